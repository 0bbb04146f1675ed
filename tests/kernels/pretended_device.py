"""A CUDA device that is none, for what the host code does on one: tensors say "cuda:0" and live in the CPU's memory.

An operation runs on the CPU and its result says "cuda:0" again. Operands on two devices are an error, as on a device,
and every value that the host reads is noted: each is a wait, and breaks a captured graph. Kernels run in Triton's
interpreter, which copies tensors from the device and back. Without autograd: a CPU build of PyTorch has no streams.
"""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from modeling_keye import sparse_attention_keye, triton_common_keye

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_READS = (
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
)
# Operations whose result, or its size, the host has to know.
_READING = (
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
)


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `held` is its memory."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written_by_hand = _PYTHON_METHODS.get(func)
        if written_by_hand is not None:
            return written_by_hand(*args, **kwargs)
        if func in _READS:
            _note(func.__name__)
            return func(_held(args[0]))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _held(x):
    return x.held if isinstance(x, OnDevice) else x


def _is_device(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _run(func, args, kwargs):
    """One operation of PyTorch, on the device where its operands are or `device` says."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    elsewhere = [x for x in tensors if not isinstance(x, OnDevice)]
    result_here = len(elsewhere) < len(tensors)
    if kwargs.get("device") is not None:
        result_here = _is_device(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is _aten.copy_.default:
        result_here = isinstance(args[0], OnDevice)
    if func in (_aten._to_copy.default, _aten.copy_.default):
        if len(elsewhere) < len(tensors) and not (result_here and isinstance(args[0], OnDevice)):
            _note("copy to the host")
    elif len(elsewhere) < len(tensors):
        if any(x.dim() > 0 for x in elsewhere):  # numbers may come from the host
            raise RuntimeError(f"{func.name()}: operands on two devices, {[tuple(x.shape) for x in tensors]}")
        name = func.name().removeprefix("aten::").split(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None
        )
        sized_by_values = func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if name in _READING or masks or sized_by_values:
            _note(func.name())
    plain_args, plain_kwargs = tree_map_only(OnDevice, _held, (args, kwargs))
    if func is _aten.histc.default and not plain_args[0].is_floating_point():  # counts integers on devices alone
        result = func(plain_args[0].float(), *plain_args[1:], **plain_kwargs).to(plain_args[0].dtype)
    else:
        result = func(*plain_args, **plain_kwargs)
    written = {id(x.held): x for x in tensors if isinstance(x, OnDevice)}

    def placed(x):
        return written[id(x)] if id(x) in written else OnDevice(x) if result_here else x

    return tree_map_only(torch.Tensor, placed, result)


# What PyTorch's own bindings would do with a device guard, which a CPU build has not.


def _plain_index(index):
    if isinstance(index, tuple):
        return tuple(_plain_index(part) for part in index)
    if isinstance(index, slice):
        return slice(*(int(x) if isinstance(x, torch.Tensor) else x for x in (index.start, index.stop, index.step)))
    if isinstance(index, OnDevice) and index.dtype in (torch.bool, torch.uint8):
        _note("index by a mask")
    return _held(index)


def _get(tensor, index):
    if not isinstance(tensor, OnDevice):
        raise RuntimeError("a tensor of the host is indexed by one of the device")
    return OnDevice(tensor.held[_plain_index(index)])


def _set(tensor, index, value):
    if isinstance(value, torch.Tensor) and value.dim() and isinstance(value, OnDevice) != isinstance(tensor, OnDevice):
        raise RuntimeError("a tensor is written to the other device by its index")
    _held(tensor)[_plain_index(index)] = _held(value)


def _nonzero(tensor, **kwargs):
    _note("nonzero")
    found = tensor.held.nonzero(**kwargs)
    return tuple(OnDevice(x) for x in found) if isinstance(found, tuple) else OnDevice(found)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal or isinstance(attn_mask, CausalBias):
        behind = scores.shape[-1] - scores.shape[-2] if isinstance(attn_mask, CausalBias) else 0
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=DEVICE).tril(behind)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf) if masked else scores + attn_mask
    return scores.softmax(-1) @ value


_PYTHON_METHODS = {
    torch.Tensor.__getitem__: _get,
    torch.Tensor.__setitem__: _set,
    torch.Tensor.__len__: lambda x: len(x.held),
    torch.Tensor.__invert__: lambda x: OnDevice(~x.held),
    torch.Tensor.contiguous: lambda x: x if x.held.is_contiguous() else OnDevice(x.held.contiguous()),
    torch.Tensor.copy_: lambda x, source, *_, **__: _run(_aten.copy_.default, (x, source), {}),
    torch.Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}


class _Functions(TorchFunctionMode):
    """Tensors made of lists, and devices named without an index."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_device(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func is torch.Tensor.to:
            args = tuple(DEVICE if isinstance(x, (str, torch.device)) and _is_device(x) else x for x in args)
        if _is_device(kwargs.get("device")):
            kwargs["device"] = DEVICE
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Operations without an operand on the device, such as `torch.zeros(..., device="cuda")`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs))) or _is_device(kwargs.get("device"))
        return _run(func, args, kwargs) if here else func(*args, **kwargs)


_reads: list[str] = []


def _note(kind: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.endswith("_keye.py")]
    place = f"{frames[-1].filename.rsplit('/', 1)[-1]}: {frames[-1].line}" if frames else "outside of the package"
    _reads.append(f"{kind} in {place}")


@contextmanager
def pretended_device() -> Iterator[list[str]]:
    """Inside, "cuda" is a small Hopper device that runs the kernels; yields the list of what the host reads from it."""
    properties = SimpleNamespace(
        name="a device that is none", shared_memory_per_block_optin=227 * 1024, major=9, multi_processor_count=4
    )
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "synchronize": None,
        "is_current_stream_capturing": False,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
    }
    _reads.clear()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
            stack.enter_context(mock.patch.object(torch.cuda, "device", lambda *_: ExitStack()))
            # The driver is not asked, and the interpreter stands for the device.
            stack.enter_context(mock.patch.object(sparse_attention_keye, "_driver_problem", lambda: None))
            stack.enter_context(mock.patch.object(triton_common_keye, "_missing", lambda device: None))
            stack.enter_context(_Operations())
            stack.enter_context(_Functions())
            stack.enter_context(torch.no_grad())
            yield _reads
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
