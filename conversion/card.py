"""The model card of a checkpoint folder, made of facts: `python -m conversion.card FOLDER [--write] [--license L]`.

Every figure is read from the folder (configuration, headers of the weights, conversion.json, file sizes) or from
reports of the commands that verified it, given with --evidence: `conversion.verify A B --json`,
`conversion.publish --json FILE`, `training.evaluate`, or a JSON object {"what", "result", "command", "covers": [...]}.
What no report covers is listed as not verified. A card that is there keeps its metadata, its introduction and its own
sections; the sections that this command writes are made anew, so run it with all the evidence each time.

Exit codes: 0 done, 2 there are no such facts (one sentence on stderr says what is missing or contradicts the folder).
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_keye.checkpoint_keye import Checkpoint, CheckpointError
from modeling_keye.configuration_keye import INDEXED_LAYER_TYPE, KeyeConfig

from .arithmetic import count_parts
from .card_evidence import CLAIMS, PIPELINE_TAG, CardError, read_evidence
from .folder import RECORD, read_json
from .publish_checks import PROCESSOR_FILES, human, list_files

DONE, IMPOSSIBLE = 0, 2

TAGS = ("custom_code", "keye", "video-question-answering")
INTRODUCTION = (
    "A checkpoint of `KeyeForVideoQA` for Hugging Face Transformers, with its code: questions about videos, answered "
    "with `trust_remote_code=True`."
)
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ introduction }}

## Use

```python
from transformers import AutoModel, AutoProcessor

name = "{{ title }}"  # the repository or the folder
model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype="auto")
{%- if has_processor %}
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
content = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What happens?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
{%- endif %}
```

## Facts

| | |
|---|---|
{%- for name, text in facts.items() %}
| {{ name }} | {{ text }} |
{%- endfor %}

| Part | Parameters |
|---|---|
{%- for name, count in parts.items() %}
| {{ name }} | {{ "{:,}".format(count) }} |
{%- endfor %}

## Files

| File | Size |
|---|---|
{%- for name, size in files.items() %}
| {{ name }} | {{ size }} |
{%- endfor %}

## Verified

{% if rows -%}
| What | Result | Command |
|---|---|---|
{%- for row in rows %}
| {{ row.what }} | {{ row.result }} | {{ row.command }} |
{%- endfor %}
{%- else -%}
Nothing yet.
{%- endif %}

## Not verified
{% for claim in open_claims %}
- {{ claim }}
{%- endfor %}
{%- if own_sections %}

{{ own_sections }}
{%- endif %}
"""
OWN_HEADINGS = ("Use", "Facts", "Files", "Verified", "Not verified")


