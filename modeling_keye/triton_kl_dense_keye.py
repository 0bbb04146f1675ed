"""KL loss of the indexer where queries attend to all they see, in Triton: the warm-up, and the first tokens later on.

The contract is that of `IndexerLoss.add_dense`, which is the judge; what is computed stands in `triton_kl_keye`. The
target is a mean over heads of probabilities, so all heads are multiplied twice: once for their log-sum-exp, once for
the mean. A chunk of queries takes five launches:

1. `_attention_lse_kernel`, one program per block of queries and head, is a flash forward pass without values;
2. `_index_lse_kernel`, one program per tile (block of queries x block of keys), gives the log-sum-exp of the indexer's
   scores over the tile;
3. `_divergence_kernel`, one program per tile, sums the probabilities of all heads in registers, makes the scores again,
   and writes the tile's part of each KL and q - p, the latter to a slab [queries of the chunk, T];
4. `_query_gradients_kernel`, one program per block of (query, head of the indexer), and
5. `_key_gradients_kernel`, one program per block of keys, read the slab. Each sum has one owner and one order, so
   results are bit-equal over runs, without atomics.

Per pair of query and key, that is 4 H D products of the attention and 12 Hi Di of the indexer.
"""

from __future__ import annotations

import torch

from .triton_common_keye import jit, on_device, shared_memory, tl, triton, within_32_bits
from .triton_gather_keye import LOG2_E, WORKSPACE_BYTES, load_rows, scores_of
from .triton_kl_index_keye import gradient_tiles, index_lse, index_lse_tiles, index_scores, slab_gradients
from .triton_kl_keye import (
    Tiles,
    head_tiles,
    key_factors,
    load_columns,
    load_mask,
    operand_types,
    padded,
    split_width,
    statistics_dtype,
    walk_tiles,
    width_of,
)
from .triton_tuning_keye import tunable

divergence_tiles = tunable("kl_divergence", rows=(32, 64, 128), keys=(64, 128), num_warps=(4, 8), num_stages=(2, 3))(
    head_tiles
)


