"""FlashAttention, where it is installed, for attention that reads every key: dense decoder layers and the vision tower.

Version 4 on devices from capability 9.0, else version 2. Without either, and for what they do not take, the callers use
PyTorch's `scaled_dot_product_attention`, which gives the same result.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

# What both versions take: the widest head, and the multiple that a head size must be of.
_MAX_HEAD_SIZE, _HEAD_MULTIPLE = 256, 8
# Version 4 was written for Hopper and newer, version 2 for Ampere and newer.
_OLDEST_CAPABILITY = {4: (9, 0), 2: (8, 0)}


@lru_cache(maxsize=2)
def _installed(version: int) -> tuple[Callable, Callable] | None:
    """`flash_attn_func` and `flash_attn_varlen_func` of that version."""
    if version == 4:
        try:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
        except ImportError:
            return None
    else:
        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        except ImportError:
            return None
    return flash_attn_func, flash_attn_varlen_func


def flash_version(device: torch.device, dtype: torch.dtype, head_size: int) -> int | None:
    """4 or 2: the installed FlashAttention for tensors like these; None when PyTorch's own attention has to do."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if head_size > _MAX_HEAD_SIZE or head_size % _HEAD_MULTIPLE:
        return None
    capability = torch.cuda.get_device_capability(device)
    for version, oldest in _OLDEST_CAPABILITY.items():
        if capability >= oldest and _installed(version) is not None:
            return version
    return None


def flash_causal(version: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv], Dv <= D -> [B, S, H, Dv]; the last query sees all T keys."""
    value_dim = v.shape[-1]
    v = torch.nn.functional.pad(v, (0, q.shape[-1] - value_dim))
    attend, _ = _installed(version)
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), **_options(scaling), causal=True)
    return _first(out)[..., :value_dim]


def flash_segments(
    version: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float,
) -> torch.Tensor:
    """q, k, v [N, H, D] -> [N, H, D]; each run of N between two of `cu_seqlens` (int32) attends to itself."""
    _, attend = _installed(version)
    segments = {f"cu_seqlens_{x}": cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
    return _first(attend(q, k, v, **segments, **_options(scaling), causal=False))


def _options(scaling: float) -> dict:
    return {"softmax_scale": scaling, "deterministic": torch.are_deterministic_algorithms_enabled()}


def _first(out) -> torch.Tensor:
    """Version 4 returns the log-sum-exp too."""
    return out[0] if isinstance(out, tuple) else out
