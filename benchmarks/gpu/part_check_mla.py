"""Sparse MLA, forward, split decode and backward, against the PyTorch backend in float64."""

import torch

from benchmarks.gpu.attention_checks import SCALE, calls, check, random_lists
from benchmarks.gpu.bench import Bench, relative_error
from modeling_keye import ops_keye, sparse_reference_keye

# Heads, latent, rotary, places.
SHAPES = [(128, 512, 64, 2048), (64, 512, 64, 300), (20, 512, 64, 129), (16, 128, 32, 256)]
TINY = [(3, 32, 16, 8)]


def run(bench: Bench) -> None:
    for case, dtype, (batch, num_queries, num_keys) in calls(bench):
        for heads, latent, rotary, places in TINY if bench.dry_run else SHAPES:
            q = bench.randn(batch, num_queries, heads, latent + rotary, dtype=dtype)
            kv = bench.randn(batch, num_keys, latent + rotary, dtype=dtype)
            indices = random_lists(bench, batch, num_queries, num_keys, places)
            check(bench, f"mla {heads}x{latent}+{rotary} {case}", (q, kv), indices, latent, dtype)
    if not bench.dry_run:
        sizes_beyond_32_bits(bench)


def sizes_beyond_32_bits(bench: Bench) -> None:
    """More queries than a grid's second axis holds, and more elements than 32 bits count."""
    q = bench.randn(1, 70_000, 2, 128)
    kv = bench.randn(1, 70_000, 128)
    slots = torch.arange(70_000, device=bench.device, dtype=torch.int32)
    indices = torch.stack([slots - 1, slots], dim=-1)[None].contiguous()
    out, _ = ops_keye.sparse_mla(q, kv, indices, SCALE, 96)
    exact, _ = sparse_reference_keye.sparse_mla(q[:, -50:].double(), kv.double(), indices[:, -50:], SCALE, 96)
    bench.check("mla 70,000 queries", relative_error(out[:, -50:], exact), 1e-2)
    kv = torch.empty(1, 4_000_000, 576, dtype=torch.bfloat16, device=bench.device).normal_()  # 2.3e9 elements
    indices = torch.arange(4_000_000 - 128, 4_000_000, device=bench.device, dtype=torch.int32)[None, None]
    q = bench.randn(1, 1, 128, 576)
    out, _ = ops_keye.sparse_mla(q, kv, indices, SCALE, 512)
    exact, _ = sparse_reference_keye.sparse_mla(q.double(), kv[:, -128:].double(), indices - 3_999_872, SCALE, 512)
    bench.check("mla 2^31 elements", relative_error(out, exact), 1e-2)
