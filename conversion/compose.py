"""A new model out of two checkpoints: `python -m conversion.compose --text DEEPSEEK --vision KEYE DST`.

The decoder of DeepSeek-V3 or V3.2, with its indexer if it has one, under the vision tower of a Keye checkpoint. The
projector between them is new: until it is trained the model answers text, and pictures tell it nothing. Text keeps
one-dimensional positions, and each video frame attends to itself.

Values are copied tensor by tensor (fp8 blocks dequantised) and compared with both sources before DST appears. A run
that is stopped is continued by the same command, to the same bytes.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from modeling_keye.checkpoint_keye import Checkpoint, CheckpointError
from modeling_keye.configuration_keye import KeyeConfig
from modeling_keye.processing_keye import KeyeProcessor
from modeling_keye.weights_keye import check_scales

from .arithmetic import count_parts, equation
from .compare import TensorStream, compare, plural, short_dtype, stored_stream
from .composed_processor import TOKENS_BY_FIELD, composed_processor
from .folder import (
    data_files,
    expected_shapes,
    meta_model,
    our_generation_config,
    read_json,
    resolve,
    source_name,
    write_our_files,
)
from .fresh import fresh_stream
from .job import DTYPES, Job, run_command, run_job
from .shard_writer import parse_size, plan_shards
from .staging import fingerprint_files
from .verify import Side

TEXT_LAYOUTS = ("deepseek_v3", "deepseek_v32")
TOWER, PROJECTOR = "model.visual.", "model.projector."


@dataclass(frozen=True)
class Composition:
    """What will be written, planned from headers and small files alone.

    streams: every tensor of the new model; those of `new` come from the seed, the others from `text` or `vision`.
    notes: what differs from the sources, in sentences.
    """

    text: Side
    vision: Side
    config: KeyeConfig
    processor: KeyeProcessor | None
    generation: GenerationConfig
    streams: dict[str, TensorStream]
    new: tuple[str, ...]
    notes: list[str]


def compose(
    text: str | Path,
    vision: str | Path,
    dst: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    local_window: int | None = None,
    anchor_stride: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> dict:
    """Make the folder `dst` out of a text and a vision checkpoint, or go on with it where an earlier run was stopped.

    Args:
        text: folder or Hub repository of DeepSeek-V3 or V3.2, bf16 or fp8.
        vision: of any Keye checkpoint with a vision tower, in a published layout or in ours.
        seed: of the new projector.
        dtype: of the weights ("bfloat16", "float16" or "float32"; router corrections stay float32). None keeps what is
            stored, makes bfloat16 of fp8 blocks, and gives the projector the dtype of the decoder.
        local_window, anchor_stride: what attention keeps besides the indexer's choice. Off by default: the decoder was
            trained without.
        dry_run: print the plan and write nothing.

    Returns numbers: tensors, parameters, bytes, shards, seconds, resumed_tensors, dry_run. Raises `ValueError` (for
    weights: `CheckpointError`) or `OSError`, before anything is written wherever that is possible.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(map(repr, DTYPES))} or None.")
    size = parse_size(max_shard_size)
    text_folder, vision_folder = resolve(text), resolve(vision)
    window = {"local_window": local_window, "anchor_stride": anchor_stride}
    plan = plan_composition(text_folder, vision_folder, seed=seed, dtype=DTYPES.get(dtype), **window)
    record = {
        "format": "composed",
        "text": {**source_name(text, text_folder), "layout": plan.text.layout_name},
        "vision": {**source_name(vision, vision_folder), "layout": plan.vision.layout_name},
        "seed": seed,
        "dtype": dtype,
        "initialised": list(plan.new),
    }
    options = {"seed": seed, "dtype": dtype, "max_shard_size": size, **window}
    job = Job(
        title=f"{plan.text.layout_name} decoder of {text_folder} under the tower of {vision_folder}",
        shards=plan_shards(plan.streams.values(), size),
        fingerprint={
            **_fingerprint(plan.text, "text"),
            **_fingerprint(plan.vision, "vision"),
            **{f"--{name.replace('_', '-')}": str(value) for name, value in options.items()},
        },
        check=partial(_check_scales, plan),
        write_files=partial(_prove_and_write, plan, record, progress),
        facts=_facts(plan),
    )
    print("\n".join(job.describe()), file=sys.stderr)
    return run_job(job, dst, dry_run=dry_run, progress=progress)


