"""Time of the indexer's KL losses beside dense flash attention: warm-up over all pairs, adaptation over lists."""

from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.lists import indexer, lists
from benchmarks.gpu.part_check_losses import empty_gradients
from benchmarks.gpu.part_gqa import SCALE, dense_forward, inputs
from benchmarks.gpu.part_selection import pairs
from modeling_keye.ops_keye import sparse_gqa
from modeling_keye.sparse_attention_keye import dense_attention_with_lse
from modeling_keye.triton_kl_dense_keye import dense_kl
from modeling_keye.triton_kl_sparse_keye import sparse_kl


def run(bench: Bench) -> None:
    num_keys, places = bench.size(8192, 10), bench.size(2048, 8)
    q, k, v = inputs(bench, num_keys, num_keys)
    heads, dim = q.shape[2:]
    index = indexer(bench, num_keys, num_keys)
    weights = torch.full((1, num_keys), 1 / num_keys, device=bench.device)
    shape = {"tokens": num_keys}
    all_pairs = pairs(num_keys, num_keys)
    dense_ms, bar = dense_forward(bench, q, k, v, all_pairs * heads * 4 * dim, **shape)
    backward_ms = bench.peer("dense gqa backward, SDPA", dense_backward(q, k, v), **shape)
    queries = q.transpose(1, 2)
    attend = partial(dense_attention_with_lse, queries, k, v, scaling=SCALE)
    attended = bench.time("dense gqa with log-sum-exp", attend, flops=all_pairs * heads * 4 * dim, **shape)
    _, lse = attend()
    # Per pair: the products of the attention's scores once, and once more for a log-sum-exp that is not given, those of
    # the indexer twice, for its own log-sum-exp and for the divergence.
    flops = all_pairs * (heads * 2 * dim + 2 * 2 * 16 * 64)
    pass_of_its_own = all_pairs * heads * 2 * dim
    loss = partial(dense_kl, *index, weights, q, k, SCALE)
    bench.time("kl dense, value, log-sum-exp made", loss, flops=flops + pass_of_its_own, **shape)
    flops += pass_of_its_own if lse is None else 0
    forward = bench.time("kl dense, value", partial(loss, lse=lse), flops=flops, given=lse is not None, **shape)
    bench.goal("kl_forward", (attended + forward) / dense_ms, dense=bar)

    grads = empty_gradients(*index)
    both = bench.time(
        "kl dense, value and gradients",
        partial(loss, lse=lse, grads=grads),
        flops=flops + all_pairs * 8 * 16 * 64,
        **shape,
    )
    if backward_ms is not None:
        bench.goal("kl_backward", max(both - forward, 0.0) / backward_ms)

    indices = lists(bench, num_keys, num_keys, places, "drift")
    with torch.no_grad():
        _, lse = sparse_gqa(q, k, v, indices, SCALE)
    used = float((indices >= 0).sum())
    for name, given in (("value", None), ("value and gradients", grads)):
        bench.time(
            f"kl sparse, {name}",
            lambda given=given: sparse_kl(*index, weights, q, k, lse, indices, SCALE, grads=given),
            flops=used * (heads * 2 * dim + 2 * 16 * 64 * (1 if given is None else 4)),
            topk=places,
            **shape,
        )


def dense_backward(q, k, v):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        leaves[0].transpose(1, 2), *leaves[1:], is_causal=True, enable_gqa=True
    )
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)
