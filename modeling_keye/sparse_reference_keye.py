"""Sparse attention in plain PyTorch: the CPU's fast path and the judge of every kernel.

Selection follows DeepSeek-V3.2-Exp eq. 1 (lightning indexer) with a local window and global anchors on top; attention
reads only the selected rows. Everything runs tile by tile: scores are made, reduced and dropped, so that memory grows
with the number of tokens and not with its square, in the backward pass as well. The contract of the public functions
stands in `sparse_attention_keye.py`; shapes there: B batch, S queries, T keys, H query heads, G key/value heads,
D head size, W = latent + rotary width, K selected keys.
"""

import math
from functools import partial

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from .index_lists_keye import pack_index_list, unpack_index_list

# Queries whose scores against all keys are held at once, and keys per scoring tile. Measured on two AVX-512 cores:
# larger blocks fall out of the cache, smaller ones lose the matrix product.
_QUERY_BLOCK = 128
_SCORE_TILE_ELEMENTS = 2**21
# Elements of the gathered rows [queries, K, width] per attention step: 64 queries of 256 keys of 160.
_GATHER_ELEMENTS = 5 * 2**19
# Queries per dense step when a mask has to be built.
_DENSE_QUERY_BLOCK = 256


def forced_count(num_visible: int, local_window: int | None, anchor_stride: int | None) -> int:
    """How many of `num_visible` tokens the window and the anchors keep for the last of them."""
    window = 0 if local_window is None else min(num_visible, local_window + 1)
    anchors = 0 if anchor_stride is None else math.ceil((num_visible - window) / anchor_stride)
    return window + anchors


def _forced_slots(
    slots: torch.Tensor, start: int, local_window: int | None, anchor_stride: int | None, unused: int
) -> torch.Tensor:
    """Window and anchors of the queries at `slots` [n]: [n, F], unique, `unused` where a query has fewer."""
    parts = []
    if anchor_stride is not None:
        anchors = torch.arange(start, max(int(slots[-1]) + 1, start), anchor_stride, device=slots.device)
        anchors = anchors.expand(slots.shape[0], -1)
        oldest_in_window = slots + 1 if local_window is None else slots - local_window
        parts.append(anchors.masked_fill(anchors >= oldest_in_window[:, None], unused))
    if local_window is not None:
        window = slots[:, None] + torch.arange(-local_window, 1, device=slots.device)
        parts.append(window.masked_fill(window < start, unused))
    if not parts:
        return slots.new_empty(slots.shape[0], 0)
    return torch.cat(parts, dim=1)


