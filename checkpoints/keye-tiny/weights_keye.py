"""How each tensor of a published checkpoint becomes one of ours, and back: the plan that loads, converts and verifies.

A plan is made from headers alone and refuses whatever is missing, unknown or of another shape before a value is read.
Its recipes then make one tensor each, in small pieces, so that no user of a plan needs memory for a whole tensor.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .checkpoint_keye import CheckpointError, StoredTensor
from .layouts_keye import FP8_BLOCK, Layout

# Bytes of one piece of a tensor.
PIECE_BYTES = 8 * 2**20

FP8 = torch.float8_e4m3fn
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALE_SUFFIX = "weight_scale_inv"

# Longest first: the published modules are flat, files saved again by newer libraries carry one more segment.
_CANONICAL_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.mlp_AR.", "mlp_AR."),
    ("model.mm_projector.", "mlp_AR."),
    ("model.projector.", "mlp_AR."),
    ("model.language_model.", "model."),
)
_OUR_PREFIXES = (
    ("visual.", "model.visual."),
    ("mlp_AR.", "model.projector."),
    ("model.", "model.language_model."),
)
_VISION_PREFIXES = ("visual.", "mlp_AR.")
_OUR_VISION_PREFIXES = tuple(ours for published, ours in _OUR_PREFIXES if published in _VISION_PREFIXES)
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED_EXPERTS = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)")
# Problems named in one message; the rest is counted.
_LISTED = 10


class Source(Protocol):
    """Where a recipe reads: a `Checkpoint`, or several behind one `read`."""

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, part: int | None = None
    ) -> torch.Tensor:
        """Rows `start` to `stop` of a stored tensor, or of `tensor[part]`."""


@dataclass(frozen=True)
class Recipe:
    """How one tensor is made of stored ones.

    parts: called with a source, yields contiguous pieces of `dtype` that make up the tensor along its first dimension.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    parts: Callable[[Source], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def build(self, source: Source) -> torch.Tensor:
        """The whole tensor."""
        if not self.shape:
            return next(self.parts(source))
        # The device is named because loading may run under another default device.
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        row = 0
        for part in self.parts(source):
            tensor[row : row + part.shape[0]] = part
            row += part.shape[0]
        return tensor


def canonical_name(layout: Layout, stored_name: str) -> str:
    """The published name of a stored tensor, also where a file saved again carries longer prefixes."""
    for prefix, canonical in _CANONICAL_PREFIXES:
        if layout.has_vision and stored_name.startswith(prefix):
            return canonical + stored_name.removeprefix(prefix)
    return stored_name


def is_vision(name: str) -> bool:
    """Whether one of our tensors is part of tower or projector."""
    return name.startswith(_OUR_VISION_PREFIXES)


def dropped_names(layout: Layout, stored: Mapping[str, StoredTensor], num_hidden_layers: int) -> list[str]:
    """Stored tensors that the family allows to leave out, such as tables which its own code never reads."""
    return [name for name in stored if layout.is_ignorable(canonical_name(layout, name), num_hidden_layers)]


def check_scales(source: Mapping[str, StoredTensor]) -> None:
    """Raise `CheckpointError` for an fp8 scale that is not finite; reads the scales only."""
    for name in source:
        if name.endswith(SCALE_SUFFIX):
            wrong = (~source.read(name).float().isfinite()).nonzero()
            if len(wrong):
                raise CheckpointError(
                    f"the fp8 scale {name!r} is not a finite number at {wrong[0].tolist()}: the checkpoint is damaged; "
                    "fetch it again."
                )


def plan_loading(
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    num_hidden_layers: int,
    part: str = "",
    optional: Callable[[str], bool] = lambda name: False,
    block: tuple[int, int] = FP8_BLOCK,
    dtype: torch.dtype | None = None,
    fp8_dtype: torch.dtype = torch.bfloat16,
    prove_fp8: bool = False,
) -> dict[str, Recipe]:
    """Published -> ours: one recipe for each expected tensor.

    Args:
        stored: the tensors of the published checkpoint.
        expected: our tensor names with their shapes, for example of a model on the meta device.
        num_hidden_layers: decoder layers; further ones (multi-token prediction) are ignorable where the layout says so.
        part: prefix of our names that is asked for; tensors of other parts are left alone.
        optional: which expected tensors may be absent.
        block: rows and columns that share one fp8 scale.
        dtype: of the results; None keeps what is stored, and makes `fp8_dtype` of fp8 blocks.
        prove_fp8: a recipe raises `CheckpointError` when its result does not lead back to the fp8 values it is made of.

    Raises `CheckpointError` that names the tensors which are missing, unknown, doubled or of another shape.
    """
    names: dict[str, str] = {}
    for name in stored:
        canonical = canonical_name(layout, name)
        if canonical in names:
            raise CheckpointError(f"{names[canonical]!r} and {name!r} are the same tensor of the {layout.name} layout.")
        if not layout.is_ignorable(canonical, num_hidden_layers):
            names[canonical] = name

    recipes: dict[str, Recipe] = {}
    experts: dict[str, dict[tuple[int, str], str]] = {}
    scales = {name for name in names if name.endswith(SCALE_SUFFIX)}
    used = set()
    unknown, wrong_dtypes = [], []
    for canonical, name in names.items():
        if canonical in scales:
            continue
        scale = canonical.removesuffix("weight") + SCALE_SUFFIX if canonical.endswith(".weight") else None
        scale = scale if scale in scales else None
        used.add(scale)
        info = stored[name]
        if info.dtype not in (FP8, *WEIGHT_DTYPES):
            wrong_dtypes.append(f"dtype: {name} is {info.dtype}; weights are 16, 32 or 64 bit floats, or scaled {FP8}")
        match = _EXPERT.fullmatch(canonical)
        if match and layout.experts is not None:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = canonical
            continue
        ours = _our_name(canonical)
        if ours is None or _FUSED_EXPERTS.fullmatch(canonical) and layout.experts != "input_major":
            unknown.append(name)
        elif _FUSED_EXPERTS.fullmatch(canonical):
            recipes[ours] = _swapped(ours, name, info, dtype)
        elif scale is not None or info.dtype == FP8:
            recipes[ours] = _dequantised(
                ours, name, info, names.get(scale), stored, block, dtype or fp8_dtype, prove_fp8
            )
        else:
            recipes[ours] = _copied(ours, name, info, dtype)
    for prefix, members in experts.items():
        ours = _our_name(prefix)
        for name in ("gate_up_proj", "down_proj"):
            if ours + name in recipes:
                raise CheckpointError(f"{prefix}{name} is stored both as one tensor and per expert.")
        recipes.update(_stacked(ours, members, names, stored, block, dtype, fp8_dtype, prove_fp8))
    unknown += [names[scale] for scale in scales - used]

    problems = [f"unknown: {name}" for name in sorted(unknown)] + wrong_dtypes
    return _checked(recipes, expected, problems, part, optional, layout)


def _checked(recipes, expected, problems, part, optional, layout) -> dict[str, Recipe]:
    """The recipes of `expected`; every problem with them, and those found before, in one message."""
    wanted = {part + name: tuple(shape) for name, shape in expected.items()}
    for name, recipe in recipes.items():
        if name not in wanted:
            if name.startswith(part):
                problems.append(f"unknown: {', '.join(recipe.sources[:2])} (would be {name})")
        elif recipe.shape != wanted[name]:
            problems.append(
                f"shape: {', '.join(recipe.sources[:2])} makes {name} of shape {list(recipe.shape)}, the configuration "
                f"asks for {list(wanted[name])}"
            )
    problems += [f"missing: {name}" for name in wanted if name not in recipes and not optional(name)]
    if problems:
        listed = "\n  ".join(problems[:_LISTED])
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"the weights do not fit config.json, read as {layout.name}; nothing was loaded:\n  {listed}{more}\n"
            "Check that config.json and the weight files belong together and that none is left out."
        )
    return {name.removeprefix(part): recipes[name] for name in wanted if name in recipes}


