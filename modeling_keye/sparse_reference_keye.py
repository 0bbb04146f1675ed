"""Sparse attention in plain PyTorch: the CPU's fast path and the judge of every kernel.

Selection follows DeepSeek-V3.2-Exp eq. 1 (lightning indexer) with a local window and global anchors on top; attention
reads only the selected rows. Everything runs tile by tile: scores are made, reduced and dropped, so that memory grows
with the number of tokens and not with its square, in the backward pass as well. The contract of the public functions
stands in `sparse_attention_keye.py`; shapes there: B batch, S queries, T keys, H query heads, G key/value heads,
D head size, W = latent + rotary width, K selected keys.
"""

import math

import torch

# Queries whose scores against all keys are held at once, and keys per scoring tile. Measured on two AVX-512 cores:
# larger blocks fall out of the cache, smaller ones lose the matrix product.
_QUERY_BLOCK = 128
_SCORE_TILE_ELEMENTS = 2**21
# Elements of the gathered rows [queries, K, width] per attention step.
_GATHER_ELEMENTS = 2**21
# Queries per dense step when a mask has to be built.
_DENSE_QUERY_BLOCK = 256


def forced_count(num_visible: int, local_window: int | None, anchor_stride: int | None) -> int:
    """How many of `num_visible` tokens the window and the anchors keep for the last of them."""
    window = 0 if local_window is None else min(num_visible, local_window + 1)
    anchors = 0 if anchor_stride is None else math.ceil((num_visible - window) / anchor_stride)
    return window + anchors


def _forced_indices(
    slots: torch.Tensor, start: int, local_window: int | None, anchor_stride: int | None
) -> torch.Tensor:
    """Window and anchors of each query, [n, K] ascending with -1 at the end; no indexer, no padding inside."""
    n = slots.shape[0]
    last = int(slots[-1]) + 1
    parts = []
    if anchor_stride is not None:
        anchors = torch.arange(start, max(last, start), anchor_stride, device=slots.device).expand(n, -1)
        oldest_in_window = slots + 1 if local_window is None else slots - local_window
        parts.append(anchors.masked_fill(anchors >= oldest_in_window[:, None], -1))
    if local_window is not None:
        window = slots[:, None] + torch.arange(-local_window, 1, device=slots.device)
        parts.append(window.masked_fill(window < start, -1))
    return torch.cat(parts, dim=1)