def _topk_slots(scores: torch.Tensor, topk: int, unused: int) -> torch.Tensor:
    """Positions of the `topk` largest entries per row of `scores` [n, T], in any order; ties go to the lowest
    position. Entries of -inf are no candidates: `unused` stands in their place.
    """
    # One more than needed: equality of the last two values is the only case that `topk` leaves open.
    best = scores.topk(min(topk + 1, scores.shape[-1]), dim=-1)
    slots = best.indices[:, :topk].masked_fill(best.values[:, :topk] == -math.inf, unused)
    if best.values.shape[-1] > topk:
        threshold, following = best.values[:, topk - 1], best.values[:, topk]
        rows = ((threshold == following) & (threshold > -math.inf)).nonzero().squeeze(-1)
        if rows.shape[0]:
            above = scores[rows] > threshold[rows, None]
            equal = scores[rows] == threshold[rows, None]
            room = topk - above.sum(dim=-1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
            slots[rows] = chosen.nonzero()[:, 1].view(-1, topk)
    return slots


def index_scores(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, buffer: torch.Tensor
) -> torch.Tensor:
    """Indexer scores `sum_j w[s,j] relu(q[s,j] . k[t])` of one block of queries, tile by tile, into `out`.

    q [S, Hi, Di], k [T, Di], weights [S, Hi], out float32 [S, T], buffer: float32 scratch. NaN becomes the lowest
    finite value, so that a visible key always remains a candidate.
    """
    num_queries, heads, _ = q.shape
    q = q.float().reshape(num_queries * heads, -1)
    weights = weights.float().unsqueeze(1)  # [S, 1, Hi]
    tile = max(64, buffer.shape[0] // (num_queries * heads))
    for begin in range(0, k.shape[0], tile):
        keys = k[begin : begin + tile].float()
        products = buffer[: q.shape[0] * keys.shape[0]].view(q.shape[0], keys.shape[0])
        torch.mm(q, keys.T, out=products).relu_()
        products = products.view(num_queries, heads, keys.shape[0])
        out[:, begin : begin + keys.shape[0]] = torch.bmm(weights, products).squeeze(1)
    lowest = torch.finfo(torch.float32).min
    return out.nan_to_num_(nan=lowest, neginf=lowest)


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
    slot: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `sparse_attention_keye.select_tokens`, for `slot` `triton_selection_keye.select_tokens`."""
    num_keys = query_offset + num_queries
    block = min(num_queries, _QUERY_BLOCK)
    if slot is not None:
        rows = []
        for b in range(batch_size):
            mask = None if key_mask is None else key_mask[b, :num_keys].bool()
            for begin in range(0, num_queries, block):
                part = slice(begin, min(begin + block, num_queries))
                slots = slot + torch.arange(part.start, part.stop, device=device)
                index = None if topk is None else (q[b, part], k[b, :num_keys], weights[b, part])
                kept = _kept_at(slots, index, mask, topk, local_window, anchor_stride, num_keys)
                rows.append(_slot_lists(kept, width))
        return torch.cat(rows).view(batch_size, num_queries, width)
    out = torch.full((batch_size, num_queries, width), -1, dtype=torch.int32, device=device)
    if topk is not None:
        # One spare column, never a candidate: what is masked by position can point at it.
        score_buffer = torch.empty(block, num_keys + 1, dtype=torch.float32, device=device)
        tile = min(num_keys, max(64, _SCORE_TILE_ELEMENTS // (block * q.shape[2])))
        product_buffer = torch.empty(block * q.shape[2] * tile, dtype=torch.float32, device=device)
    for b in range(batch_size):
        valid, start = None, 0
        if key_mask is not None and not bool(key_mask[b].all()):
            valid = torch.cat([key_mask[b].bool(), key_mask.new_zeros(1, dtype=torch.bool)])
            start = int(valid.to(torch.uint8).argmax()) if bool(valid.any()) else num_keys
        for begin in range(0, num_queries, block):
            end = min(begin + block, num_queries)
            slots = torch.arange(query_offset + begin, query_offset + end, device=device)
            kept = _forced_slots(slots, start, local_window, anchor_stride, unused=num_keys)
            if valid is not None:
                kept = kept.masked_fill(~valid[kept], num_keys)
            if topk is not None:
                last = query_offset + end
                scores = score_buffer[: end - begin, : last + 1]
                with torch.autocast(device.type, enabled=False):  # scores are float32 under any autocast
                    index_scores(q[b, begin:end], k[b, :last], weights[b, begin:end], scores[:, :last], product_buffer)
                scores[:, last] = -math.inf
                future = torch.arange(query_offset + begin, last, device=device) > slots[:, None]
                scores[:, query_offset + begin : last].masked_fill_(future, -math.inf)
                if valid is not None:
                    scores.masked_fill_(~valid[: last + 1], -math.inf)
                scores.scatter_(1, kept.clamp(max=last), -math.inf)
                kept = torch.cat([kept, _topk_slots(scores, topk, unused=num_keys)], dim=1)
            kept = kept.to(torch.int32).sort(dim=-1).values[:, :width]
            out[b, begin:end, : kept.shape[1]] = kept.masked_fill_(kept == num_keys, -1)
    return out


def _kept_at(
    slots: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
    topk: int | None,
    local_window: int | None,
    anchor_stride: int | None,
    num_keys: int,
) -> torch.Tensor:
    """Bool [n, T], what the queries of one sequence at `slots` [n] keep; nothing waits for the device.

    index: queries [n, Hi, Di], keys [T, Di] and gates [n, Hi] of the indexer, or None. mask: bool [T] at real tokens.
    """
    keys, slots = torch.arange(num_keys, device=slots.device), slots[:, None]
    visible, start = keys <= slots, 0
    if mask is not None:
        visible, start = visible & mask, mask.to(torch.uint8).argmax()
    kept = torch.zeros_like(visible)
    if local_window is not None:
        kept = kept | (slots - keys <= local_window)
    if anchor_stride is not None:
        kept = kept | ((keys - start) % anchor_stride == 0)
    kept = kept & visible
    if topk is None:
        return kept
    chosen = visible & ~kept
    if topk < num_keys:
        q, k, weights = index
        scores = torch.empty(q.shape[0], num_keys, dtype=torch.float32, device=q.device)
        tile = min(num_keys, max(64, _SCORE_TILE_ELEMENTS // (q.shape[0] * q.shape[1])))
        buffer = torch.empty(q.shape[0] * q.shape[1] * tile, dtype=torch.float32, device=q.device)
        with torch.autocast(q.device.type, enabled=False):  # scores are float32 under any autocast
            index_scores(q, k, weights, scores, buffer)
        scores = scores.masked_fill(~chosen, -math.inf)
        threshold = scores.topk(topk, dim=-1).values[:, -1:]
        above, equal = scores > threshold, scores == threshold
        room = topk - above.sum(dim=-1, keepdim=True)
        chosen = chosen & (above | (equal & (equal.cumsum(dim=-1) <= room)))
    return kept | chosen


def _slot_lists(kept: torch.Tensor, width: int) -> torch.Tensor:
    """The marked positions of each row of `kept` [n, T] in ascending order, -1 behind them: int32 [n, width]."""
    slots = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device)
    # What is not marked goes to a place of its own behind the list.
    places = (kept.cumsum(dim=-1) - 1).masked_fill(~kept, width)
    lists = torch.full((kept.shape[0], width + 1), -1, dtype=torch.int32, device=kept.device)
    return lists.scatter(1, places, slots.expand_as(kept))[:, :width]


class _SparseAttention(torch.autograd.Function):
    """Attention over gathered rows; keeps only the log-sum-exp and makes the probabilities again in backward.

    q [B, S, H, D], k [B, G, T, D], v [B, G, T, Dv] or None (the values are the first `value_dim` columns of k, as in
    MLA), indices [B, S, K]. Unused places repeat a real key with probability 0, so they add nothing to any gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, indices, scaling, value_dim):
        out, lse = _gathered_attention(q, k, v, indices, scaling, value_dim)
        ctx.save_for_backward(q, k, v, *pack_index_list(indices, k.shape[2]), out, lse)
        ctx.scaling, ctx.value_dim, ctx.width = scaling, value_dim, indices.shape[-1]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        with torch.autocast(grad_out.device.type, enabled=False):  # that may be on here, if the caller left it on
            return _SparseAttention._gradients(ctx, grad_out)

    @staticmethod
    def _gradients(ctx, grad_out):
        q, k, v, shared, rest, out, lse = ctx.saved_tensors
        indices = unpack_index_list(shared, rest, ctx.width)
        dtype = lse.dtype
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros(k.shape, dtype=dtype, device=k.device)
        grad_v = None if v is None else torch.zeros(v.shape, dtype=dtype, device=v.device)
        scratch = _Scratch(q.device)
        for b, part, g, head in _chunks(q, k, indices):
            picked = indices[b, part]
            unused = (picked < 0)[:, None, :]
            keys = scratch.gather("keys", k[b, g], picked)
            values = keys[..., : ctx.value_dim] if v is None else scratch.gather("values", v[b, g], picked)
            queries, grad = q[b, part, head].to(dtype), grad_out[b, part, head].to(dtype)
            scores = torch.bmm(queries * ctx.scaling, keys.transpose(1, 2)).masked_fill_(unused, -math.inf)
            norm = lse[b, part, head].unsqueeze(-1)
            probs = scores.sub_(norm.masked_fill(norm == -math.inf, 0.0)).exp_()
            delta = (out[b, part, head].to(dtype) * grad).sum(dim=-1, keepdim=True)
            grad_scores = torch.bmm(grad, values.transpose(1, 2)).sub_(delta).mul_(probs).mul_(ctx.scaling)
            grad_scores.masked_fill_(unused, 0.0)
            # Without any key the gathered row is row 0, which may hold NaN; 0 * NaN must not reach the gradient.
            grad_queries = torch.bmm(grad_scores, keys).masked_fill_(norm == -math.inf, 0.0)
            grad_q[b, part, head] = grad_queries.to(q.dtype)
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries)  # [n, K, D]
            grad_values = torch.bmm(probs.transpose(1, 2), grad)  # [n, K, Dv]
            rows = _safe_rows(picked).reshape(-1)
            if v is None:
                grad_keys[..., : ctx.value_dim] += grad_values
            else:
                grad_v[b, g].index_add_(0, rows, grad_values.flatten(0, 1))
            grad_k[b, g].index_add_(0, rows, grad_keys.flatten(0, 1))
        return grad_q, grad_k.to(k.dtype), None if v is None else grad_v.to(v.dtype), None, None, None


