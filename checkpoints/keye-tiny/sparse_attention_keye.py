"""The one dispatch point of sparse attention: what is kept, how it is read, and which backend does it.

Selection (fixed here, equal in every backend): for query t the kept set is

    {s <= t : t - s <= local_window} U {s <= t : s % anchor_stride == 0} U top-k of the indexer over the other valid s

where each of the three parts may be off (None), positions count from the first real token of the sequence, ties of
the indexer go to the lowest position, and all heads share one set. Sources: DeepSeek-V3.2-Exp report, eq. 1 and 2
(indexer, top-k); DeepSeek-V2 report, section 2.1 (absorbed MLA).

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head size, C latent size, R rotary size,
W = C + R, K selected keys, Hi and Di heads and head size of the indexer. `query_offset` is the cache slot of the first
query: query i stands at slot `query_offset + i` and sees slots up to its own. `key_mask` is bool [B, T], True at real
tokens, or None when all are.

The slot may also be an int64 tensor [] on the device of the inputs, for steps over a static cache: T is then the whole
cache, whatever it holds behind the queries, and nothing waits for the device, so that one graph serves all positions.
"""

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .autotune_keye import autotune as _autotune_kernels
from .flash_attention_keye import flash_causal, flash_version, fused_causal
from .ops_keye import select_tokens as _triton_select_tokens
from .ops_keye import sparse_gqa as _triton_sparse_gqa
from .ops_keye import sparse_mla as _triton_sparse_mla
from .sparse_reference_keye import dense_attention as _torch_dense_attention
from .sparse_reference_keye import dense_latent_attention as _torch_dense_latent_attention
from .sparse_reference_keye import forced_count
from .sparse_reference_keye import select_tokens as _torch_select_tokens
from .sparse_reference_keye import sparse_gqa as _torch_sparse_gqa
from .sparse_reference_keye import sparse_mla as _torch_sparse_mla
from .triton_common_keye import shared_memory, triton_usable
from .triton_gqa_keye import unsupported as _unsupported_by_triton_gqa
from .triton_mla_keye import unsupported as _unsupported_by_triton_mla
from .triton_selection_keye import score_tiles
from .warm_up_keye import warm_up as _warm_up_kernels

ATTENTION_NAME = "keye_sparse"
BACKENDS = ("auto", "torch", "triton")
# Code that Triton's assembler makes runs on drivers from CUDA 12.0 on.
_OLDEST_DRIVER = (12, 0)
_DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


@dataclass(frozen=True)
class Selection:
    """What a query keeps: indexer top-k, local window, anchors; None switches a part off.

    All three None means dense attention.
    """

    topk: int | None = None
    local_window: int | None = None
    anchor_stride: int | None = None

    @property
    def is_dense(self) -> bool:
        return self.topk is None and self.local_window is None and self.anchor_stride is None

    def keeps_everything(self, num_visible: int) -> bool:
        """Whether a query that sees `num_visible` tokens keeps all of them, so that scoring can be skipped."""
        if self.is_dense:
            return True
        return num_visible - forced_count(num_visible, self.local_window, self.anchor_stride) <= (self.topk or 0)

    def dense_length(self, num_visible: int) -> int:
        """Largest n <= `num_visible` such that queries seeing up to n tokens keep everything."""
        low, high = 0, num_visible
        while low < high:  # keeps_everything is monotone: one more token never makes more room
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.keeps_everything(middle) else (low, middle - 1)
        return low

    def width(self, num_visible: int) -> int:
        """K, the most keys that any query with up to `num_visible` visible tokens keeps."""
        forced = forced_count(num_visible, self.local_window, self.anchor_stride)
        return min(num_visible, forced + (self.topk or 0))


