"""The Triton kernels as operators of PyTorch, with shapes for the compiler and gradients.

An operator is opaque: `torch.compile` takes its result's shape from the function beside it and never looks inside, and
CUDA graphs record what it launches. Contracts are those of `sparse_attention_keye.py`, which is the only caller.

Names of operators are global to a process and a second registration replaces the first. Copies of this file (package,
remote code of several revisions, Hub kernel) therefore register under names of their own, made of the module's name.
"""

from hashlib import blake2b

import torch

from .triton_gqa_backward_keye import backward as _gqa_backward
from .triton_gqa_keye import sparse_gqa as _triton_sparse_gqa
from .triton_kl_dense_keye import dense_kl as _triton_dense_kl
from .triton_kl_keye import statistics_dtype
from .triton_kl_sparse_keye import sparse_kl as _triton_sparse_kl
from .triton_mla_backward_keye import backward as _mla_backward
from .triton_mla_keye import sparse_mla as _triton_sparse_mla
from .triton_selection_keye import select_tokens as _triton_select_tokens

NAMESPACE = "keye_" + blake2b(__name__.encode(), digest_size=6).hexdigest()
# Triton compiles a kernel anew when 16 stops dividing a stride. Rows of a selection are as long as this multiple.
_ROW_MULTIPLE = 16


def _operator(name: str, schema: str, mutates_args: tuple[str, ...] = ()):
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates_args, schema=schema)


@_operator(
    "select_tokens",
    "(Tensor q, Tensor? k, Tensor? weights, Tensor? key_mask, SymInt? topk, SymInt? local_window, "
    "SymInt? anchor_stride, SymInt batch_size, SymInt num_queries, SymInt query_offset, SymInt width, "
    "Tensor? slot=None) -> Tensor",
)
def _select_tokens(
    q, k, weights, key_mask, topk, local_window, anchor_stride, batch_size, num_queries, query_offset, width, slot=None
):
    slots = _triton_select_tokens(
        None if topk is None else q,
        k,
        weights,
        topk=topk,
        local_window=local_window,
        anchor_stride=anchor_stride,
        batch_size=batch_size,
        num_queries=num_queries,
        query_offset=query_offset,
        key_mask=key_mask,
        width=_padded(width),
        device=q.device,
        slot=slot,
    )
    return slots[..., :width]


@_select_tokens.register_fake
def _(
    q, k, weights, key_mask, topk, local_window, anchor_stride, batch_size, num_queries, query_offset, width, slot=None
):
    return q.new_empty(batch_size, num_queries, _padded(width), dtype=torch.int32)[..., :width]


def _padded(width: int) -> int:
    return (width + _ROW_MULTIPLE - 1) // _ROW_MULTIPLE * _ROW_MULTIPLE


def select_tokens(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    topk: int | None,
    local_window: int | None,
    anchor_stride: int | None,
    batch_size: int,
    num_queries: int,
    query_offset: int,
    key_mask: torch.Tensor | None,
    width: int,
    device: torch.device,
    slot: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `sparse_attention_keye.select_tokens`, for `slot` `triton_selection_keye.select_tokens`. Rows of the result
    lie a multiple of 16 elements apart."""
    if q is None:  # an operator finds its device by a tensor
        q = torch.empty(0, device=device)
    rule = (topk, local_window, anchor_stride)
    return _select_tokens(q.detach(), k, weights, key_mask, *rule, batch_size, num_queries, query_offset, width, slot)


@_operator("sparse_mla", "(Tensor q, Tensor kv, Tensor indices, float scaling, int value_dim) -> (Tensor, Tensor)")
def _sparse_mla(q, kv, indices, scaling, value_dim):
    with torch.no_grad():  # the gradient is the operator's
        return _triton_sparse_mla(q, kv, indices, scaling, value_dim)


@_sparse_mla.register_fake
def _(q, kv, indices, scaling, value_dim):
    return _outputs(q, value_dim, kv)


@_operator(
    "sparse_mla_backward",
    "(Tensor q, Tensor kv, Tensor indices, Tensor out, Tensor lse, Tensor grad_out, float scaling) -> (Tensor, Tensor)",
)
def _sparse_mla_backward(q, kv, indices, out, lse, grad_out, scaling):
    return _mla_backward(q, kv, indices, out, lse, grad_out, scaling)


@_sparse_mla_backward.register_fake
def _(q, kv, indices, out, lse, grad_out, scaling):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


@_operator("sparse_gqa", "(Tensor q, Tensor k, Tensor v, Tensor indices, float scaling) -> (Tensor, Tensor)")
def _sparse_gqa(q, k, v, indices, scaling):
    with torch.no_grad():
        return _triton_sparse_gqa(q, k, v, indices, scaling)


@_sparse_gqa.register_fake
def _(q, k, v, indices, scaling):
    return _outputs(q, v.shape[-1], k, v)


@_operator(
    "sparse_gqa_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor out, Tensor lse, Tensor grad_out, float scaling) "
    "-> (Tensor, Tensor, Tensor)",
)
def _sparse_gqa_backward(q, k, v, indices, out, lse, grad_out, scaling):
    return _gqa_backward(q, k, v, indices, out, lse, grad_out, scaling)


@_sparse_gqa_backward.register_fake
def _(q, k, v, indices, out, lse, grad_out, scaling):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _outputs(q: torch.Tensor, value_dim: int, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unwritten out [B, S, H, C] in the dtype of q, and lse [B, S, H] in that of the statistics."""
    dtype = torch.float32
    for x in (q, *others):
        dtype = torch.promote_types(dtype, x.dtype)
    return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=dtype)