def _gathered_attention(q, k, v, indices, scaling, value_dim) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, num_queries, heads, value_dim)
    lse = torch.empty(batch, num_queries, heads, dtype=dtype, device=q.device)
    scratch = _Scratch(q.device)
    for b, part, g, head in _chunks(q, k, indices):
        picked = indices[b, part]
        keys = scratch.gather("keys", k[b, g], picked)  # [n, K, D]
        values = keys[..., :value_dim] if v is None else scratch.gather("values", v[b, g], picked)
        queries = q[b, part, head].to(dtype) * scaling
        scores = scratch.take("scores", (*queries.shape[:2], picked.shape[-1]), dtype)  # [n, h, K]
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        blind = _hide_unused(scores, picked)
        probs = torch.softmax(scores, dim=-1, out=scratch.take("probs", scores.shape, dtype))
        # At the largest score the probability is 1 / sum(exp(s - max)).
        chunk_lse = scores.amax(dim=-1) - probs.amax(dim=-1).log()
        chunk_out = torch.bmm(probs, values)
        if blind is not None:
            chunk_lse.masked_fill_(blind, -math.inf)
            chunk_out.masked_fill_(blind.unsqueeze(-1), 0.0)
        out[b, part, head], lse[b, part, head] = chunk_out.to(q.dtype), chunk_lse
    return out, lse


