"""Proof that two checkpoint folders hold the same model: `python -m conversion.verify A B`.

Either folder may be in a published layout or in ours. Folders of one layout are compared under their own names; mixed
ones in our layout, with the same recipes that loading uses. A published folder in fp8 blocks is also compared the other
way: ours, quantised again with the kept scales, must be the published bytes.

The report lists differences in tensors, the parameter arithmetic of both folders, the configurations and the files
beside them. Exit codes: 0 equal, 1 different, 2 they cannot be compared (one sentence on stderr says why).
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from modeling_keye.checkpoint_keye import Checkpoint, CheckpointError, StoredTensor
from modeling_keye.configuration_keye import KeyeConfig
from modeling_keye.layouts_keye import Layout, detect_layout, fp8_block
from modeling_keye.weights_keye import (
    SCALE_SUFFIX,
    Recipe,
    canonical_name,
    check_scales,
    is_vision,
    plan_loading,
    plan_publishing,
)

from .arithmetic import count_groups, count_parts, equation, text_tensors
from .compare import Difference, TensorStream, compare, plural, recipe_stream, short_dtype, stored_stream
from .folder import SCALES_FILE, expected_shapes, meta_model, read_json, resolve

EQUAL, DIFFERENT, NOT_COMPARABLE = 0, 1, 2
LISTED = 20
WAY_BACK = "way back: "

# Fields that say nothing about what the weights compute.
_INCIDENTAL_FIELDS = {
    "_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "initializer_range",
    "use_cache", "output_router_logits", "prefill_chunk_tokens", "encode_chunk_patches",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip


class NotComparableError(ValueError):
    """One of the folders is no usable checkpoint; the message names it and says why."""


@dataclass
class Side:
    """One of the two folders: what it says it is, and what it stores."""

    label: str
    folder: Path
    raw: dict
    layout: Layout | None
    stored: Checkpoint
    config: KeyeConfig
    scales: Checkpoint | None

    @classmethod
    def open(cls, label: str, folder: str | Path) -> "Side":
        """Read configuration and headers. Raises `NotComparableError`."""
        with _blaming(label, folder):
            folder = resolve(folder)
            raw = read_json(folder / "config.json")
            if raw is None:
                raise CheckpointError("it holds no config.json")
            layout = detect_layout(raw)
            config = KeyeConfig.from_pretrained(folder)
            stored = Checkpoint.open(folder)
            sidecar = folder / SCALES_FILE
            scales = Checkpoint.open(sidecar) if layout is None and sidecar.is_file() else None
        return cls(label, folder, raw, layout, stored, config, scales)

    @property
    def layout_name(self) -> str:
        return "ours" if self.layout is None else self.layout.name

    @property
    def has_vision(self) -> bool:
        """Whether this layout can hold a vision tower."""
        return self.layout is None or self.layout.has_vision

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes, as the configuration implies them for what this layout can hold."""
        expected = expected_shapes(meta_model(self.config))
        return expected if self.has_vision else text_tensors(expected)

    @cached_property
    def canonical(self) -> dict[str, StoredTensor]:
        """What is stored, under the names of the layout as it was published."""
        if self.layout is None:
            return dict(self.stored)
        return {canonical_name(self.layout, name): entry for name, entry in self.stored.items()}

    @property
    def is_fp8(self) -> bool:
        return self.layout is not None and any(name.endswith(SCALE_SUFFIX) for name in self.canonical)

    @property
    def form(self) -> tuple:
        """What must agree for two folders to be compared under their own names."""
        fused = any(name.endswith("experts.gate_up_proj") for name in self.canonical)
        return self.layout_name, self.layout is not None and fused, self.is_fp8

    def plan(self, part: str = "", dtype: torch.dtype | None = None) -> dict[str, Recipe]:
        """Recipes for our names that begin with `part`, of a published folder. Raises `NotComparableError`."""
        with _blaming(self.label, self.folder):
            recipes = plan_loading(
                self.layout,
                self.stored,
                {name.removeprefix(part): shape for name, shape in self.expected.items() if name.startswith(part)},
                num_hidden_layers=self.config.text_config.num_hidden_layers,
                part=part,
                block=self.block,
                dtype=dtype,
            )
        return {recipe.name: recipe for recipe in recipes.values()}

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the stored weights that share one fp8 scale."""
        return fp8_block(self.raw)

    def streams(self) -> dict[str, TensorStream]:
        """Every tensor under the folder's own (canonical) name."""
        return {name: stored_stream(name, self.stored, entry) for name, entry in self.canonical.items()}

    def scale_streams(self) -> dict[str, TensorStream]:
        """The kept fp8 scales beside weights of ours."""
        names = {name: f"{SCALES_FILE}: {name}" for name in self.scales or ()}
        return {label: stored_stream(label, self.scales, self.scales[name]) for name, label in names.items()}

    def our_streams(self, part: str = "", dtype: torch.dtype | None = None) -> dict[str, TensorStream]:
        """Every tensor whose name (ours) begins with `part`, under that name.

        dtype: of floating point tensors but router corrections; None keeps what is stored, and makes bfloat16 of fp8.

        Raises `NotComparableError` when a published folder is not a whole checkpoint.
        """
        if self.layout is None:
            streams = {
                name: stored_stream(name, self.stored, entry)
                for name, entry in self.stored.items()
                if name.startswith(part)
            }
            kept = {name for name, s in streams.items() if _keeps_dtype(s)} if dtype is not None else set(streams)
            return {name: stream if name in kept else stream.to(dtype) for name, stream in streams.items()}
        plans = {dtype: self.plan(part, dtype)}

        def recast(name: str) -> Callable[[torch.dtype], TensorStream]:
            def stream(wanted: torch.dtype) -> TensorStream:
                # Not a conversion of the pieces: fp8 blocks are dequantised straight into the wanted dtype.
                if wanted not in plans:
                    plans[wanted] = self.plan(part, wanted)
                return recipe_stream(plans[wanted][name], self.stored).to(wanted)

            return stream

        return {name: recipe_stream(recipe, self.stored, recast(name)) for name, recipe in plans[dtype].items()}

    @cached_property
    def unused(self) -> dict[str, StoredTensor]:
        """What is stored and no part of the model, under canonical names."""
        if self.layout is None:
            return {name: entry for name, entry in self.stored.items() if name not in self.expected}
        layers = self.config.text_config.num_hidden_layers
        return {name: entry for name, entry in self.canonical.items() if self.layout.is_ignorable(name, layers)}

    def arithmetic(self) -> dict[str, Any]:
        """Numbers that the configuration implies and that the folder stores, and the equation between them."""
        parts = count_parts(self.expected)
        stored = sum(math.prod(entry.shape) for entry in self.stored.values())
        extra = {name: entry.shape for name, entry in self.unused.items()}
        extra.update({name: entry.shape for name, entry in self.canonical.items() if name.endswith(SCALE_SUFFIX)})
        groups = count_groups(extra)
        # In our layout nothing is ignored: what the model does not name has no right to be there.
        terms = {"implied by the configuration": sum(parts.values()), **(groups if self.layout else {})}
        text, closes = equation(self.label, stored, terms)
        return {
            "parts": parts,
            "implied": sum(parts.values()),
            "unused": groups,
            "stored": stored,
            "equation": text,
            "closes": closes,
        }


