"""Safetensors files for tests: made by the library, or byte by byte where the library would not make them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
TWO = {"dtype": "I16", "shape": [4], "data_offsets": [24, 32]}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(file: Path, header: dict | str | bytes, data: bytes = bytes(32), length: int | None = None) -> Path:
    """A file of the format byte by byte; `length` is what its first eight bytes claim."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return file


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bytes that are a value of the dtype; for floats that includes NaN and infinity."""
    high = 2 if dtype == torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.device.type) == (expected.dtype, expected.shape, "cpu")
    assert raw(got) == raw(expected)  # bytes, because NaN is not equal to itself


def three_tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.randn(2, 2, 2).bfloat16()}


def write_sharded(folder: Path, weight_map: dict | None = None, **index) -> dict[str, torch.Tensor]:
    """Tensors a and b in the first shard, c in the second; the index is true unless given."""
    tensors = three_tensors()
    save_file({"a": tensors["a"], "b": tensors["b"]}, folder / SHARDS[0])
    save_file({"c": tensors["c"]}, folder / SHARDS[1])
    if weight_map is None:
        weight_map = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **index}))
    return tensors
