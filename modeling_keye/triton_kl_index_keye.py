"""The indexer's side of the dense KL loss in Triton: scores by tiles, their log-sum-exp, and the gradients.

With r = q_j . k the product of a head j, dI = q - p from the slab that the divergence leaves and c the weight of the
query,

    I = sum_j gate_j relu(r)            d gate_j = c sum_s dI relu(r)
    dq_j = c gate_j sum_s dI [r > 0] k_s     dk_s = sum over t and j of c gate_j dI [r > 0] q_j

where products are made again. Rows of both gradient kernels are (query, head of the indexer), the heads of a query
side by side; one owns blocks of rows and walks over keys, the other owns blocks of keys and walks over rows.
"""

from __future__ import annotations

import torch

from .triton_common_keye import jit, on_device, tl, triton
from .triton_gather_keye import HOPPER_SHARED, add_weighted, first_fitting, load_rows, scores_of
from .triton_kl_keye import LIFT, Tiles, head_tiles, load_mask, padded, statistics_dtype
from .triton_tuning_keye import tunable

index_lse_tiles = tunable("kl_index_lse", rows=(32, 64, 128), keys=(64, 128), num_warps=(4, 8), num_stages=(2, 3))(
    head_tiles
)


@tunable("kl_gradients", rows=(64, 128), keys=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))
def gradient_tiles(width: int, element_size: int, shared: int) -> Tiles:
    """Blocks for the gradients of an indexer of `width` padded columns."""
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(rows: int, keys: int) -> int:
        return ((rows + keys) * width * (2 if hopper else 1) + rows * keys) * element_size

    blocks = [(128, 64), (64, 64), (64, 32), (32, 32), (16, 16)] if element_size == 2 else [(32, 32), (16, 16)]
    rows, keys = first_fitting(blocks, size, shared)
    return Tiles(rows, keys, 8 if rows * width > 64 * 64 else 4, 2)