def _keeps_dtype(stream: TensorStream) -> bool:
    return not stream.dtype.is_floating_point or stream.name.endswith("e_score_correction_bias")


@contextmanager
def _blaming(label: str, folder: str | Path):
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        raise NotComparableError(f"{label} ({folder}) cannot be read: {' '.join(str(error).split())}") from error


@dataclass
class Report:
    """What a comparison found. `problems` make the folders different, `warnings` do not."""

    a: dict
    b: dict
    names: str
    compared: int = 0
    rounded: bool = False
    values: int = 0
    differences: list[Difference] = field(default_factory=list)
    more_differences: int = 0
    way_back: str = ""
    config: list[dict] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.problems

    @property
    def exit_code(self) -> int:
        return EQUAL if self.equal else DIFFERENT

    @property
    def verdict(self) -> str:
        if self.equal:
            how = "after rounding A to B's dtypes" if self.rounded else "bit for bit"
            warned = f"; {plural(len(self.warnings), 'warning')}" if self.warnings else ""
            return f"EQUAL: {plural(self.compared, 'tensor')}, {self.values:,} values, {how}{warned}"
        return f"DIFFERENT: {'; '.join(self.problems)}"

    def to_json(self) -> dict:
        """Everything, in types that JSON knows; what is no finite number becomes a string."""
        fields = asdict(self)
        for difference in fields["differences"]:
            for name, value in difference.items():
                if isinstance(value, float) and not math.isfinite(value):
                    difference[name] = str(value)
        return {"verdict": self.verdict, "equal": self.equal, **fields}


