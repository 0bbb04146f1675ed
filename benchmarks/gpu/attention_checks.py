"""How sparse attention, forward, split decode and backward, is checked against the PyTorch backend in float64.

The error may be that of plain attention in the same dtype plus one rounding. Outputs and scratch memory are poisoned.
"""

import torch

from benchmarks.gpu.bench import Bench, relative_error
from benchmarks.gpu.lists import plain_attention
from modeling_keye import ops_keye, sparse_reference_keye

SCALE = 0.0722


def random_lists(bench: Bench, batch: int, num_queries: int, num_keys: int, places: int) -> torch.Tensor:
    """Ascending random slots, -1 behind them; lists grow from none to all places, a single query has them all."""
    order = torch.rand(batch, num_queries, num_keys, device=bench.device, generator=bench.generator).argsort(dim=-1)
    least = 0 if num_queries > 1 else places
    counts = torch.linspace(least, places, num_queries, device=bench.device).long().view(1, -1, 1)
    chosen = order[..., :places].sort(dim=-1).values
    used = torch.arange(places, device=bench.device) < counts
    return chosen.masked_fill(~used, -1).to(torch.int32)


def _gradients(attend, inputs, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def check(bench: Bench, name: str, inputs, indices, value_dim: int, dtype: torch.dtype) -> None:
    """Records the errors of one call: output and gradients, and the log-sum-exp."""
    latent = len(inputs) == 2
    kernel, judge = (
        (ops_keye.sparse_mla, sparse_reference_keye.sparse_mla)
        if latent
        else (ops_keye.sparse_gqa, sparse_reference_keye.sparse_gqa)
    )
    rest = (indices, SCALE, value_dim) if latent else (indices, SCALE)

    def plain(*tensors):
        if latent:
            q, kv = tensors
            return plain_attention(q, kv.unsqueeze(1), kv.unsqueeze(1)[..., :value_dim], indices, SCALE)
        return plain_attention(*tensors, indices, SCALE)

    upstream = bench.randn(*inputs[0].shape[:3], value_dim, dtype=dtype)
    wide = [x.double() for x in inputs]
    exact = _gradients(lambda *tensors: judge(*tensors, *rest), wide, upstream.double())
    found = _gradients(lambda *tensors: kernel(*tensors, *rest), inputs, upstream)
    eager = _gradients(plain, inputs, upstream)
    names = ["out", "grad q", "grad kv"] if latent else ["out", "grad q", "grad k", "grad v"]
    for part, ours, theirs, best in zip(names, found, eager, exact):
        # One rounding for 16 bits; in float32 sums of thousands of terms differ by their order as well.
        rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
        allowed = relative_error(theirs, best) + rounding
        bench.check(f"{name} {part}", relative_error(ours, best), allowed, dtype=str(dtype))
    with torch.no_grad():
        out, lse = kernel(*inputs, *rest)
        best = judge(*wide, *rest)[1]
        blind = best == -torch.inf
        bench.check(f"{name} blind queries", float((lse[blind] != -torch.inf).sum() + (out[blind] != 0).sum()), 0.0)
        allowed = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        bench.check(f"{name} lse", relative_error(lse[~blind], best[~blind]), allowed, dtype=str(dtype))


def calls(bench: Bench) -> list[tuple[str, torch.dtype, tuple[int, int, int]]]:
    """Name, dtype, and (sequences, queries, keys) of what both kinds of attention are checked with."""
    if bench.dry_run:
        dtypes, sizes = [torch.float32], {"prefill": (1, 3, 30), "decode": (2, 1, 30)}
    else:
        dtypes = [torch.float32, torch.float16, torch.bfloat16]
        sizes = {"prefill": (1, 70, 3000), "decode": (3, 1, 3000)}
    return [(name, dtype, size) for dtype in dtypes for name, size in sizes.items()]
