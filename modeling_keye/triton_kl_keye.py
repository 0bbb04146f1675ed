"""What the kernels of the indexer's KL loss share, whether its queries attend to all they see or to a selection.

For a query with support S_t, p the attention over S_t averaged over its heads (a constant) and I the indexer's scores,

    KL_t = sum over s in S_t of p[s] (log p[s] - log q[s]),   q = softmax over S_t of I,   dKL_t / dI = q - p

(`indexer_objective_keye`, which is the judge; DeepSeek-V3.2 report, eq. 3 and 4). Gates and weights of the queries are
factors of whole rows, so `q - p` is what kernels hand on to each other and these factors come last: with a weight of
1 / tokens inside, float16 operands would underflow.

Sizes: B batch, S queries, T keys, H query heads, G key groups, D head size, K places of a list, Hi and Di heads and
head size of the indexer. Prefixes as in `triton_gather_keye.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_common_keye import jit, operand_dtype, tl, triton
from .triton_gather_keye import HOPPER_SHARED, SLACK, first_fitting, load_rows
from .triton_tuning_keye import tunable

# q - p lies in [-1, 1]. Multiplied by this it is a normal float16 from 4e-9 on, and far from the greatest.
LIFT = 2.0**14


@dataclass(frozen=True)
class Tiles:
    """Queries (or queries x heads) and keys per program, launch options."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ListTiles(Tiles):
    """The same for lists of places, and whether two blocks of columns are multiplied apart."""

    apart: bool


def padded(size: int) -> int:
    """The least power of two that holds `size` columns of a matrix product."""
    return max(16, triton.next_power_of_2(size))


def split_width(dim: int) -> dict[str, int]:
    """A head size as two blocks of columns, so that 576 is 512 + 64 and not 1024: sizes A and R, and their blocks."""
    block = padded(dim)
    if dim >= 32 and dim <= block // 2 + block // 4:
        rest = dim - block // 2
        return {"A": block // 2, "R": rest, "BLOCK_A": block // 2, "BLOCK_R": padded(rest) if rest else 16}
    return {"A": dim, "R": 0, "BLOCK_A": block, "BLOCK_R": 16}


def width_of(dim: int) -> int:
    """Columns that `split_width` takes in memory."""
    widths = split_width(dim)
    return widths["BLOCK_A"] + (widths["BLOCK_R"] if widths["R"] else 0)


@tunable("kl_attention_lse", rows=(64, 128), keys=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
def walk_tiles(width: int, element_size: int, shared: int) -> Tiles:
    """Blocks of a kernel that walks over keys, for rows of `width` padded columns; no length enters."""
    buffers = _buffers(element_size, shared)

    def size(rows: int, keys: int) -> int:
        return (rows + buffers * keys) * width * element_size

    blocks = [(128, 128), (64, 64), (32, 32), (16, 16)] if element_size == 2 else [(32, 32), (16, 16)]
    rows, keys = first_fitting(blocks, size, shared)
    return Tiles(rows, keys, 8 if rows == 128 or element_size > 2 else 4, 2)


def head_tiles(width: int, element_size: int, shared: int) -> Tiles:
    """Blocks of a kernel that keeps a tile of keys and walks over heads: more keys feed more products per byte."""
    hopper = _buffers(element_size, shared) > 1

    def size(rows: int, keys: int, buffers: int = 2 if hopper else 1) -> int:
        return (buffers * rows + keys) * width * element_size

    blocks = [(64, 128), (64, 64), (32, 32), (16, 16)] if element_size == 2 else [(32, 32), (16, 16)]
    if width > 256 and not hopper:  # operands of wider tiles would not fit the registers
        blocks = [pair for pair in blocks if pair[1] <= 32]
    rows, keys = first_fitting(blocks, size, shared)
    # With two stages a head is waited for as soon as it is asked for. Widths that are read in two parts have no room.
    ahead = hopper and width == triton.next_power_of_2(width) and size(rows, keys, 3) <= shared - SLACK
    return Tiles(rows, keys, 8 if keys == 128 or element_size > 2 else 4, 3 if ahead else 2)


def _buffers(element_size: int, shared: int) -> int:
    """Hopper reads a tile from shared memory while the next one arrives; older devices hold it in registers."""
    return 2 if shared >= HOPPER_SHARED and element_size == 2 else 1


def statistics_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float32, or float64 when one of them is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def operand_types(queries, keys, q, k, statistics: torch.dtype) -> dict:
    """Compile-time types of the products of the attention, of those of the indexer, and of sums."""
    return {
        "DOT": operand_dtype(torch.promote_types(queries.dtype, keys.dtype)),
        "INDEX_DOT": operand_dtype(torch.promote_types(q.dtype, k.dtype)),
        "ACC": tl.float64 if statistics == torch.float64 else tl.float32,
    }


def key_factors(weights: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weights [B, n] x gates [B, n, Hi] relative to the largest, in [-1, 1], and the largest []."""
    factors = weights.unsqueeze(-1) * gates.to(weights.dtype)
    top = factors.abs().amax().clamp(min=torch.finfo(factors.dtype).tiny)
    return factors / top, top


@jit
def load_columns(
    pointers,
    m_row,
    stride,
    A: tl.constexpr,
    R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    """Both blocks of columns of the rows at `pointers`; without a second one, the first stands for it."""
    b_first = load_rows(pointers, m_row, stride, 0, A, BLOCK_A, DOT)
    b_second = b_first
    if R > 0:
        b_second = load_rows(pointers, m_row, stride, A, R, BLOCK_R, DOT)
    return b_first, b_second


@jit
def load_mask(mask_ptr, o_key, end):
    """Which of the keys before `end` are real tokens."""
    m_key = o_key < end
    if mask_ptr is not None:
        m_key = m_key & (tl.load(mask_ptr + o_key, mask=m_key, other=0) != 0)
    return m_key
