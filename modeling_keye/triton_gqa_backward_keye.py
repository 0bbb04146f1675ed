"""Backward pass of sparse grouped-query attention in Triton, over unions of the lists of neighbouring queries.

Probabilities are made again from the log-sum-exp, never kept from the forward pass:

    P = exp(scale q.k - lse)     dS = P (dO.v - sum(O dO)) scale     dq = dS k     dk = dS^T q     dv = P^T dO

One program takes one key/value head of one unit of queries. Gradients of queries are its own; those of a row are summed
over the queries and heads of the unit by the products, then added atomically to the sum that all units share. When
deterministic algorithms are asked for, each place of a union writes rows of its own instead, and the rows of one key
are added in the order of the units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_common_keye import jit, on_device, operand_dtype, shared_memory, tl, triton, within_32_bits
from .triton_gather_keye import (
    HOPPER_SHARED,
    WORKSPACE_BYTES,
    add_rows_in_order,
    add_weighted,
    first_fitting,
    give_rows,
    load_rows,
    scores_of,
)
from .triton_tuning_keye import tunable
from .triton_union_keye import Union, unions, unit_blocks


def padded(size: int) -> int:
    """The least power of two that holds `size` columns of a matrix product."""
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Tiles:
    """Queries, heads of one key/value head and places per program, launch options."""

    queries: int
    heads: int
    places: int
    num_warps: int
    num_stages: int


@tunable("gqa_backward", places=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3))
def tiles_for(heads_per_group: int, dim: int, value_dim: int, element_size: int, shared: int) -> Tiles:
    """Blocks for padded head sizes that fit `shared` bytes; no length enters."""
    heads = triton.next_power_of_2(heads_per_group)
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(rows: int, places: int) -> int:
        both = dim + value_dim
        buffers = 2 if hopper else 1
        # Queries and gradients of the output; keys and values; probabilities and their gradients. Gradients of keys
        # change their layout through the memory of the latter before they are added.
        operands = (rows + buffers * places) * both + rows * places
        if hopper and places < 64:  # not all products are Hopper's, and the others read copies in another layout
            operands += rows * both
        scratch = max(2 * rows * places * element_size, places * max(dim, value_dim) * 4)
        return operands * element_size + scratch

    if element_size > 2:
        blocks = [(32, 16), (16, 16)]
    elif hopper:
        blocks = [(128, 64), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16)]
    else:
        blocks = [(64, 32), (32, 32), (32, 16), (16, 16)]
    # Off Hopper operands live in registers too.
    most_rows = 128 * (128 if hopper else 64) // max(dim, value_dim)
    rows, places = first_fitting(unit_blocks(blocks, heads, most_rows), size, shared)
    return Tiles(rows // heads, heads, places, 8, 2)


@jit(do_not_specialize=["first_unit", "first_local", "units", "num_queries", "num_keys", "own_places", "num_groups"])
def _backward_kernel(
    q_ptr,  # [B, S, H, D]
    k_ptr,  # [B, G, T, D]
    v_ptr,  # [B, G, T, E]
    positions_ptr,  # int32 [units, U]
    members_ptr,  # int32 [units, U]
    sizes_ptr,  # int32 [units]
    out_ptr,  # [B, S, H, E]
    lse_ptr,  # [B, S, H]
    grad_out_ptr,  # [B, S, H, E]
    grad_q_ptr,  # [B, S, H, D]
    grad_k_ptr,  # [B, G, T, D], or [units, G, places, D] when each place writes its own row
    grad_v_ptr,  # the same with E
    scaling,
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
    stride_gb,
    stride_gs,
    stride_gh,
    stride_gd,
    first_unit,
    first_local,  # of the unions
    units,  # of one sequence
    num_queries,
    num_keys,
    num_places,  # U
    own_places,
    num_groups,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    i_group = tl.program_id(0) % num_groups
    i_own = (tl.program_id(0) // num_groups).to(tl.int64)
    i_local = first_local + i_own
    i_b = (first_unit + i_local) // units
    o_row = tl.arange(0, QUERIES * BLOCK_H)
    o_member = o_row // BLOCK_H
    o_query = ((first_unit + i_local) % units) * QUERIES + o_member
    o_head = i_group * HEADS + o_row % BLOCK_H
    m_row = (o_row % BLOCK_H < HEADS) & (o_query < num_queries)
    q_rows = q_ptr + i_b * stride_qb + o_query * stride_qs + o_head * stride_qh
    b_q = load_rows(q_rows, m_row, stride_qd, 0, D, BLOCK_D, DOT)
    grad_rows = grad_out_ptr + i_b * stride_gb + o_query * stride_gs + o_head * stride_gh
    b_grad = load_rows(grad_rows, m_row, stride_gd, 0, E, BLOCK_E, DOT)
    o_out = (i_b * num_queries + o_query) * (num_groups * HEADS) + o_head
    b_out = load_rows(out_ptr + o_out * E, m_row, 1, 0, E, BLOCK_E, DOT)
    b_delta = tl.sum(b_out.to(ACC) * b_grad.to(ACC), 1)
    b_lse = tl.load(lse_ptr + o_out, mask=m_row, other=0.0)
    k_ptr += i_b * stride_kb + i_group.to(tl.int64) * stride_kg
    v_ptr += i_b * stride_vb + i_group.to(tl.int64) * stride_vg
    positions_ptr += i_local * num_places
    members_ptr += i_local * num_places
    size = tl.load(sizes_ptr + i_local)
    b_grad_q = tl.zeros([QUERIES * BLOCK_H, BLOCK_D], ACC)
    o_d, o_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for start in range(0, size, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        m_place = o_place < size
        b_position = tl.load(positions_ptr + o_place, mask=m_place, other=0)
        b_word = tl.load(members_ptr + o_place, mask=m_place, other=0)
        b_offset = b_position.to(tl.int64)
        b_k = load_rows(k_ptr + b_offset * stride_kt, m_place, stride_kd, 0, D, BLOCK_D, DOT)
        b_v = load_rows(v_ptr + b_offset * stride_vt, m_place, stride_vd, 0, E, BLOCK_E, DOT)
        m_score = ((b_word[None, :] >> o_member[:, None]) & 1) != 0
        if OWN_ROWS:
            o_grad = (i_own * num_groups + i_group) * own_places + o_place
        else:
            o_grad = (i_b * num_groups + i_group) * num_keys + b_position
        # A pair that was not selected has no part in the log-sum-exp and may lie far above it: masked before the power.
        b_scores = tl.where(m_score, scores_of(b_q, b_k, False, ACC) * scaling - b_lse[:, None], float("-inf"))
        b_probs = tl.exp2(b_scores * 1.4426950408889634)
        # Each gradient leaves the registers before the next is made.
        b_grad_v = tl.dot(tl.trans(b_probs.to(DOT)), b_grad, input_precision="ieee", out_dtype=ACC)
        give_rows(
            grad_v_ptr + o_grad[:, None] * E + o_e[None, :], b_grad_v, m_place[:, None] & (o_e < E)[None, :], OWN_ROWS
        )
        b_grad_scores = (scores_of(b_grad, b_v, False, ACC) - b_delta[:, None]) * b_probs * scaling
        b_grad_scores = b_grad_scores.to(DOT)
        b_grad_k = tl.dot(tl.trans(b_grad_scores), b_q, input_precision="ieee", out_dtype=ACC)
        give_rows(
            grad_k_ptr + o_grad[:, None] * D + o_d[None, :], b_grad_k, m_place[:, None] & (o_d < D)[None, :], OWN_ROWS
        )
        b_grad_q = add_weighted(b_grad_q, b_grad_scores, b_k, False, ACC)
    tl.store(
        grad_q_ptr + o_out[:, None] * D + o_d[None, :],
        b_grad_q.to(grad_q_ptr.dtype.element_ty),
        mask=m_row[:, None] & (o_d < D)[None, :],
    )


def _most_places(union: Union) -> int:
    """At least as many as each union of the chunk has. Asking the device for the number would break a capture, which
    goes through as many as there can be."""
    if union.sizes.is_cuda and torch.cuda.is_current_stream_capturing():
        return union.positions.shape[1]
    return max(1, int(union.sizes[: union.count].max()))


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q [B, S, H, D], k [B, G, T, D] and v [B, G, T, E] for `out`, `lse` of the forward pass."""
    q, grad_out = within_32_bits(q), within_32_bits(grad_out)
    batch, num_queries, heads, dim = q.shape
    groups, num_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
    grad_v = torch.zeros(v.shape, dtype=lse.dtype, device=v.device)
    if lse.numel() == 0:
        return grad_q.zero_(), grad_k.to(k.dtype), grad_v.to(v.dtype)
    block_d, block_e = padded(dim), padded(value_dim)
    tiles = tiles_for(heads // groups, block_d, block_e, dtype.itemsize, shared_memory(q.device))
    units = triton.cdiv(num_queries, tiles.queries)

    def launch(union, begin, count, k_rows, v_rows, own_places):
        with on_device(q.device):
            _backward_kernel[(count * groups,)](
                q,
                k,
                v,
                union.positions,
                union.members,
                union.sizes,
                out,
                lse,
                grad_out,
                grad_q,
                k_rows,
                v_rows,
                scaling,
                *q.stride(),
                *k.stride(),
                *v.stride(),
                *grad_out.stride(),
                union.first,
                begin,
                units,
                num_queries,
                num_keys,
                union.positions.shape[1],
                own_places,
                groups,
                HEADS=heads // groups,
                D=dim,
                E=value_dim,
                BLOCK_D=block_d,
                BLOCK_E=block_e,
                QUERIES=tiles.queries,
                BLOCK_H=tiles.heads,
                BLOCK_K=tiles.places,
                OWN_ROWS=own_places > 0,
                DOT=operand_dtype(dtype),
                ACC=tl.float64 if lse.dtype == torch.float64 else tl.float32,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )

    for union in unions(indices, num_keys, tiles.queries, groups):
        if not torch.are_deterministic_algorithms_enabled():
            launch(union, 0, union.count, grad_k, grad_v, 0)
            continue
        largest = _most_places(union)
        own_bytes = groups * largest * (dim + value_dim) * lse.element_size()
        chunk = min(union.count, max(1, WORKSPACE_BYTES // own_bytes))
        k_rows = torch.empty(chunk, groups, largest, dim, dtype=lse.dtype, device=q.device)
        v_rows = torch.empty(chunk, groups, largest, value_dim, dtype=lse.dtype, device=q.device)
        head = torch.arange(groups, device=q.device)[:, None] * num_keys
        for begin in range(0, union.count, chunk):
            count = min(chunk, union.count - begin)
            launch(union, begin, count, k_rows, v_rows, largest)
            local = torch.arange(begin, begin + count, device=q.device)
            sequence = (union.first + local) // units * (groups * num_keys)
            places = torch.arange(largest, device=q.device)
            rows = union.positions[begin : begin + count, None, :largest] + head + sequence[:, None, None]
            unused = (places >= union.sizes[begin : begin + count, None])[:, None]
            rows = rows.masked_fill(unused, batch * groups * num_keys).flatten()
            add_rows_in_order(k_rows[:count].flatten(0, 2), rows, grad_k.flatten(0, 2))
            add_rows_in_order(v_rows[:count].flatten(0, 2), rows, grad_v.flatten(0, 2))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