def resolve_backend(name: str, device: torch.device, *dtypes: torch.dtype, problem: str | None = None) -> str:
    """The backend that will run on `device` for inputs of `dtypes` when `name` is asked for.

    "auto" takes the Triton kernels on CUDA devices where they can run, PyTorch elsewhere. `problem` is what else keeps
    the kernels from running, in one sentence. Raises `ValueError` when the backend that was named cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"There is no sparse attention backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    problem = _device_problem(device, *dtypes) or problem
    if name == "triton" and problem is not None:
        raise ValueError(problem)
    return "triton" if problem is None else "torch"


def mla_backend(q: torch.Tensor, kv: torch.Tensor, value_dim: int, backend: str = "auto") -> str:
    """The backend that `sparse_mla` runs for these inputs; raises `ValueError` when a named one cannot."""
    problem = None
    if _asks_for_triton(backend, q):
        problem = _size_problem("mla", q.device, (q.dtype, kv.dtype), int(q.shape[2]), int(q.shape[3]), value_dim)
    return resolve_backend(backend, q.device, q.dtype, kv.dtype, problem=problem)


def gqa_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = "auto") -> str:
    """The backend that `sparse_gqa` runs for these inputs; raises `ValueError` when a named one cannot."""
    problem = None
    if _asks_for_triton(backend, q):
        sizes = int(q.shape[2]), int(k.shape[1]), int(q.shape[3]), int(v.shape[3])
        problem = _size_problem("gqa", q.device, (q.dtype, k.dtype, v.dtype), *sizes)
    return resolve_backend(backend, q.device, q.dtype, k.dtype, v.dtype, problem=problem)


def selection_backend(q: torch.Tensor | None, device: torch.device, backend: str = "auto", *dtypes: torch.dtype) -> str:
    """The backend that `select_tokens` runs for indexer queries [B, S, Hi, Di], None without an indexer."""
    problem = None
    if q is not None and _asks_for_triton(backend, q):
        problem = _size_problem("selection", q.device, dtypes, int(q.shape[2]), int(q.shape[3]))
    return resolve_backend(backend, device, *dtypes, problem=problem)


def _asks_for_triton(backend: str, q: torch.Tensor) -> bool:
    return (backend == "triton" or (backend == "auto" and q.is_cuda)) and _device_problem(q.device) is None


# The questions below have one answer per process and arguments: `torch.compile` asks once and goes on.
@torch.compiler.assume_constant_result
def _device_problem(device: torch.device, *dtypes: torch.dtype) -> str | None:
    problem = _driver_problem() if device.type == "cuda" else None
    return triton_usable(device, *dtypes) if problem is None else problem


@lru_cache(maxsize=1)
def _driver_problem() -> str | None:
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f'PyTorch, built {built}, finds no CUDA device or driver that it can use; choose the backend "torch".'
    version = _driver_version()
    if version is not None and version < _OLDEST_DRIVER:
        found, oldest = (".".join(map(str, numbers)) for numbers in (version, _OLDEST_DRIVER))
        return f'The driver supports CUDA {found} and Triton\'s code needs {oldest}; choose the backend "torch".'
    return None


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports, None where it does not say. PyTorch has no public question for it."""
    for name in _DRIVER_LIBRARIES:
        try:
            ask = ctypes.CDLL(name).cuDriverGetVersion
        except (OSError, AttributeError):
            continue
        version = ctypes.c_int()
        if ask(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return None


@torch.compiler.assume_constant_result
def _size_problem(kernels: str, device: torch.device, dtypes: tuple[torch.dtype, ...], *sizes: int) -> str | None:
    return _known_size_problem(kernels, device, dtypes, sizes, shared_memory(device))


@lru_cache(maxsize=64)
def _known_size_problem(kernels, device, dtypes, sizes, shared: int) -> str | None:
    """What keeps the kernels from taking heads and head sizes, asked with inputs that have nothing else."""
    if kernels == "selection":
        heads, dim = sizes
        dtype = torch.promote_types(*dtypes[:2])
        try:
            score_tiles(heads, dim, torch.float32 if dtype == torch.float64 else dtype, shared)
        except ValueError as error:
            return str(error)
        return None
    if kernels == "mla":
        heads, width, value_dim = sizes
        q = torch.empty(0, 0, heads, width, dtype=dtypes[0], device=device)
        return _unsupported_by_triton_mla(q, torch.empty(0, 0, width, dtype=dtypes[1], device=device), value_dim)
    heads, groups, dim, value_dim = sizes
    shapes = (0, 0, heads, dim), (0, groups, 0, dim), (0, groups, 0, value_dim)
    inputs = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes))
    return _unsupported_by_triton_gqa(*inputs)