def plan_publishing(
    layout: Layout,
    ours: Mapping[str, StoredTensor],
    *,
    unfused_experts: bool = False,
    block: tuple[int, int] = FP8_BLOCK,
    dtype: torch.dtype | None = None,
) -> dict[str, Recipe]:
    """Ours -> published: one recipe for each published tensor.

    Args:
        ours: our tensors; entries that end in "weight_scale_inv" (under published names) ask for the fp8 form of
            their weight, and are published too.
        unfused_experts: one tensor per expert where the layout knows both forms.
        dtype: of the results that are not fp8; None keeps what is stored.

    A layout without vision tower leaves ours out. Raises `CheckpointError` for a name that is not one of ours.
    """
    recipes: dict[str, Recipe] = {}
    scales = {name: info for name, info in ours.items() if name.endswith(SCALE_SUFFIX)}

    def add(published: str, name: str, info: StoredTensor, rows: tuple[int, int] | None = None, expert=None) -> None:
        scale = published.removesuffix("weight") + SCALE_SUFFIX
        if published.endswith(".weight") and scale in scales:
            recipes[published] = _quantised(published, name, info, scale, scales[scale], block, rows, expert)
        elif expert is not None:
            recipes[published] = _one_expert(published, name, info, rows, expert, dtype)
        else:
            recipes[published] = _copied(published, name, info, dtype)

    for name, info in ours.items():
        if name in scales:
            recipes[name] = _copied(name, name, info, None)
            continue
        published = _published_name(name)
        if published is None:
            raise CheckpointError(f"{name!r} is not a tensor of KeyeForVideoQA; nothing was written.")
        if published.startswith(_VISION_PREFIXES) and not layout.has_vision:
            continue
        if layout.experts != "per_expert":
            # The decoders built on Qwen3 have the Keye indexer, those built on DeepSeek that of DeepSeek-V3.2.
            published = published.replace(".self_attn.indexer.", ".self_attn.sa_indexer.")
        match = _FUSED_EXPERTS.fullmatch(published)
        if not match:
            add(published, name, info)
        elif layout.experts == "input_major" and not unfused_experts:
            recipes[published] = _swapped(published, name, info, dtype)
        else:
            prefix = published.removesuffix(match[1])
            for expert in range(info.shape[0]):
                if match[1] == "down_proj":
                    add(f"{prefix}{expert}.down_proj.weight", name, info, (0, info.shape[1]), expert)
                    continue
                half = info.shape[1] // 2
                add(f"{prefix}{expert}.gate_proj.weight", name, info, (0, half), expert)
                add(f"{prefix}{expert}.up_proj.weight", name, info, (half, 2 * half), expert)
    lone = [scale for scale in scales if scale.removesuffix(SCALE_SUFFIX) + "weight" not in recipes]
    if lone:
        raise CheckpointError(f"the fp8 scale {lone[0]!r} has no weight; nothing was written.")
    return recipes


