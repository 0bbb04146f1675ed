"""FlashMLA's sparse prefill and ours in turn on the same inputs; a part of its own, because a crash would end it."""

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench, relative_error
from benchmarks.gpu.lists import lists
from benchmarks.gpu.part_mla import LATENT, SCALE, WIDTH
from modeling_keye.ops_keye import sparse_mla


@torch.no_grad()
def run(bench: Bench) -> None:
    num_queries, places = bench.size(4096, 2), bench.size(2048, 8)
    for num_keys in [64] if bench.dry_run else [32768, 131072]:
        indices = lists(bench, num_queries, num_keys, places, "drift")
        for heads in [2] if bench.dry_run else [128, 64]:
            q, kv = bench.randn(1, num_queries, heads, WIDTH), bench.randn(1, num_keys, WIDTH)
            flops = float((indices >= 0).sum()) * heads * 2 * (WIDTH + LATENT)
            shape = {"heads": heads, "queries": num_queries, "tokens": num_keys, "topk": places}

            def ours(q=q, kv=kv, indices=indices):
                return sparse_mla(q, kv, indices, SCALE, LATENT)[0][0]

            def theirs(q=q, kv=kv, indices=indices):
                return peers.flash_mla(bench.peers)(q[0], kv[0], indices[0], SCALE)[0]

            ms = bench.time("mla forward, beside FlashMLA", ours, flops=flops, **shape)
            peer = bench.peer("FlashMLA sparse prefill", theirs, flops=flops, **shape)
            if peer is None:
                return
            bench.record("ratio", "mla forward against FlashMLA", times=round(ms / peer, 3), **shape)
            bench.check("mla against FlashMLA", relative_error(ours(), theirs().double()), 2e-2, **shape)
