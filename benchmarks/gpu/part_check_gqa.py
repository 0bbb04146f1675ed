"""Sparse GQA, forward, split decode and backward, against the PyTorch backend in float64."""

from benchmarks.gpu.attention_checks import calls, check, random_lists
from benchmarks.gpu.bench import Bench

# Heads, groups, head size, head size of values, places.
SHAPES = [(32, 4, 128, 128, 2048), (32, 8, 128, 128, 300), (4, 4, 48, 48, 129), (8, 1, 64, 96, 65)]
TINY = [(4, 2, 16, 16, 8)]


def run(bench: Bench) -> None:
    for case, dtype, (batch, num_queries, num_keys) in calls(bench):
        for heads, groups, dim, value_dim, places in TINY if bench.dry_run else SHAPES:
            q = bench.randn(batch, num_queries, heads, dim, dtype=dtype)
            k = bench.randn(batch, groups, num_keys, dim, dtype=dtype)
            v = bench.randn(batch, groups, num_keys, value_dim, dtype=dtype)
            indices = random_lists(bench, batch, num_queries, num_keys, places)
            check(bench, f"gqa {heads}/{groups}x{dim} {case}", (q, k, v), indices, value_dim, dtype)
