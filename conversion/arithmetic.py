"""How many parameters a model has, part by part, and what a checkpoint stores besides them."""

import math
import re
from collections.abc import Iterable, Mapping

from modeling_keye.weights_keye import is_vision

# Our names, the first match decides.
_PARTS = (
    ("vision tower", r"model\.visual\..*"),
    ("projector", r"model\.projector\..*"),
    ("head", r"lm_head\..*"),
    ("indexers", r".*\.self_attn\.indexer\..*"),
    ("experts", r".*\.mlp\.experts\..*"),
    ("router corrections (buffers)", r".*\.e_score_correction_bias"),
    ("decoder body", r"model\.language_model\..*"),
)
# Published names that nothing in the model corresponds to, the first match decides.
_GROUPS = (
    ("vision pooling head", r".*\bvision_model\.head\..*"),
    ("packing position table", r".*\.packing_position_embedding\..*"),
    ("rotary buffers", r".*\.inv_freq"),
    ("fp8 scales", r".*\.weight_scale_inv"),
    ("multi-token prediction layers", r"model\.(language_model\.)?layers\.\d+\..*"),
)


def text_tensors(expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The decoder and its head."""
    return {name: shape for name, shape in expected.items() if not is_vision(name)}


def count_parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers per part of the model ("vision tower", "decoder body", ...), for tensors under our names.

    Raises `ValueError` for a name that belongs to no part.
    """
    return _count(shapes, _PARTS)


def count_groups(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers per group of published tensors that the model does not use; names outside every group stand alone."""
    return _count(shapes, _GROUPS, others=True)


def _count(shapes: Mapping[str, tuple[int, ...]], patterns: Iterable[tuple[str, str]], others: bool = False) -> dict:
    counts = {part: 0 for part, _ in patterns}
    for name, shape in shapes.items():
        part = next((part for part, pattern in patterns if re.fullmatch(pattern, name)), name if others else None)
        if part is None:
            raise ValueError(f"{name} is no name of ours; known parts: {', '.join(part for part, _ in patterns)}.")
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return {part: count for part, count in counts.items() if count}


def equation(label: str, stored: int, terms: Mapping[str, int]) -> tuple[str, bool]:
    """ "A: 31,122,082,160 stored = 31,084,333,424 implied by the configuration + 37,748,736 packing position table"
    and whether it closes."""
    total = sum(terms.values())
    right = " + ".join(f"{count:,} {name}" for name, count in terms.items()) or "0"
    if stored == total:
        return f"{label}: {stored:,} stored = {right}", True
    return f"{label}: {stored:,} stored is not {right} = {total:,}; it differs by {stored - total:+,}", False
