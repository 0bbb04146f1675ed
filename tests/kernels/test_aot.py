"""The selection kernels, compiled for real devices without one: registers, spills, shared memory, instructions."""

import pytest
import torch

from modeling_keye.triton_selection_keye import select_tokens
from tests.kernels.aot import SHARED_LIMIT, compile_launches

SHAPES = {(heads, dim): f"{heads}x{dim}" for heads, dim in ((4, 128), (16, 64), (32, 128), (64, 128))}


def _launch(heads: int, dim: int, dtype: torch.dtype, masked: bool = True) -> None:
    num_queries, offset = 48, 4096
    num_keys = offset + num_queries
    select_tokens(
        torch.zeros(1, num_queries, heads, dim, dtype=dtype),
        torch.zeros(1, num_keys, dim, dtype=dtype),
        torch.zeros(1, num_queries, heads, dtype=dtype),
        topk=2048,
        local_window=128,
        anchor_stride=64,
        batch_size=1,
        num_queries=num_queries,
        query_offset=offset,
        key_mask=torch.ones(1, num_keys, dtype=torch.bool) if masked else None,
        width=2304,
        device=torch.device("cpu"),
    )


def bf16_4x128():
    _launch(4, 128, torch.bfloat16)


def bf16_16x64():
    _launch(16, 64, torch.bfloat16)


def bf16_32x128():
    _launch(32, 128, torch.bfloat16)


def bf16_64x128():
    _launch(64, 128, torch.bfloat16)


def fp32_16x64():
    _launch(16, 64, torch.float32)