def _hide_unused(scores: torch.Tensor, picked: torch.Tensor) -> torch.Tensor | None:
    """Mask unused places of scores [n, h, K]; returns which rows have no key at all [n, 1], None if none does."""
    unused = picked < 0
    traced = torch.compiler.is_compiling()  # a graph is the same for all values
    if not traced and not bool(unused.any()):
        return None
    blind = unused.all(dim=-1, keepdim=True)
    scores.masked_fill_((unused & ~blind)[:, None, :], -math.inf)
    return blind if traced or bool(blind.any()) else None


class _Scratch:
    """Buffers of one call, reused from chunk to chunk: fresh pages cost as much as the matrix products."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < size or buffer.dtype != dtype:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def gather(self, name: str, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """rows [T, D], indices [n, K] -> [n, K, D] in float32 (float64 stays)."""
        safe = _safe_rows(indices).reshape(-1)
        picked = self.take(name, (safe.shape[0], rows.shape[-1]), rows.dtype)
        torch.index_select(rows, 0, safe, out=picked)
        picked = picked.view(*indices.shape, rows.shape[-1])
        return picked.to(torch.promote_types(rows.dtype, torch.float32))


def _chunks(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor):
    """(batch row, slice of queries, key group, slice of its query heads) so that gathered rows stay bounded."""
    heads, groups = q.shape[2], k.shape[1]
    step = max(1, _GATHER_ELEMENTS // max(1, indices.shape[-1] * k.shape[-1]))
    for b in range(q.shape[0]):
        for begin in range(0, q.shape[1], step):
            for g in range(groups):
                yield b, slice(begin, begin + step), g, slice(g * heads // groups, (g + 1) * heads // groups)


def _safe_rows(indices: torch.Tensor) -> torch.Tensor:
    """Unused places point at a key of the same query: never at row 0, whose content may be padding or NaN."""
    return torch.where(indices >= 0, indices, indices.amax(dim=-1, keepdim=True).clamp(min=0))


def _attention(q, k, v, indices, scaling, value_dim) -> tuple[torch.Tensor, torch.Tensor]:
    needs_graph = q.requires_grad or k.requires_grad or (v is not None and v.requires_grad)
    with torch.autocast(q.device.type, enabled=False):  # the statistics are float32 under any autocast
        if torch.is_grad_enabled() and needs_graph:
            return _SparseAttention.apply(q, k, v, indices, scaling, value_dim)
        with torch.no_grad():  # `out=` arguments refuse inputs that require a gradient
            return _gathered_attention(q, k, v, indices, scaling, value_dim)


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_mla`."""
    return _attention(q, kv.unsqueeze(1), None, indices, scaling, value_dim)


