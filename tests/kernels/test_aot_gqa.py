"""Kernels of sparse grouped-query attention compiled for real devices: no spills, shared memory, matrix instructions.

`forward_...`, `decode_...` and `gradients_...` run in a process of their own, where a launch compiles and does not run.
"""

import pytest
import torch

from modeling_keye import triton_gqa_keye
from modeling_keye.triton_gqa_backward_keye import backward
from tests.kernels import aot

HEADS, GROUPS, DIM, PLACES, KEYS = 32, 4, 128, 2048, 4096
QUERIES = 64


def inputs(batch, queries, heads, groups, dim, dtype):
    q = torch.empty(batch, queries, heads, dim, dtype=dtype)
    k, v = (torch.empty(batch, groups, KEYS, dim, dtype=dtype) for _ in range(2))
    return q, k, v, torch.empty(batch, queries, PLACES, dtype=torch.int32)


def forward(batch=1, queries=QUERIES, heads=HEADS, groups=GROUPS, dim=DIM, dtype=torch.bfloat16):
    triton_gqa_keye._forward(*inputs(batch, queries, heads, groups, dim, dtype), 0.1)


def gradients(heads=HEADS, groups=GROUPS, dim=DIM, dtype=torch.bfloat16):
    q, k, v, indices = inputs(1, QUERIES, heads, groups, dim, dtype)
    out = torch.empty_like(q)
    backward(q, k, v, indices, out, torch.empty(q.shape[:3]), torch.empty_like(out), 0.1)


def forward_32_heads():
    forward()


def forward_wide_heads():
    forward(heads=16, groups=2, dim=256)


def decode_one():
    forward(queries=1)


def gradients_32_heads():
    gradients()


def gradients_wide_heads():
    gradients(heads=16, groups=2, dim=256)


def forward_float32():
    forward(dtype=torch.float32)


def gradients_float32():
    gradients(dtype=torch.float32)


LAUNCHES = {
    90: [
        forward_32_heads,
        forward_wide_heads,
        decode_one,
        gradients_32_heads,
        gradients_wide_heads,
        forward_float32,
        gradients_float32,
    ],
    80: [forward_32_heads, decode_one, gradients_32_heads],
    89: [
        forward_32_heads,
        forward_wide_heads,
        decode_one,
        gradients_32_heads,
        gradients_wide_heads,
        forward_float32,
        gradients_float32,
    ],
}
# These must run; nobody expects them to be fast. float32 is multiplied and added without matrix instructions.
FITTING_ONLY = ("gradients_wide_heads", "float32")
NAMES = {arch: [function.__name__ for function in functions] for arch, functions in LAUNCHES.items()}


@pytest.mark.parametrize(("arch", "name"), [(arch, name) for arch in NAMES for name in NAMES[arch]])
def test_compiles_for_the_device(arch, name):
    reports = aot.compile_launches(__name__)[arch][name]
    print("", *reports, sep="\n")
    assert any(report.kernel in ("_forward_kernel", "_backward_kernel") for report in reports)
    for report in reports:
        assert report.shared <= aot.SHARED_LIMIT[arch], report
        if not name.endswith(FITTING_ONLY):
            assert report.stack == 0, report
        if report.kernel not in ("_forward_kernel", "_backward_kernel"):
            continue
        assert report.instructions["LDGSTS"] >= 4, f"rows are not gathered asynchronously: {report}"
        if name.endswith(FITTING_ONLY):
            continue
        # A single query has too few rows for Hopper's instruction, and is bound by memory.
        hopper = arch == 90 and "decode" not in name
        expected, unexpected = ("HGMMA", "HMMA") if hopper else ("HMMA", "HGMMA")
        assert expected in report.instructions and unexpected not in report.instructions, report