@jit(do_not_specialize=["first_slot", "num_queries", "num_blocks", "num_heads", "stride_mb"])
def _attention_lse_kernel(
    queries_ptr,  # [B, n, H, D]
    keys_ptr,  # [B, G, T, D]
    mask_ptr,  # uint8 [B, T], 1 at real tokens, or None
    lse_ptr,  # [B, n, H]
    scale_log2,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kg,
    stride_kt,
    stride_kd,
    stride_mb,
    first_slot,
    num_queries,
    num_blocks,
    num_heads,
    HEADS: tl.constexpr,  # per group of keys
    A: tl.constexpr,
    R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    # Blocks that see the most keys start first; the heads of one block are neighbours and read the same keys.
    i_head = tl.program_id(0) % num_heads
    i_block = num_blocks - 1 - (tl.program_id(0) // num_heads) % num_blocks
    i_b = (tl.program_id(0) // num_heads // num_blocks).to(tl.int64)
    o_query = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < num_queries
    rows = queries_ptr + i_b * stride_qb + o_query.to(tl.int64) * stride_qs + i_head * stride_qh
    b_q, b_q_rest = load_columns(rows, m_query, stride_qd, A, R, BLOCK_A, BLOCK_R, DOT)
    keys_ptr += i_b * stride_kb + (i_head // HEADS).to(tl.int64) * stride_kg
    if mask_ptr is not None:
        mask_ptr += i_b * stride_mb
    end = first_slot + tl.minimum((i_block + 1) * BLOCK_Q, num_queries)
    b_max = tl.full([BLOCK_Q], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_Q], ACC)
    for start in range(0, end, BLOCK_K):
        o_key = start + tl.arange(0, BLOCK_K)
        m_key = load_mask(mask_ptr, o_key, end)
        pointers = keys_ptr + o_key.to(tl.int64) * stride_kt
        b_k, b_k_rest = load_columns(pointers, m_key, stride_kd, A, R, BLOCK_A, BLOCK_R, DOT)
        b_scores = scores_of(b_q, b_k, False, ACC)
        if R > 0:
            b_scores += scores_of(b_q_rest, b_k_rest, False, ACC)
        visible = m_key[None, :] & (o_key[None, :] <= (first_slot + o_query)[:, None])
        b_scores = tl.where(visible, b_scores * scale_log2, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_scores - b_safe[:, None]), 1)
        b_max = b_new
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # without keys the maximum is -inf, and so becomes the log-sum-exp
    o_row = (i_b * num_queries + o_query) * num_heads + i_head
    tl.store(lse_ptr + o_row, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_query)


# Numbers that follow the length, strides of a log-sum-exp that an attention made as [B, H, n] among them.
_LENGTHS = ["first_slot", "num_queries", "num_blocks", "num_tiles", "num_groups"]
_STRIDES = ["stride_lb", "stride_ls", "stride_lh", "stride_wb", "stride_mb"]


@jit(do_not_specialize=_LENGTHS + _STRIDES, do_not_specialize_on_alignment=["weights_ptr"])
def _divergence_kernel(
    queries_ptr,  # [B, n, H, D]
    keys_ptr,  # [B, G, T, D]
    lse_ptr,  # [B, n, H]
    q_ptr,  # [B, n, Hi, Di]
    k_ptr,  # [B, T, Di]
    gates_ptr,  # [B, n, Hi]
    index_lse_ptr,  # [B, n]
    weights_ptr,  # [B, n]
    mask_ptr,  # uint8 [B, T], 1 at real tokens, or None
    part_ptr,  # [B, n, tiles], 0 where no program comes by
    slab_ptr,  # [B * n, row_stride], or None when only the value is wanted
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
    stride_iqb,
    stride_iqs,
    stride_iqh,
    stride_iqd,
    stride_ikb,
    stride_ikt,
    stride_ikd,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_wb,
    stride_ws,
    stride_mb,
    first_slot,
    num_queries,
    num_blocks,
    num_tiles,
    row_stride,
    num_groups,
    HEADS: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
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
        o_wide = o_query.to(tl.int64)
        query_rows = queries_ptr + i_b * stride_qb + o_wide * stride_qs
        lse_rows = lse_ptr + i_b * stride_lb + o_wide * stride_ls
        key_rows = keys_ptr + i_b * stride_kb + o_key.to(tl.int64) * stride_kt
        b_target = tl.zeros([BLOCK_Q, BLOCK_K], ACC)
        # Pairs that do not see each other get anything at first.
        for i_group in range(num_groups):
            group_rows = key_rows + i_group * tl.cast(stride_kg, tl.int64)
            b_k, b_k_rest = load_columns(group_rows, m_key, stride_kd, A, R, BLOCK_A, BLOCK_R, DOT)
            for i_member in range(HEADS):
                i_head = i_group * HEADS + i_member
                head_rows = query_rows + i_head * stride_qh
                b_q, b_q_rest = load_columns(head_rows, m_query, stride_qd, A, R, BLOCK_A, BLOCK_R, DOT)
                b_lse = tl.load(lse_rows + i_head * stride_lh, mask=m_query, other=0.0).to(ACC)
                b_scores = scores_of(b_q, b_k, False, ACC)
                if R > 0:
                    b_scores += scores_of(b_q_rest, b_k_rest, False, ACC)
                b_target += tl.exp2(b_scores * scale_log2 - (b_lse * 1.4426950408889634)[:, None])

        b_index_k = load_rows(
            k_ptr + i_b * stride_ikb + o_key.to(tl.int64) * stride_ikt, m_key, stride_ikd, 0, DI, BLOCK_DI, INDEX_DOT
        )
        b_scores = index_scores(
            q_ptr + i_b * stride_iqb,
            gates_ptr + i_b * stride_gb,
            b_index_k,
            o_query,
            m_query,
            stride_iqs,
            stride_iqh,
            stride_iqd,
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
        o_row = i_b * num_queries + o_query
        b_index_lse = tl.load(index_lse_ptr + o_row, mask=m_query, other=0.0).to(ACC)
        b_weight = tl.load(weights_ptr + i_b * stride_wb + o_wide * stride_ws, mask=m_query, other=0.0)
        visible = m_key[None, :] & (o_key[None, :] <= (first_slot + o_query)[:, None]) & (b_weight != 0)[:, None]
        b_target = tl.where(visible, b_target / (num_groups * HEADS), 0.0)
        b_log = tl.where(visible, b_scores - b_index_lse[:, None], 0.0)
        b_terms = b_target * (tl.log(tl.where(b_target > 0.0, b_target, 1.0)) - b_log)
        tl.store(part_ptr + o_row * num_tiles + i_tile, tl.sum(b_terms, 1), mask=m_query)
        if slab_ptr is not None:
            b_grad = tl.where(visible, tl.exp2(b_log * 1.4426950408889634) - b_target, 0.0)
            pointers = slab_ptr + (o_row * row_stride)[:, None] + o_key[None, :]
            tl.store(pointers, b_grad, mask=m_query[:, None])


def unsupported(queries: torch.Tensor, keys: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> str | None:
    """None when the kernels take the head sizes of these inputs, else one sentence that says why not."""
    try:
        _all_tiles(queries, keys, q, k)
    except ValueError as error:
        return str(error)
    return None


def _all_tiles(queries, keys, q, k) -> tuple[Tiles, Tiles, Tiles, Tiles]:
    """Blocks of the log-sum-exp of the attention, that of the indexer, the divergence and the gradients."""
    size = torch.promote_types(queries.dtype, keys.dtype).itemsize
    index_size = torch.promote_types(q.dtype, k.dtype).itemsize
    shared, width, index_width = shared_memory(queries.device), width_of(queries.shape[-1]), padded(q.shape[-1])
    # A tile of the divergence makes both products, so the larger one decides.
    largest = max((width, size), (index_width, index_size), key=lambda sizes: sizes[0] * sizes[1])
    return (
        walk_tiles(width, size, shared),
        index_lse_tiles(index_width, index_size, shared),
        divergence_tiles(*largest, shared),
        gradient_tiles(index_width, index_size, shared),
    )


@torch.no_grad()
def dense_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    weights: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    first_slot: int = 0,
    key_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum over n queries of weight x KL, for queries that attend to all they see.

    Args:
        q: indexer queries [B, n, Hi, Di], k: indexer keys [B, T, Di], gates: [B, n, Hi]. weights: [B, n] float32, 0 at
            queries that do not count. queries [B, n, H, D], keys [B, G, T, D]: what the attention's scores are made of.
            T is at least `first_slot` + n; the first query stands at slot `first_slot` and each sees the slots up to
            its own.
        key_mask: bool [B, T] at real tokens, or None when all are. A query that counts must see one.
        lse: log-sum-exp of the attention per head [B, n, H], natural, when the caller has it; saves the first launch.
        grads: None, or gradients of q and gates, which are written, and of k in float32, which is added to.

    Returns:
        the sum [] in float32 (float64 when an input is). Raises `ValueError` where `unsupported` has something to say.
    """
    q, queries = within_32_bits(q), within_32_bits(queries)
    batch, num_queries = queries.shape[:2]
    statistics = statistics_dtype(queries, keys, q, k)
    value = torch.zeros((), dtype=statistics, device=q.device)
    lse_tiles, index_tiles, tiles, last_tiles = _all_tiles(queries, keys, q, k)
    if batch * num_queries == 0:
        return value
    types = operand_types(queries, keys, q, k, statistics)
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    row = triton.cdiv(first_slot + num_queries, tiles.keys) * tiles.keys
    per_block = batch * tiles.rows * row * statistics.itemsize
    chunk = min(num_queries, max(1, WORKSPACE_BYTES // per_block) * tiles.rows)
    slab = factors = top = None
    if grads is not None:
        slab = torch.empty(batch * chunk, row, dtype=statistics, device=q.device)
        factors, top = key_factors(weights, gates)
    for begin in range(0, num_queries, chunk):
        part, slot = slice(begin, begin + chunk), first_slot + begin
        if lse is None:
            part_lse = _attention_lse(queries[:, part], keys, mask, scaling, slot, lse_tiles, types)
        else:
            part_lse = lse[:, part]
        index = (q[:, part], k, gates[:, part])
        norm = index_lse(*index, mask, slot, index_tiles, types)
        rows = _divergence(
            queries[:, part],
            keys,
            part_lse,
            *index,
            norm,
            weights[:, part],
            mask,
            slab,
            scaling,
            slot,
            tiles,
            types,
        )
        value += (rows * weights[:, part]).sum()
        if grads is not None:
            own = (grads[0][:, part], grads[1], grads[2][:, part])
            slab_gradients(*index, weights[:, part], factors[:, part], top, mask, slab, slot, last_tiles, types, own)
    return value


def _attention_lse(queries, keys, mask, scaling, first_slot, tiles, types) -> torch.Tensor:
    """Log-sum-exp of the attention per head, [B, n, H]."""
    batch, num_queries, heads, dim = queries.shape
    lse = torch.empty(batch, num_queries, heads, dtype=statistics_dtype(queries, keys), device=queries.device)
    blocks = triton.cdiv(num_queries, tiles.rows)
    with on_device(queries.device):
        _attention_lse_kernel[(batch * blocks * heads,)](
            queries,
            keys,
            mask,
            lse,
            scaling * LOG2_E,
            *queries.stride(),
            *keys.stride(),
            0 if mask is None else mask.stride(0),
            first_slot,
            num_queries,
            blocks,
            heads,
            HEADS=heads // keys.shape[1],
            **split_width(dim),
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.keys,
            DOT=types["DOT"],
            ACC=types["ACC"],
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return lse


def _divergence(
    queries, keys, lse, q, k, gates, index_lse, weights, mask, slab, scaling, first_slot, tiles, types
) -> torch.Tensor:
    """KL of each query [B, n]; writes q - p to the slab when there is one."""
    batch, num_queries, heads, dim = queries.shape
    blocks, num_tiles = triton.cdiv(num_queries, tiles.rows), triton.cdiv(first_slot + num_queries, tiles.keys)
    part = torch.zeros(batch, num_queries, num_tiles, dtype=statistics_dtype(queries, keys, q, k), device=q.device)
    with on_device(q.device):
        _divergence_kernel[(batch * blocks * num_tiles,)](
            queries,
            keys,
            lse,
            q,
            k,
            gates,
            index_lse,
            weights,
            mask,
            part,
            slab,
            scaling * LOG2_E,
            *queries.stride(),
            *keys.stride(),
            *lse.stride(),
            *q.stride(),
            *k.stride(),
            *gates.stride(),
            *weights.stride(),
            0 if mask is None else mask.stride(0),
            first_slot,
            num_queries,
            blocks,
            num_tiles,
            0 if slab is None else slab.stride(0),
            keys.shape[1],
            HEADS=heads // keys.shape[1],
            **split_width(dim),
            HI=q.shape[2],
            DI=q.shape[3],
            BLOCK_DI=padded(q.shape[3]),
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.keys,
            **types,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return part.sum(dim=-1)
