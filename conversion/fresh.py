"""Newly initialised tensors for parts that no source holds, such as the projector of a new pair of models."""

import copy
import zlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .compare import TensorStream


def fresh_stream(model: PreTrainedModel, name: str, dtype: torch.dtype, seed: int = 0) -> TensorStream:
    """The parameter or buffer `name` of `model`, initialised as the model itself does it.

    The values depend on seed and name only, neither on the order of calls nor on other tensors, so that an interrupted
    run goes on to the same bytes. Memory: the module which owns the tensor, in float32.

    Args:
        model: on the meta device; stays as it is.
        dtype: of the tensor; values are drawn in float32 and rounded.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    template = getattr(module, leaf)

    def pieces() -> Iterator[torch.Tensor]:
        copied = copy.deepcopy(module)
        for tensors in (copied._parameters, copied._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    real = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
                    tensors[key] = nn.Parameter(real, requires_grad=False) if tensors is copied._parameters else real
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}/{path}".encode()))
            _owner(model, path)._init_weights(copied)
        value = getattr(copied, leaf).detach().to(dtype)
        yield value.contiguous()

    return TensorStream(name, tuple(template.shape), dtype, pieces)


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model around a module: its configuration says how wide the values are drawn."""
    owner, module = model, model
    for step in path.split("."):
        module = getattr(module, step)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner
