"""The dense-masked judge behind `attn_implementation="eager"`: full scores and a full mask, for short inputs.

It states the selection as directly as it can be written and shares no code with the tiled path, so that each can be
tested against the other. Memory grows with S x T.
"""

import math

import torch


@torch.no_grad()
def eager_selection(
    selection,
    index,
    shape: tuple[int, int],
    query_offset: int,
    attention_mask: torch.Tensor | None,
    device,
    bounds: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Bool [B, S, T], True where the query keeps the key.

    index: indexer queries [B, S, Hi, Di], keys [B, T, Di], gates [B, S, Hi], or None. attention_mask: bool [B, T] at
    real tokens, bool [B, 1, S, T] of allowed pairs, or None. bounds: of the sequences of a packed row, see
    `packing_keye`.
    """
    batch, num_queries = shape
    num_keys = query_offset + num_queries
    slots = torch.arange(query_offset, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    visible = (keys <= slots).expand(batch, -1, -1)
    start = torch.zeros(batch, 1, 1, dtype=torch.long, device=device)
    if attention_mask is not None and attention_mask.dim() == 4:
        allowed = attention_mask[:, 0, :, :num_keys]
        visible = visible & allowed
        start = allowed[:, -1:].to(torch.uint8).argmax(dim=-1, keepdim=True)  # the first slot that the last query sees
    elif attention_mask is not None:
        real = attention_mask[:, None, :num_keys].bool()
        visible = visible & real
        start = real.to(torch.uint8).argmax(dim=-1, keepdim=True)
    elif bounds is not None:
        begins = torch.tensor(bounds, device=device)
        start = begins[:-1].repeat_interleave(begins.diff()).view(1, -1, 1)
        visible = visible & (keys >= start)
    if selection.is_dense:
        return visible
    kept = torch.zeros_like(visible)
    if selection.local_window is not None:
        kept = kept | (slots - keys <= selection.local_window)
    if selection.anchor_stride is not None:
        kept = kept | ((keys - start) % selection.anchor_stride == 0)
    kept = kept & visible
    if selection.topk is not None:
        q, k, gates = index
        products = torch.einsum("bshd,btd->bsht", q.float(), k[:, :num_keys].float()).relu()
        scores = torch.einsum("bsht,bsh->bst", products, gates.float())
        scores = scores.nan_to_num(nan=torch.finfo(torch.float32).min, neginf=torch.finfo(torch.float32).min)
        candidates = visible & ~kept
        order = scores.masked_fill(~candidates, -math.inf).argsort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(kept).scatter(-1, order[..., : selection.topk], True)
        kept = kept | (best & candidates)
    return kept


def eager_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """queries [B, S, H, D], keys [B, G, T, D], values [B, G, T, Dv], kept [B, S, T] -> output [B, S, H, Dv] and
    weights [B, H, S, T]. A query that keeps nothing gets zeros."""
    repeats = queries.shape[2] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(queries.transpose(1, 2), keys.transpose(2, 3)) * scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    blind = ~kept.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~(kept | blind)[:, None], -math.inf).softmax(dim=-1)
    weights = weights.masked_fill(blind[:, None], 0.0).to(queries.dtype)
    return torch.matmul(weights, values).transpose(1, 2), weights


def eager_objective(index, weights, support, dense, visible, kept, query_offset: int) -> torch.Tensor:
    """The indexer's loss and the share of the dense attention that falls on `kept`, mean over real queries: [2].

    index: as in `eager_selection`, with gradient. weights [B, H, S, T]: attention over `support` [B, S, T]; dense: over
    `visible`. A query is real when it sees itself.
    """
    real = visible.diagonal(offset=query_offset, dim1=1, dim2=2)
    q, k, gates = index
    dtype = torch.promote_types(q.dtype, torch.float32)
    products = torch.einsum("bshd,btd->bsht", q.to(dtype), k[:, : support.shape[-1]].to(dtype)).relu()
    scores = torch.einsum("bsht,bsh->bst", products, gates.to(dtype))[real].masked_fill(~support[real], -math.inf)
    target = weights.detach().to(dtype).mean(dim=1)[real]
    rest = torch.where(target > 0, target.log() - scores.log_softmax(dim=-1), 0.0)
    loss = (target * rest).sum(dim=-1).mean()
    recall = (dense.detach().to(dtype).mean(dim=1)[real] * kept[real]).sum(dim=-1).mean()
    return torch.stack([loss, recall]).float()