def plan_composition(
    text: Path,
    vision: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    local_window: int | None = None,
    anchor_stride: int | None = None,
) -> Composition:
    """Plan every tensor and file of the new model. Raises `ValueError` for sources that do not fit together."""
    decoder, tower = Side.open("TEXT", text), Side.open("VISION", vision)
    if decoder.layout_name not in TEXT_LAYOUTS:
        raise ValueError(
            f"TEXT ({text}) has the layout {decoder.layout_name!r}; it must be a DeepSeek-V3 or V3.2 checkpoint "
            f"({' or '.join(TEXT_LAYOUTS)})."
        )
    if not tower.has_vision:
        raise ValueError(f"VISION ({vision}) has the layout {tower.layout_name!r}, which holds no vision tower.")
    config, notes = composed_config(decoder.config, tower.config, local_window, anchor_stride)
    processor = composed_processor(text, decoder.layout, config, notes)
    streams = decoder.our_streams(dtype=dtype)
    streams.update(tower.our_streams(part=TOWER, dtype=dtype))
    config.dtype = streams["lm_head.weight"].dtype
    model = meta_model(config)
    expected = expected_shapes(model)
    new = tuple(name for name in expected if name.startswith(PROJECTOR))
    streams.update({name: fresh_stream(model, name, config.dtype, seed) for name in new})
    for name, shape in expected.items():
        found = streams[name].shape if name in streams else None
        if found != shape:
            raise CheckpointError(f"{name} has the shape {found} in its source, but the new model needs {shape}.")
    raw = read_json(text / "generation_config.json")
    generation = _generation(config, processor, raw)
    return Composition(
        decoder, tower, config, processor, generation, {name: streams[name] for name in expected}, new, notes
    )


def composed_config(
    text: KeyeConfig, vision: KeyeConfig, local_window: int | None = None, anchor_stride: int | None = None
) -> tuple[KeyeConfig, list[str]]:
    """The configuration of the new model, and in sentences what in it is not as in the sources."""
    text_part, vision_part = text.text_config.to_dict(), vision.vision_config.to_dict()
    notes = []
    for name, wanted in (("projector_norm", "post_merge"), ("video_attention", "frame")):
        if vision_part[name] != wanted:
            notes.append(f"`{name}` is {wanted!r}; VISION has {vision_part[name]!r}.")
        vision_part[name] = wanted
    if local_window is not None or anchor_stride is not None:
        notes.append("The decoder was trained without a local window and without anchors.")
    text_part.update(local_window=local_window, anchor_stride=anchor_stride)
    # Which layers select follows from the settings above.
    del text_part["layer_types"]
    config = KeyeConfig(
        vision_config=vision_part,
        text_config=text_part,
        video_position_ids="frame",
        **{name: getattr(text, name) for name in TOKENS_BY_FIELD},
    )
    return config, notes


def _generation(config: KeyeConfig, processor: KeyeProcessor | None, raw: dict | None) -> GenerationConfig:
    """TEXT's settings; a turn also ends where the chat template ends one."""
    settings = dict(raw or {})
    if processor is not None:
        tokenizer = processor.tokenizer
        ends = settings.get("eos_token_id", config.text_config.eos_token_id)
        ends = ends if isinstance(ends, list) else [ends]
        if "<|im_end|>" in processor.chat_template:
            ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), *ends]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        settings["pad_token_id"] = tokenizer.pad_token_id
    return our_generation_config(config, settings)