def _compact(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Ascending positions of the True entries of `kept` [n, T], padded with -1 to [n, width]."""
    rows, columns = kept.nonzero(as_tuple=True)
    counts = kept.sum(dim=-1)
    first = counts.cumsum(0) - counts
    indices = torch.full((kept.shape[0], width), -1, dtype=torch.int32, device=kept.device)
    place = torch.arange(rows.shape[0], device=kept.device) - first[rows]
    indices[rows, place] = columns.to(torch.int32)
    return indices


def _keep_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Bool mask of the `topk` largest entries per row of `scores` [n, T]; ties go to the lowest position.

    Entries of -inf are not candidates and are never kept.
    """
    candidates = scores > -math.inf
    if topk >= scores.shape[-1]:
        return candidates
    threshold = scores.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    kept = (scores >= threshold) & candidates
    tied = (kept.sum(dim=-1) > topk).nonzero().squeeze(-1)
    if tied.numel():
        above = scores[tied] > threshold[tied]
        equal = scores[tied] == threshold[tied]
        room = topk - above.sum(dim=-1, keepdim=True)
        kept[tied] = above | (equal & (equal.cumsum(dim=-1) <= room))
    return kept


def index_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Indexer scores `sum_j w[s,j] relu(q[s,j] . k[t])` of one block, tile by tile.

    q [S, Hi, Di], k [T, Di], weights [S, Hi] -> float32 [S, T]. NaN becomes the lowest finite value, so that a
    visible key always remains a candidate.
    """
    num_queries, heads, _ = q.shape
    scores = torch.empty(num_queries, k.shape[0], dtype=torch.float32, device=q.device)
    q = q.float().reshape(num_queries * heads, -1)
    weights = weights.float().unsqueeze(1)  # [S, 1, Hi]
    tile = max(64, _SCORE_TILE_ELEMENTS // (num_queries * heads))
    buffer = torch.empty(num_queries * heads * min(tile, k.shape[0]), dtype=torch.float32, device=q.device)
    for begin in range(0, k.shape[0], tile):
        keys = k[begin : begin + tile].float()
        products = buffer[: q.shape[0] * keys.shape[0]].view(q.shape[0], keys.shape[0])
        torch.mm(q, keys.T, out=products).relu_()
        scores[:, begin : begin + keys.shape[0]] = torch.bmm(
            weights, products.view(num_queries, heads, keys.shape[0])
        ).squeeze(1)
    lowest = torch.finfo(torch.float32).min
    return scores.nan_to_num_(nan=lowest, neginf=lowest)


@torch.no_grad()
def select_tokens(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    topk: int | None,
    local_window: int | None,
    anchor_stride: int | None,
    batch_size: int,
    num_queries: int,
    query_offset: int,
    key_mask: torch.Tensor | None,
    width: int,
    device: torch.device,
) -> torch.Tensor:
    """See `sparse_attention_keye.select_tokens`."""
    out = torch.full((batch_size, num_queries, width), -1, dtype=torch.int32, device=device)
    for b in range(batch_size):
        valid = None
        start = 0
        if key_mask is not None and not bool(key_mask[b].all()):
            valid = key_mask[b].bool()
            start = int(valid.to(torch.uint8).argmax()) if bool(valid.any()) else valid.shape[0]
        for begin in range(0, num_queries, _QUERY_BLOCK):
            end = min(begin + _QUERY_BLOCK, num_queries)
            slots = torch.arange(query_offset + begin, query_offset + end, device=device)
            last = query_offset + end
            if topk is None and (valid is None or bool(valid[start:last].all())):
                forced = _forced_indices(slots, start, local_window, anchor_stride)
                kept = None
            else:
                positions = torch.arange(last, device=device)
                visible = positions <= slots[:, None]
                if valid is not None:
                    visible &= valid[:last]
                kept = torch.zeros_like(visible)
                if local_window is not None:
                    kept |= visible & (positions >= slots[:, None] - local_window)
                if anchor_stride is not None:
                    kept |= visible & ((positions - start) % anchor_stride == 0)
                if topk is not None:
                    scores = index_scores(q[b, begin:end], k[b, :last], weights[b, begin:end])
                    scores.masked_fill_(~(visible & ~kept), -math.inf)
                    kept |= _keep_topk(scores, topk)
                forced = None
            if forced is not None:
                # Rows are padded inside; a stable sort on "unused" keeps the ascending order of the rest.
                order = (forced < 0).to(torch.uint8).argsort(dim=-1, stable=True)
                forced = forced.gather(1, order)[:, :width]
                out[b, begin:end, : forced.shape[1]] = forced.to(torch.int32)
            else:
                out[b, begin:end] = _compact(kept, width)
    return out


class _SparseAttention(torch.autograd.Function):
    """Attention over gathered rows; keeps only the log-sum-exp and makes the probabilities again in backward.

    q [B, S, H, D], k [B, G, T, D], v [B, G, T, Dv] or None (the values are the first `value_dim` columns of k, as in
    MLA), indices [B, S, K]. Unused places repeat a real key with probability 0, so they add nothing to any gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, indices, scaling, value_dim):
        batch, num_queries, heads, dim = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(batch, num_queries, heads, value_dim)
        lse = torch.empty(batch, num_queries, heads, dtype=dtype, device=q.device)
        for b, part, g, head in _chunks(q, k, indices, value_dim):
            picked = indices[b, part]
            keys = _gather(k[b, g], picked)  # [n, K, D]
            values = keys[..., :value_dim] if v is None else _gather(v[b, g], picked)
            scores = torch.bmm(q[b, part, head].to(dtype) * scaling, keys.transpose(1, 2))  # [n, h, K]
            probs, chunk_lse = _softmax(scores, (picked < 0)[:, None, :])
            chunk_out = torch.bmm(probs, values)
            out[b, part, head] = chunk_out.masked_fill_(chunk_lse.unsqueeze(-1) == -math.inf, 0.0).to(q.dtype)
            lse[b, part, head] = chunk_lse
        ctx.save_for_backward(q, k, v, indices, out, lse)
        ctx.scaling, ctx.value_dim = scaling, value_dim
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        q, k, v, indices, out, lse = ctx.saved_tensors
        dtype = lse.dtype
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros(k.shape, dtype=dtype, device=k.device)
        grad_v = None if v is None else torch.zeros(v.shape, dtype=dtype, device=v.device)
        for b, part, g, head in _chunks(q, k, indices, ctx.value_dim):
            picked = indices[b, part]
            unused = (picked < 0)[:, None, :]
            keys = _gather(k[b, g], picked)
            values = keys[..., : ctx.value_dim] if v is None else _gather(v[b, g], picked)
            queries, grad = q[b, part, head].to(dtype), grad_out[b, part, head].to(dtype)
            scores = torch.bmm(queries * ctx.scaling, keys.transpose(1, 2)).masked_fill_(unused, -math.inf)
            norm = lse[b, part, head].unsqueeze(-1)
            probs = scores.sub_(norm.masked_fill(norm == -math.inf, 0.0)).exp_()
            delta = (out[b, part, head].to(dtype) * grad).sum(dim=-1, keepdim=True)
            grad_scores = torch.bmm(grad, values.transpose(1, 2)).sub_(delta).mul_(probs).mul_(ctx.scaling)
            grad_scores.masked_fill_(unused, 0.0)
            grad_q[b, part, head] = torch.bmm(grad_scores, keys).to(q.dtype)
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries)  # [n, K, D]
            grad_values = torch.bmm(probs.transpose(1, 2), grad)  # [n, K, Dv]
            rows = _safe_rows(picked).reshape(-1)
            if v is None:
                grad_keys[..., : ctx.value_dim] += grad_values
            else:
                grad_v[b, g].index_add_(0, rows, grad_values.flatten(0, 1))
            grad_k[b, g].index_add_(0, rows, grad_keys.flatten(0, 1))
        return grad_q, grad_k.to(k.dtype), None if v is None else grad_v.to(v.dtype), None, None, None