def _our_name(canonical: str) -> str | None:
    """Our name of a published tensor, None if no module of that name exists in any layout."""
    if canonical == "lm_head.weight":
        return canonical
    for prefix, ours in _OUR_PREFIXES:
        if canonical.startswith(prefix):
            return (ours + canonical.removeprefix(prefix)).replace(".self_attn.sa_indexer.", ".self_attn.indexer.")
    return None


def _published_name(ours: str) -> str | None:
    if ours == "lm_head.weight":
        return ours
    for published, prefix in _OUR_PREFIXES:
        if ours.startswith(prefix):
            return published + ours.removeprefix(prefix)
    return None


def _result_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    # The correction bias decides which experts are chosen: DeepSeek keeps it in float32 whatever the model's dtype.
    if dtype is None or not stored.is_floating_point or name.endswith("e_score_correction_bias"):
        return stored
    return dtype


def _row_ranges(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about PIECE_BYTES, each but the last a multiple of `multiple` rows."""
    row_bytes = max(math.prod(shape[1:]) * itemsize, 1)
    rows = max(PIECE_BYTES // row_bytes // multiple, 1) * multiple
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def _copied(name: str, stored_name: str, info: StoredTensor, dtype: torch.dtype | None) -> Recipe:
    dtype = _result_dtype(name, info.dtype, dtype)

    def parts(source: Source) -> Iterator[torch.Tensor]:
        if not info.shape:
            yield source.read(stored_name).to(dtype)
            return
        for start, stop in _row_ranges(info.shape, info.dtype.itemsize):
            yield source.read(stored_name, start, stop).to(dtype)

    return Recipe(name, info.shape, dtype, (stored_name,), parts)


def _swapped(name: str, stored_name: str, info: StoredTensor, dtype: torch.dtype | None) -> Recipe:
    """Fused experts [E, in, out] <-> [E, out, in], one expert at a time."""
    dtype = _result_dtype(name, info.dtype, dtype)
    if len(info.shape) != 3:
        raise CheckpointError(f"{stored_name!r} has shape {list(info.shape)}; fused experts have three dimensions.")

    def parts(source: Source) -> Iterator[torch.Tensor]:
        for expert in range(info.shape[0]):
            yield source.read(stored_name, expert, expert + 1).transpose(1, 2).to(dtype).contiguous()

    return Recipe(name, (info.shape[0], info.shape[2], info.shape[1]), dtype, (stored_name,), parts)


def _dequantised(name, stored_name, info, scale_name, stored, block, dtype, prove) -> Recipe:
    """fp8 [out, in] times the scale of its block; the last block of a row or column may be partial."""
    _check_fp8(stored_name, info, scale_name, stored, block)

    def parts(source: Source) -> Iterator[torch.Tensor]:
        scale = source.read(scale_name)
        for start, stop in _row_ranges(info.shape, 4, block[0]):
            rows = source.read(stored_name, start, stop)
            spread = _spread(scale, start, rows.shape, block)
            values = (rows.float() * spread).to(dtype)
            if prove and not torch.equal(_to_fp8(values, spread).view(torch.uint8), rows.view(torch.uint8)):
                raise CheckpointError(
                    f"{stored_name!r} holds fp8 values that cannot be restored from {dtype} with their scales "
                    f"{scale_name!r} (zero, or out of range): the checkpoint is damaged; fetch it again."
                )
            yield values

    return Recipe(name, info.shape, dtype, (stored_name, scale_name), parts)


def _check_fp8(name, info, scale_name, stored, block) -> None:
    if scale_name is None:
        raise CheckpointError(f"{name!r} is stored as fp8 without its {SCALE_SUFFIX!r}: the checkpoint is incomplete.")
    if info.dtype != FP8 or len(info.shape) != 2:
        raise CheckpointError(
            f"{name!r} has the scale {scale_name!r}, but is {info.dtype} of shape {list(info.shape)} instead of a "
            f"matrix of {FP8}."
        )
    grid = (math.ceil(info.shape[0] / block[0]), math.ceil(info.shape[1] / block[1]))
    scale = stored[scale_name]
    if scale.shape != grid or scale.dtype != torch.float32:
        raise CheckpointError(
            f"{scale_name!r} is {scale.dtype} of shape {list(scale.shape)}; blocks of {list(block)} of "
            f"{list(info.shape)} need float32 of shape {list(grid)}."
        )


def _spread(scale: torch.Tensor, start: int, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """The scale of each element of `shape` rows that begin at row `start`."""
    rows = torch.arange(start, start + shape[0], device="cpu") // block[0]
    columns = torch.arange(shape[1], device="cpu") // block[1]
    return scale[rows][:, columns]


def _to_fp8(values: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    # A block of zeros may have the scale zero.
    return torch.where(spread == 0, values.float(), values.float() / spread).to(FP8)


def _stacked(ours, members, names, stored, block, dtype, fp8_dtype, prove) -> dict[str, Recipe]:
    """Per-expert matrices -> [E, gate rows then up rows, in] and [E, out, in]."""
    count = 1 + max(expert for expert, _ in members)
    singles: dict[tuple[int, str], Recipe] = {}
    for expert in range(count):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            canonical = members.get((expert, kind))
            if canonical is None:
                raise CheckpointError(
                    f"missing: {kind} of expert {expert} of {ours.removesuffix('.')}, although expert {count - 1} is "
                    "there; nothing was loaded."
                )
            name, scale = names[canonical], names.get(canonical.removesuffix("weight") + SCALE_SUFFIX)
            if scale is not None or stored[name].dtype == FP8:
                singles[expert, kind] = _dequantised(
                    ours, name, stored[name], scale, stored, block, dtype or fp8_dtype, prove
                )
            else:
                singles[expert, kind] = _copied(ours, name, stored[name], dtype)
    return {
        ours + name: _stack(ours + name, [[singles[expert, kind] for kind in kinds] for expert in range(count)])
        for name, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
    }


def _stack(name: str, experts: list[list[Recipe]]) -> Recipe:
    first = experts[0][0]
    for matrices in experts:
        for recipe in matrices:
            if recipe.shape != first.shape or recipe.dtype != first.dtype or len(recipe.shape) != 2:
                raise CheckpointError(
                    f"{recipe.sources[0]!r} is {recipe.dtype} of shape {list(recipe.shape)}, but {first.sources[0]!r} "
                    f"is {first.dtype} of shape {list(first.shape)}: the experts of a layer must be alike."
                )

    def parts(source: Source) -> Iterator[torch.Tensor]:
        for matrices in experts:
            yield torch.cat([recipe.build(source) for recipe in matrices]).unsqueeze(0)

    shape = (len(experts), len(experts[0]) * first.shape[0], first.shape[1])
    sources = tuple(source for matrices in experts for recipe in matrices for source in recipe.sources)
    return Recipe(name, shape, first.dtype, sources, parts)


def _one_expert(name, stored_name, info, rows, expert, dtype) -> Recipe:
    dtype = _result_dtype(name, info.dtype, dtype)

    def parts(source: Source) -> Iterator[torch.Tensor]:
        yield source.read(stored_name, *rows, part=expert).to(dtype)

    return Recipe(name, (rows[1] - rows[0], info.shape[2]), dtype, (stored_name,), parts)


def _quantised(name, stored_name, info, scale_name, scale_info, block, rows, expert) -> Recipe:
    """Back to fp8 with the scales that were published.

    A value read from fp8 is q * scale, rounded to bfloat16 at worst: an error of 2^-9, where neighbouring fp8 values
    lie 2^-4 apart, so that dividing by the scale and rounding gives q again.
    """
    shape = info.shape if expert is None else (rows[1] - rows[0], info.shape[2])
    grid = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    if scale_info.shape != grid:
        raise CheckpointError(
            f"{scale_name!r} has shape {list(scale_info.shape)}; blocks of {list(block)} of {list(shape)} need "
            f"{list(grid)}."
        )

    def parts(source: Source) -> Iterator[torch.Tensor]:
        scale = source.read(scale_name)
        first = 0 if expert is None else rows[0]
        for start, stop in _row_ranges(shape, 4, block[0]):
            values = source.read(stored_name, first + start, first + stop, part=expert)
            spread = _spread(scale, start, values.shape, block)
            quantised = _to_fp8(values, spread)
            if not torch.equal((quantised.float() * spread).to(values.dtype), values):
                raise CheckpointError(
                    f"{stored_name!r} is not what was read from fp8 blocks, so it has been trained since; rounding it "
                    f"back to {name!r} would undo that. Give --dtype bfloat16 to write it unquantised."
                )
            yield quantised

    return Recipe(name, shape, FP8, (stored_name, scale_name), parts)
