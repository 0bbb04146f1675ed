"""Selections of the kernel against scores in float64, and against the PyTorch backend where scores are exact."""

import torch

from benchmarks.gpu.bench import Bench
from modeling_keye import sparse_attention_keye
from modeling_keye.sparse_attention_keye import Selection

SHAPES = [(16, 64), (32, 128), (64, 128)]


def _select(rule, index, num_keys, mask=None, backend="triton"):
    batch, num_queries = index[0].shape[:2]
    place = {"num_queries": num_queries, "query_offset": num_keys - num_queries, "key_mask": mask}
    return sparse_attention_keye.select_tokens(rule, *index, batch_size=batch, **place, backend=backend)


def violation(found, index, num_keys: int, rule: Selection, mask) -> float:
    """How far, relative to the spread of the scores, a token left out lies above one that was taken; NaN when the
    selection breaks its rule otherwise."""
    q, k, gates = (x.double() for x in index)
    batch, num_queries = q.shape[:2]
    worst = 0.0
    for b in range(batch):
        scores = torch.einsum("sht,sh->st", torch.einsum("shd,td->sht", q[b], k[b]).relu(), gates[b])
        slots = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
        keys = torch.arange(num_keys, device=q.device)
        real = torch.ones(num_keys, dtype=torch.bool, device=q.device) if mask is None else mask[b]
        start = int(real.to(torch.uint8).argmax())
        visible = (keys <= slots) & real
        forced = torch.zeros_like(visible)
        if rule.local_window is not None:
            forced |= slots - keys <= rule.local_window
        if rule.anchor_stride is not None:
            forced |= (keys - start) % rule.anchor_stride == 0
        forced &= visible
        taken = torch.zeros(num_queries, num_keys + 1, dtype=torch.bool, device=q.device)
        taken.scatter_(1, found[b].long().masked_fill(found[b] < 0, num_keys), True)
        taken = taken[:, :-1]
        free = visible & ~forced
        expected = forced.sum(1) + free.sum(1).clamp(max=rule.topk or 0)
        ascending = bool((found[b].diff(dim=1)[found[b][:, 1:] >= 0] > 0).all())
        if not ascending or bool((taken & ~visible).any()) or bool((forced & ~taken).any()):
            return float("nan")
        if bool((taken.sum(1) != expected).any()):
            return float("nan")
        lowest = scores.masked_fill(~(taken & free), float("inf")).amin(1)
        highest = scores.masked_fill(taken | ~free, float("-inf")).amax(1)
        worst = max(worst, float(((highest - lowest) / scores.std()).amax()))
    return max(worst, 0.0)


def run(bench: Bench) -> None:
    num_queries, num_keys, topk = bench.size(64, 1), bench.size(20000, 200), bench.size(2048, 24)
    dtypes = [torch.float32] if bench.dry_run else [torch.float32, torch.float16, torch.bfloat16]
    rules = {"top-k": Selection(topk), "all": Selection(topk, bench.size(64, 8), bench.size(64, 16))}
    for heads, dim in [(4, 16)] if bench.dry_run else SHAPES:
        for dtype in dtypes:
            index = (
                bench.randn(2, num_queries, heads, dim, dtype=dtype),
                bench.randn(2, num_keys, dim, dtype=dtype),
                bench.randn(2, num_queries, heads, dtype=torch.float32),
            )
            # Products of 16-bit numbers are exact in float32; what is left is the order of the sum.
            allowed = 2e-5
            for name, rule in rules.items():
                padding = torch.tensor([[0], [num_keys // 3]], device=bench.device)
                mask = torch.arange(num_keys, device=bench.device) >= padding if name == "all" else None
                found = _select(rule, index, num_keys, mask)
                error = violation(found, index, num_keys, rule, mask)
                bench.check(f"select {heads}x{dim} {name}", error, allowed, dtype=str(dtype), keys=num_keys)
    # Small integers: scores are exact, most of them tie, and both backends have to choose the same.
    shapes = (2, num_queries, 16, 64), (2, num_keys, 64), (2, num_queries, 16)
    index = tuple(torch.randint(-1, 2, shape, device=bench.device).to(bench.dtype) for shape in shapes)
    for name, rule in rules.items():
        ours, judge = (_select(rule, index, num_keys, backend=backend) for backend in ("triton", "torch"))
        bench.check(f"ties {name}", float((ours != judge).sum()), 0.0, keys=num_keys)