def _facts(plan: Composition) -> dict[str, str]:
    text, vision = plan.config.text_config, plan.config.vision_config
    merged = vision.hidden_size * vision.spatial_merge_size**2
    kinds = {"text": plan.text, "vision": plan.vision}
    facts = {
        label: f"{side.layout_name}, {plural(_count(plan, label), 'tensor')}"
        + f", fp8 blocks become {short_dtype(plan.config.dtype)}" * side.is_fp8
        for label, side in kinds.items()
    }
    facts["new"] = (
        f"projector {merged} -> {text.hidden_size}, {plural(len(plan.new), 'tensor')} in "
        f"{short_dtype(plan.config.dtype)}, not trained"
    )
    facts["attention"] = (
        f"indexer {text.indexer_type}, local window {text.local_window}, anchor stride {text.anchor_stride}"
    )
    facts["ids"] = ", ".join(f"{token} {getattr(plan.config, name)}" for name, token in TOKENS_BY_FIELD.items())
    facts.update({f"note {number}": note for number, note in enumerate(plan.notes, start=1)})
    return facts


def _origin(plan: Composition, name: str) -> str:
    return "new" if name in plan.new else "vision" if name.startswith(TOWER) else "text"


def _count(plan: Composition, origin: str) -> int:
    return sum(_origin(plan, name) == origin for name in plan.streams)


def _fingerprint(side: Side, label: str) -> dict[str, str]:
    return fingerprint_files([*data_files(side.folder), *side.stored.files], label)


def _check_scales(plan: Composition) -> None:
    for side in (plan.text, plan.vision):
        if side.layout is not None:
            check_scales(side.stored)


def _prove_and_write(plan: Composition, record: dict, progress: bool, output: Path) -> None:
    """The last step in the folder that is not yet DST: proof, then every file that is no weight."""
    total = sum(stream.nbytes for stream in plan.streams.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress) as bar:
        lines = prove(plan, Checkpoint.open(output), bar.update)
    print("\n".join(lines), file=sys.stderr)
    write_our_files(output, plan.config, plan.processor, plan.generation, record)


def prove(plan: Composition, stored: Checkpoint, progress: Callable[[int], object] = lambda count: None) -> list[str]:
    """Compare written weights with their sources bit by bit, and their number with the configuration.

    Returns the proof in lines. Raises `OSError` at the first difference.
    """
    found = {origin: [0, 0] for origin in ("text", "vision", "new")}
    for name, stream in plan.streams.items():
        for difference in compare(stream, stored_stream(name, stored, stored[name]), progress):
            raise OSError(f"what was written (B) is not what its source holds (A): {difference}.")
        counts = found[_origin(plan, name)]
        counts[0] += 1
        counts[1] += stream.numel
    parts = count_parts(expected_shapes(meta_model(plan.config)))
    text, closes = equation("parameters", sum(math.prod(entry.shape) for entry in stored.values()), parts)
    if not closes:
        raise OSError(f"{text}.")
    sources = {"text": plan.text.folder, "vision": plan.vision.folder, "new": "the initialisation with this seed"}
    proofs = [
        f"verified: {origin}, {plural(tensors, 'tensor')}, {values:,} values, bit for bit equal to {sources[origin]}"
        for origin, (tensors, values) in found.items()
    ]
    return [*proofs, text]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.compose",
        description="Put a DeepSeek-V3.2 or V3 decoder under a Keye vision tower. A stopped run is continued.",
    )
    parser.add_argument("--text", required=True, metavar="DEEPSEEK", help="folder or Hub repository, bf16 or fp8")
    parser.add_argument("--vision", required=True, metavar="KEYE", help="folder or Hub repository, published or ours")
    parser.add_argument("dst", metavar="DST", help="folder to make; the work is done in DST.partial")
    parser.add_argument("--seed", type=int, default=0, help="of the new projector (default: 0)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as stored, bfloat16 for fp8")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--local-window", type=int, metavar="N", help="always keep the N tokens before each query, too")
    parser.add_argument("--anchor-stride", type=int, metavar="N", help="always keep every N-th token, too")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 done, 1 refused or failed (a sentence on stderr says why), 130 interrupted."""
    options = vars(build_parser().parse_args(arguments))
    return run_command(partial(compose, **options))


if __name__ == "__main__":
    sys.exit(main())
