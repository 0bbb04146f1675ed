"""Published Keye and DeepSeek-V3 checkpoints to ours, and back: `python -m conversion.convert SRC DST`.

Tensors are streamed in pieces, so memory does not grow with the checkpoint. A run that is stopped at any moment is
continued by the same command, to the same bytes. DST appears when it is complete; until then the work is in
DST.partial. What a folder of ours must know for the way back stands in its conversion.json and, for fp8 blocks, in
fp8_scales.safetensors; the way back is bit for bit.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from modeling_keye import KeyeConfig, KeyeForVideoQA, KeyeProcessor
from modeling_keye.checkpoint_keye import Checkpoint, listed
from modeling_keye.layouts_keye import FP8_BLOCK, LAYOUTS, Layout, detect_layout, fp8_block
from modeling_keye.published_config_keye import our_config
from modeling_keye.weights_keye import (
    FP8,
    SCALE_SUFFIX,
    canonical_name,
    check_scales,
    dropped_names,
    is_vision,
    plan_loading,
    plan_publishing,
)

from .compare import TensorStream, compare, recipe_stream, stored_stream
from .folder import (
    RECORD,
    SCALES_FILE,
    config_dict,
    data_files,
    expected_shapes,
    has_tokenizer,
    kept_files,
    load_processor,
    meta_model,
    our_generation_config,
    read_json,
    read_record,
    resolve,
    source_name,
    write_our_files,
    write_published_files,
)
from .fresh import fresh_stream
from .job import DTYPES, Job, run_command, run_job
from .published_config import published_config
from .published_settings import changed_generation, lost_settings, processor_texts
from .shard_writer import make_shard, parse_size, plan_shards
from .staging import fingerprint_files

_EMBEDDING = "model.language_model.embed_tokens.weight"
# Keys of a published config.json that may differ from conversion.json: they say nothing about the weights' meaning.
_INCIDENTAL = {"torch_dtype", "use_cache", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"}


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "ours",
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    layout: str | None = None,
    drop_vision: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> dict:
    """Make the folder `dst` out of the checkpoint `src`, or go on with it where an earlier run was stopped.

    Args:
        src: folder, or repository of the Hub.
        to: "ours" for a published checkpoint; "published" for one of ours.
        dtype: of the weights ("bfloat16", "float16" or "float32"); None keeps what is stored, fp8 blocks excepted,
            which become bfloat16 and, on the way back, fp8 again. float16 cannot hold them, so they come back as that.
        layout: for "published": write this layout, with a configuration of its own, instead of what conversion.json
            has kept.
        drop_vision: for "published": a layout without vision may lose a tower and a projector that have been trained.
        dry_run: print the plan and write nothing.

    Returns numbers: tensors, parameters, bytes, shards, seconds, resumed_tensors, dry_run. Raises `ValueError` (for
    weights: `CheckpointError`) or `OSError`, before anything is written wherever that is possible.
    """
    for name, value, known in (("to", to, ("ours", "published")), ("dtype", dtype, (None, *DTYPES))):
        if value not in known:
            raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, known))}.")
    size = parse_size(max_shard_size)
    folder = resolve(src)
    if to == "ours":
        if layout is not None:
            raise ValueError("`layout` is for the way back; a published checkpoint says itself which layout it has.")
        if drop_vision:
            raise ValueError("`drop_vision` is for the way back; nothing of a published tower is dropped.")
        job = _plan_ours(folder, source_name(src, folder), dtype, size)
    else:
        job = _plan_published(folder, dtype, size, layout, drop_vision)
    print("\n".join(job.describe()), file=sys.stderr)
    return run_job(job, dst, dry_run=dry_run, progress=progress)


def _plan_ours(folder: Path, source: dict, dtype: str | None, max_shard_size: int) -> Job:
    raw = _raw_config(folder)
    layout = detect_layout(raw)
    if layout is None:
        raise ValueError(f"{folder} is a checkpoint in our layout already; `--to published` is the way back.")
    checkpoint = Checkpoint.open(folder)
    config = KeyeConfig.from_pretrained(folder)
    model = meta_model(config)
    expected = expected_shapes(model)
    unfused = _unfused_experts(layout, checkpoint, folder)
    block = fp8_block(raw)
    layers = config.text_config.num_hidden_layers
    recipes = plan_loading(
        layout,
        checkpoint,
        expected,
        num_hidden_layers=layers,
        optional=is_vision if not layout.has_vision else lambda name: False,
        block=block,
        dtype=DTYPES.get(dtype),
        # float16 has too few exponents for fp8 blocks, so nobody asks for them back.
        prove_fp8=dtype != "float16",
    )
    config.dtype = recipes[_EMBEDDING].dtype
    new = [name for name in expected if name not in recipes]
    streams = [
        recipe_stream(recipes[name], checkpoint) if name in recipes else fresh_stream(model, name, config.dtype)
        for name in expected
    ]
    dropped = dropped_names(layout, checkpoint, layers)
    scales = _scale_streams(layout, checkpoint, set(dropped))
    has_fp8, scales = bool(scales), [] if dtype == "float16" else scales
    generation = read_json(folder / "generation_config.json")
    record = {
        "format": 1,
        "source": source,
        "layout": layout.name,
        "unfused_experts": unfused,
        "fp8_block": list(block) if scales else None,
        "dtype": dtype,
        "dropped": dropped,
        "initialised": new,
        "published_config": _without("_name_or_path", raw),  # somebody's local path
        "published_generation_config": generation,
        "published_files": kept_files(folder),
    }
    # Whatever these refuse is refused now, not after hours of writing.
    processor = load_processor(folder) if layout.has_vision else None
    our_generation = our_generation_config(config, generation)

    facts = {"source": f"{len(checkpoint)} tensors in {len(checkpoint.files)} file(s)"}
    facts["dropped"] = listed(dropped) or "nothing"
    if new:
        facts["newly initialised"] = f"{len(new)} tensors of vision tower and projector, which {layout.name} lacks"
    if scales:
        facts["fp8"] = f"blocks of {block[0]} x {block[1]} become {config.dtype}; {SCALES_FILE} keeps their scales"
    elif has_fp8:
        facts["fp8"] = "blocks become float16, which cannot hold them exactly: the way back is float16, too"
    facts["files"] = "config, generation config, remote code, conversion.json, "
    if processor is not None:
        facts["files"] += "tokenizer and processor"
    elif has_tokenizer(folder):
        facts["files"] += "tokenizer; a text checkpoint has no processor"
    else:
        facts["files"] += "but no processor, because SRC holds no tokenizer"
    return Job(
        title=f"{folder}: {layout.name} -> ours",
        shards=plan_shards(streams, max_shard_size),
        side_shards=[make_shard(SCALES_FILE, scales)] if scales else [],
        fingerprint=_fingerprint(folder, checkpoint.files, to="ours", dtype=dtype, max_shard_size=max_shard_size),
        check=partial(check_scales, checkpoint),
        write_files=lambda output: write_our_files(output, config, processor, our_generation, record, folder),
        facts=facts,
    )


@dataclass(frozen=True)
class _Published:
    """What a folder of ours is published as. `source` holds the weights and, for fp8, the scales."""

    layout: Layout
    config: dict
    generation: dict | None
    source: Checkpoint
    kept: dict[str, str] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    unfused_experts: bool = False
    block: tuple[int, int] = FP8_BLOCK
    facts: dict[str, str] = field(default_factory=dict)


def _plan_published(
    folder: Path, dtype: str | None, max_shard_size: int, layout_name: str | None, drop_vision: bool
) -> Job:
    if (found := detect_layout(_raw_config(folder))) is not None:
        raise ValueError(f"{folder} is published already, as {found.name}; `--to ours` is the other way.")
    checkpoint = Checkpoint.open(folder)
    config = KeyeConfig.from_pretrained(folder)
    model = meta_model(config)
    _check_ours(checkpoint, expected_shapes(model), folder)
    if layout_name is None:
        published = _as_recorded(folder, checkpoint, config, dtype)
    else:
        published = _as_named(folder, checkpoint, config, layout_name)
    layout, source = published.layout, published.source
    lost = [] if layout.has_vision else [name for name in checkpoint if is_vision(name)]
    if lost and not drop_vision:
        _refuse_lost_vision(lost, _initialised(folder), layout)
    raw = published.config
    if dtype is not None:
        raw = _without("quantization_config", raw)
        raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    recipes = plan_publishing(
        layout,
        source,
        unfused_experts=published.unfused_experts,
        block=published.block,
        dtype=DTYPES.get(dtype),
    )
    streams = [recipe_stream(recipe, source) for recipe in recipes.values()]

    facts = {"source": f"{len(source)} tensors in {len(source.files)} file(s)"}
    facts["config.json"] = "as it was published" if layout_name is None else f"written for {layout.name} out of ours"
    facts["left out"] = listed([*published.dropped, *lost]) or "nothing"
    if any(stream.dtype == FP8 for stream in streams):
        facts["fp8"] = f"blocks of {published.block[0]} x {published.block[1]} with the published scales"
    elif (folder / SCALES_FILE).is_file():
        facts["fp8"] = f"left behind: weights are written as they are stored or as --dtype, {SCALES_FILE} is not used"
    facts.update(published.facts)
    names = ["tokenizer"] * has_tokenizer(folder) + ["config.json", "generation_config.json", *published.kept]
    facts["files"] = ", ".join(names)
    if code := (raw.get("auto_map") or {}).get("AutoModel"):
        facts["code"] = f"config.json names {code}; its files are not ours to write, take them from the publisher"

    def check() -> None:
        check_scales(source)
        if not drop_vision:
            _refuse_trained_vision(lost, checkpoint, model, layout)

    return Job(
        title=f"{folder}: ours -> {layout.name}",
        shards=plan_shards(streams, max_shard_size),
        fingerprint=_fingerprint(
            folder,
            source.files,
            to="published",
            dtype=dtype,
            max_shard_size=max_shard_size,
            layout=layout_name,
            drop_vision=drop_vision,
        ),
        check=check,
        write_files=lambda output: write_published_files(output, folder, raw, published.generation, published.kept),
        facts=facts,
    )


def _as_named(folder: Path, checkpoint: Checkpoint, config: KeyeConfig, name: str) -> _Published:
    """The layout of this name, with a configuration for what ours says now."""
    if name not in LAYOUTS:
        raise ValueError(f"`layout` is {name!r}; it must be one of {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    generation = read_json(folder / "generation_config.json")
    raw, kept, facts = published_config(config_dict(config), layout), {}, {}
    processor = _our_processor(folder) if layout.has_vision else None
    if processor is not None:
        kept = processor_texts(processor, layout)
        if lost := lost_settings(folder, processor, raw, kept):
            facts["warning"] = f"{layout.name} has no place for {', '.join(lost)}"
    return _Published(layout, raw, generation, checkpoint, kept, facts=facts)


def _as_recorded(folder: Path, checkpoint: Checkpoint, config: KeyeConfig, dtype: str | None) -> _Published:
    """What conversion.json has kept. With another `dtype`, fp8 is left behind."""
    record = read_record(folder)
    if record is None:
        raise ValueError(
            f"{folder} has no conversion.json, which would say how it was published; name the layout to write with "
            f"--layout: {', '.join(LAYOUTS)}."
        )
    layout, raw, source = LAYOUTS[record["layout"]], dict(record["published_config"]), checkpoint
    _refuse_changed_config(config, checkpoint, raw, layout, folder)
    if record["dtype"] is not None:
        raw["dtype" if "dtype" in raw else "torch_dtype"] = record["dtype"]
    if record["dtype"] == "float16":
        raw = _without("quantization_config", raw)
    if record["fp8_block"] and dtype is None:
        if not (folder / SCALES_FILE).is_file():
            raise ValueError(
                f"{folder} lacks {SCALES_FILE}, without which fp8 blocks cannot be made again; give --dtype to write "
                "them unquantised."
            )
        source = checkpoint.merged(Checkpoint.open(folder / SCALES_FILE))
    generation = record["published_generation_config"]
    undone = changed_generation(folder, config, generation)
    processor = _our_processor(folder) if layout.has_vision else None
    if processor is not None:
        undone = lost_settings(folder, processor, raw, record["published_files"]) + undone
    return _Published(
        layout,
        raw,
        generation,
        source,
        kept=record["published_files"],
        dropped=record["dropped"],
        unfused_experts=record["unfused_experts"],
        block=tuple(record["fp8_block"] or FP8_BLOCK),
        facts={"warning": f"edited since the conversion, put back as published: {', '.join(undone)}"} if undone else {},
    )


def _our_processor(folder: Path) -> KeyeProcessor | None:
    return load_processor(folder) if (folder / "processor_config.json").is_file() else None


def _raw_config(folder: Path) -> dict:
    raw = read_json(folder / "config.json")
    if raw is None:
        raise ValueError(f"{folder} holds no config.json, which says what its weights are.")
    return raw


def _without(key: str, raw: dict) -> dict:
    """A published configuration without `key`, wherever it stands."""
    return {name: _without(key, v) if isinstance(v, dict) else v for name, v in raw.items() if name != key}


def _unfused_experts(layout: Layout, checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether experts are stored one by one. Raises `ValueError` where some are and some are not."""
    names = [canonical_name(layout, name) for name in checkpoint]
    unfused = [name for name in names if name.endswith(".experts.0.gate_proj.weight")]
    fused = [name for name in names if name.endswith(".experts.gate_up_proj")]
    if unfused and fused:
        raise ValueError(
            f"{folder} stores some experts as one tensor ({fused[0]}) and some one by one ({unfused[0]}); the way back "
            "knows one form for all. Save the checkpoint in one of them first."
        )
    return bool(unfused)


