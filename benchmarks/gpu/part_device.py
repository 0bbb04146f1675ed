"""What the device can do at best: a large matrix product and a large copy. Fractions of the floor are of these."""

import torch

from benchmarks.gpu.bench import Bench


def run(bench: Bench) -> None:
    size = bench.size(8192, 64)
    a, b = bench.randn(size, size), bench.randn(size, size)
    bench.time("matrix product", lambda: a @ b, flops=2 * size**3, shape=[size] * 3)
    source = torch.empty(bench.size(4 * 2**30, 2**16), dtype=torch.int8, device=bench.device).random_(0, 100)
    target = torch.empty_like(source)
    bench.time("copy", lambda: target.copy_(source), moved=2 * source.numel())