def verify(a: str | Path, b: str | Path, *, allow_dtype: bool = False, progress: bool = False) -> Report:
    """Compare two checkpoint folders in any layouts.

    Args:
        allow_dtype: tensors whose values are equal once A's are rounded to B's dtype count as equal.
        progress: show bytes on stderr.

    Raises `NotComparableError` when one of them is no whole checkpoint.
    """
    one, two = Side.open("A", a), Side.open("B", b)
    for side in (one, two):
        if side.layout is not None:
            with _blaming(side.label, side.folder):
                check_scales(side.stored)
    own_names = one.form == two.form
    left, right = (side.streams() if own_names else side.our_streams() for side in (one, two))
    names = f"{one.layout_name} names" if own_names else "our names"
    report = Report(_facts(one), _facts(two), names)

    if one.scales is not None and two.scales is not None:
        left, right = {**left, **one.scale_streams()}, {**right, **two.scale_streams()}
    elif own_names and one.scales != two.scales:
        report.warnings.append(f"only {'A' if two.scales is None else 'B'} holds {SCALES_FILE}")
    _drop_new_vision(report, one, two, left, right)
    ignored = {name for side in (one, two) if own_names and side.layout for name in side.unused}
    pairs = [(name, left.get(name), right.get(name)) for name in sorted({*left, *right})]
    back = _way_back(report, one, two)
    total = sum(y.nbytes for _, x, y in (*pairs, *back) if x is not None and y is not None)
    with tqdm(total=total, unit="B", unit_scale=True, desc="comparing", disable=None if progress else True) as bar:
        results = {name: _compare_pair(x, y, one, two, bar.update) for name, x, y in (*pairs, *back)}
    both = [y for _, x, y in pairs if x is not None and y is not None]
    report.compared, report.values = len(both), sum(y.numel for y in both)
    found = [difference for name, result in results.items() if name not in ignored for difference in result]
    ignored_differences = [difference for name in ignored for difference in results.get(name, ())]
    if back and not any(results[name] for name, _, _ in back):
        report.way_back = f"{plural(len(back), 'tensor')} quantised again from ours, bit for bit as published"
    _judge_tensors(report, found, ignored_differences, allow_dtype)
    _judge_arithmetic(report)
    _compare_config(report, one, two)
    _compare_files(report, one.folder, two.folder)
    return report


def _compare_pair(
    x: TensorStream | None, y: TensorStream | None, one: Side, two: Side, progress: Callable[[int], object]
) -> list[Difference]:
    """What differs between a tensor of A and one of B; None stands for one that is absent."""
    if x is None or y is None:
        there = x or y
        where = "only in A" if y is None else "only in B"
        return [Difference(there.name, where, f"{short_dtype(there.dtype)} {list(there.shape)}")]
    try:
        return compare(x, y, progress)
    except (CheckpointError, OSError) as error:
        message = " ".join(str(error).split())
        if y.name.startswith(WAY_BACK) and isinstance(error, CheckpointError):
            return [Difference(y.name, "unreadable", message)]
        raise NotComparableError(f"{one.folder} and {two.folder} cannot be compared: {message}") from error