def _initialised(folder: Path) -> list[str]:
    """Tensors that a conversion to this folder has made anew."""
    record = read_json(folder / RECORD) or {}
    return record.get("initialised") or [] if record.get("format") == 1 else []


def _refuse_lost_vision(names: Sequence[str], initialised: Sequence[str], layout: Layout) -> None:
    """A layout without vision may only lose what its own conversion has added."""
    if kept := sorted(set(names) - set(initialised)):
        raise ValueError(
            f"{layout.name} has no vision: {len(names)} tensors of tower and projector would be lost, and not all of "
            f"them are new ({listed(kept)}). Choose a layout with vision, or give --drop-vision to lose them."
        )


def _refuse_trained_vision(names: Sequence[str], checkpoint: Checkpoint, model: KeyeForVideoQA, layout: Layout) -> None:
    """What the conversion has added is worth nothing as long as it still has its first values."""
    trained = [
        name
        for name in names
        if compare(fresh_stream(model, name, checkpoint[name].dtype), stored_stream(name, checkpoint, checkpoint[name]))
    ]
    if trained:
        raise ValueError(
            f"{layout.name} has no vision: the tower and projector of this folder have been changed since they were "
            f"new ({listed(trained)}), and would be lost. Choose a layout with vision, or give --drop-vision to lose "
            "them."
        )


