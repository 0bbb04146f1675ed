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
"""

from dataclasses import dataclass

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .sparse_reference_keye import dense_attention as _torch_dense_attention
from .sparse_reference_keye import dense_latent_attention as _torch_dense_latent_attention
from .sparse_reference_keye import forced_count
from .sparse_reference_keye import select_tokens as _torch_select_tokens
from .sparse_reference_keye import sparse_gqa as _torch_sparse_gqa
from .sparse_reference_keye import sparse_mla as _torch_sparse_mla
from .triton_common_keye import triton_usable
from .triton_gqa_keye import sparse_gqa as _triton_sparse_gqa
from .triton_gqa_keye import unsupported as _unsupported_by_triton_gqa
from .triton_mla_keye import sparse_mla as _triton_sparse_mla
from .triton_mla_keye import unsupported as _unsupported_by_triton_mla
from .triton_selection_keye import select_tokens as _triton_select_tokens

ATTENTION_NAME = "keye_sparse"
BACKENDS = ("auto", "torch", "triton")


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
    problem = triton_usable(device, *dtypes) or problem
    if name == "triton" and problem is not None:
        raise ValueError(problem)
    return "triton" if problem is None else "torch"


def mla_backend(q: torch.Tensor, kv: torch.Tensor, value_dim: int, backend: str = "auto") -> str:
    """The backend that `sparse_mla` runs for these inputs; raises `ValueError` when a named one cannot."""
    problem = _unsupported_by_triton_mla(q, kv, value_dim) if _asks_for_triton(backend, q) else None
    return resolve_backend(backend, q.device, q.dtype, kv.dtype, problem=problem)


def gqa_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = "auto") -> str:
    """The backend that `sparse_gqa` runs for these inputs; raises `ValueError` when a named one cannot."""
    problem = _unsupported_by_triton_gqa(q, k, v) if _asks_for_triton(backend, q) else None
    return resolve_backend(backend, q.device, q.dtype, k.dtype, v.dtype, problem=problem)


def _asks_for_triton(backend: str, q: torch.Tensor) -> bool:
    return (backend == "triton" or (backend == "auto" and q.is_cuda)) and triton_usable(q.device) is None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def select_tokens(
    selection: Selection,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    batch_size: int,
    num_queries: int,
    query_offset: int = 0,
    key_mask: torch.Tensor | None = None,
    device: torch.device | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Cache slots that each query keeps.

    Args:
        selection: the rule; with `topk` None the indexer arguments must be None.
        q: indexer queries [B, S, Hi, Di], k: indexer keys [B, T, Di], weights: gates [B, S, Hi] with every constant
            scale already inside. Any float dtype; scores are float32. No gradient flows through a selection.

    Returns:
        int32 [B, S, K]: slots, ascending, unique, -1 at the end for unused places, `K = selection.width(T)`. Slots
        of padding never appear; a query without a visible key gets only -1.

    Raises `ValueError` for a dense rule, shapes that do not fit, or a backend that cannot run.
    """
    num_keys = query_offset + num_queries
    _check(not selection.is_dense, "The selection rule is dense; call dense attention instead of selecting.")
    _check(
        (selection.topk is None) == (q is None),
        f"`topk` is {selection.topk} but indexer queries are {'missing' if q is None else 'given'}.",
    )
    if q is not None:
        _check(
            q.shape[:2] == (batch_size, num_queries) and weights.shape == q.shape[:3],
            f"Indexer queries {tuple(q.shape)}, gates {tuple(weights.shape)} do not fit {batch_size} x {num_queries}.",
        )
        _check(
            k.shape[0] == batch_size and k.shape[1] >= num_keys and k.shape[2] == q.shape[3],
            f"Indexer keys {tuple(k.shape)} do not fit queries {tuple(q.shape)} at offset {query_offset}.",
        )
        device = q.device
    if key_mask is not None:
        _check(
            key_mask.shape[0] == batch_size and key_mask.shape[1] >= num_keys,
            f"`key_mask` {tuple(key_mask.shape)} must cover {batch_size} sequences of {num_keys} tokens.",
        )
        key_mask = key_mask[:, :num_keys]
    dtypes = () if q is None else (q.dtype, k.dtype, weights.dtype)
    chosen = resolve_backend(backend, device, *dtypes)
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
    )


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
    _check(
        q.dim() == 4 and kv.dim() == 3 and q.shape[-1] == kv.shape[-1] and q.shape[0] == kv.shape[0],
        f"Queries {tuple(q.shape)} must be [B, S, H, W] and cache rows {tuple(kv.shape)} [B, T, W].",
    )
    _check(indices.shape[:2] == q.shape[:2], f"Indices {tuple(indices.shape)} do not fit queries {tuple(q.shape)}.")
    attend = _triton_sparse_mla if mla_backend(q, kv, value_dim, backend) == "triton" else _torch_sparse_mla
    return attend(q, kv, indices, scaling, value_dim)


def sparse_gqa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention over selected keys, one set for all heads.

    q [B, S, H, D], k [B, G, T, D], v [B, G, T, Dv], indices int32 [B, S, K]; query head h reads group h * G // H.
    Returns out [B, S, H, Dv] and log-sum-exp [B, S, H], as `sparse_mla` does.
    """
    _check(
        q.shape[2] % k.shape[1] == 0 and k.shape[:3] == v.shape[:3] and q.shape[-1] == k.shape[-1],
        f"Queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit.",
    )
    _check(indices.shape[:2] == q.shape[:2], f"Indices {tuple(indices.shape)} do not fit queries {tuple(q.shape)}.")
    attend = _triton_sparse_gqa if gqa_backend(q, k, v, backend) == "triton" else _torch_sparse_gqa
    return attend(q, k, v, indices, scaling)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    query_offset: int = 0,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over all keys, for layers and queries that keep everything; linear memory.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv] with Dv <= D -> [B, S, H, Dv]. A query that sees no real token
    returns 0.
    """
    return _torch_dense_attention(q, k, v, scaling=scaling, query_offset=query_offset, key_mask=key_mask)


def dense_latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    scaling: float,
    value_dim: int,
    query_offset: int = 0,
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
        _check(value >= least, f"`{name}` is {value}; it must be at least {least}.")
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
