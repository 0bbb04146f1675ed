"""KL loss of the indexer where queries attend to a selection, in Triton: the adaptation stage.

The contract is that of `IndexerLoss.add_sparse`, which is the judge; what is computed stands in `triton_kl_keye`. One
program takes one query and its list, in chunks of queries:

1. `triton_kl_target_keye` makes p, the mean of the attention's probabilities;
2. `_divergence_kernel` makes the indexer's scores, and goes over them and p once their log-sum-exp is known: KL, and
   q - p for the scores;
3. `_gradients_kernel` makes the products of the indexer again for the gradients of queries and gates, which are the
   query's own, and of keys, which queries share: those are added atomically. When deterministic algorithms are asked
   for, each place writes its own row instead and the rows of one key are added in the order of the queries.

Places are the rows of every product and heads its columns: an indexer has few heads.
"""

from __future__ import annotations

import torch

from .triton_common_keye import jit, on_device, shared_memory, tl, triton, within_32_bits
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
from .triton_kl_keye import LIFT, ListTiles, key_factors, operand_types, padded, statistics_dtype, width_of
from .triton_kl_target_keye import targets, unit_of
from .triton_tuning_keye import tunable

# Rows of the workspace are whole tiles of places, so that stores there need no mask.
_PLACES_MULTIPLE = 64


@tunable("kl_lists", rows=(16, 32, 64), keys=(16, 32, 64), num_warps=(4, 8), num_stages=(2, 3), apart=(False, True))
def list_tiles(
    heads: int, width: int, element_size: int, index_heads: int, index_width: int, index_size: int, shared: int
) -> ListTiles:
    """Heads of a block and places for `heads` heads of `width` padded columns, and for those of the indexer.

    All heads of the indexer are one block. Places divide `_PLACES_MULTIPLE`.
    """
    hopper = shared >= HOPPER_SHARED and element_size == 2

    def size(heads: int, places: int) -> int:
        # Hopper reads a tile from shared memory while the next one arrives; older devices hold it in registers.
        buffers = 2 if hopper else 1
        attention = (heads + buffers * places) * width * element_size + heads * places * 2
        return max(attention, ((index_heads + buffers * places) * index_width + index_heads * places) * index_size)

    most = min(64 if hopper else 32, padded(heads))
    blocks = [(64, 64), (32, 64), (16, 64), (32, 32), (16, 32), (16, 16)] if element_size == 2 else [(16, 16)]
    block, places = first_fitting([pair for pair in blocks if pair[0] <= most], size, shared)
    warps = 8 if width > 256 or index_heads * index_width > 64 * 64 else 4
    return ListTiles(block, places, warps, 2, hopper and places == 64 and width != triton.next_power_of_2(width))


