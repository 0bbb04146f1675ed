"""FlashAttention, where it is installed, for attention that reads every key: dense decoder layers and the vision tower.

Version 4 on devices of capability 9 to 11, else version 2. Without either, and for what they do not take, the callers
use PyTorch's `scaled_dot_product_attention`, which gives the same result, or a kernel inside of it, which also gives
the log-sum-exp.
"""

import inspect
from collections.abc import Callable

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from .sparse_reference_keye import widened
from .triton_common_keye import on_device

_DEVICE_TYPE = "cuda"
# What both versions take: the widest head, and the multiple that a head size must be of.
_MAX_HEAD_SIZE, _HEAD_MULTIPLE = 256, 8
_OLDEST_CAPABILITY = {4: (9, 0), 2: (8, 0)}
# On consumer cards from 12.0 on, version 4 multiplies as version 2 does and has no deterministic backward pass.
_TOO_NEW_FOR_4 = (12, 0)
# Sizes of queries and values that version 4 takes beyond equal ones up to 128, from capability 10 on; 9 takes them too.
_EXPANDED_MLA = (192, 128)
_WIDE_OF_4 = (_EXPANDED_MLA, (256, 256))


# Version -> its `flash_attn_func` and `flash_attn_varlen_func`, and what asks the first for the log-sum-exp: an option
# of version 2, that without dropout returns nothing else, or of 4; older releases have none. None: not installed.
_functions: dict[int, tuple[Callable, Callable, dict[str, bool]] | None] = {}


def _installed(version: int) -> bool:
    if version not in _functions:
        _functions[version] = _imported(version)
    return _functions[version] is not None


def _imported(version: int) -> tuple[Callable, Callable, dict[str, bool]] | None:
    try:
        if version == 4:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
        else:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError:
        return None
    known = inspect.signature(flash_attn_func).parameters
    lse = {name: True for name in ("return_attn_probs", "return_lse") if name in known}
    return flash_attn_func, flash_attn_varlen_func, lse


# What is installed does not change: `torch.compile`, which cannot trace an import, asks once.
@torch.compiler.assume_constant_result
def flash_version(device: torch.device, dtype: torch.dtype, head_size: int, value_size: int) -> int | None:
    """4 or 2: the installed FlashAttention for tensors like these; None when PyTorch's own attention has to do."""
    if device.type != _DEVICE_TYPE or dtype not in (torch.float16, torch.bfloat16):
        return None
    if head_size > _MAX_HEAD_SIZE or head_size % _HEAD_MULTIPLE or value_size > head_size:
        return None
    capability = torch.cuda.get_device_capability(device)
    for version, oldest in _OLDEST_CAPABILITY.items():
        if capability >= oldest and (version == 2 or _takes_4(capability, head_size, value_size)):
            if _installed(version):
                return version
    return None


def _takes_4(capability: tuple[int, int], head_size: int, value_size: int) -> bool:
    if capability >= _TOO_NEW_FOR_4:
        return False
    sizes = head_size, _value_width(4, head_size, value_size)
    return capability < (10, 0) or head_size <= 128 or sizes in _WIDE_OF_4


def _value_width(version: int, head_size: int, value_size: int) -> int:
    """Columns of the values as that version takes them, the last of them zeros."""
    return value_size if version == 4 and (head_size, value_size) == _EXPANDED_MLA else head_size


def flash_causal(
    version: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv], Dv <= D; the last query sees all T keys.

    `version` is what `flash_version` said. Returns out [B, S, H, Dv] and the natural log-sum-exp [B, S, H] in float32,
    None from a release that has no option for it.
    """
    value_dim = v.shape[-1]
    v = widened(v, _value_width(version, q.shape[-1], value_dim))
    attend, _, lse_option = _functions[version]
    options = _options(scaling) | lse_option
    with on_device(q.device):
        out, lse, *_ = _as_tuple(attend(*(x.transpose(1, 2) for x in (q, k, v)), **options, causal=True))
    return out[..., :value_dim], None if lse is None else lse.detach().transpose(1, 2)


def fused_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `flash_causal`, by an operator that `scaled_dot_product_attention` calls; None where there is none for these.

    cuDNN's from Hopper on, where it is the faster one, for as many queries as keys; else PyTorch's FlashAttention.
    """
    value_dim, causal, grouped = v.shape[-1], q.shape[2] > 1, q.shape[1] != k.shape[1]
    if not q.is_cuda or q.shape[-1] % _HEAD_MULTIPLE or q.shape[-1] < value_dim:
        return None
    v = widened(v, q.shape[-1])
    if _cudnn_takes(q, k, v, grouped):
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = attend(q, k, v, None, compute_log_sumexp=True, is_causal=causal, scale=scaling)
    elif can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped)):
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = attend(q, k, v, is_causal=causal, scale=scaling)
    else:
        return None
    return out[..., :value_dim].transpose(1, 2), lse.detach().reshape(q.shape[:3]).transpose(1, 2)


def _cudnn_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool) -> bool:
    if torch.compiler.is_compiling() or q.shape[2] != k.shape[2]:  # the compiler does not know the question
        return False
    if torch.cuda.get_device_capability(q.device) < _OLDEST_CAPABILITY[4]:
        return False
    return can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, grouped))


def flash_segments(
    version: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float,
) -> torch.Tensor:
    """q, k, v [N, H, D] -> [N, H, D]; each run of N between two of `cu_seqlens` (int32) attends to itself. `version` is
    what `flash_version` said."""
    _, attend, _ = _functions[version]
    segments = {f"cu_seqlens_{x}": cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
    with on_device(q.device):
        return _as_tuple(attend(q, k, v, **segments, **_options(scaling), causal=False))[0]


def _options(scaling: float) -> dict:
    return {"softmax_scale": scaling, "deterministic": torch.are_deterministic_algorithms_enabled()}


def _as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out, None)