def warm_up(
    config, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, training: bool = False
) -> dict[str, float]:
    """Compiles every kernel that a decoder of this configuration launches, so that no request waits for the compiler.

    Blocks depend on head sizes, dtype and device alone, so one call serves all lengths and batch sizes.

    Args:
        config: a `KeyeTextConfig`, or a `KeyeConfig`. device, dtype: the model's.
        training: the backward kernels too, in the mode that `torch.use_deterministic_algorithms` asks for now, and with
            an `indexer_loss_coef` the losses of its `indexer_stage`.

    Returns:
        Seconds of each step; empty where PyTorch is the backend. Raises `ValueError` with one sentence where the
        kernels do not take these head sizes.
    """
    if resolve_backend("auto", torch.device(device), dtype) == "torch":
        return {}
    return _warm_up_kernels(config, device, dtype, training=training)


def autotune(
    config,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = False,
    file: str | os.PathLike | None = None,
) -> list[dict]:
    """Measures which blocks of the kernels are fastest on this device for a decoder of this configuration; uses them.

    Call it before `warm_up` and before the first input: other blocks round otherwise, so results before and after may
    differ by rounding (selections never do). Minutes, nearly all of them compilation. Blocks depend on head sizes,
    dtype and device alone, so nothing is measured or compiled per length afterwards.

    Args:
        config: a `KeyeTextConfig`, or a `KeyeConfig`. device, dtype: the model's.
        training: the backward kernels too, in the mode that `torch.use_deterministic_algorithms` asks for now, and with
            an `indexer_loss_coef` the losses of its `indexer_stage`.
        file: JSON file that keeps what was measured, per device and release of Triton. What it holds is used instead
            of measuring again, and each kernel is added as soon as it is done. In a job of several processes, tune in
            one of them and let the others read.

    Returns:
        One record per kernel: `blocks` and `ms` of what is used now, `own` and `own_ms` of what the kernel chooses by
        itself. Empty where PyTorch is the backend. Raises `ValueError` with one sentence where the kernels do not take
        these head sizes, or the file is none of `autotune`.
    """
    if resolve_backend("auto", torch.device(device), dtype) == "torch":
        return []
    return _autotune_kernels(config, device, dtype, training=training, file=file)


def _check_indices(indices: torch.Tensor, q: torch.Tensor) -> None:
    if indices.shape[:2] != q.shape[:2]:
        raise ValueError(f"Indices {tuple(indices.shape)} do not fit queries {tuple(q.shape)}.")