@jit(do_not_specialize=["first_query", "num_queries", "num_keys", "num_places", "part_stride"])
def _divergence_kernel(
    selected_ptr,  # int32 [B, n, K]
    used_ptr,  # int32 [B * n]
    q_ptr,  # [B, n, Hi, Di]
    k_ptr,  # [B, T, Di]
    gates_ptr,  # [B, n, Hi]
    target_ptr,  # [PARTS, chunk, row_places]
    grad_ptr,  # [chunk, row_places]
    rows_ptr,  # [B * n]
    stride_sb,
    stride_ss,
    stride_sk,
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
    first_query,
    num_queries,
    num_keys,
    num_places,
    row_places,
    part_stride,
    PARTS: tl.constexpr,
    USED_ONLY: tl.constexpr,  # whether the entries of a row of the target are those of used places alone
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_HI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    i_local = tl.program_id(0).to(tl.int64)
    i_query = first_query + i_local
    i_b, i_s = i_query // num_queries, i_query % num_queries
    selected_ptr += i_b * stride_sb + i_s * stride_ss
    k_ptr += i_b * stride_kb
    target_ptr += i_local * row_places
    grad_ptr += i_local * row_places
    o_head = tl.arange(0, BLOCK_HI)
    m_head = o_head < HI
    used = tl.load(used_ptr + i_query)
    q_rows = q_ptr + i_b * stride_qb + i_s * stride_qs + o_head * stride_qh
    b_q = load_rows(q_rows, m_head, stride_qd, 0, DI, BLOCK_DI, INDEX_DOT)
    gates = gates_ptr + i_b * stride_gb + i_s * stride_gs + o_head * stride_gh
    b_gates = tl.load(gates, mask=m_head, other=0.0).to(ACC)
    b_max = tl.full([BLOCK_K], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_K], ACC)
    for start in range(0, used, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        b_index = tl.load(selected_ptr + o_place * stride_sk, mask=o_place < num_places, other=-1)
        m_place = (b_index >= 0) & (b_index < num_keys)
        key_rows = k_ptr + b_index.to(tl.int64) * stride_kt
        b_k = load_rows(key_rows, m_place, stride_kd, 0, DI, BLOCK_DI, INDEX_DOT)
        b_products = tl.maximum(scores_of(b_q, b_k, True, ACC), 0.0) * b_gates[None, :]
        b_scores = tl.where(m_place, tl.sum(b_products, 1), float("-inf"))
        tl.store(grad_ptr + o_place, b_scores)
        b_new = tl.maximum(b_max, b_scores)
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_safe) + tl.exp(b_scores - b_safe)
        b_max = b_new
    top = tl.max(b_max, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(b_sum * tl.exp(b_max - safe), 0)
    norm = safe + tl.log(tl.where(total == 0.0, 1.0, total))
    tl.debug_barrier()  # other threads read what this one wrote

    b_value = tl.zeros([BLOCK_K], ACC)
    before = 0
    for start in range(0, used, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        b_log = tl.load(grad_ptr + o_place) - norm
        kept = b_log > float("-inf")
        o_entry = o_place
        if USED_ONLY:
            b_index = tl.load(selected_ptr + o_place * stride_sk, mask=o_place < num_places, other=-1)
            b_used = ((b_index >= 0) & (b_index < num_keys)).to(tl.int32)
            o_entry = before + tl.cumsum(b_used, 0) - b_used
            before += tl.sum(b_used, 0)
        b_target = tl.zeros([BLOCK_K], ACC)
        for i_part in tl.static_range(PARTS):
            part_ptr = target_ptr + i_part * tl.cast(part_stride, tl.int64)
            b_target += tl.load(part_ptr + o_entry, mask=kept, other=0.0)
        tl.debug_barrier()  # threads that hold a copy of a place have read it before its owner writes
        b_log = tl.where(kept, b_log, 0.0)
        b_value += b_target * (tl.log(tl.where(b_target > 0.0, b_target, 1.0)) - b_log)
        tl.store(grad_ptr + o_place, tl.where(kept, tl.exp(b_log) - b_target, 0.0))
    tl.store(rows_ptr + i_query, tl.sum(b_value, 0))


@jit(
    do_not_specialize=["first_query", "num_queries", "num_keys", "num_places", "stride_wb"],
    do_not_specialize_on_alignment=["weights_ptr"],
)
def _gradients_kernel(
    selected_ptr,  # int32 [B, n, K]
    used_ptr,  # int32 [B * n]
    q_ptr,  # [B, n, Hi, Di]
    k_ptr,  # [B, T, Di]
    gates_ptr,  # [B, n, Hi]
    weights_ptr,  # [B, n]
    factors_ptr,  # [B, n, Hi], weight x gate, relative to the largest
    top_ptr,  # [], the largest
    grad_ptr,  # [chunk, row_places], q - p
    grad_q_ptr,  # [B, n, Hi, Di]
    grad_gates_ptr,  # [B, n, Hi]
    grad_k_ptr,  # [B, T, Di], or [chunk, K, Di] when each place writes its own row
    stride_sb,
    stride_ss,
    stride_sk,
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
    stride_fb,
    stride_fs,
    stride_fh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    stride_dqd,
    stride_dgb,
    stride_dgs,
    stride_dgh,
    stride_dkb,
    first_query,
    num_queries,
    num_keys,
    num_places,
    row_places,
    LIFT: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_HI: tl.constexpr,
    BLOCK_DI: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX_DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    i_local = tl.program_id(0).to(tl.int64)
    i_query = first_query + i_local
    i_b, i_s = i_query // num_queries, i_query % num_queries
    o_head = tl.arange(0, BLOCK_HI)
    m_head = o_head < HI
    rows = q_ptr + i_b * stride_qb + i_s * stride_qs + o_head * stride_qh
    b_q = load_rows(rows, m_head, stride_qd, 0, DI, BLOCK_DI, INDEX_DOT)
    factors = factors_ptr + i_b * stride_fb + i_s * stride_fs + o_head * stride_fh
    b_factor = tl.load(factors, mask=m_head, other=0.0) * LIFT
    weight = tl.load(weights_ptr + i_b * stride_wb + i_s * stride_ws).to(ACC)
    top = tl.load(top_ptr) / LIFT
    selected_ptr += i_b * stride_sb + i_s * stride_ss
    k_ptr += i_b * stride_kb
    grad_ptr += i_local * row_places
    used = tl.load(used_ptr + i_query)
    o_column = tl.arange(0, BLOCK_DI)
    m_column = o_column < DI
    b_grad_q = tl.zeros([BLOCK_DI, BLOCK_HI], ACC)
    b_grad_gates = tl.zeros([BLOCK_HI], ACC)
    for start in range(0, used, BLOCK_K):
        o_place = start + tl.arange(0, BLOCK_K)
        b_index = tl.load(selected_ptr + o_place * stride_sk, mask=o_place < num_places, other=-1)
        m_place = (b_index >= 0) & (b_index < num_keys)
        key_rows = k_ptr + b_index.to(tl.int64) * stride_kt
        b_k = load_rows(key_rows, m_place, stride_kd, 0, DI, BLOCK_DI, INDEX_DOT)
        b_products = scores_of(b_q, b_k, True, ACC)
        b_grad = tl.load(grad_ptr + o_place)
        b_grad = tl.where(b_products > 0.0, b_grad[:, None], 0.0)
        b_grad_gates += tl.sum(b_grad * b_products, 0)
        b_grad_q = add_weighted(b_grad_q, (b_grad * LIFT).to(INDEX_DOT), b_k, True, ACC)
        b_weights = (b_grad * b_factor[None, :]).to(INDEX_DOT)
        b_grad_k = tl.dot(b_weights, b_q, input_precision="ieee", out_dtype=ACC) * top
        o_row = (i_local * num_places + o_place) * DI if OWN_ROWS else i_b * stride_dkb + b_index.to(tl.int64) * DI
        give_rows(
            grad_k_ptr + o_row[:, None] + o_column[None, :], b_grad_k, m_place[:, None] & m_column[None, :], OWN_ROWS
        )
    gates = gates_ptr + i_b * stride_gb + i_s * stride_gs + o_head * stride_gh
    b_gates = tl.load(gates, mask=m_head, other=0.0).to(ACC)
    grad_gates = grad_gates_ptr + i_b * stride_dgb + i_s * stride_dgs + o_head * stride_dgh
    tl.store(grad_gates, b_grad_gates * weight, mask=m_head)
    b_grad_q *= (b_gates * (weight / LIFT))[None, :]
    grad_rows = grad_q_ptr + i_b * stride_dqb + i_s * stride_dqs + o_head * stride_dqh
    tl.store(
        grad_rows[None, :] + o_column[:, None] * stride_dqd,
        b_grad_q.to(grad_q_ptr.dtype.element_ty),
        mask=m_column[:, None] & m_head[None, :],
    )


def unsupported(queries: torch.Tensor, keys: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> str | None:
    """None when the kernels take heads and head sizes of these inputs, else one sentence that says why not."""
    try:
        _tiles(queries, keys, q, k)
    except ValueError as error:
        return str(error)
    return None


def _tiles(queries, keys, q, k) -> ListTiles:
    size = torch.promote_types(queries.dtype, keys.dtype).itemsize
    attention = (queries.shape[2] // keys.shape[1], width_of(queries.shape[3]), size)
    index = (padded(q.shape[2]), padded(q.shape[3]), torch.promote_types(q.dtype, k.dtype).itemsize)
    return list_tiles(*attention, *index, shared_memory(queries.device))


@torch.no_grad()
def sparse_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    weights: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    selected: torch.Tensor,
    scaling: float,
    *,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum over n queries of weight x KL, for queries that attend to a selection.

    Args:
        q: indexer queries [B, n, Hi, Di], k: indexer keys [B, T, Di], gates: [B, n, Hi]. weights: [B, n] float32, 0 at
            queries that do not count. queries [B, n, H, D], keys [B, G, T, D]: what the attention's scores are made of.
        lse: natural log-sum-exp of that attention over the selection, per head [B, n, H]. selected: int32 [B, n, K] as
            `select_tokens` returns it, ascending without duplicates; -1, or anything else that is no slot of keys, is
            unused wherever it stands.
        grads: None, or gradients of q and gates, which are written, and of k in float32, which is added to.

    Returns:
        the sum [] in float32 (float64 when an input is). Gradients of keys are added atomically, hence in no fixed
        order, unless `torch.use_deterministic_algorithms` is on. Raises `ValueError` where `unsupported` has something
        to say.
    """
    q, queries = within_32_bits(q), within_32_bits(queries)
    batch, num_queries, heads, dim = queries.shape
    num_keys, num_places = keys.shape[2], selected.shape[2]
    tiles = _tiles(queries, keys, q, k)
    statistics = statistics_dtype(queries, keys, q, k)
    count = batch * num_queries
    if count * num_places == 0:
        if grads is not None:
            grads[0].zero_()
            grads[2].zero_()
        return torch.zeros((), dtype=statistics, device=q.device)
    index_heads, index_dim = q.shape[2:]
    unit = unit_of(queries, keys, shared_memory(queries.device))
    parts = 1 if unit is None else keys.shape[1]
    rows = torch.empty(batch, num_queries, dtype=statistics, device=q.device)
    own_rows = grads is not None and torch.are_deterministic_algorithms_enabled()
    row_places = triton.cdiv(num_places, _PLACES_MULTIPLE) * _PLACES_MULTIPLE
    per_query = ((parts + 1) * row_places + num_places * index_dim * own_rows) * statistics.itemsize
    chunk = min(count, max(1, WORKSPACE_BYTES // per_query))
    if unit is not None:  # whole units, and at least one
        chunk = triton.cdiv(chunk, unit.queries) * unit.queries
    target = torch.empty(parts, chunk, row_places, dtype=statistics, device=q.device)
    grad = torch.empty(chunk, row_places, dtype=statistics, device=q.device)
    counts = weights != 0
    used = used_places(selected, num_keys).masked_fill_(~counts.flatten(), 0)
    types = operand_types(queries, keys, q, k, statistics)
    index = {
        "HI": index_heads,
        "DI": index_dim,
        "BLOCK_HI": padded(index_heads),
        "BLOCK_DI": padded(index_dim),
        "BLOCK_K": tiles.keys,
        "INDEX_DOT": types["INDEX_DOT"],
        "ACC": types["ACC"],
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    if grads is not None:
        factors, top = key_factors(weights, gates)
        grad_k = grad_k_rows = grads[1].contiguous()
    if own_rows:
        grad_k_rows = torch.empty(chunk, num_places, index_dim, dtype=statistics, device=q.device)
        known = (selected >= 0) & (selected < num_keys) & counts.unsqueeze(-1)
        # Rows of keys as in `grad_k`, which may be longer; past its end for places that nobody wrote.
        first_row = torch.arange(batch, device=q.device)[:, None, None] * k.shape[1]
        key_rows = torch.where(known, selected + first_row, batch * k.shape[1]).flatten(0, 1)  # [B * n, K]
    for begin, size in targets(queries, keys, lse, selected, used, scaling, tiles, unit, target, types):
        sizes = (begin, num_queries, num_keys, num_places, row_places)
        with on_device(q.device):
            _divergence_kernel[(size,)](
                selected,
                used,
                q,
                k,
                gates,
                target,
                grad,
                rows,
                *selected.stride(),
                *q.stride(),
                *k.stride(),
                *gates.stride(),
                *sizes,
                target.stride(0),
                PARTS=parts,
                USED_ONLY=unit is not None,
                **index,
            )
            if grads is None:
                continue
            _gradients_kernel[(size,)](
                selected,
                used,
                q,
                k,
                gates,
                weights,
                factors,
                top,
                grad,
                grads[0],
                grads[2],
                grad_k_rows,
                *selected.stride(),
                *q.stride(),
                *k.stride(),
                *gates.stride(),
                *weights.stride(),
                *factors.stride(),
                *grads[0].stride(),
                *grads[2].stride(),
                grad_k.stride(0),
                *sizes,
                LIFT=LIFT,
                OWN_ROWS=own_rows,
                **index,
            )
        if own_rows:
            chosen = key_rows[begin : begin + size].flatten()
            add_rows_in_order(grad_k_rows[:size].flatten(0, 1), chosen, grad_k.flatten(0, 1))
    if grads is not None and grad_k is not grads[1]:
        grads[1].copy_(grad_k)
    return (rows * weights).sum()
