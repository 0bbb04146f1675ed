"""The target of the indexer's KL loss over lists, in Triton: the attention, averaged over its heads.

    p[t, s] = mean over heads h of exp(scaling q[t, h] . k[s] - lse[t, h])   for the places s of the list of query t

The attention left its log-sum-exps, so one pass over the keys is enough. As in the attention itself,

- where many heads share their keys (latent attention), a program reads the list of one query for all its heads;
- where few do, a program reads, for one group of keys, the union of the lists of a unit of neighbouring queries
  (`triton_union_keye`): keys gathered for one query alone would feed too few products.

Prefixes and sizes as in `triton_kl_keye.py`; n queries of a chunk, P places of a workspace row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .triton_common_keye import jit, on_device, tl, triton
from .triton_gather_keye import HOPPER_SHARED, LOG2_E, SLACK, first_fitting, scores_apart, scores_of
from .triton_kl_keye import ListTiles, load_columns, split_width, width_of
from .triton_tuning_keye import tunable
from .triton_union_keye import unions, unit_blocks

# Queries of a unit whose union is worth making: fewer share too little.
_LEAST_UNIT = 4


@dataclass(frozen=True)
class UnionTiles:
    """Queries of a unit, heads of a group and places per program (powers of two), launch options."""

    queries: int
    heads: int
    places: int
    num_warps: int
    num_stages: int


@tunable("kl_unions", places=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 5))
def union_tiles(heads: int, width: int, element_size: int, shared: int) -> UnionTiles:
    """Blocks for `heads` heads per group of keys of `width` padded columns; no length enters."""
    heads = triton.next_power_of_2(heads)
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(columns: int, places: int, buffers: int = 2 if hopper else 1) -> int:
        return (columns + buffers * places) * width * element_size

    blocks = [(128, 64), (64, 64), (32, 32), (32, 16)] if element_size == 2 else [(32, 16), (16, 16)]
    columns, places = first_fitting(unit_blocks(blocks, heads, 128), size, shared)
    # Half of the stages bring positions, half keys. Two programs share a multiprocessor, one reduces while one waits.
    ahead = hopper and 2 * (size(columns, places, 3) + SLACK) <= shared
    return UnionTiles(columns // heads, heads, places, 4, 5 if ahead else 3)


@jit(do_not_specialize=["first_query", "num_queries", "num_keys", "num_places", "num_groups"])
def _list_kernel(
    queries_ptr,  # [B, n, H, D]
    keys_ptr,  # [B, G, T, D]
    lse_ptr,  # [B, n, H]
    selected_ptr,  # int32 [B, n, K]
    used_ptr,  # int32 [B * n]
    target_ptr,  # [chunk, P], by place
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_kd,
    stride_lb,
    stride_ls,
    stride_lh,
    stride_sb,
    stride_ss,
    stride_sk,
    first_query,
    num_queries,
    num_keys,
    num_places,
    row_places,
    num_groups,
    HEADS: tl.constexpr,  # per group of keys
    A: tl.constexpr,
    R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # of a loop that multiplies both blocks of columns apart, or None
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Places are the rows of the products and heads their columns. A block of heads adds to what the last one left."""
    i_local = tl.program_id(0).to(tl.int64)
    i_query = first_query + i_local
    i_b, i_s = i_query // num_queries, i_query % num_queries
    queries_ptr += i_b * stride_qb + i_s * stride_qs
    keys_ptr += i_b * stride_kb
    lse_ptr += i_b * stride_lb + i_s * stride_ls
    selected_ptr += i_b * stride_sb + i_s * stride_ss
    target_ptr += i_local * row_places
    used = tl.load(used_ptr + i_query)
    head_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    for i_block in range(num_groups * head_blocks):
        o_member = (i_block % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        m_head = o_member < HEADS
        o_head = (i_block // head_blocks) * HEADS + o_member
        q_rows = queries_ptr + o_head * stride_qh
        b_q, b_q_rest = load_columns(q_rows, m_head, stride_qd, A, R, BLOCK_A, BLOCK_R, DOT)
        b_lse = tl.load(lse_ptr + o_head * stride_lh, mask=m_head, other=float("inf")).to(ACC) * 1.4426950408889634
        group_ptr = keys_ptr + (i_block // head_blocks) * tl.cast(stride_kg, tl.int64)
        for start in tl.range(0, used, BLOCK_K, num_stages=STAGES):
            o_place = start + tl.arange(0, BLOCK_K)
            b_index = tl.load(selected_ptr + o_place * stride_sk, mask=o_place < num_places, other=-1)
            m_place = (b_index >= 0) & (b_index < num_keys)
            key_rows = group_ptr + b_index.to(tl.int64) * stride_kt
            b_k, b_k_rest = load_columns(key_rows, m_place, stride_kd, A, R, BLOCK_A, BLOCK_R, DOT)
            if STAGES is None:
                b_scores = scores_of(b_q, b_k, True, ACC)
                if R > 0:
                    b_scores += scores_of(b_q_rest, b_k_rest, True, ACC)
            else:
                b_scores = scores_apart(b_q, b_q_rest, b_k, b_k_rest, start, used, True, ACC)
            b_target = tl.sum(tl.exp2(b_scores * scale_log2 - b_lse[None, :]), 1) / (num_groups * HEADS)
            # An unused place has score 0, which may lie far above the log-sum-exp.
            b_target = tl.where(m_place, b_target, 0.0)
            b_target += tl.load(target_ptr + o_place, mask=m_place & (i_block > 0), other=0.0)
            tl.store(target_ptr + o_place, b_target)
        tl.debug_barrier()  # other threads read what this one wrote


@jit(do_not_specialize=["i_b", "first_unit", "first_local", "num_queries", "num_places", "num_groups", "rows"])
def _union_kernel(
    queries_ptr,  # [B, n, H, D]
    keys_ptr,  # [B, G, T, D]
    lse_ptr,  # [B, n, H]
    positions_ptr,  # int32 [units, U]
    members_ptr,  # int32 [units, U]
    sizes_ptr,  # int32 [units]
    target_ptr,  # [G, rows, P]; entry r of a row belongs to the r-th row that the query selected
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_kd,
    stride_lb,
    stride_ls,
    stride_lh,
    i_b,
    first_unit,  # of the unions
    first_local,  # of this launch
    num_queries,
    num_places,  # U
    row_places,
    num_groups,
    rows,
    HEADS: tl.constexpr,  # per group of keys
    A: tl.constexpr,
    R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Places are the rows of the products. Their columns have the queries innermost, so that a thread holds all heads
    of its pairs, and their sum needs no other thread."""
    i_group = tl.program_id(0) % num_groups
    i_own = (tl.program_id(0) // num_groups).to(tl.int64)
    i_unit = first_local + i_own
    o_column = tl.arange(0, BLOCK_H * QUERIES)
    o_query = (first_unit + i_unit) * QUERIES + o_column % QUERIES
    o_member = o_column // QUERIES
    m_column = (o_member < HEADS) & (o_query < num_queries)
    o_head = i_group * HEADS + o_member
    b_wide = tl.cast(i_b, tl.int64)
    q_rows = queries_ptr + b_wide * stride_qb + o_query * stride_qs + o_head * stride_qh
    b_q, b_q_rest = load_columns(q_rows, m_column, stride_qd, A, R, BLOCK_A, BLOCK_R, DOT)
    lse_rows = lse_ptr + b_wide * stride_lb + o_query * stride_ls + o_head * stride_lh
    b_lse = tl.load(lse_rows, mask=m_column, other=float("inf")).to(ACC) * 1.4426950408889634
    keys_ptr += b_wide * stride_kb + i_group.to(tl.int64) * stride_kg
    positions_ptr += i_unit * num_places
    members_ptr += i_unit * num_places
    size = tl.load(sizes_ptr + i_unit)
    o_own = tl.arange(0, QUERIES)
    target_rows = target_ptr + ((i_group * rows + i_own * QUERIES + o_own) * row_places)[None, :]
    b_count = tl.zeros([QUERIES], tl.int32)
    for start in range(0, size, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        m_place = o_place < size
        b_position = tl.load(positions_ptr + o_place, mask=m_place, other=0)
        b_word = tl.load(members_ptr + o_place, mask=m_place, other=0)
        key_rows = keys_ptr + b_position.to(tl.int64) * stride_kt
        b_k, b_k_rest = load_columns(key_rows, m_place, stride_kd, A, R, BLOCK_A, BLOCK_R, DOT)
        b_scores = scores_of(b_q, b_k, True, ACC)
        if R > 0:
            b_scores += scores_of(b_q_rest, b_k_rest, True, ACC)
        b_probs = tl.exp2(b_scores * scale_log2 - b_lse[None, :])
        b_target = tl.sum(tl.reshape(b_probs, (BLOCK_K, BLOCK_H, QUERIES)), axis=1) / (num_groups * HEADS)
        b_chosen = (b_word[:, None] >> o_own[None, :]) & 1
        o_entry = b_count[None, :] + tl.cumsum(b_chosen, axis=0) - b_chosen
        b_count += tl.sum(b_chosen, axis=0)
        tl.store(target_rows + o_entry, b_target, mask=b_chosen != 0)


def unit_of(queries: torch.Tensor, keys: torch.Tensor, shared: int) -> UnionTiles | None:
    """Blocks of the kernel that reads unions; None where lists are read one by one."""
    heads, size = queries.shape[2] // keys.shape[1], torch.promote_types(queries.dtype, keys.dtype).itemsize
    try:
        tiles = union_tiles(heads, width_of(queries.shape[-1]), size, shared)
    except ValueError:  # then a list may still fit
        return None
    return tiles if _LEAST_UNIT <= tiles.queries <= queries.shape[1] else None


def targets(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    selected: torch.Tensor,
    used: torch.Tensor,
    scaling: float,
    list_tiles: ListTiles,
    unit: UnionTiles | None,
    target: torch.Tensor,
    types: dict,
) -> Iterator[tuple[int, int]]:
    """Writes the targets of some queries after the other into `target`: (the first of them, counted over all B * n; how
    many). With a `unit`, parts that add up to p, for the used places of a list one by one; else p, for all its places.

    queries [B, n, H, D], keys [B, G, T, D], lse [B, n, H], selected int32 [B, n, K], of which the used places ascend;
    used int32 [B * n], as `used_places` gives it; target [G with a unit, else 1, queries of a chunk, P].
    """
    batch, num_queries, heads, dim = queries.shape
    groups, num_keys = keys.shape[1:3]
    strides = (*queries.stride(), *keys.stride(), *lse.stride())
    chunk, row_places = target.shape[1:]
    common = {"HEADS": heads // groups, **split_width(dim), "DOT": types["DOT"], "ACC": types["ACC"]}
    if unit is None:
        for begin in range(0, batch * num_queries, chunk):
            count = min(chunk, batch * num_queries - begin)
            with on_device(queries.device):
                _list_kernel[(count,)](
                    queries,
                    keys,
                    lse,
                    selected,
                    used,
                    target,
                    scaling * LOG2_E,
                    *strides,
                    *selected.stride(),
                    begin,
                    num_queries,
                    num_keys,
                    selected.shape[2],
                    row_places,
                    groups,
                    **common,
                    BLOCK_H=list_tiles.rows,
                    BLOCK_K=list_tiles.keys,
                    STAGES=list_tiles.num_stages if list_tiles.apart and common["R"] else None,
                    num_warps=list_tiles.num_warps,
                    num_stages=list_tiles.num_stages,
                )
            yield begin, count
        return
    units = chunk // unit.queries
    for b in range(batch):
        for union in unions(selected[b : b + 1], num_keys, unit.queries, groups):
            for local in range(0, union.count, units):
                count = min(units, union.count - local)
                with on_device(queries.device):
                    _union_kernel[(count * groups,)](
                        queries,
                        keys,
                        lse,
                        union.positions,
                        union.members,
                        union.sizes,
                        target,
                        scaling * LOG2_E,
                        *strides,
                        b,
                        union.first,
                        local,
                        num_queries,
                        union.positions.shape[1],
                        row_places,
                        groups,
                        chunk,
                        **common,
                        QUERIES=unit.queries,
                        BLOCK_H=unit.heads,
                        BLOCK_K=unit.places,
                        num_warps=unit.num_warps,
                        num_stages=unit.num_stages,
                    )
                begin = (union.first + local) * unit.queries
                yield b * num_queries + begin, min(count * unit.queries, num_queries - begin)
