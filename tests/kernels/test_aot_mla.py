"""Kernels of sparse latent attention compiled for real devices: no spills, shared memory, matrix instructions.

`forward_...`, `decode_...` and `gradients_...` run in a process of their own, where a launch compiles and does not run.
"""

import pytest
import torch

from modeling_keye import triton_mla_keye
from modeling_keye.triton_mla_backward_keye import backward
from tests.kernels import aot

LATENT, ROTARY, PLACES = 512, 64, 2048
QUERIES, ROWS = 256, 4096


def inputs(heads: int, dtype: torch.dtype, queries: int, latent: int, rotary: int, places: int):
    q = torch.empty(1, queries, heads, latent + rotary, dtype=dtype)
    kv = torch.empty(1, ROWS, latent + rotary, dtype=dtype)
    return q, kv, torch.empty(1, queries, places, dtype=torch.int32)


def forward(heads, dtype=torch.bfloat16, queries=QUERIES, latent=LATENT, rotary=ROTARY, places=PLACES):
    triton_mla_keye._forward(*inputs(heads, dtype, queries, latent, rotary, places), 0.1, latent)


def gradients(heads, dtype=torch.bfloat16, latent=LATENT, rotary=ROTARY):
    q, kv, indices = inputs(heads, dtype, 2, latent, rotary, PLACES)
    out = torch.empty(*q.shape[:3], latent, dtype=dtype)
    lse = torch.empty(q.shape[:3])
    backward(q, kv, indices, out, lse, torch.empty_like(out), 0.1)


def forward_128_heads():
    forward(128)


def forward_64_heads_odd_places():
    forward(64, places=PLACES + 129)


def forward_32_heads():
    forward(32)


def forward_16_heads():
    forward(16)


def forward_small_latent():
    forward(16, latent=128, rotary=32)


def decode_128_heads():
    forward(128, queries=1)


def forward_float32():
    forward(128, torch.float32)


def gradients_128_heads():
    gradients(128)


def gradients_32_heads():
    gradients(32)


def gradients_16_heads():
    gradients(16)


def gradients_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        gradients(128)
    finally:
        torch.use_deterministic_algorithms(False)


def gradients_float32():
    gradients(128, torch.float32)


LAUNCHES = {
    90: [
        forward_128_heads,
        forward_64_heads_odd_places,
        forward_32_heads,
        forward_16_heads,
        forward_small_latent,
        decode_128_heads,
        gradients_128_heads,
        gradients_32_heads,
        gradients_16_heads,
        gradients_deterministic,
        forward_float32,
        gradients_float32,
    ],
    80: [forward_128_heads, forward_16_heads, gradients_128_heads],
    89: [
        forward_128_heads,
        forward_16_heads,
        gradients_128_heads,
        gradients_16_heads,
        forward_float32,
        gradients_float32,
    ],
}
NAMES = {arch: [function.__name__ for function in functions] for arch, functions in LAUNCHES.items()}
# Matrix instructions of one group of four warps on Hopper, where 64 heads take 64 places of 576 columns: 36 for the
# scores and 4 for the values; 8, 8 and 4 for 128 columns of the gradients. Twice as many if both groups make the same.
PRODUCTS = {
    "forward_128_heads": ("_forward_kernel", 40),
    "forward_64_heads_odd_places": ("_forward_kernel", 40),
    "decode_128_heads": ("_forward_kernel", 40),
    "gradients_128_heads": ("_row_gradients_kernel", 20),
    "gradients_deterministic": ("_row_gradients_kernel", 20),
}
GATHERING = ("_forward_kernel", "_score_gradients_kernel", "_row_gradients_kernel")


assert set(PRODUCTS) <= set(NAMES[90])


@pytest.mark.parametrize(("arch", "name"), [(arch, name) for arch in NAMES for name in NAMES[arch]])
def test_compiles_for_the_device(arch, name):
    reports = aot.compile_launches(__name__)[arch][name]
    print("", *reports, sep="\n")
    if arch == 90 and name in PRODUCTS:
        kernel, products = PRODUCTS[name]
        assert [report.instructions["HGMMA"] for report in reports if report.kernel == kernel] == [products], reports
    for report in reports:
        assert report.shared <= aot.SHARED_LIMIT[arch], report
        if report.kernel not in GATHERING:
            assert report.stack == 0, report
            continue
        assert report.instructions["LDGSTS"] >= 4, f"rows are not gathered asynchronously: {report}"
        if name.endswith("float32"):
            continue  # multiply-adds: correct everywhere, fast nowhere
        # At 255 registers, releases of Triton differ by a few: 3.8 has no spill at all, 3.6 up to four registers.
        assert report.stack <= 16, report
        expected, unexpected = ("HGMMA", "HMMA") if arch == 90 else ("HMMA", "HGMMA")
        assert expected in report.instructions and unexpected not in report.instructions, report
        if report.kernel == "_row_gradients_kernel" and "deterministic" in name:
            assert not {"RED", "REDG", "ATOM", "ATOMG"} & set(report.instructions), report
