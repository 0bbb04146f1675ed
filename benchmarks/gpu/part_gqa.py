"""Time of sparse GQA with its selection, as a part of dense attention's on the same device: prefill, training, decode.

32 query and 4 key/value heads of 128, an indexer of 16 x 64, k = 2048: Keye-VL-2.0's shape.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import peers
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.lists import indexer, lists, union_factor
from benchmarks.gpu.part_selection import pairs, select
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.ops_keye import sparse_gqa
from modeling_keye.sparse_attention_keye import Selection

SCALE = 128**-0.5
# A prefill's attention runs in steps of this many queries: the decoder's chunks.
STEP = KeyeTextConfig.prefill_chunk_tokens


def heads_of(bench: Bench) -> tuple[int, int, int]:
    return (4, 2, 16) if bench.dry_run else (32, 4, 128)


def inputs(bench: Bench, num_queries: int, num_keys: int, batch: int = 1):
    heads, groups, dim = heads_of(bench)
    keys = batch, groups, num_keys, dim
    return bench.randn(batch, num_queries, heads, dim), bench.randn(*keys), bench.randn(*keys)


def dense_forward(bench: Bench, q, k, v, flops: float, **shape) -> tuple[float, str]:
    """Milliseconds and name of the fastest dense forward pass."""
    times = {}
    queries = q.transpose(1, 2)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def attend(backend=backend):
            with sdpa_kernel(SDPBackend.MATH if bench.dry_run else backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    queries, k, v, is_causal=q.shape[1] > 1, enable_gqa=True
                )

        times[f"SDPA {name}"] = bench.peer(f"dense gqa, SDPA {name}", attend, flops=flops, **shape)
    rows = k.transpose(1, 2), v.transpose(1, 2)
    third = bench.peer(
        "dense gqa, FlashAttention-3",
        lambda: peers.flash_attention_3(bench.peers)(q, *rows, SCALE, q.shape[1] > 1),
        flops=flops,
        **shape,
    )
    times["FlashAttention-3"] = third
    found = {name: ms for name, ms in times.items() if ms is not None}
    if not found:
        raise RuntimeError("no dense attention ran on this device, so there is nothing to compare with")
    best = min(found, key=found.get)
    return found[best], best


def run(bench: Bench) -> None:
    places = bench.size(2048, 8)
    lengths = {"32k": bench.size(32768, 10), "128k": bench.size(131072, 11), "256k": bench.size(262144, 12)}
    for label, num_keys in lengths.items():
        prefill(bench, label, num_keys, places)
        bench.release()
    training(bench, lengths["128k"], places)
    bench.release()
    for batch in (1, bench.size(64, 2)):
        decode(bench, batch, lengths["128k"], places)
        bench.release()


def prefill(bench: Bench, label: str, num_keys: int, places: int) -> None:
    q, k, v = inputs(bench, num_keys, num_keys)
    heads, _, dim = heads_of(bench)
    shape = {"tokens": num_keys, "topk": places}
    dense_ms, bar = dense_forward(bench, q, k, v, pairs(num_keys, num_keys) * heads * 4 * dim, tokens=num_keys)
    rule = Selection(places)
    for kind in ("drift",) if label == "256k" or bench.dry_run else ("drift", "slow drift", "random"):
        index = indexer(bench, num_keys, num_keys, kind)
        select_ms = bench.time("selection for gqa", lambda index=index: select(rule, index, num_keys), **shape)
        indices = select(rule, index, num_keys)
        factor = round(union_factor(indices), 2)

        def attend(indices=indices):
            for begin in range(0, num_keys, STEP):
                end = min(begin + STEP, num_keys)
                sparse_gqa(q[:, begin:end], k[:, :, :end], v[:, :, :end], indices[:, begin:end], SCALE)

        flops = float((indices >= 0).sum()) * heads * 4 * dim
        with torch.no_grad():
            ms = bench.time("gqa forward", attend, flops=flops, lists=kind, rho=factor, **shape)
        total = {"of_dense": round((ms + select_ms) / dense_ms, 4), "attention_of_dense": round(ms / dense_ms, 4)}
        bench.record("ratio", "gqa prefill", dense=bar, lists=kind, rho=factor, **total, **shape)
        if kind == "drift":
            bench.goal(f"gqa_prefill_{label}", total["of_dense"], dense=bar, rho=factor)
            if label == "128k":
                bench.goal("gqa_union_128k", total["attention_of_dense"], dense=bar, rho=factor)
        del indices, index
        bench.release()


def training(bench: Bench, num_keys: int, places: int) -> None:
    q, k, v = inputs(bench, num_keys, num_keys)
    indices = lists(bench, num_keys, num_keys, places, "drift")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    shape = {"tokens": num_keys, "topk": places}

    def ours():
        out, _ = sparse_gqa(*leaves, indices, SCALE)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def dense():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True
            )
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    ms = bench.time("gqa forward and backward", ours, **shape)
    dense_ms = bench.peer("dense gqa forward and backward, SDPA", dense, **shape)
    if dense_ms is not None:
        bench.goal("gqa_training_128k", ms / dense_ms)


def decode(bench: Bench, batch: int, num_keys: int, places: int) -> None:
    q, k, v = inputs(bench, 1, num_keys, batch)
    index = bench.randn(batch, 1, 16, 64), bench.randn(batch, num_keys, 64), bench.randn(batch, 1, 16).float()
    rule = Selection(places)
    heads, groups, dim = heads_of(bench)
    shape = {"batch": batch, "tokens": num_keys, "topk": places}

    def step():
        sparse_gqa(q, k, v, select(rule, index, num_keys), SCALE)

    moved = batch * (num_keys * 128.0 + places * groups * dim * 4.0)
    with torch.no_grad():
        bench.time("gqa decode with selection", step, moved=moved, **shape)
        ms = bench.time("gqa decode with selection", step, moved=moved, graph=True, **shape)
        dense_ms, bar = dense_forward(bench, q, k, v, batch * num_keys * heads * 4.0 * dim, graph=True, **shape)
    goal = "gqa_decode_1" if batch == 1 else "gqa_decode_64"
    bench.goal(goal, ms / dense_ms, dense=bar)
