"""Equal inputs give equal bits, and the same selection however the work is cut."""

import torch

from benchmarks.gpu.attention_checks import random_lists
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.lists import indexer
from modeling_keye import ops_keye, triton_selection_keye
from modeling_keye.sparse_attention_keye import Selection, select_tokens


def _select(index, begin, end, num_keys, batch=1, mask=None):
    q, k, gates = index
    rule = Selection(min(2048, num_keys // 4), 64, 64)
    place = {"num_queries": end - begin, "query_offset": begin + num_keys - q.shape[1]}
    part = q[:, begin:end], k, gates[:, begin:end]
    return select_tokens(rule, *part, batch_size=batch, **place, key_mask=mask, backend="triton")


def _differences(part, whole) -> float:
    """Places in which two selections differ, where the wider one has nothing else."""
    width = part.shape[-1]
    return float((part != whole[..., :width]).sum() + (whole[..., width:] != -1).sum())


def run(bench: Bench) -> None:
    num_queries, num_keys = bench.size(512, 2), bench.size(40_000, 200)
    index = indexer(bench, num_queries, num_keys)
    whole = _select(index, 0, num_queries, num_keys)
    bench.check("selection repeated", float((whole != _select(index, 0, num_queries, num_keys)).sum()), 0.0)
    for chunk in (1,) if bench.dry_run else (1, 77, 256):
        error = 0.0
        for begin in range(0, min(num_queries, 4 * chunk), chunk):
            end = min(begin + chunk, num_queries)
            error += _differences(_select(index, begin, end, num_keys), whole[:, begin:end])
        bench.check(f"selection in chunks of {chunk}", error, 0.0)
    before = triton_selection_keye.SLAB_ELEMENTS
    triton_selection_keye.SLAB_ELEMENTS = before // 7
    bench.check("selection with another slab", float((whole != _select(index, 0, num_queries, num_keys)).sum()), 0.0)
    triton_selection_keye.SLAB_ELEMENTS = before
    twice = tuple(torch.cat([torch.zeros_like(x), x]) for x in index)
    together = _select(twice, 0, num_queries, num_keys, batch=2)
    bench.check("selection in a batch", float((whole != together[1:]).sum()), 0.0)

    cases = bench.size(256, 2), bench.size(4000, 20), bench.size(512, 4)
    latent = (bench.randn(1, cases[0], bench.size(128, 3), 576), bench.randn(1, cases[1], 576))
    group = (1, 4, cases[1], 128)
    grouped = (bench.randn(1, cases[0], bench.size(32, 4), 128), bench.randn(*group), bench.randn(*group))
    indices = random_lists(bench, 1, *cases)
    torch.use_deterministic_algorithms(True)
    for name, attend, inputs in (
        ("mla", lambda *x: ops_keye.sparse_mla(*x, indices, 0.07, 512), latent),
        ("gqa", lambda *x: ops_keye.sparse_gqa(*x, indices, 0.09), grouped),
    ):
        runs = []
        for _ in range(bench.size(3, 2)):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out, lse = attend(*leaves)
            runs.append([out.detach(), lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        different = sum(float((a != b).sum()) for run in runs[1:] for a, b in zip(run, runs[0]))
        bench.check(f"{name} forward and deterministic backward repeated", different, 0.0)
    torch.use_deterministic_algorithms(False)
