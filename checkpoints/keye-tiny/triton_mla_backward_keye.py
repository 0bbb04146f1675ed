"""Backward pass of sparse multi-head latent attention in Triton, in two kernels over chunks of queries.

Probabilities are made again from the log-sum-exp, never kept from the forward pass:

    P = exp(scale q.kv - lse)     dS = P (dO.c - sum(O dO)) scale     dq = dS kv     dkv = dS^T q + [P^T dO, 0]

Done by one program, this needs q, dO, the tile and both gradients on chip, which no device has room for. So

1. `_score_gradients_kernel`, one program per query and block of heads like the forward pass, writes P and dS of a chunk
   of queries to a workspace, and
2. `_row_gradients_kernel`, one program per query and block of columns with all heads at once, reads them back and makes
   these columns of dq, which are its own, and of dkv, which other queries share.

Shared columns are added atomically. When deterministic algorithms are asked for, each place writes its own row instead
and the rows of one cache entry are added in the order of the queries.

Sizes: n queries of a chunk, P places of a workspace row; the others as in `triton_mla_keye.py`.
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
    used_places,
)
from .triton_tuning_keye import tunable

# Rows of the workspace are whole tiles of places, so that stores there need no mask. The first kernel fills the last of
# these tiles even where its own are shorter: the second reads it whole.
_PLACES_MULTIPLE = 64


@dataclass(frozen=True)
class ScoreTiles:
    """Blocks of the first kernel: heads, places, heads as columns of the products or as rows; launch options."""

    heads: int
    places: int
    swapped: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowTiles:
    """Blocks of the second kernel: heads (all of them), places, columns; launch options; products kept apart."""

    heads: int
    places: int
    columns: int
    swapped: bool
    num_warps: int
    num_stages: int
    apart: bool


@tunable(
    "mla_backward_scores",
    heads=(16, 32, 64),
    swapped=(False, True),
    places=(32, 64),
    num_warps=(4, 8),
    num_stages=(1, 2, 3),
)
def score_tiles(heads: int, latent: int, width: int, element_size: int, shared: int) -> ScoreTiles:
    """Blocks for padded sizes `latent` and `width` that fit `shared` bytes; no length enters."""
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(heads: int, places: int) -> int:
        buffers = 2 if hopper else 1
        return (heads * (width + latent) + buffers * places * width + heads * places) * element_size

    if element_size > 2:
        blocks = [(16, 16), (8, 16)]
    else:
        most = 64 if hopper else 32 if shared > 128 * 1024 else 16
        blocks = [(64, 64), (64, 32), (64, 16), (32, 64), (32, 32), (32, 16), (16, 64), (16, 32), (16, 16)]
        blocks = [(block, places) for block, places in blocks if block <= most and block < 2 * max(16, heads)]
    block, places = first_fitting(blocks, size, shared)
    # On Hopper one group of four warps: the products then read the fewest bytes of shared memory.
    return ScoreTiles(block, places, hopper and block < 64 <= places, 4 if hopper else 8, 2)


@tunable(
    "mla_backward_rows",
    apart=(False, True),
    swapped=(False, True),
    places=(32, 64),
    columns=(64, 128),
    num_warps=(4, 8),
    num_stages=(1, 2, 3),
)
def row_tiles(heads: int, width: int, element_size: int, shared: int) -> RowTiles:
    """Blocks for `heads` heads of `width` columns that fit `shared` bytes; no length enters."""
    block = max(16, triton.next_power_of_2(heads))
    columns = 128 if element_size == 2 and -width % 128 <= 64 else 64
    if element_size > 2:
        return RowTiles(block, 16, columns, False, 8, 2, False)
    hopper = shared >= HOPPER_SHARED
    return RowTiles(block, 64 if hopper else 32, columns, hopper and block < 64, 8, 2, hopper and block == 128)


@jit(do_not_specialize=["first_query", "num_queries", "num_keys", "num_places", "num_heads"])
def _score_gradients_kernel(
    q_ptr,  # [B, S, H, W]
    kv_ptr,  # [B, T, W]
    indices_ptr,  # int32 [B, S, K]
    used_ptr,  # int32 [B * S]
    out_ptr,  # [B, S, H, C]
    lse_ptr,  # [B, S, H]
    grad_out_ptr,  # [B, S, H, C]
    probs_ptr,  # [n, H, P]
    grad_scores_ptr,  # [n, H, P]
    scaling,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qw,
    stride_kb,
    stride_kt,
    stride_kw,
    stride_ib,
    stride_is,
    stride_ik,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_gw,
    first_query,
    num_queries,
    num_keys,
    num_places,
    num_heads,
    row_places,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLACES_MULTIPLE: tl.constexpr,
    SWAPPED: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    HEAD_AXIS: tl.constexpr = 1 if SWAPPED else 0
    PLACE_AXIS: tl.constexpr = 0 if SWAPPED else 1
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    i_local = (tl.program_id(0) // head_blocks).to(tl.int64)
    i_query = first_query + i_local
    i_b, i_s = i_query // num_queries, i_query % num_queries
    o_head = (tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_head = o_head < num_heads
    q_rows = q_ptr + i_b * stride_qb + i_s * stride_qs + o_head * stride_qh
    b_q = load_rows(q_rows, m_head, stride_qw, 0, C, BLOCK_C, DOT)
    if R > 0:
        b_q_rope = load_rows(q_rows, m_head, stride_qw, C, R, BLOCK_R, DOT)
    grad_rows = grad_out_ptr + i_b * stride_gb + i_s * stride_gs + o_head * stride_gh
    b_grad = load_rows(grad_rows, m_head, stride_gw, 0, C, BLOCK_C, DOT)
    o_row = i_query * num_heads + o_head
    b_out = load_rows(out_ptr + o_row * C, m_head, 1, 0, C, BLOCK_C, DOT)
    b_delta = tl.sum(b_out.to(ACC) * b_grad.to(ACC), 1)
    b_lse = tl.load(lse_ptr + o_row, mask=m_head, other=float("inf"))
    indices_ptr += i_b * stride_ib + i_s * stride_is
    kv_ptr += i_b * stride_kb
    probs_ptr += i_local * num_heads * row_places
    grad_scores_ptr += i_local * num_heads * row_places
    written = tl.cdiv(tl.load(used_ptr + i_query), PLACES_MULTIPLE) * PLACES_MULTIPLE
    for start in range(0, written, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        b_index = tl.load(indices_ptr + o_place * stride_ik, mask=o_place < num_places, other=-1)
        m_place = (b_index >= 0) & (b_index < num_keys)
        kv_rows = kv_ptr + b_index.to(tl.int64) * stride_kt
        b_kv = load_rows(kv_rows, m_place, stride_kw, 0, C, BLOCK_C, DOT)
        b_scores = scores_of(b_q, b_kv, SWAPPED, ACC)
        if R > 0:
            b_scores += scores_of(b_q_rope, load_rows(kv_rows, m_place, stride_kw, C, R, BLOCK_R, DOT), SWAPPED, ACC)
        b_probs = tl.exp2((b_scores * scaling - tl.expand_dims(b_lse, PLACE_AXIS)) * 1.4426950408889634)
        # An unused place has score 0, which may be far above the log-sum-exp: infinity times its zero row is not 0.
        b_probs = tl.where(tl.expand_dims(m_place, HEAD_AXIS), b_probs, 0.0)
        b_grad_probs = scores_of(b_grad, b_kv, SWAPPED, ACC)
        b_grad_scores = (b_grad_probs - tl.expand_dims(b_delta, PLACE_AXIS)) * b_probs * scaling
        offsets = tl.expand_dims(o_head * row_places, PLACE_AXIS) + tl.expand_dims(o_place, HEAD_AXIS)
        mask = tl.expand_dims(m_head, PLACE_AXIS)
        tl.store(probs_ptr + offsets, b_probs.to(probs_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_scores_ptr + offsets, b_grad_scores.to(probs_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["first_query", "num_queries", "num_keys", "num_places", "num_heads"])
def _row_gradients_kernel(
    q_ptr,  # [B, S, H, W]
    kv_ptr,  # [B, T, W]
    indices_ptr,  # int32 [B, S, K]
    used_ptr,  # int32 [B * S]
    grad_out_ptr,  # [B, S, H, C]
    probs_ptr,  # [n, H, P]
    grad_scores_ptr,  # [n, H, P]
    grad_q_ptr,  # [B, S, H, W]
    grad_kv_ptr,  # [B, T, W], or [n, K, W] when each place writes its own row
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qw,
    stride_kb,
    stride_kt,
    stride_kw,
    stride_ib,
    stride_is,
    stride_ik,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_gw,
    first_query,
    num_queries,
    num_keys,
    num_places,
    num_heads,
    row_places,
    C: tl.constexpr,
    W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SWAPPED: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    APART: tl.constexpr,  # stages of a loop whose products stand in branches of their own, or None
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    column_blocks: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    i_local = (tl.program_id(0) // column_blocks).to(tl.int64)
    i_query = first_query + i_local
    i_b, i_s = i_query // num_queries, i_query % num_queries
    o_head = tl.arange(0, BLOCK_H)
    m_head = o_head < num_heads
    o_column = (tl.program_id(0) % column_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_column = o_column < W
    q_rows = q_ptr + i_b * stride_qb + i_s * stride_qs + o_head * stride_qh
    m_q = m_head[:, None] & m_column[None, :]
    b_q = tl.load(q_rows[:, None] + o_column[None, :] * stride_qw, mask=m_q, other=0.0).to(DOT)
    grad_rows = grad_out_ptr + i_b * stride_gb + i_s * stride_gs + o_head * stride_gh
    m_value = m_head[:, None] & (o_column < C)[None, :]
    b_grad = tl.load(grad_rows[:, None] + o_column[None, :] * stride_gw, mask=m_value, other=0.0).to(DOT)
    indices_ptr += i_b * stride_ib + i_s * stride_is
    kv_ptr += i_b * stride_kb
    probs_ptr += i_local * num_heads * row_places
    grad_scores_ptr += i_local * num_heads * row_places
    used = tl.load(used_ptr + i_query)
    b_grad_q = tl.zeros([BLOCK_W, BLOCK_H] if SWAPPED else [BLOCK_H, BLOCK_W], ACC)
    for start in tl.range(0, used, BLOCK_K, num_stages=APART):
        o_place = start + tl.arange(0, BLOCK_K)
        b_index = tl.load(indices_ptr + o_place * stride_ik, mask=o_place < num_places, other=-1)
        m_place = (b_index >= 0) & (b_index < num_keys)
        m_kv = m_place[:, None] & m_column[None, :]
        kv_rows = kv_ptr + b_index.to(tl.int64) * stride_kt
        b_kv = tl.load(kv_rows[:, None] + o_column[None, :] * stride_kw, mask=m_kv, other=0.0).to(DOT)
        offsets = o_head[:, None] * row_places + o_place[None, :]
        b_probs = tl.load(probs_ptr + offsets, mask=m_head[:, None], other=0.0).to(DOT)
        b_grad_scores = tl.load(grad_scores_ptr + offsets, mask=m_head[:, None], other=0.0).to(DOT)
        # Branches that are always taken. The first keeps Triton from following one product into the next, which would
        # make both groups of warps multiply the same (see `scores_apart`); the second has its
        # product done before the atomic additions branch, across which each matrix instruction would be waited for.
        if APART is None or start >= 0:
            b_grad_kv = tl.dot(tl.trans(b_grad_scores), b_q, input_precision="ieee", out_dtype=ACC)
        else:
            b_grad_kv = tl.dot(tl.trans(b_probs), b_q, input_precision="ieee", out_dtype=ACC)
        b_grad_kv = tl.dot(tl.trans(b_probs), b_grad, b_grad_kv, input_precision="ieee", out_dtype=ACC)
        b_weights = tl.trans(b_grad_scores) if SWAPPED else b_grad_scores
        if APART is None or used > 0:
            b_grad_q = add_weighted(b_grad_q, b_weights, b_kv, SWAPPED, ACC)
        o_row = i_local * num_places + o_place if OWN_ROWS else i_b * num_keys + b_index
        give_rows(grad_kv_ptr + o_row[:, None] * W + o_column[None, :], b_grad_kv, m_kv, OWN_ROWS)
    if SWAPPED:
        b_grad_q = tl.trans(b_grad_q)
    o_row = i_query * num_heads + o_head
    tl.store(
        grad_q_ptr + o_row[:, None] * W + o_column[None, :],
        b_grad_q.to(grad_q_ptr.dtype.element_ty),
        mask=m_head[:, None] & m_column[None, :],
    )


def padded_sizes(latent: int, width: int) -> tuple[int, int, int]:
    """Powers of two that hold the latent and the rotary columns, and their sum."""
    block_c = max(16, triton.next_power_of_2(latent))
    block_r = max(16, triton.next_power_of_2(width - latent))
    return block_c, block_r, block_c + (block_r if width > latent else 0)


def backward(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q [B, S, H, W] and kv [B, T, W] for `out`, `lse` of the forward pass and grad_out [B, S, H, C]."""
    # What comes back through the value up-projection is laid out by heads, over all queries.
    q, grad_out = within_32_bits(q), grad_out.contiguous()
    batch, num_queries, heads, width = q.shape
    num_keys, num_places = kv.shape[1], indices.shape[2]
    latent = out.shape[-1]
    dtype = torch.promote_types(q.dtype, kv.dtype)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_kv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
    if lse.numel() == 0 or num_places == 0:
        return grad_q.zero_(), grad_kv.to(kv.dtype)

    block_c, block_r, padded_width = padded_sizes(latent, width)
    shared = shared_memory(q.device)
    first = score_tiles(heads, block_c, padded_width, dtype.itemsize, shared)
    second = row_tiles(heads, width, dtype.itemsize, shared)
    deterministic = torch.are_deterministic_algorithms_enabled()
    row_places = triton.cdiv(num_places, _PLACES_MULTIPLE) * _PLACES_MULTIPLE
    bytes_per_query = 2 * heads * row_places * dtype.itemsize
    if deterministic:
        bytes_per_query += num_places * width * grad_kv.element_size()
    chunk = min(batch * num_queries, max(1, WORKSPACE_BYTES // bytes_per_query))
    probs, grad_scores = (torch.empty(chunk, heads, row_places, dtype=dtype, device=q.device) for _ in range(2))
    if deterministic:
        places = torch.empty(chunk, num_places, width, dtype=grad_kv.dtype, device=q.device)
        first_row = torch.arange(batch, device=q.device)[:, None, None] * num_keys
        used_place = (indices >= 0) & (indices < num_keys)
        rows = torch.where(used_place, indices + first_row, batch * num_keys).flatten(0, 1)  # [B * S, K]
    used = used_places(indices, num_keys)
    strides = (*q.stride(), *kv.stride(), *indices.stride(), *grad_out.stride())
    types = {"DOT": operand_dtype(dtype), "ACC": tl.float64 if lse.dtype == torch.float64 else tl.float32}
    for begin in range(0, batch * num_queries, chunk):
        count = min(chunk, batch * num_queries - begin)
        sizes = (begin, num_queries, num_keys, num_places, heads, row_places)
        with on_device(q.device):
            _score_gradients_kernel[(count * triton.cdiv(heads, first.heads),)](
                q,
                kv,
                indices,
                used,
                out,
                lse,
                grad_out,
                probs,
                grad_scores,
                scaling,
                *strides,
                *sizes,
                C=latent,
                R=width - latent,
                BLOCK_C=block_c,
                BLOCK_R=block_r,
                BLOCK_H=first.heads,
                BLOCK_K=first.places,
                PLACES_MULTIPLE=_PLACES_MULTIPLE,
                SWAPPED=first.swapped,
                **types,
                num_warps=first.num_warps,
                num_stages=first.num_stages,
            )
            _row_gradients_kernel[(count * triton.cdiv(width, second.columns),)](
                q,
                kv,
                indices,
                used,
                grad_out,
                probs,
                grad_scores,
                grad_q,
                places if deterministic else grad_kv,
                *strides,
                *sizes,
                C=latent,
                W=width,
                BLOCK_H=second.heads,
                BLOCK_K=second.places,
                BLOCK_W=second.columns,
                SWAPPED=second.swapped,
                OWN_ROWS=deterministic,
                APART=second.num_stages if second.apart else None,
                **types,
                num_warps=second.num_warps,
                num_stages=second.num_stages,
            )
        if deterministic:
            chosen = rows[begin : begin + count].flatten()
            add_rows_in_order(places[:count].flatten(0, 1), chosen, grad_kv.flatten(0, 1))
    return grad_q, grad_kv.to(kv.dtype)
