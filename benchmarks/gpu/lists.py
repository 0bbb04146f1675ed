"""Index lists and the plain attention over them: inputs and judge of checks and timings.

Lists come out of the selection kernel itself, from an indexer of 16 x 64 whose queries either have nothing to do with
each other, or drift (each is a fraction of the one before plus noise), or keep a local window beside their top-k. The
union of neighbouring lists, over their length, is the factor `rho` that sparse GQA pays.
"""

import torch

from benchmarks.gpu.bench import Bench

INDEX_HEADS, INDEX_DIM = 16, 64
# How much of a query is left in the next one.
DRIFT = {"random": 0.0, "drift": 0.95, "slow drift": 0.995}
_MEMORY = 256
# Columns of queries that are filtered at once: bounds the memory.
_COLUMNS = 128


def indexer(bench: Bench, num_queries: int, num_keys: int, kind: str = "random", heads=INDEX_HEADS, dim=INDEX_DIM):
    """q [1, S, Hi, Di], k [1, T, Di], gates [1, S, Hi] of the last `num_queries` of `num_keys` tokens."""
    remain = DRIFT[kind]
    q = bench.randn(num_queries, heads * dim, dtype=torch.float32)
    if remain:
        decay = remain ** torch.arange(_MEMORY, device=q.device).flip(0)
        padded = torch.cat([torch.zeros(_MEMORY - 1, q.shape[1], device=q.device), q])
        parts = [part.T.unsqueeze(1) for part in padded.split(_COLUMNS, dim=1)]  # [columns, 1, S + memory]
        q = torch.cat([torch.nn.functional.conv1d(part, decay.view(1, 1, -1)).squeeze(1).T for part in parts], dim=1)
        q = q * (1 - remain**2) ** 0.5
    k = bench.randn(1, num_keys, dim)
    gates = bench.randn(1, num_queries, heads, dtype=torch.float32)
    if remain:  # drifting queries keep the same heads
        gates = gates[:, :1].expand_as(gates).contiguous()
    return q.view(1, num_queries, heads, dim).to(bench.dtype), k, gates


def lists(bench: Bench, num_queries: int, num_keys: int, topk: int, kind: str) -> torch.Tensor:
    """int32 [1, S, topk] for the last `num_queries` of `num_keys` tokens; kinds of `DRIFT`, or "local"."""
    from modeling_keye.sparse_attention_keye import Selection, select_tokens

    rule = Selection(topk=topk) if kind != "local" else Selection(topk=topk // 2, local_window=topk - topk // 2 - 1)
    index = indexer(bench, num_queries, num_keys, "random" if kind == "local" else kind)
    return select_tokens(
        rule, *index, batch_size=1, num_queries=num_queries, query_offset=num_keys - num_queries, backend="triton"
    )


def union_factor(indices: torch.Tensor, group: int = 16, samples: int = 64) -> float:
    """Mean of |union of `group` neighbouring lists| / K over some groups from the second half."""
    num_queries, places = indices.shape[1:]
    group = min(group, num_queries)
    begins = torch.linspace(num_queries // 2, num_queries - group, samples).long().clamp(min=0).unique().tolist()
    sizes = [int((torch.unique(indices[0, b : b + group]) >= 0).sum()) for b in begins]
    return sum(sizes) / len(sizes) / places


def plain_attention(q, k, v, indices, scaling: float) -> torch.Tensor:
    """Gathered attention in the inputs' own dtype, softmax in float32 at least: what eager code would compute.

    q [B, S, H, D], k [B, G, T, D], v [B, G, T, E], indices [B, S, K] -> [B, S, H, E]; a query without keys gives 0.
    """
    groups = k.shape[1]
    used = indices >= 0
    rows = indices.clamp(min=0).long()
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    outputs = []
    for g in range(groups):
        heads = slice(g * q.shape[2] // groups, (g + 1) * q.shape[2] // groups)
        keys, values = k[batch, g, rows], v[batch, g, rows]  # [B, S, K, D]
        scores = torch.matmul(q[:, :, heads], keys.transpose(2, 3)) * scaling
        scores = scores.masked_fill(~used[:, :, None], float("-inf"))
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=wide).nan_to_num(0.0).to(q.dtype)
        outputs.append(torch.matmul(weights, values))
    return torch.cat(outputs, dim=2)