def select_tokens(
    selection: Selection,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    batch_size: int,
    num_queries: int,
    query_offset: int | torch.Tensor = 0,
    key_mask: torch.Tensor | None = None,
    device: torch.device | None = None,
    backend: str = "auto",
    num_keys: int | None = None,
) -> torch.Tensor:
    """Cache slots that each query keeps.

    Args:
        selection: the rule; with `topk` None the indexer arguments must be None.
        q: indexer queries [B, S, Hi, Di], k: indexer keys [B, T, Di], weights: gates [B, S, Hi] with every constant
            scale already inside. Any float dtype; scores are float32. No gradient flows through a selection.
        query_offset: int, or int64 [] on the device of the inputs: at most T - S, which nobody checks.
        num_keys: T, with a slot on the device only; may be left out where the indexer keys or the mask tell.

    Returns:
        int32 [B, S, K]: slots, ascending, unique, -1 at the end for unused places, `K = selection.width(T)`, where T is
        `query_offset + S`, or the length of the static cache. Slots of padding never appear; a query without a visible
        key gets only -1.

    Raises `ValueError` for a dense rule, shapes that do not fit, a slot of another kind or on another device, or a
    backend that cannot run.
    """
    slot = query_offset if isinstance(query_offset, torch.Tensor) else None
    if slot is not None:
        num_keys = _cache_length(slot, num_queries, num_keys, k, key_mask)
        query_offset = num_keys - num_queries  # the last slot at which the queries can stand
    elif num_keys is not None:
        raise ValueError(f"`num_keys` is {num_keys}, but `query_offset` is {query_offset}, which tells already.")
    else:
        num_keys = query_offset + num_queries
    if selection.is_dense:
        raise ValueError("The selection rule is dense; call dense attention instead of selecting.")
    if (selection.topk is None) != (q is None):
        found = "missing" if q is None else "given"
        raise ValueError(f"`topk` is {selection.topk} but indexer queries are {found}.")
    if q is not None:
        if q.shape[:2] != (batch_size, num_queries) or weights.shape != q.shape[:3]:
            found = f"Indexer queries {tuple(q.shape)}, gates {tuple(weights.shape)}"
            raise ValueError(f"{found} do not fit {batch_size} x {num_queries}.")
        if k.shape[0] != batch_size or k.shape[1] < num_keys or k.shape[2] != q.shape[3]:
            found = f"Indexer keys {tuple(k.shape)}"
            raise ValueError(f"{found} do not fit queries {tuple(q.shape)} at offset {query_offset}.")
        device = q.device
    if key_mask is not None:
        if key_mask.shape[0] != batch_size or key_mask.shape[1] < num_keys:
            raise ValueError(
                f"`key_mask` {tuple(key_mask.shape)} must cover {batch_size} sequences of {num_keys} tokens."
            )
        key_mask = key_mask[:, :num_keys]
    if slot is not None:
        if q is not None and slot.device != device:
            raise ValueError(f"The slot of the first query lies on {slot.device}, the indexer's inputs on {device}.")
        device = slot.device
    dtypes = () if q is None else (q.dtype, k.dtype, weights.dtype)
    chosen = selection_backend(q, device, backend, *dtypes)
    select = _triton_select_tokens if chosen == "triton" else _torch_select_tokens
    return select(
        q,
        k,
        weights,
        topk=selection.topk,
        local_window=selection.local_window,
        anchor_stride=selection.anchor_stride,
        batch_size=batch_size,
        num_queries=num_queries,
        query_offset=query_offset,
        key_mask=key_mask,
        width=selection.width(num_keys),
        device=device,
        slot=slot,
    )