def _facts(side: Side) -> dict:
    files = len(side.stored.files)
    size = sum(entry.nbytes for entry in side.stored.values())
    return {
        "folder": str(side.folder),
        "layout": side.layout_name,
        "tensors": len(side.stored),
        "files": files,
        "bytes": size,
        "fp8": side.is_fp8,
        "parameters": side.arithmetic(),
    }


def _drop_new_vision(report: Report, one: Side, two: Side, left: dict, right: dict) -> None:
    """A text checkpoint knows nothing of vision: what the other side has of it is new, not different."""
    for side, other, other_streams in ((one, two, right), (two, one, left)):
        if side.has_vision or not other.has_vision:
            continue
        new = [name for name in other_streams if is_vision(name)]
        for name in new:
            del other_streams[name]
        if new:
            report.warnings.append(
                f"{side.label} is a text checkpoint: {plural(len(new), 'tensor')} of tower and projector are in "
                f"{other.label} only and were not compared"
            )


def _way_back(report: Report, one: Side, two: Side) -> list[tuple[str, TensorStream, TensorStream]]:
    """fp8 blocks against ours quantised again: pairs (name, A, B)."""
    published = next((side for side in (one, two) if side.is_fp8), None)
    ours = next((side for side in (one, two) if side.layout is None), None)
    if published is None or ours is None:
        return []
    if ours.scales is None:
        report.way_back = f"not checked: {ours.label} holds no {SCALES_FILE}"
        report.warnings.append(f"the way back to fp8 was not checked, because {ours.label} holds no {SCALES_FILE}")
        return []
    kept = {name: entry for name, entry in ours.stored.items() if published.layout.has_vision or not is_vision(name)}
    source = ours.stored.merged(ours.scales)
    with _blaming(ours.label, ours.folder):
        recipes = plan_publishing(published.layout, {**kept, **ours.scales}, block=published.block)
    pairs = []
    for name, entry in published.canonical.items():
        if name in published.unused:
            continue
        label = f"{WAY_BACK}{name}"
        there = stored_stream(label, published.stored, entry)
        here = replace(recipe_stream(recipes[name], source), name=label) if name in recipes else None
        pairs.append((label, there, here) if published is one else (label, here, there))
    return pairs


def _judge_tensors(report: Report, found: list[Difference], ignored: list[Difference], allow_dtype: bool) -> None:
    dtypes = [difference for difference in found if difference.kind == "dtype"]
    others = [difference for difference in found if difference.kind != "dtype"]
    if ignored:
        report.warnings.append(f"of what no model uses, {_counted(ignored)}, for example {ignored[0].name}")
    if others:
        report.problems.append(_counted(others))
    if dtypes and allow_dtype:
        report.rounded = True
        report.warnings.append(_counted(dtypes))
    elif dtypes:
        report.problems.append(f"{_counted(dtypes)} (--allow-dtype accepts that)")
    listed = others + dtypes
    report.differences, report.more_differences = listed[:LISTED], len(listed[LISTED:])


def _counted(differences: list[Difference]) -> str:
    """How many tensors differ in which way: "1 tensor differs, 2 tensors are only in A"."""
    verbs = {
        "dtype": ("has another dtype and equal values", "have another dtype and equal values"),
        "only in A": ("is only in A", "are only in A"),
        "only in B": ("is only in B", "are only in B"),
    }
    counts = Counter(verbs.get(difference.kind, ("differs", "differ")) for difference in differences)
    return ", ".join(
        f"{plural(count, 'tensor')} {one if count == 1 else many}" for (one, many), count in counts.items()
    )


def _judge_arithmetic(report: Report) -> None:
    for facts in (report.a, report.b):
        if not facts["parameters"]["closes"]:
            report.problems.append(f"the arithmetic does not close ({facts['parameters']['equation']})")


