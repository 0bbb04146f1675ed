"""Index lists as a backward pass keeps them: what all queries of a run share is stored once.

Anchors grow with the sequence and are the same for neighbouring queries. Kept per query they would make the memory of a
training step grow with N^2 / anchor_stride.
"""

import torch


def pack_index_list(indices: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [B, S, K], -1 where unused -> what all queries of a batch row keep, int32 [B, C] with -1 at the end, and
    the rest of each query, int32 [B, S, K']. Nothing is shared where a query lists a slot twice."""
    batch, num_queries, _ = indices.shape
    places = (indices + 1).flatten(1).long()
    counts = torch.zeros(batch, num_keys + 1, dtype=torch.int32, device=indices.device)
    counts.scatter_add_(1, places, torch.ones_like(places, dtype=torch.int32))
    counts[:, 0] = 0  # unused places
    common = counts == num_queries
    ordered = indices.sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        common = torch.zeros_like(common)
    own = ~common.gather(1, places).view_as(indices) & (indices >= 0)
    shared = torch.arange(-1, num_keys, dtype=torch.int32, device=indices.device).expand(batch, -1)
    return _closed_up(shared, common), _closed_up(indices, own)


def unpack_index_list(shared: torch.Tensor, rest: torch.Tensor, width: int) -> torch.Tensor:
    """The list [B, S, width] that `pack_index_list` was given, ascending with -1 at the end."""
    joined = torch.cat([shared.unsqueeze(1).expand(-1, rest.shape[1], -1), rest], dim=-1)
    joined = _closed_up(joined, joined >= 0)
    return torch.nn.functional.pad(joined, (0, width - joined.shape[-1]), value=-1)


def _closed_up(slots: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The slots to keep, ascending, with -1 behind them, as wide as the longest row."""
    width = int(keep.sum(dim=-1).max())
    last = torch.iinfo(slots.dtype).max
    slots = torch.where(keep, slots, last).sort(dim=-1).values[..., :width]
    return slots.masked_fill(slots == last, -1)