def _chunks(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, value_dim: int):
    """(batch row, slice of queries, key group, slice of its query heads) so that gathered rows stay bounded."""
    heads, groups = q.shape[2], k.shape[1]
    step = max(1, _GATHER_ELEMENTS // max(1, indices.shape[-1] * (k.shape[-1] + value_dim)))
    for b in range(q.shape[0]):
        for begin in range(0, q.shape[1], step):
            for g in range(groups):
                yield b, slice(begin, begin + step), g, slice(g * heads // groups, (g + 1) * heads // groups)


def _safe_rows(indices: torch.Tensor) -> torch.Tensor:
    """Unused places point at the query's own first key: never at row 0, whose content may be padding or NaN."""
    return torch.where(indices >= 0, indices, indices[:, :1].clamp(min=0))


def _gather(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """rows [T, D], indices [n, K] -> [n, K, D] in float32 (float64 stays)."""
    picked = rows.index_select(0, _safe_rows(indices).reshape(-1)).view(*indices.shape, rows.shape[-1])
    return picked.to(torch.promote_types(rows.dtype, torch.float32))


def _softmax(scores: torch.Tensor, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and log-sum-exp over the last axis, in place; a row with no key gives zeros and -inf."""
    scores.masked_fill_(unused, -math.inf)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    scores.sub_(lse.masked_fill(lse == -math.inf, 0.0)).exp_()
    return scores, lse.squeeze(-1)


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_mla`."""
    return _SparseAttention.apply(q, kv.unsqueeze(1), None, indices, scaling, value_dim)


def sparse_gqa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_gqa`."""
    return _SparseAttention.apply(q, k, v, indices, scaling, v.shape[-1])


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    query_offset: int,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `sparse_attention_keye.dense_attention`."""
    batch, heads, num_queries, dim = q.shape
    num_keys, value_dim = k.shape[2], v.shape[-1]
    if value_dim < dim:
        v = torch.nn.functional.pad(v, (0, dim - value_dim))  # the flash path needs equal widths
    masked = key_mask is not None and not bool(key_mask.all())
    parts = []
    step = num_queries if query_offset == 0 and num_queries == num_keys and not masked else _DENSE_QUERY_BLOCK
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        last = query_offset + end
        keys, values = k[:, :, :last], v[:, :, :last]
        mask = blind = None
        if step != num_queries or step != num_keys or masked:
            positions = torch.arange(last, device=q.device)
            slots = torch.arange(query_offset + begin, last, device=q.device)[:, None]
            mask = (positions <= slots)[None, None]
            if masked:
                mask = mask & key_mask[:, None, None, :last].bool()
                blind = ~mask.any(dim=-1, keepdim=True)
                mask = mask | (blind & (positions == slots))
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, begin:end],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and num_queries > 1,
            scale=scaling,
            enable_gqa=heads != k.shape[1],
        )
        parts.append(out if blind is None else out.masked_fill(blind, 0.0))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out[..., :value_dim].transpose(1, 2)


def dense_latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    scaling: float,
    value_dim: int,
    query_offset: int,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `sparse_attention_keye.dense_latent_attention`."""
    num_queries, heads = q.shape[1:3]
    num_keys = kv.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    kv = kv.to(dtype)
    parts = []
    step = max(1, _SCORE_TILE_ELEMENTS // (heads * num_keys))
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        last = query_offset + end
        rows = kv[:, :last]
        positions = torch.arange(last, device=q.device)
        hidden = positions > torch.arange(query_offset + begin, last, device=q.device)[:, None]  # [n, T]
        hidden = hidden[None, :, None] if key_mask is None else (hidden | ~key_mask[:, None, :last].bool())[:, :, None]
        queries = q[:, begin:end].to(dtype) * scaling
        scores = torch.matmul(queries.flatten(1, 2), rows.transpose(1, 2)).unflatten(1, (end - begin, heads))
        blind = hidden.all(dim=-1, keepdim=True)
        probs = scores.masked_fill(hidden & ~blind, -math.inf).softmax(dim=-1).masked_fill(blind, 0.0)
        out = torch.matmul(probs.flatten(1, 2), rows[..., :value_dim]).unflatten(1, (end - begin, heads))
        parts.append(out.to(q.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