def _compare_config(report: Report, one: Side, two: Side) -> None:
    left, right = (_flat(json.loads(json.dumps(side.config.to_dict()))) for side in (one, two))
    text_only = not (one.has_vision and two.has_vision)
    for name in sorted({*left, *right}):
        values = left.get(name), right.get(name)
        # A text checkpoint says nothing about vision.
        if values[0] == values[1] or (text_only and not name.startswith("text_config.")):
            continue
        incidental = any(part in _INCIDENTAL_FIELDS for part in name.split("."))
        report.config.append({"field": name, "a": values[0], "b": values[1], "computes": not incidental})
    computing = [entry["field"] for entry in report.config if entry["computes"]]
    others = [entry["field"] for entry in report.config if not entry["computes"]]
    if computing:
        report.problems.append(f"the configurations compute differently ({', '.join(computing)})")
    if others:
        report.warnings.append(f"the configurations differ in {', '.join(others)}, which no weight depends on")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _compare_files(report: Report, one: Path, two: Path) -> None:
    for name in _FILES:
        here, there = (one / name).is_file(), (two / name).is_file()
        if here and there:
            report.files[name] = "same" if _same_content(one / name, two / name) else "different"
        elif here or there:
            report.files[name] = "only in A" if here else "only in B"
    if different := [name for name, state in report.files.items() if state == "different"]:
        report.warnings.append(f"{', '.join(different)} {'differs' if len(different) == 1 else 'differ'}")


def _same_content(one: Path, two: Path) -> bool:
    first, second = one.read_bytes(), two.read_bytes()
    if first == second or one.suffix != ".json":
        return first == second
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


def format_report(report: Report) -> str:
    """The report as text, for people; the last line is the verdict."""
    lines = []
    for label, facts in (("A", report.a), ("B", report.b)):
        size = f"{facts['bytes'] / 1e9:,.2f} GB" if facts["bytes"] > 1e8 else f"{facts['bytes']:,} bytes"
        kind = facts["layout"] + (" in fp8 blocks" if facts["fp8"] else "")
        lines.append(
            f"{label}  {facts['folder']}: {kind}, {plural(facts['tensors'], 'tensor')} in "
            f"{plural(facts['files'], 'file')}, {size}"
        )
    lines += ["", f"{'parameters':<44}{'A':>20}{'B':>20}"]
    sides = (report.a["parameters"], report.b["parameters"])
    for title, key in (("  ", "parts"), ("  not used: ", "unused")):
        for name in dict.fromkeys([*sides[0][key], *sides[1][key]]):
            counts = "".join(f"{side[key].get(name, 0):>20,}" for side in sides)
            lines.append(f"{title + name:<44}{counts}")
    for name in ("implied", "stored"):
        lines.append(f"{name:<44}" + "".join(f"{side[name]:>20,}" for side in sides))
    lines += ["", *(side["equation"] for side in sides), ""]
    lines.append(f"{plural(report.compared, 'tensor')} compared under {report.names}, {report.values:,} values")
    lines += [f"  {difference}" for difference in report.differences]
    if report.more_differences:
        lines.append(f"  and {report.more_differences:,} more")
    if report.way_back:
        lines.append(f"way back: {report.way_back}")
    lines.append("configuration: " + ("differs" if report.config else "same"))
    for entry in report.config:
        effect = "changes what is computed" if entry["computes"] else "no weight depends on it"
        lines.append(f"  {entry['field']}: {entry['a']!r} in A, {entry['b']!r} in B ({effect})")
    lines += [f"{name}: {state}" for name, state in report.files.items()]
    lines += [f"warning: {warning}" for warning in report.warnings]
    return "\n".join([*lines, "", report.verdict])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.verify", description="Prove that two checkpoint folders hold the same model."
    )
    parser.add_argument("a", metavar="A", help="a checkpoint folder, published or ours")
    parser.add_argument("b", metavar="B", help="another one, in the same layout or not")
    parser.add_argument("--allow-dtype", action="store_true", help="another dtype with equal values counts as equal")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        report = verify(args.a, args.b, allow_dtype=args.allow_dtype, progress=True)
    except NotComparableError as error:
        if args.json:
            print(json.dumps({"verdict": f"NOT COMPARABLE: {error}", "equal": None}))
        print(f"verify: {error}", file=sys.stderr)
        return NOT_COMPARABLE
    print(json.dumps(report.to_json(), indent=2, allow_nan=False) if args.json else format_report(report))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