def _cache_length(slot, num_queries: int, num_keys: int | None, k, key_mask) -> int:
    """T of a static cache whose slot `slot` is a tensor."""
    if slot.shape != () or slot.dtype != torch.int64:
        raise ValueError(f"A slot on the device is int64 [], not {slot.dtype} {list(slot.shape)}.")
    if num_keys is None:
        if k is None and key_mask is None:
            raise ValueError("With a slot on the device and neither indexer keys nor a mask, pass `num_keys`.")
        num_keys = (key_mask if k is None else k).shape[1]
    if num_keys < num_queries:
        raise ValueError(f"{num_queries} queries do not fit a cache of {num_keys} slots.")
    return num_keys


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    scaling: float,
    value_dim: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed multi-head latent attention over selected cache rows.

    Args:
        q: [B, S, H, W], the absorbed queries; kv: [B, T, W], the cache rows (latent, then rotary key).
        indices: int32 [B, S, K] as `select_tokens` returns them. Duplicates are not allowed.
        scaling: softmax scale of the un-absorbed head. value_dim: C, the first columns of `kv` are the values.

    Returns:
        out [B, S, H, C] in the dtype of q, and the natural log-sum-exp [B, S, H] in float32 (float64 for float64). A
        query without keys returns 0 and -inf. Gradients reach q and kv, not indices.
    """
    if q.dim() != 4 or kv.dim() != 3 or q.shape[-1] != kv.shape[-1] or q.shape[0] != kv.shape[0]:
        raise ValueError(f"Queries {tuple(q.shape)} must be [B, S, H, W] and cache rows {tuple(kv.shape)} [B, T, W].")
    _check_indices(indices, q)
    attend = _triton_sparse_mla if mla_backend(q, kv, value_dim, backend) == "triton" else _torch_sparse_mla
    return attend(q, kv, indices, scaling, value_dim)


def sparse_gqa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention over selected keys, one set for all heads.

    q [B, S, H, D], k [B, G, T, D], v [B, G, T, Dv], indices int32 [B, S, K]; query head h reads group h * G // H.
    Returns out [B, S, H, Dv] and log-sum-exp [B, S, H], as `sparse_mla` does.
    """
    if q.shape[2] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"Queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit.")
    _check_indices(indices, q)
    attend = _triton_sparse_gqa if gqa_backend(q, k, v, backend) == "triton" else _torch_sparse_gqa
    return attend(q, k, v, indices, scaling)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    query_offset: int | torch.Tensor = 0,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over all keys, for layers and queries that keep everything; linear memory.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv] with Dv <= D -> [B, S, H, Dv]. A query that sees no real token
    returns 0. FlashAttention is used where it is installed and takes the inputs, with a slot on the device never. Keys
    and values behind such a slot must be finite, as the zeros of an empty static cache are.
    """
    return _dense_attention(q, k, v, scaling, query_offset, key_mask, with_lse=False)[0]


def dense_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    query_offset: int | torch.Tensor = 0,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`dense_attention`, and the natural log-sum-exp of its scores [B, S, H] in float32, without gradient.

    None in its place where what attends keeps it to itself, as `scaled_dot_product_attention` does; on CUDA the kernels
    inside of it can be asked. What is None costs whoever needs it a pass over the keys.
    """
    return _dense_attention(q, k, v, scaling, query_offset, key_mask, with_lse=True)


def _dense_attention(
    q, k, v, scaling, query_offset, key_mask, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if key_mask is None and not isinstance(query_offset, torch.Tensor):
        num_keys = query_offset + q.shape[2]
        seen = k[:, :, :num_keys], v[:, :, :num_keys]
        version = flash_version(q.device, q.dtype, int(q.shape[-1]), int(v.shape[-1]))
        if version is not None:
            return flash_causal(version, q, *seen, scaling)
        fused = fused_causal(q, *seen, scaling) if with_lse else None
        if fused is not None:
            return fused
    return _torch_dense_attention(q, k, v, scaling=scaling, query_offset=query_offset, key_mask=key_mask), None


def dense_latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    scaling: float,
    value_dim: int,
    query_offset: int | torch.Tensor = 0,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The absorbed twin of `dense_attention`: q [B, S, H, W], kv [B, T, W] -> [B, S, H, C], nothing expanded."""
    return _torch_dense_latent_attention(
        q, kv, scaling=scaling, value_dim=value_dim, query_offset=query_offset, key_mask=key_mask
    )


def sparse_attention_mask(seq_len: int, block_size: int, anchor_stride: int = 64) -> torch.Tensor:
    """The local window + anchors part of the selection as a bool mask [seq_len, seq_len], for inspection.

    Row t is True at s in [t - block_size, t] and at every s <= t with `s % anchor_stride == 0`. Quadratic in memory:
    the model never builds it.
    """
    for name, value, least in (
        ("seq_len", seq_len, 0),
        ("block_size", block_size, 0),
        ("anchor_stride", anchor_stride, 1),
    ):
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
    positions = torch.arange(seq_len)
    distance = positions[:, None] - positions
    return (distance >= 0) & ((distance <= block_size) | (positions % anchor_stride == 0))


def _padding_mask(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """Mask of the implementation: padding only [B, T]; causality and the selection come from cache slots."""
    return attention_mask


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The decoder calls the functions above itself; any other module has no selection to attend by."""
    raise ValueError(
        f"{ATTENTION_NAME!r} belongs to the Keye decoder, not to {type(module).__name__}; use 'sdpa' there."
    )


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)
