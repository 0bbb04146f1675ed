"""What the kernels of sparse attention share: rows gathered by index, products in either order, partial results.

A query brings a list of K places; a place names a row (0 <= index < T) or nothing. Prefixes: i_ index, o_ offsets,
m_ mask, b_ block. Compile-time constants come from head sizes, types and shared memory, never from lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .triton_common_keye import jit, on_device, tl, triton

LOG2_E = math.log2(math.e)
# Parts of one query that a combining program looks at.
MAX_SPLITS = 64
# Scratch of a backward pass; queries are processed in chunks that fit.
WORKSPACE_BYTES = 256 * 2**20
USED_BLOCK = 1024
# Shared memory that reductions and indices take beside the operands.
SLACK = 2048
# More than A100's 163 KiB: Hopper or newer, whose matrix instructions read operands from shared memory.
HOPPER_SHARED = 200 * 1024


def first_fitting(blocks: list[tuple[int, int]], size: Callable[[int, int], int], shared: int) -> tuple[int, int]:
    """The first of `blocks` (rows, places) whose operands, `size` bytes, fit. Raises `ValueError` when none does."""
    for block in blocks:
        if size(*block) <= shared - SLACK:
            return block
    raise ValueError(
        f"The smallest tile of the Triton kernels takes {size(*blocks[-1]) // 1024} KiB of shared memory at these head "
        f'sizes, and a program may use {shared // 1024} KiB; choose the backend "torch".'
    )


@jit
def load_rows(pointers, m_row, stride, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Columns FIRST .. FIRST + SIZE of the rows at `pointers`: [rows, BLOCK], 0 where masked and past SIZE."""
    o_column = tl.arange(0, BLOCK)
    pointers = pointers[:, None] + (FIRST + o_column)[None, :] * stride
    mask = m_row[:, None] if SIZE == BLOCK else m_row[:, None] & (o_column < SIZE)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT)


@jit
def scores_of(b_heads, b_places, SWAPPED: tl.constexpr, ACC: tl.constexpr):
    """heads [BH, D] x places [BK, D] -> [BH, BK], or [BK, BH] when swapped.

    Hopper's matrix instruction has at least 64 rows: with fewer heads, these become the columns.
    """
    if SWAPPED:
        b_scores = tl.dot(b_places, tl.trans(b_heads), input_precision="ieee", out_dtype=ACC)
    else:
        b_scores = tl.dot(b_heads, tl.trans(b_places), input_precision="ieee", out_dtype=ACC)
    return b_scores


@jit
def scores_apart(b_heads, b_heads_rest, b_places, b_places_rest, start, end, SWAPPED: tl.constexpr, ACC: tl.constexpr):
    """`scores_of` over two blocks of columns, in branches that are always taken, as start and end are 0 or more.

    Triton gives a product that it can follow into another one to all warps along its rows. With 64 rows, that has both
    groups of four warps make the same product. It follows none out of a branch; the branch that is never taken holds a
    product too, because a constant there would be folded into what comes after.
    """
    if start >= 0:
        b_scores = scores_of(b_heads, b_places, SWAPPED, ACC)
    else:
        b_scores = scores_of(b_heads_rest, b_places_rest, SWAPPED, ACC)
    if end >= 0:
        if SWAPPED:
            b_scores = tl.dot(b_places_rest, tl.trans(b_heads_rest), b_scores, input_precision="ieee", out_dtype=ACC)
        else:
            b_scores = tl.dot(b_heads_rest, tl.trans(b_places_rest), b_scores, input_precision="ieee", out_dtype=ACC)
    return b_scores


@jit
def add_weighted(b_sum, b_weights, b_places, SWAPPED: tl.constexpr, ACC: tl.constexpr):
    """sum + weights [BH, BK] x places [BK, D] -> [BH, D]; when swapped, sum, weights and result are transposed."""
    if SWAPPED:
        b_sum = tl.dot(tl.trans(b_places), b_weights, b_sum, input_precision="ieee", out_dtype=ACC)
    else:
        b_sum = tl.dot(b_weights, b_places, b_sum, input_precision="ieee", out_dtype=ACC)
    return b_sum


@jit
def give_rows(pointers, b_rows, mask, OWN_ROWS: tl.constexpr):
    """Rows of a gradient, to places of their own or to sums shared with other programs."""
    if OWN_ROWS:
        tl.store(pointers, b_rows, mask=mask)
    else:
        tl.atomic_add(pointers, b_rows, mask=mask, sem="relaxed")


