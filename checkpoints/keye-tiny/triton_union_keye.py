"""Unions of the lists of neighbouring queries, for sparse grouped-query attention.

One key/value head feeds few query heads, so rows gathered for one query alone are read for too few products. A unit of
up to 32 neighbouring queries reads the union of its lists instead: positions ascending, each with a word whose bit j
says that query j of the unit selected it. Memory bounds the number of units that are made at once, so callers walk
through chunks of units.

Sizes: B batch, S queries, T keys, K places of a list, U places of a union, U <= min(T, queries of a unit x K).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .triton_common_keye import jit, multiprocessors, on_device, tl, triton

# Membership words and unions of one chunk. At 128K keys and 2048 places there is room for 170 units of 16 queries, so
# that an H100 gets 132: with four key/value heads, four programs for each multiprocessor.
UNION_BYTES = 128 * 2**20
MAX_UNIT = 32
_MARK_BLOCK = 1024
_COLLECT_BLOCK = 4096


@dataclass(frozen=True)
class Union:
    """Units `first` .. `first + count` of the lists; `positions` and `members` hold `sizes[i]` places of unit i."""

    first: int
    count: int
    positions: torch.Tensor  # int32 [units, U]
    members: torch.Tensor  # int32 [units, U]
    sizes: torch.Tensor  # int32 [units]


def unit_blocks(blocks: list[tuple[int, int]], heads: int, most_rows: int) -> list[tuple[int, int]]:
    """Those of `blocks` (rows, places) that a unit can have; a row is one of `heads` heads of one query.

    Blocks of more than `most_rows` rows do not fit the registers, but at least one query has to be there anyway.
    """
    possible = [(min(rows, MAX_UNIT * heads), places) for rows, places in blocks if heads <= rows <= most_rows]
    return possible or [(heads, blocks[-1][1])]


@jit(do_not_specialize=["first_unit", "units", "num_queries", "num_keys", "num_places"])
def _mark_kernel(
    indices_ptr,  # int32 [B, S, K]
    words_ptr,  # int32 [units, row], zero
    ends_ptr,  # int32 [units], zero
    stride_ib,
    stride_is,
    stride_ik,
    first_unit,
    units,  # of one sequence
    num_queries,
    num_keys,
    num_places,
    row,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Query j of a unit sets bit j at the rows it selected; `ends` becomes one more than the last of them."""
    i_local = (tl.program_id(0) // QUERIES).to(tl.int64)
    i_unit = first_unit + i_local
    i_member = tl.program_id(0) % QUERIES
    i_b, i_s = i_unit // units, (i_unit % units) * QUERIES + i_member
    if i_s < num_queries:
        indices_ptr += i_b * stride_ib + i_s * stride_is
        words_ptr += i_local * row
        end = 0
        for start in range(0, num_places, BLOCK):
            o_place = start + tl.arange(0, BLOCK)
            b_index = tl.load(indices_ptr + o_place * stride_ik, mask=o_place < num_places, other=-1)
            m_place = (b_index >= 0) & (b_index < num_keys)
            b_bit = tl.full([BLOCK], 1, tl.int32) << i_member
            tl.atomic_or(words_ptr + b_index, b_bit, mask=m_place, sem="relaxed")
            end = tl.maximum(end, tl.max(tl.where(m_place, b_index + 1, 0)))
        tl.atomic_max(ends_ptr + i_local, end, sem="relaxed")


@jit
def _collect_kernel(
    words_ptr,  # int32 [units, row]
    ends_ptr,  # int32 [units]
    positions_ptr,  # int32 [units, width]
    members_ptr,  # int32 [units, width]
    sizes_ptr,  # int32 [units]
    row,
    width,
    BLOCK: tl.constexpr,
):
    """Words that are not zero, in order; leaves zeros behind for the next chunk."""
    i_unit = tl.program_id(0).to(tl.int64)
    words_ptr += i_unit * row
    positions_ptr += i_unit * width
    members_ptr += i_unit * width
    size = 0
    for start in range(0, tl.load(ends_ptr + i_unit), BLOCK):
        o_key = start + tl.arange(0, BLOCK)
        b_word = tl.load(words_ptr + o_key)
        tl.store(words_ptr + o_key, tl.zeros([BLOCK], tl.int32))
        b_chosen = (b_word != 0).to(tl.int32)
        o_place = size + tl.cumsum(b_chosen, 0) - b_chosen
        tl.store(positions_ptr + o_place, o_key, mask=b_word != 0)
        tl.store(members_ptr + o_place, b_word, mask=b_word != 0)
        size += tl.sum(b_chosen, 0)
    tl.store(sizes_ptr + i_unit, size)
    tl.store(ends_ptr + i_unit, 0)


def unions(indices: torch.Tensor, num_keys: int, queries: int, groups: int) -> Iterator[Union]:
    """A `Union` per chunk of units of `queries` queries of indices [B, S, K]; the next one reuses its tensors.

    The caller makes `groups` programs of each unit.
    """
    batch, num_queries, num_places = indices.shape
    units = triton.cdiv(num_queries, queries)
    row = max(1, triton.cdiv(num_keys, _COLLECT_BLOCK)) * _COLLECT_BLOCK
    width = triton.cdiv(max(1, min(num_keys, queries * num_places)), 128) * 128
    device = indices.device
    chunk, processors = max(1, UNION_BYTES // (4 * row + 8 * width)), multiprocessors(indices.device)
    # Whole rounds of programs, here or at least at the caller: a last one of few takes as long as a full one.
    for whole in (processors, processors // math.gcd(processors, groups)):
        if chunk >= whole:
            chunk -= chunk % whole
            break
    chunk = min(batch * units, chunk)
    words = torch.zeros(chunk, row, dtype=torch.int32, device=device)
    ends = torch.zeros(chunk, dtype=torch.int32, device=device)
    positions, members = (torch.empty(chunk, width, dtype=torch.int32, device=device) for _ in range(2))
    sizes = torch.empty(chunk, dtype=torch.int32, device=device)
    for first in range(0, batch * units, chunk):
        count = min(chunk, batch * units - first)
        with on_device(device):
            _mark_kernel[(count * queries,)](
                indices,
                words,
                ends,
                *indices.stride(),
                first,
                units,
                num_queries,
                num_keys,
                num_places,
                row,
                QUERIES=queries,
                BLOCK=_MARK_BLOCK,
                num_warps=4,
            )
            _collect_kernel[(count,)](
                words, ends, positions, members, sizes, row, width, BLOCK=_COLLECT_BLOCK, num_warps=8
            )
        yield Union(first, count, positions, members, sizes)
