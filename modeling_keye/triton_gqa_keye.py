"""Sparse grouped-query attention in Triton: prefill over unions of lists, split decode, and the entry with gradients.

The contract is that of `sparse_attention_keye.sparse_gqa`; `sparse_reference_keye.sparse_gqa` is the judge. A program
takes one key/value head and either the query heads of a unit of neighbouring queries, which read the union of their
lists (`triton_union_keye`), or, where queries are few, those of a single query and its own list. Lists are cut into
parts where programs are too few to fill the device.

Sizes: B batch, S queries, T keys, H query heads, G key/value heads, D head size, E head size of values, K places of a
list, U places of a union. Prefixes as in `triton_gather_keye.py`. Logarithms in the kernels have base 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_common_keye import (
    jit,
    multiprocessors,
    on_device,
    operand_dtype,
    shared_memory,
    tl,
    triton,
    within_32_bits,
)
from .triton_gather_keye import (
    HOPPER_SHARED,
    LOG2_E,
    SLACK,
    add_weighted,
    combine,
    first_fitting,
    load_rows,
    num_splits,
    scores_of,
    used_places,
)
from .triton_gqa_backward_keye import backward, padded
from .triton_gqa_backward_keye import tiles_for as backward_tiles
from .triton_tuning_keye import tunable
from .triton_union_keye import unions, unit_blocks


@dataclass(frozen=True)
class Tiles:
    """Rows (queries x heads of one key/value head) and places per program, queries per program, launch options."""

    queries: int
    heads: int
    places: int
    num_warps: int
    num_stages: int


@tunable("gqa_unions", places=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 5, 7))
def union_tiles(heads_per_group: int, dim: int, value_dim: int, element_size: int, shared: int) -> Tiles:
    """Blocks for padded head sizes that fit `shared` bytes; no length enters."""
    heads = triton.next_power_of_2(heads_per_group)
    # Hopper reads a tile from shared memory while the next one arrives; older devices hold it in registers.
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(rows: int, places: int, buffers: int = 2 if hopper else 1) -> int:
        return (rows * dim + buffers * places * (dim + value_dim) + rows * places) * element_size

    blocks = [(128, 64), (64, 64), (64, 32), (32, 32), (32, 16)] if element_size == 2 else [(32, 16), (16, 16)]
    rows, places = first_fitting(unit_blocks(blocks, heads, 128 * 128 // value_dim), size, shared)
    # Half of the stages bring positions, half rows: with three, a tile is waited for as soon as it is asked for.
    ahead = hopper and size(rows, places, 3) <= shared - SLACK
    return Tiles(rows // heads, heads, places, 8, 5 if ahead else 3)


@tunable("gqa_lists", places=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 5, 7))
def list_tiles(heads_per_group: int, dim: int, value_dim: int, element_size: int, shared: int) -> Tiles:
    """The same for one query per program."""
    heads = max(16, triton.next_power_of_2(heads_per_group))

    def size(heads: int, places: int, buffers: int = 1) -> int:
        return (heads * dim + buffers * places * (dim + value_dim) + heads * places) * element_size

    blocks = [(heads, places) for places in ((64, 32, 16) if element_size == 2 else (16,))]
    _, places = first_fitting(blocks, size, shared)
    # Two tiles on their way where three programs still share a multiprocessor.
    ahead = element_size == 2 and 3 * (size(heads, places, 2) + SLACK) <= shared
    return Tiles(1, heads, places, 4, 5 if ahead else 3)


@jit(do_not_specialize=["first_unit", "units", "num_rows", "num_queries", "num_keys", "num_places", "num_groups"])
def _forward_kernel(
    q_ptr,  # [B, S, H, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,  # [B, G, T, E]
    positions_ptr,  # int32 [B, S, K], or the unions [units, U]
    members_ptr,  # int32 [units, U], or None for lists
    sizes_ptr,  # int32 [units], or None when all places of a list are read
    out_ptr,  # [splits, B, S, H, E]
    lse_ptr,  # [splits, B, S, H]
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vg,
    stride_vt,
    stride_vd,
    stride_pb,
    stride_ps,
    stride_pk,
    first_unit,
    units,  # of one sequence
    num_rows,  # B * S * H
    num_queries,
    num_keys,
    num_places,
    num_groups,
    HEADS: tl.constexpr,  # per key/value head
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    # The key/value heads of a unit are neighbours, so that its positions are read from the cache.
    i_group = tl.program_id(0) % num_groups
    i_local = (tl.program_id(0) // num_groups).to(tl.int64)
    i_b = (first_unit + i_local) // units
    o_row = tl.arange(0, QUERIES * BLOCK_H)
    o_member = o_row // BLOCK_H
    o_query = ((first_unit + i_local) % units) * QUERIES + o_member
    o_head = i_group * HEADS + o_row % BLOCK_H
    m_row = (o_row % BLOCK_H < HEADS) & (o_query < num_queries)
    q_rows = q_ptr + i_b * stride_qb + o_query * stride_qs + o_head * stride_qh
    b_q = load_rows(q_rows, m_row, stride_qd, 0, D, BLOCK_D, DOT)
    k_ptr += i_b * stride_kb + i_group.to(tl.int64) * stride_kg
    v_ptr += i_b * stride_vb + i_group.to(tl.int64) * stride_vg
    if members_ptr is None:
        positions_ptr += i_b * stride_pb + ((first_unit + i_local) % units) * stride_ps
    else:
        positions_ptr += i_local * num_places
        members_ptr += i_local * num_places

    size = num_places if sizes_ptr is None else tl.load(sizes_ptr + i_local)
    span = tl.cdiv(tl.cdiv(size, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, size)
    b_max = tl.full([QUERIES * BLOCK_H], float("-inf"), ACC)
    b_sum = tl.zeros([QUERIES * BLOCK_H], ACC)
    b_out = tl.zeros([QUERIES * BLOCK_H, BLOCK_E], ACC)
    for start in range(first, last, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        b_position = tl.load(positions_ptr + o_place * stride_pk, mask=o_place < last, other=-1)
        m_place = (b_position >= 0) & (b_position < num_keys)
        b_offset = b_position.to(tl.int64)
        b_k = load_rows(k_ptr + b_offset * stride_kt, m_place, stride_kd, 0, D, BLOCK_D, DOT)
        b_v = load_rows(v_ptr + b_offset * stride_vt, m_place, stride_vd, 0, E, BLOCK_E, DOT)
        if members_ptr is None:
            m_score = m_place[None, :]
        else:
            b_word = tl.load(members_ptr + o_place, mask=o_place < last, other=0)
            m_score = ((b_word[None, :] >> o_member[:, None]) & 1) != 0
        b_scores = tl.where(m_score, scores_of(b_q, b_k, False, ACC) * scale_log2, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_probs = tl.exp2(b_scores - b_safe[:, None])
        b_decay = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
        b_out = add_weighted(b_out * b_decay[:, None], b_probs.to(DOT), b_v, False, ACC)
        b_max = b_new

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # without keys the maximum is -inf, and so becomes the log-sum-exp
    b_out = b_out / b_sum[:, None]
    o_out = (i_b * num_queries + o_query) * (num_groups * HEADS) + o_head
    o_out += tl.program_id(1).to(tl.int64) * num_rows
    o_column = tl.arange(0, BLOCK_E)
    tl.store(
        out_ptr + o_out[:, None] * E + o_column[None, :],
        b_out.to(out_ptr.dtype.element_ty),
        mask=m_row[:, None] & (o_column < E)[None, :],
    )
    tl.store(lse_ptr + o_out, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_row)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """None when the kernels take heads and head sizes of these inputs, else one sentence that says why not."""
    try:
        for choose in (union_tiles, list_tiles, backward_tiles):
            choose(*_sizes(q, k, v))
    except ValueError as error:
        return str(error)
    return None


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, int, int, int, int]:
    """What blocks are chosen by: heads per key/value head, padded head sizes, bytes per element, shared memory."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    heads = q.shape[2] // k.shape[1]
    return heads, padded(q.shape[3]), padded(v.shape[3]), dtype.itemsize, shared_memory(q.device)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q = within_32_bits(q)
    batch, num_queries, heads, dim = q.shape
    groups, num_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    statistics = torch.promote_types(dtype, torch.float32)
    out = q.new_empty(batch, num_queries, heads, value_dim)
    lse = torch.empty(batch, num_queries, heads, dtype=statistics, device=q.device)
    if lse.numel() == 0:
        return out, lse
    sizes = _sizes(q, k, v)
    tiles = union_tiles(*sizes)
    joined = 1 < tiles.queries <= num_queries
    if not joined:
        tiles = list_tiles(*sizes)
    units = triton.cdiv(num_queries, tiles.queries)
    width = min(num_keys, tiles.queries * indices.shape[2]) if joined else indices.shape[2]
    splits = num_splits(batch * units * groups, width, tiles.places, multiprocessors(q.device))
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, *out.shape, dtype=statistics, device=q.device)
        part_lse = torch.empty(splits, *lse.shape, dtype=statistics, device=q.device)

    def launch(first, count, positions, members, used, strides, places):
        with on_device(q.device):
            _forward_kernel[(count * groups, splits)](
                q,
                k,
                v,
                positions,
                members,
                used,
                part,
                part_lse,
                scaling * LOG2_E,
                *q.stride(),
                *k.stride(),
                *v.stride(),
                *strides,
                first,
                units,
                lse.numel(),
                num_queries,
                num_keys,
                places,
                groups,
                HEADS=heads // groups,
                D=dim,
                E=value_dim,
                BLOCK_D=sizes[1],
                BLOCK_E=sizes[2],
                QUERIES=tiles.queries,
                BLOCK_H=tiles.heads,
                BLOCK_K=tiles.places,
                DOT=operand_dtype(dtype),
                ACC=tl.float64 if statistics == torch.float64 else tl.float32,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )

    if joined:
        for union in unions(indices, num_keys, tiles.queries, k.shape[1]):
            strides = (0, union.positions.stride(0), 1)
            launch(
                union.first,
                union.count,
                union.positions,
                union.members,
                union.sizes,
                strides,
                union.positions.shape[1],
            )
    else:
        # With few queries, another launch would cost more than the places it saves.
        used = used_places(indices, num_keys) if splits == 1 else None
        launch(0, batch * num_queries, indices, None, used, indices.stride(), indices.shape[2])
    if splits > 1:
        combine(part, part_lse, out, lse)
    return out, lse


class _SparseGQA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, indices, scaling):
        out, lse = _forward(q, k, v, indices, scaling)
        ctx.save_for_backward(q, k, v, indices, out, lse)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        return *backward(*ctx.saved_tensors, grad_out, ctx.scaling), None, None


def sparse_gqa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_gqa`.

    Beyond its contract: indices at or past the number of keys count as unused, and the inputs may differ in dtype
    (products are made in the widest). A list must not repeat a row. A selected row that holds NaN reaches the
    neighbouring queries of its unit as well. The backward pass adds gradients of keys and values atomically, hence in
    no fixed order, unless `torch.use_deterministic_algorithms` is on. Raises `ValueError` where `unsupported` has
    something to say.
    """
    problem = unsupported(q, k, v)
    if problem is not None:
        raise ValueError(problem)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _SparseGQA.apply(q, k, v, indices, scaling)
    return _forward(q, k, v, indices, scaling)