def sparse_gqa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_gqa`."""
    return _attention(q, k, v, indices, scaling, v.shape[-1])


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    query_offset: int | torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `sparse_attention_keye.dense_attention`."""
    heads, num_queries, dim = q.shape[1:]
    value_dim = v.shape[-1]
    at_slot = isinstance(query_offset, torch.Tensor)
    num_keys = k.shape[2] if at_slot else query_offset + num_queries
    masked = at_slot or (key_mask is not None and not bool(key_mask.all()))
    plain = num_queries in (1, num_keys)  # the kernels' own idea of causal, or none, is right
    if not plain and torch.compiler.is_compiling():
        masked = True  # the compiler knows no bias
    # The flash path needs equal widths.
    width = max(dim, value_dim)
    q, k, v = (widened(x, width) for x in (q, k, v))
    k, v = k[:, :, :num_keys], v[:, :, :num_keys]
    if q.is_cuda and heads != k.shape[1] and (masked or not _has_fused_kernel(q, k, v)):
        # With a mask, and for what the flash kernel does not take, grouped heads have no fused kernel there.
        k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, scale=scaling, enable_gqa=heads != k.shape[1])
    if not masked and (plain or _has_fused_kernel(q, k, v)):
        bias = None if plain else causal_lower_right(num_queries, num_keys)
        out = attend(q, k, v, attn_mask=bias, is_causal=1 < num_queries == num_keys)
        return out[..., :value_dim].transpose(1, 2)

    def block(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first) -> torch.Tensor:
        mask = _causal_mask(queries.shape[2], first, keys.shape[2], key_mask, q.device)[:, None]
        blind = ~mask.any(dim=-1, keepdim=True)
        out = attend(queries, keys, values, attn_mask=mask | blind)
        return out.masked_fill(blind, 0.0)

    parts = []
    for begin in range(0, num_queries, _DENSE_QUERY_BLOCK):
        end = min(begin + _DENSE_QUERY_BLOCK, num_queries)
        last = num_keys if at_slot else query_offset + end
        parts.append(_recomputed(block, q[:, :, begin:end], k[:, :, :last], v[:, :, :last], query_offset + begin))
    return torch.cat(parts, dim=2)[..., :value_dim].transpose(1, 2)


def widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """x with zeros behind its columns; itself where there are none to add, which `pad` would copy."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _has_fused_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether PyTorch has a CUDA kernel that takes a causal bias as such; elsewhere `CausalBias` becomes [S, T]."""
    if not q.is_cuda:
        return False
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])
    checks = (torch.backends.cuda.can_use_flash_attention, torch.backends.cuda.can_use_efficient_attention)
    return any(check(parameters) for check in checks)


def dense_latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    scaling: float,
    value_dim: int,
    query_offset: int | torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `sparse_attention_keye.dense_latent_attention`."""
    num_queries, heads = q.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)

    def block(queries: torch.Tensor, rows: torch.Tensor, first) -> torch.Tensor:
        count = queries.shape[1]
        visible = _causal_mask(count, first, rows.shape[1], key_mask, q.device).unsqueeze(2)  # [B or 1, n, 1, T]
        blind = ~visible.any(dim=-1, keepdim=True)
        with torch.autocast(q.device.type, enabled=False):
            rows = rows.to(dtype)
            scores = torch.matmul((queries.to(dtype) * scaling).flatten(1, 2), rows.transpose(1, 2))
            scores = scores.unflatten(1, (count, heads)).masked_fill(~(visible | blind), -math.inf)
            probs = scores.softmax(dim=-1).masked_fill(blind, 0.0)
            out = torch.matmul(probs.flatten(1, 2), rows[..., :value_dim])
        return out.unflatten(1, (count, heads)).to(q.dtype)

    parts = []
    step = max(1, _SCORE_TILE_ELEMENTS // (heads * kv.shape[1]))
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        last = kv.shape[1] if isinstance(query_offset, torch.Tensor) else query_offset + end
        parts.append(_recomputed(block, q[:, begin:end], kv[:, :last], query_offset + begin))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _recomputed(block, *arguments):
    """One tile; with gradients its scores and mask are made again in backward instead of being kept."""
    if torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


def _causal_mask(
    num_queries: int,
    first: int | torch.Tensor,
    num_keys: int,
    key_mask: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Bool [B, n, T] ([1, n, T] without padding): which keys the queries at slots `first`, `first + 1`, ... see."""
    slots = (torch.arange(num_queries, device=device) + first)[:, None]
    visible = (torch.arange(num_keys, device=device) <= slots)[None]
    return visible if key_mask is None else visible & key_mask[:, None, :num_keys].bool()