def _scale_streams(layout: Layout, checkpoint: Checkpoint, dropped: set[str]) -> list[TensorStream]:
    names = {name: canonical_name(layout, name) for name in checkpoint if name.endswith(SCALE_SUFFIX)}
    return [
        stored_stream(canonical, checkpoint, checkpoint[name])
        for name, canonical in names.items()
        if name not in dropped
    ]


def _check_ours(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise `ValueError` unless the weights are those that config.json asks for."""
    problems = [f"missing: {name}" for name in expected if name not in checkpoint]
    problems += [f"unknown: {name}" for name in checkpoint if name not in expected]
    problems += [
        f"shape: {name} is {list(entry.shape)} instead of {list(expected[name])}"
        for name, entry in checkpoint.items()
        if name in expected and entry.shape != expected[name]
    ]
    if problems:
        raise ValueError(f"the weights of {folder} do not fit its config.json: {listed(problems)}.")


def _refuse_changed_config(
    config: KeyeConfig, checkpoint: Checkpoint, published: dict, layout: Layout, folder: Path
) -> None:
    """What was published may be restored only while it describes the same computation."""
    then = published_config(config_dict(KeyeConfig(**our_config(published))), layout)
    now = published_config(config_dict(config), layout)
    if not any(".indexer." in name for name in checkpoint):
        # Published configurations speak of an indexer also where the weights hold none.
        then.pop("sa_config", None)
    changed = [name for name in {**then, **now} if name not in _INCIDENTAL and then.get(name) != now.get(name)]
    if changed:
        changes = [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in changed]
        raise ValueError(
            f"config.json of {folder} has changed since it was converted: {listed(changes)}. Give --layout "
            f"{layout.name} to write a configuration for what it says now."
        )


def _fingerprint(folder: Path, weights: Sequence[Path], **options) -> dict[str, str]:
    return {
        **fingerprint_files([*data_files(folder), *weights], "source"),
        **{f"--{name.replace('_', '-')}": str(value) for name, value in options.items()},
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert",
        description="Convert a published Keye or DeepSeek-V3 checkpoint to ours, or back. A stopped run is continued.",
    )
    parser.add_argument("src", metavar="SRC", help="checkpoint folder, or OWNER/NAME on the Hub")
    parser.add_argument("dst", metavar="DST", help="folder to make; the work is done in DST.partial")
    parser.add_argument("--to", choices=("ours", "published"), default="ours", help="default: ours")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as stored, bfloat16 for fp8")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument(
        "--layout", choices=tuple(LAYOUTS), help="with --to published: this layout instead of what conversion.json kept"
    )
    parser.add_argument(
        "--drop-vision",
        action="store_true",
        help="with --to published: lose a trained tower in a layout without vision",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    call: Callable[[], dict] = partial(
        convert,
        options.src,
        options.dst,
        to=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        layout=options.layout,
        drop_vision=options.drop_vision,
        dry_run=options.dry_run,
    )
    return run_command(call)


if __name__ == "__main__":
    sys.exit(main())
