"""Time of the indexer's selection: whole prefills, single steps, its workspace, and peers on the same inputs."""

from functools import partial

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.lists import indexer
from modeling_keye.sparse_attention_keye import Selection, select_tokens


def select(rule, index, num_keys):
    batch, num_queries = index[0].shape[:2]
    place = {"num_queries": num_queries, "query_offset": num_keys - num_queries}
    return select_tokens(rule, *index, batch_size=batch, **place, backend="triton")


def pairs(num_queries: int, num_keys: int) -> float:
    """(query, key) pairs of the last `num_queries` of `num_keys` tokens."""
    return num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) / 2


def prefill(bench: Bench, heads: int, dim: int, num_keys: int, rule: Selection) -> None:
    index = indexer(bench, num_keys, num_keys, "drift", heads, dim)
    flops = pairs(num_keys, num_keys) * 2 * heads * dim
    name, shape = f"selection {heads}x{dim}", {"tokens": num_keys, "topk": rule.topk}
    ms = bench.time(name, lambda: select(rule, index, num_keys), flops=flops, **shape)
    if (heads, num_keys) == (16, bench.size(131072, 14)):
        bench.goal("indexer_128k", ms)
        peak = bench.peak_bytes(lambda: select(rule, index, num_keys))
        if peak is not None:
            bench.goal("indexer_workspace", (peak - num_keys * rule.width(num_keys) * 4) / 2**20)
    if num_keys == bench.size(32768, 12) and heads == 16:

        def gym():
            return peers.attention_gym_indexer(bench.peers)(*index, rule.topk)

        bench.peer("attention-gym indexer", gym, **shape)


def run(bench: Bench) -> None:
    topk = bench.size(2048, 8)
    rule = Selection(topk)
    lengths = [12, 14] if bench.dry_run else [32768, 131072]
    for heads, dim in [(16, 64)] if bench.dry_run else [(16, 64), (64, 128)]:
        for num_keys in lengths:
            prefill(bench, heads, dim, num_keys, rule)
            bench.release()

    num_keys = lengths[-1]
    for batch in (1, bench.size(64, 2)):
        index = bench.randn(batch, 1, 16, 64), bench.randn(batch, num_keys, 64), bench.randn(batch, 1, 16).float()
        step = {"batch": batch, "tokens": num_keys, "topk": topk, "moved": batch * num_keys * 128.0}
        for graph in (False, True):
            bench.time("selection 16x64, one step", partial(select, rule, index, num_keys), graph=graph, **step)

    # 512 queries at the end of a long prompt, and the same through PyTorch.
    num_queries = bench.size(512, 2)
    index = indexer(bench, num_queries, num_keys)
    shape = {"tokens": num_keys, "queries": num_queries, "topk": topk}
    flops = pairs(num_queries, num_keys) * 2 * 16 * 64
    bench.time("selection 16x64, last queries", lambda: select(rule, index, num_keys), flops=flops, **shape)
    q, k, gates = index

    def scores():
        products = torch.matmul(q[0].flatten(0, 1), k[0].T).relu_().view(num_queries, 16, num_keys)
        return torch.einsum("sht,sh->st", products, gates[0].to(products.dtype)).float()

    bench.peer("torch scores and topk", lambda: scores().topk(topk), **shape)
    logits, ends = scores(), torch.arange(num_keys - num_queries, num_keys, device=bench.device, dtype=torch.int32) + 1
    bench.peer("torch topk of given scores", lambda: logits.topk(topk), **shape)
    bench.peer("vLLM top-k of given scores", lambda: peers.top_k_rows(bench.peers)(logits, ends, topk), **shape)
