"""The kernels of sparse latent attention compiled for real devices: no spills, within shared memory, matrix instructions."""

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


def forward_128_heads_float16():
    forward(128, torch.float16)


def forward_64_heads_odd_places():
    forward(64, places=PLACES + 129)


def forward_32_heads():
    forward(32)


def forward_20_heads():
    forward(20)


def forward_16_heads():
    forward(16)


def forward_small_latent():
    forward(16, latent=128, rotary=32)


def forward_no_rotary():
    forward(64, latent=256, rotary=0)


def decode_128_heads():
    forward(128, queries=1)


def decode_16_heads():
    forward(16, queries=1)


def forward_float32():
    forward(128, torch.float32)


def gradients_128_heads():
    gradients(128)


def gradients_128_heads_float16():
    gradients(128, torch.float16)


def gradients_64_heads():
    gradients(64)


def gradients_32_heads():
    gradients(32)


def gradients_16_heads():
    gradients(16)


def gradients_small_latent():
    gradients(16, latent=128, rotary=32)


def gradients_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        gradients(128)
    finally:
        torch.use_deterministic_algorithms(False)


def gradients_float32():
    gradients(128, torch.float32)


HALF = [
    forward_128_heads,
    forward_128_heads_float16,
    forward_64_heads_odd_places,
    forward_32_heads,
    forward_20_heads,
    forward_16_heads,
    forward_small_latent,
    forward_no_rotary,
    decode_128_heads,
    decode_16_heads,
    gradients_128_heads,
    gradients_128_heads_float16,
    gradients_64_heads,
    gradients_32_heads,
    gradients_16_heads,
    gradients_small_latent,
    gradients_deterministic,
]
SINGLE = [forward_float32, gradients_float32]
NAMES = [function.__name__ for function in HALF + SINGLE]


@pytest.mark.parametrize("arch", [90, 80, 89])
@pytest.mark.parametrize("name", NAMES)
def test_fits(name, arch):
    for report in aot.compile_launches(__name__, NAMES, arch)[name]:
        print(arch, name, report)
        assert report.shared <= aot.SHARED_LIMIT[arch]