@jit(do_not_specialize=["num_queries", "num_keys", "num_places"])
def _used_kernel(
    indices_ptr,  # int32 [B, S, K]
    used_ptr,  # int32 [B * S]
    stride_ib,
    stride_is,
    stride_ik,
    num_queries,
    num_keys,
    num_places,
    BLOCK: tl.constexpr,
):
    i_query = tl.program_id(0).to(tl.int64)
    indices_ptr += (i_query // num_queries) * stride_ib + (i_query % num_queries) * stride_is
    used = 0
    for start in range(0, num_places, BLOCK):
        o_place = start + tl.arange(0, BLOCK)
        b_index = tl.load(indices_ptr + o_place * stride_ik, mask=o_place < num_places, other=-1)
        used = tl.maximum(used, tl.max(tl.where((b_index >= 0) & (b_index < num_keys), o_place + 1, 0)))
    tl.store(used_ptr + i_query, used)


def used_places(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    """int32 [B * S]: one more than the last place of each list that names a row; what follows need not be read.

    A kernel of its own: as a reduction inside the attention kernels it makes their loops look divergent to the
    assembler, which then keeps the operand descriptors in ordinary registers and spills.
    """
    used = torch.empty(indices.shape[0] * indices.shape[1], dtype=torch.int32, device=indices.device)
    with on_device(indices.device):
        _used_kernel[(used.shape[0],)](
            indices,
            used,
            *indices.stride(),
            indices.shape[1],
            num_keys,
            indices.shape[2],
            BLOCK=USED_BLOCK,
            num_warps=4,
        )
    return used


def num_splits(programs: int, num_places: int, tile: int, processors: int) -> int:
    """Into how many parts each list is cut so that `programs` fill the device: at least two tiles in a part."""
    return max(1, min(processors // max(1, programs), num_places // (2 * tile), MAX_SPLITS))


@jit(do_not_specialize=["num_rows", "num_splits"])
def _combine_kernel(
    part_ptr,  # [splits, rows, C]
    part_lse_ptr,  # [splits, rows]
    out_ptr,  # [rows, C]
    lse_ptr,  # [rows]
    num_rows,
    num_splits,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_split = tl.arange(0, BLOCK_SPLITS)
    b_lse = tl.load(part_lse_ptr + o_split * num_rows + i_row, mask=o_split < num_splits, other=float("-inf"))
    top = tl.max(b_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(b_lse - safe))
    total = tl.where(total == 0.0, 1.0, total)
    o_column = tl.arange(0, BLOCK_C)
    m_column = o_column < C
    b_out = tl.zeros([BLOCK_C], b_lse.dtype)
    part_ptr += i_row * C
    for i_split in range(num_splits):
        weight = tl.exp(tl.load(part_lse_ptr + i_split * num_rows + i_row) - safe) / total
        b_out += weight * tl.load(part_ptr + o_column, mask=m_column, other=0.0)
        part_ptr += tl.cast(num_rows, tl.int64) * C
    tl.store(out_ptr + i_row * C + o_column, b_out.to(out_ptr.dtype.element_ty), mask=m_column)
    tl.store(lse_ptr + i_row, top + tl.log(total))


def combine(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Parts [splits, ..., C], each normalised by its own sum, into out [..., C] and lse [...], in a fixed order.

    A part without keys holds 0 and -inf and has weight 0.
    """
    with on_device(out.device):
        _combine_kernel[(lse.numel(),)](
            part,
            part_lse,
            out,
            lse,
            lse.numel(),
            part.shape[0],
            C=out.shape[-1],
            BLOCK_C=triton.next_power_of_2(out.shape[-1]),
            BLOCK_SPLITS=MAX_SPLITS,
            num_warps=4,
        )


@jit
def _add_rows_kernel(
    part_ptr,  # [places, W]
    order_ptr,  # int64 [places], places sorted by row
    bounds_ptr,  # int64 [rows + 1], where the places of a row begin in `order`
    total_ptr,  # [rows, W]
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds_ptr + i_row)
    last = tl.load(bounds_ptr + i_row + 1)
    o_column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_column = o_column < W
    if first < last:
        b_total = tl.load(total_ptr + i_row * W + o_column, mask=m_column, other=0.0)
        for i_place in range(first, last):
            i_part = tl.load(order_ptr + i_place)
            b_total += tl.load(part_ptr + i_part * W + o_column, mask=m_column, other=0.0)
        tl.store(total_ptr + i_row * W + o_column, b_total, mask=m_column)


def add_rows_in_order(part: torch.Tensor, rows: torch.Tensor, total: torch.Tensor) -> None:
    """total [R, W] += part [n, W] at rows int64 [n] (R: nowhere), in ascending n for each row: bit-equal over runs."""
    ordered, order = torch.sort(rows, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(total.shape[0] + 1, device=rows.device))
    width = total.shape[1]
    block = min(256, triton.next_power_of_2(width))
    with on_device(total.device):
        _add_rows_kernel[(total.shape[0], triton.cdiv(width, block))](
            part, order, bounds, total, W=width, BLOCK_W=block, num_warps=2
        )