def make_card(
    folder: str | Path,
    license: str | None = None,
    base_models: Sequence[str] = (),
    evidence: Iterable[str | Path] = (),
) -> ModelCard:
    """The card of `folder`, out of its facts and of report files.

    Args:
        license: default that of the card which is there.
        base_models: default those of conversion.json or of the card which is there.

    Raises `CardError`, or `CheckpointError` for weights that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CardError(f"there is no folder {folder}")
    raw = read_json(folder / "config.json")
    if raw is None or raw.get("model_type") != KeyeConfig.model_type:
        raise CardError(
            f"{folder} is no checkpoint in our layout; convert it first: python -m conversion.convert SRC DST"
        )
    config, stored = KeyeConfig.from_pretrained(folder), Checkpoint.open(folder)
    record = read_json(folder / RECORD)
    old = read_card(folder / "README.md")
    proofs = [read_evidence(Path(path), folder, stored) for path in evidence]
    parts = count_parts({name: tuple(tensor.shape) for name, tensor in stored.items()})

    covered = set().union(*(proof.covers for proof in proofs))
    if record is None:
        # Without a source there is nothing that the weights could be equal to.
        covered.add("weights")
    context = config.text_config.max_position_embeddings
    return ModelCard.from_template(
        card_data(old, folder, license, base_models, record, [r for proof in proofs for r in proof.results]),
        template_str=TEMPLATE,
        title=old.title or folder.resolve().name,
        introduction=old.introduction or INTRODUCTION,
        has_processor=any((folder / name).exists() for name in PROCESSOR_FILES),
        facts=collect_facts(config, raw, stored, record),
        parts=parts,
        files=file_table(folder),
        rows=[row for proof in proofs for row in proof.rows],
        open_claims=[text.format(context=context) for name, text in CLAIMS.items() if name not in covered],
        own_sections=old.own_sections,
    )


@dataclass
class OldCard:
    """What a card that is there contributes to the new one."""

    data: dict = field(default_factory=dict)
    title: str = ""
    introduction: str = ""
    own_sections: str = ""


def read_card(path: Path) -> OldCard:
    """Metadata, title, introduction, and the sections that are not written by this command."""
    if not path.exists():
        return OldCard()
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"the metadata of {path} cannot be read: {' '.join(str(error).split())}") from error
    head, *sections = _split_sections(card.text)
    found = re.match(r"\s*# +(.+)\n?", head)
    own = [section for section in sections if _heading(section) not in OWN_HEADINGS]
    return OldCard(
        data={name: value for name, value in card.data.to_dict().items() if name != "model-index"},
        title=found.group(1).strip() if found else "",
        introduction=(head[found.end() :] if found else head).strip(),
        own_sections="\n\n".join(section.strip() for section in own),
    )


def card_data(
    old: OldCard,
    folder: Path,
    license: str | None,
    base_models: Sequence[str],
    record: dict | None,
    results: list[EvalResult],
) -> ModelCardData:
    """Metadata: what the old card says, and what is always true of these folders."""
    data = dict(old.data)
    license = license or data.get("license")
    if not license:
        raise CardError("no license is known; pass --license with an identifier of the Hub, for example apache-2.0")
    models = list(base_models) or _hub_sources(record) or data.pop("base_model", None)
    data |= {"library_name": "transformers", "license": license}
    data.setdefault("pipeline_tag", PIPELINE_TAG)
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or ()), *TAGS]))
    if models:
        data["base_model"] = models[0] if isinstance(models, list) and len(models) == 1 else models
    if results:
        data |= {"eval_results": results, "model_name": old.title or folder.resolve().name}
    return ModelCardData(**data)


def collect_facts(config: KeyeConfig, raw: dict, stored: Checkpoint, record: dict | None) -> dict[str, str]:
    """Lines of the table, read from configuration, headers and conversion.json."""
    text, vision = config.text_config, config.vision_config
    sizes = {name: math.prod(tensor.shape) for name, tensor in stored.items()}
    buffers = sum(size for name, size in sizes.items() if name.endswith("e_score_correction_bias"))
    facts = {"Source": _source(record)}
    facts["Parameters"] = f"{sum(sizes.values()) - buffers:,}"
    if (active := _active(stored, config)) is not None:
        facts["Parameters per text token"] = (
            f"{active:,}: decoder, embedding and head, with {text.num_experts_per_tok} of {text.n_routed_experts} "
            "routed experts per layer"
        )
    kind = {
        "mla": f"multi-head latent attention, {text.num_attention_heads} heads, "
        f"latent {text.kv_lora_rank} + {text.qk_rope_head_dim}",
        "gqa": f"grouped-query attention, {text.num_attention_heads} heads over {text.num_key_value_heads}",
    }[text.attention_type]
    layers = f"{text.num_hidden_layers} layers of width {text.hidden_size}, {kind}"
    if sparse := text.mlp_layer_types.count("sparse"):
        layers += f", experts in {sparse} layers"
    facts["Decoder"] = layers
    facts["Selection"] = _selection(text)
    facts["Context"] = (
        f"{text.max_position_embeddings:,} tokens (`max_position_embeddings`), vocabulary {text.vocab_size:,}"
    )
    facts["Vision tower"] = (
        f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, patches of {vision.patch_size} pixels, "
        f"{vision.spatial_merge_size} x {vision.spatial_merge_size} patches per token"
    )
    numbers = Counter()
    for name, tensor in stored.items():
        numbers[str(tensor.dtype).removeprefix("torch.")] += sizes[name]
    facts["Stored as"] = ", ".join(f"{dtype} ({count:,} numbers)" for dtype, count in numbers.most_common())
    if version := raw.get("transformers_version"):
        facts["Written with"] = f"transformers {version}"
    return facts


def file_table(folder: Path) -> dict[str, str]:
    """Sizes by name; code files in one line, and not the card itself."""
    names = [name for name in list_files(folder) if name != "README.md"]
    sizes = {name: (folder / name).stat().st_size for name in names}
    code = [name for name in names if name.endswith(".py")]
    table = {f"`{name}`": human(size) for name, size in sizes.items() if name not in code}
    if code:
        table[f"{len(code)} code files (`*.py`)"] = human(sum(sizes[name] for name in code))
    return table


def _source(record: dict | None) -> str:
    if record is None:
        return "no record of a conversion in the folder"
    if record.get("format") == "composed":
        text, vision = (_named(record[part]) for part in ("text", "vision"))
        return f"decoder of {text} under the tower of {vision}{_initialised(record)}"
    architectures = ", ".join((record.get("published_config") or {}).get("architectures") or ())
    source = f"{_named({**(record.get('source') or {}), 'layout': record.get('layout')})}"
    if architectures:
        source += f", published as {architectures}"
    if block := record.get("fp8_block"):
        source += f", in fp8 blocks of {block[0]} x {block[1]}"
    if dropped := record.get("dropped"):
        source += f"; {_count(dropped)} without use left out (`{dropped[0]}`" + (", ...)" if dropped[1:] else ")")
    return source + _initialised(record)


def _count(tensors: Sequence[str]) -> str:
    return f"{len(tensors):,} tensor" + ("" if len(tensors) == 1 else "s")


def _named(source: dict) -> str:
    name = source.get("name") or "an unnamed folder"
    revision = f" at {source['revision'][:12]}" if source.get("revision") else ""
    return f"{name}{revision} (layout {source['layout']})"


def _initialised(record: dict) -> str:
    new = record.get("initialised") or ()
    return f"; {_count(new)} newly initialised, not trained (`{new[0]}`" + (", ...)" if new[1:] else ")") if new else ""


def _hub_sources(record: dict | None) -> list[str]:
    """Names of Hub repositories that the weights came from."""
    sources = [(record or {}).get(part) or {} for part in ("source", "text", "vision")]
    return [source["name"] for source in sources if source.get("revision")]


def _active(stored: Checkpoint, config: KeyeConfig) -> int | None:
    """Parameters that one text token passes; None without experts."""
    text, active, experts = config.text_config, 0, False
    for name, tensor in stored.items():
        if not name.startswith(("model.language_model.", "lm_head.")) or name.endswith("e_score_correction_bias"):
            continue
        size = math.prod(tensor.shape)
        if ".mlp.experts." in name:
            experts = True
            size = size // tensor.shape[0] * text.num_experts_per_tok
        active += size
    return active if experts else None


def _selection(text) -> str:
    if not text.has_selection:
        return "none, every token attends to all before it"
    parts = []
    if text.indexer_type is not None:
        parts.append(f"top {text.index_topk:,} tokens of the {text.indexer_type} indexer")
    if text.local_window is not None:
        parts.append(f"the {text.local_window:,} tokens before")
    if text.anchor_stride is not None:
        parts.append(f"every {text.anchor_stride:,}-th token")
    layers = text.layer_types.count(INDEXED_LAYER_TYPE)
    described = f"{', '.join(parts)}; in {layers} of {len(text.layer_types)} layers"
    if text.indexer_type is not None and text.index_topk >= text.max_position_embeddings:
        described += "; that is the whole context, so attention is dense"
    return described


def _split_sections(text: str) -> list[str]:
    """A card cut before each second-level heading that stands outside code."""
    sections, fenced = [[]], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if line.startswith("## ") and not fenced:
            sections.append([])
        sections[-1].append(line)
    return ["\n".join(lines) for lines in sections]


def _heading(section: str) -> str:
    return section.splitlines()[0].removeprefix("## ").strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.card", description="Write the model card of a checkpoint folder from facts only."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint folder in our layout")
    parser.add_argument("--write", action="store_true", help="write FOLDER/README.md instead of printing the card")
    parser.add_argument("--license", help="identifier of the Hub (default: that of the card which is there)")
    parser.add_argument("--base-model", action="append", default=[], metavar="REPO", help="may be given twice")
    parser.add_argument("--evidence", nargs="+", default=[], metavar="FILE.json", help="reports of what was verified")
    args = parser.parse_args(argv)
    try:
        card = make_card(args.folder, args.license, args.base_model, args.evidence)
    except (CardError, CheckpointError, ValueError, OSError) as error:
        print(f"card: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return IMPOSSIBLE
    if args.write:
        path = Path(args.folder) / "README.md"
        path.write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
        print(path)
    else:
        print(card)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
