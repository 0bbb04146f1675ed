"""Time of sparse MLA: prefill, decode and backward, and dense attention as the bar."""

from functools import partial

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.lists import lists, union_factor
from modeling_keye.ops_keye import sparse_mla

WIDTH, LATENT, SCALE = 576, 512, 192**-0.5


def run(bench: Bench) -> None:
    num_queries, places = bench.size(4096, 2), bench.size(2048, 8)
    for num_keys in [64] if bench.dry_run else [8192, 32768, 131072]:
        for kind in ("random", "drift", "local"):
            indices = lists(bench, num_queries, num_keys, places, kind)
            factor = round(union_factor(indices), 2)
            for heads in [2] if bench.dry_run else [128, 64]:
                prefill(bench, heads, num_queries, num_keys, places, kind, indices, factor)
    bench.release()
    backward(bench, bench.size(128, 2), bench.size(1024, 2), bench.size(131072, 64), places)
    bench.release()
    dense(bench, bench.size(128, 2), bench.size(16384, 16))
    bench.release()
    decode(bench, bench.size(128, 2), places)


def prefill(bench, heads, num_queries, num_keys, places, kind, indices, factor) -> None:
    q, kv = bench.randn(1, num_queries, heads, WIDTH), bench.randn(1, num_keys, WIDTH)
    used = int((indices >= 0).sum())
    flops = used * heads * 2.0 * (WIDTH + LATENT)
    shape = {"heads": heads, "queries": num_queries, "tokens": num_keys, "topk": places, "lists": kind, "rho": factor}
    moved = kv.numel() * 2.0 + 2 * q.numel() + 2 * num_queries * heads * LATENT
    with torch.no_grad():
        ms = bench.time(
            "mla forward", lambda: sparse_mla(q, kv, indices, SCALE, LATENT), flops=flops, moved=moved, **shape
        )
        if (heads, num_keys, kind) == (bench.size(128, 2), bench.size(32768, 64), "drift"):
            bench.goal("mla_prefill", flops / ms / 1e9)


def backward(bench, heads, num_queries, num_keys, places) -> None:
    q = bench.randn(1, num_queries, heads, WIDTH).requires_grad_()
    kv = bench.randn(1, num_keys, WIDTH).requires_grad_()
    indices = lists(bench, num_queries, num_keys, places, "drift")
    used = int((indices >= 0).sum())
    out, _ = sparse_mla(q, kv, indices, SCALE, LATENT)
    upstream = torch.randn_like(out)
    flops = used * heads * 2.0 * (3 * WIDTH + 2 * LATENT)
    shape = {"heads": heads, "queries": num_queries, "tokens": num_keys, "topk": places}

    def gradients():
        return torch.autograd.grad(out, (q, kv), upstream, retain_graph=True)

    ms = bench.time("mla backward", gradients, flops=flops, **shape)
    bench.goal("mla_backward", flops / ms / 1e9)
    torch.use_deterministic_algorithms(True)
    bench.time("mla backward, deterministic", gradients, flops=flops, **shape)
    torch.use_deterministic_algorithms(False)


def decode(bench, heads, places) -> None:
    num_keys = bench.size(131072, 64)
    for batch in [1, 2] if bench.dry_run else [1, 8, 64]:
        q, kv = bench.randn(batch, 1, heads, WIDTH), bench.randn(batch, num_keys, WIDTH)
        indices = torch.rand(batch, 1, num_keys, device=bench.device).topk(places).indices.sort(-1).values.int()
        flops = batch * places * heads * 2.0 * (WIDTH + LATENT)
        shape = {"heads": heads, "batch": batch, "tokens": num_keys, "topk": places}
        moved = batch * places * WIDTH * 2.0
        step = partial(sparse_mla, q, kv, indices, SCALE, LATENT)
        for graph in (False, True):
            with torch.no_grad():
                ms = bench.time("mla decode", step, flops=flops, moved=moved, graph=graph, **shape)
        if batch == bench.size(64, 2):
            bench.goal("mla_decode", ms * 1e3)


def dense(bench, heads, num_keys) -> None:
    """MLA expanded to heads of 192 and values of 128, causal."""
    q, k = (bench.randn(1, heads, num_keys, 192) for _ in range(2))
    v = bench.randn(1, heads, num_keys, 128)
    flops = num_keys * (num_keys + 1) / 2 * heads * 2.0 * (192 + 128)
    shape = {"heads": heads, "tokens": num_keys}
    attend = torch.nn.functional.scaled_dot_product_attention
    padded = torch.nn.functional.pad(v, (0, 64))
    bench.peer("dense mla, SDPA padded", lambda: attend(q, k, padded, is_causal=True), flops=flops, **shape)
    bench.peer("dense mla, SDPA 192/128", lambda: attend(q, k, v, is_causal=True), flops=flops, **shape)
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def third():
        return peers.flash_attention_3(bench.peers)(*rows, SCALE, True)

    bench.peer("dense mla, FlashAttention-3", third, flops=flops, **shape)