@jit
def index_scores(
    q_ptr,
    gates_ptr,
    b_k,
    o_query,
    m_query,
    stride_s,
    stride_h,
    stride_d,
    stride_gs,
    stride_gh,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The indexer's scores of a block of queries and keys b_k [BLOCK_K, DI], head by head."""
    b_scores = tl.zeros([BLOCK_Q, BLOCK_K], ACC)
    q_ptr += o_query.to(tl.int64) * stride_s
    gates_ptr += o_query.to(tl.int64) * stride_gs
    for i_head in range(HI):
        b_q = load_rows(q_ptr + i_head * stride_h, m_query, stride_d, 0, DI, BLOCK_DI, DOT)
        b_gate = tl.load(gates_ptr + i_head * stride_gh, mask=m_query, other=0.0).to(ACC)
        b_scores += tl.maximum(scores_of(b_q, b_k, False, ACC), 0.0) * b_gate[:, None]
    return b_scores


@jit(do_not_specialize=["first_slot", "num_queries", "num_blocks", "num_tiles", "stride_mb"])
def _index_lse_kernel(
    q_ptr,  # [B, n, Hi, Di]
    k_ptr,  # [B, T, Di]
    gates_ptr,  # [B, n, Hi]
    mask_ptr,  # uint8 [B, T], 1 at real tokens, or None
    part_ptr,  # [B, n, tiles], -inf where no program comes by
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kt,
    stride_kd,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_mb,
    first_slot,
    num_queries,
    num_blocks,
    num_tiles,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    i_block = tl.program_id(0) % num_blocks
    i_tile = (tl.program_id(0) // num_blocks) % num_tiles
    i_b = (tl.program_id(0) // num_blocks // num_tiles).to(tl.int64)
    end = first_slot + tl.minimum((i_block + 1) * BLOCK_Q, num_queries)
    if i_tile * BLOCK_K < end:
        o_query = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_query = o_query < num_queries
        o_key = i_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        if mask_ptr is not None:
            mask_ptr += i_b * stride_mb
        m_key = load_mask(mask_ptr, o_key, end)
        rows = k_ptr + i_b * stride_kb + o_key.to(tl.int64) * stride_kt
        b_k = load_rows(rows, m_key, stride_kd, 0, DI, BLOCK_DI, INDEX_DOT)
        b_scores = index_scores(
            q_ptr + i_b * stride_qb,
            gates_ptr + i_b * stride_gb,
            b_k,
            o_query,
            m_query,
            stride_qs,
            stride_qh,
            stride_qd,
            stride_gs,
            stride_gh,
            HI,
            DI,
            BLOCK_DI,
            BLOCK_Q,
            BLOCK_K,
            INDEX_DOT,
            ACC,
        )
        visible = m_key[None, :] & (o_key[None, :] <= (first_slot + o_query)[:, None])
        b_scores = tl.where(visible, b_scores, float("-inf"))
        b_max = tl.max(b_scores, 1)
        b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_sum = tl.sum(tl.exp2((b_scores - b_safe[:, None]) * 1.4426950408889634), 1)
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
        o_row = (i_b * num_queries + o_query) * num_tiles + i_tile
        tl.store(part_ptr + o_row, b_max + tl.log(b_sum), mask=m_query)


def index_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    mask: torch.Tensor | None,
    first_slot: int,
    tiles: Tiles,
    types: dict,
) -> torch.Tensor:
    """Log-sum-exp of the indexer's scores over the slots that each query sees: [B, n], -inf where it sees none."""
    batch, num_queries, heads, dim = q.shape
    blocks, num_tiles = triton.cdiv(num_queries, tiles.rows), triton.cdiv(first_slot + num_queries, tiles.keys)
    shape = (batch, num_queries, num_tiles)
    part = torch.full(shape, float("-inf"), dtype=statistics_dtype(q, k), device=q.device)
    with on_device(q.device):
        _index_lse_kernel[(batch * blocks * num_tiles,)](
            q,
            k,
            gates,
            mask,
            part,
            *q.stride(),
            *k.stride(),
            *gates.stride(),
            0 if mask is None else mask.stride(0),
            first_slot,
            num_queries,
            blocks,
            num_tiles,
            HI=heads,
            DI=dim,
            BLOCK_DI=padded(dim),
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.keys,
            INDEX_DOT=types["INDEX_DOT"],
            ACC=types["ACC"],
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return part.logsumexp(dim=-1)


@jit(
    do_not_specialize=["first_slot", "num_queries", "num_blocks", "stride_wb", "stride_mb"],
    do_not_specialize_on_alignment=["weights_ptr"],
)
def _query_gradients_kernel(
    q_ptr,  # [B, n, Hi, Di]
    k_ptr,  # [B, T, Di]
    gates_ptr,  # [B, n, Hi]
    weights_ptr,  # [B, n]
    mask_ptr,  # uint8 [B, T], 1 at real tokens, or None
    slab_ptr,  # [B, n, row_stride]
    grad_q_ptr,  # [B, n, Hi, Di]
    grad_gates_ptr,  # [B, n, Hi]
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kt,
    stride_kd,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_wb,
    stride_ws,
    stride_mb,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    stride_dqd,
    stride_dgb,
    stride_dgs,
    stride_dgh,
    first_slot,
    num_queries,
    num_blocks,
    row_stride,
    LIFT: tl.constexpr,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows are (query, head of the indexer), the heads of a query side by side."""
    i_block = num_blocks - 1 - tl.program_id(0) % num_blocks
    i_b = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_row = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < num_queries * HI
    o_query, o_head = (o_row // HI).to(tl.int64), o_row % HI
    rows = q_ptr + i_b * stride_qb + o_query * stride_qs + o_head * stride_qh
    b_q = load_rows(rows, m_row, stride_qd, 0, DI, BLOCK_DI, INDEX_DOT)
    slab_rows = slab_ptr + (i_b * num_queries + o_query) * row_stride
    k_ptr += i_b * stride_kb
    if mask_ptr is not None:
        mask_ptr += i_b * stride_mb
    end = first_slot + tl.minimum(((i_block + 1) * BLOCK_R - 1) // HI + 1, num_queries)
    b_grad_q = tl.zeros([BLOCK_R, BLOCK_DI], ACC)
    b_grad_gate = tl.zeros([BLOCK_R], ACC)
    for start in range(0, end, BLOCK_K):
        o_key = start + tl.arange(0, BLOCK_K)
        m_key = load_mask(mask_ptr, o_key, end)
        key_rows = k_ptr + o_key.to(tl.int64) * stride_kt
        b_k = load_rows(key_rows, m_key, stride_kd, 0, DI, BLOCK_DI, INDEX_DOT)
        b_products = scores_of(b_q, b_k, False, ACC)
        # The slab is written where a pair sees each other, and only in tiles that have such a pair.
        visible = m_row[:, None] & (o_key[None, :] <= (first_slot + o_query)[:, None])
        b_grad = tl.load(slab_rows[:, None] + o_key[None, :], mask=visible, other=0.0)
        b_grad = tl.where(b_products > 0.0, b_grad, 0.0)
        b_grad_gate += tl.sum(b_grad * b_products, 1)
        b_grad_q = add_weighted(b_grad_q, (b_grad * LIFT).to(INDEX_DOT), b_k, False, ACC)
    b_weight = tl.load(weights_ptr + i_b * stride_wb + o_query * stride_ws, mask=m_row, other=0.0).to(ACC)
    b_gate = tl.load(gates_ptr + i_b * stride_gb + o_query * stride_gs + o_head * stride_gh, mask=m_row, other=0.0)
    grad_gates = grad_gates_ptr + i_b * stride_dgb + o_query * stride_dgs + o_head * stride_dgh
    tl.store(grad_gates, b_grad_gate * b_weight, mask=m_row)
    b_grad_q *= (b_weight * b_gate.to(ACC) / LIFT)[:, None]
    o_column = tl.arange(0, BLOCK_DI)
    grad_rows = grad_q_ptr + i_b * stride_dqb + o_query * stride_dqs + o_head * stride_dqh
    tl.store(
        grad_rows[:, None] + o_column[None, :] * stride_dqd,
        b_grad_q.to(grad_q_ptr.dtype.element_ty),
        mask=m_row[:, None] & (o_column < DI)[None, :],
    )


@jit(do_not_specialize=["first_slot", "num_queries", "num_blocks", "stride_mb"])
def _key_gradients_kernel(
    q_ptr,  # [B, n, Hi, Di]
    k_ptr,  # [B, T, Di]
    factors_ptr,  # [B, n, Hi], weight x gate, relative to the largest
    top_ptr,  # [], the largest
    mask_ptr,  # uint8 [B, T], 1 at real tokens, or None
    slab_ptr,  # [B, n, row_stride]
    grad_k_ptr,  # [B, T, Di], added to
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kt,
    stride_kd,
    stride_fb,
    stride_fs,
    stride_fh,
    stride_mb,
    stride_dkb,
    stride_dkt,
    stride_dkd,
    first_slot,
    num_queries,
    num_blocks,
    row_stride,
    LIFT: tl.constexpr,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows as in `_query_gradients_kernel`; a program takes a block of keys and every row that sees one of them."""
    i_block = tl.program_id(0) % num_blocks
    i_b = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_key = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    if mask_ptr is not None:
        mask_ptr += i_b * stride_mb
    m_key = load_mask(mask_ptr, o_key, first_slot + num_queries)
    rows = k_ptr + i_b * stride_kb + o_key.to(tl.int64) * stride_kt
    b_k = load_rows(rows, m_key, stride_kd, 0, DI, BLOCK_DI, INDEX_DOT)
    q_ptr += i_b * stride_qb
    factors_ptr += i_b * stride_fb
    slab_ptr += i_b * num_queries * row_stride
    first_query = tl.maximum(i_block * BLOCK_K - first_slot, 0)
    b_grad_k = tl.zeros([BLOCK_K, BLOCK_DI], ACC)
    for start in range(first_query * HI, num_queries * HI, BLOCK_R):
        o_row = start + tl.arange(0, BLOCK_R)
        m_row = o_row < num_queries * HI
        o_query, o_head = (o_row // HI).to(tl.int64), o_row % HI
        query_rows = q_ptr + o_query * stride_qs + o_head * stride_qh
        b_q = load_rows(query_rows, m_row, stride_qd, 0, DI, BLOCK_DI, INDEX_DOT)
        b_products = scores_of(b_q, b_k, False, ACC)
        visible = m_row[:, None] & (o_key[None, :] <= (first_slot + o_query)[:, None])
        b_grad = tl.load(slab_ptr + (o_query * row_stride)[:, None] + o_key[None, :], mask=visible, other=0.0)
        b_factor = tl.load(factors_ptr + o_query * stride_fs + o_head * stride_fh, mask=m_row, other=0.0)
        b_grad = tl.where(b_products > 0.0, b_grad * (b_factor * LIFT)[:, None], 0.0)
        b_grad_k = tl.dot(tl.trans(b_grad.to(INDEX_DOT)), b_q, b_grad_k, input_precision="ieee", out_dtype=ACC)
    b_grad_k *= tl.load(top_ptr) / LIFT
    o_column = tl.arange(0, BLOCK_DI)
    pointers = grad_k_ptr + i_b * stride_dkb + o_key.to(tl.int64)[:, None] * stride_dkt + o_column[None, :] * stride_dkd
    m_store = m_key[:, None] & (o_column < DI)[None, :]
    tl.store(pointers, tl.load(pointers, mask=m_store, other=0.0) + b_grad_k, mask=m_store)


def slab_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    weights: torch.Tensor,
    factors: torch.Tensor,
    top: torch.Tensor,
    mask: torch.Tensor | None,
    slab: torch.Tensor,
    first_slot: int,
    tiles: Tiles,
    types: dict,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Writes the gradients of q [B, n, Hi, Di] and gates [B, n, Hi] and adds to that of k [B, T, Di].

    weights [B, n]; factors [B, n, Hi] and top [] as `key_factors` gives them; mask uint8 [B, T] or None; slab, whose
    rows are the B x n queries, holds q - p.
    """
    batch, num_queries, heads, dim = q.shape
    grad_q, grad_k, grad_gates = grads
    query_blocks = triton.cdiv(num_queries * heads, tiles.rows)
    key_blocks = triton.cdiv(first_slot + num_queries, tiles.keys)
    mask_stride = 0 if mask is None else mask.stride(0)
    options = {
        "LIFT": LIFT,
        "HI": heads,
        "DI": dim,
        "BLOCK_DI": padded(dim),
        "BLOCK_R": tiles.rows,
        "BLOCK_K": tiles.keys,
        "INDEX_DOT": types["INDEX_DOT"],
        "ACC": types["ACC"],
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    with on_device(q.device):
        _query_gradients_kernel[(batch * query_blocks,)](
            q,
            k,
            gates,
            weights,
            mask,
            slab,
            grad_q,
            grad_gates,
            *q.stride(),
            *k.stride(),
            *gates.stride(),
            *weights.stride(),
            mask_stride,
            *grad_q.stride(),
            *grad_gates.stride(),
            first_slot,
            num_queries,
            query_blocks,
            slab.stride(0),
            **options,
        )
        _key_gradients_kernel[(batch * key_blocks,)](
            q,
            k,
            factors,
            top,
            mask,
            slab,
            grad_k,
            *q.stride(),
            *k.stride(),
            *factors.stride(),
            mask_stride,
            *grad_k.stride(),
            first_slot,
            num_queries,
            key_blocks,
            slab.stride(0),
            **options,
        )