def _save(ctx, inputs, output):
    *tensors, ctx.scaling = inputs[: ctx.num_tensors + 1]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _save_mla(ctx, inputs, output):
    ctx.num_tensors = 3
    _save(ctx, inputs, output)


def _save_gqa(ctx, inputs, output):
    ctx.num_tensors = 4
    _save(ctx, inputs, output)


def _mla_gradients(ctx, grad_out, _):
    return *_sparse_mla_backward(*ctx.saved_tensors, grad_out, ctx.scaling), None, None, None


def _gqa_gradients(ctx, grad_out, _):
    return *_sparse_gqa_backward(*ctx.saved_tensors, grad_out, ctx.scaling), None, None


_sparse_mla.register_autograd(_mla_gradients, setup_context=_save_mla)
_sparse_gqa.register_autograd(_gqa_gradients, setup_context=_save_gqa)


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_mla` and `triton_mla_keye.sparse_mla`."""
    return _sparse_mla(q, kv, indices, scaling, value_dim)


def sparse_gqa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sparse_attention_keye.sparse_gqa` and `triton_gqa_keye.sparse_gqa`."""
    return _sparse_gqa(q, k, v, indices, scaling)


# The losses write their gradients into tensors of the caller, which collects them over several calls.
_GRADIENTS = ("grad_q", "grad_k", "grad_gates")
_GRADIENTS_SCHEMA = "Tensor(a!)? grad_q, Tensor(b!)? grad_k, Tensor(c!)? grad_gates"


@_operator(
    "dense_kl",
    "(Tensor q, Tensor k, Tensor gates, Tensor weights, Tensor queries, Tensor keys, float scaling, SymInt first_slot, "
    f"Tensor? key_mask, Tensor? lse, {_GRADIENTS_SCHEMA}) -> Tensor",
    mutates_args=_GRADIENTS,
)
def _dense_kl(q, k, gates, weights, queries, keys, scaling, first_slot, key_mask, lse, *grads):
    grads = None if grads[0] is None else grads
    options = {"first_slot": first_slot, "key_mask": key_mask, "lse": lse, "grads": grads}
    return _triton_dense_kl(q, k, gates, weights, queries, keys, scaling, **options)


@_operator(
    "sparse_kl",
    "(Tensor q, Tensor k, Tensor gates, Tensor weights, Tensor queries, Tensor keys, Tensor lse, Tensor selected, "
    f"float scaling, {_GRADIENTS_SCHEMA}) -> Tensor",
    mutates_args=_GRADIENTS,
)
def _sparse_kl(q, k, gates, weights, queries, keys, lse, selected, scaling, *grads):
    grads = None if grads[0] is None else grads
    return _triton_sparse_kl(q, k, gates, weights, queries, keys, lse, selected, scaling, grads=grads)


@_dense_kl.register_fake
@_sparse_kl.register_fake
def _(q, k, gates, weights, queries, keys, *rest):
    return q.new_empty((), dtype=statistics_dtype(queries, keys, q, k))


def dense_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    weights: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    first_slot: int = 0,
    key_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """See `triton_kl_dense_keye.dense_kl`."""
    grads = grads or (None, None, None)
    return _dense_kl(q, k, gates, weights, queries, keys, scaling, first_slot, key_mask, lse, *grads)


def sparse_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    weights: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    selected: torch.Tensor,
    scaling: float,
    *,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """See `triton_kl_sparse_keye.sparse_kl`."""
    return _sparse_kl(q, k, gates, weights, queries, keys, lse, selected, scaling, *(grads or (None, None, None)))
