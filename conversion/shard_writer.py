"""Safetensors files written piece by piece: shapes are known beforehand, so the header comes first and data follows.

What a run has finished is in the journal of its `Staging`; the next run cuts the file behind the last finished tensor
and goes on there. The bytes depend on the plan only, not on where a run was stopped.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_keye.checkpoint_keye import DTYPES

from .compare import TensorStream
from .staging import Staging, write_all

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CHECK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Shard:
    """One file to write: `header` (with its length in front), then the tensors in the order of `streams`."""

    file: str
    header: bytes
    streams: tuple[TensorStream, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        """Size of the tensors."""
        return sum(stream.nbytes for stream in self.streams)


@dataclass(frozen=True)
class Written:
    """Tensors and their bytes in all files, and how many of the tensors an earlier run had finished."""

    tensors: int
    nbytes: int
    resumed: int


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "200MiB" or a plain number. Raises `ValueError` for anything else, and for less than one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", str(text).strip(), flags=re.IGNORECASE)
    if not match or match[2].upper() not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise ValueError(f"{text!r} is no size of a file; write it like 5GB, 500MB or 2GiB.")
    return size


def make_shard(file: str, streams: Iterable[TensorStream]) -> Shard:
    """The plan of one file."""
    # Wide elements first, so that each tensor begins at a multiple of its element size, as readers expect.
    streams = sorted(streams, key=lambda stream: -stream.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for stream in streams:
        header[stream.name] = {
            "dtype": _DTYPE_NAMES[stream.dtype],
            "shape": list(stream.shape),
            "data_offsets": [begin, begin + stream.nbytes],
        }
        begin += stream.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(file, len(text).to_bytes(8, "little") + text, tuple(streams))


def plan_shards(streams: Iterable[TensorStream], max_shard_size: int) -> list[Shard]:
    """Files of at most `max_shard_size` bytes of tensors each, filled in the given order; a larger tensor is alone.

    One file is called model.safetensors, several have a number and need `index_json` beside them.
    """
    groups: list[list[TensorStream]] = [[]]
    size = 0
    for stream in streams:
        if groups[-1] and size + stream.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(stream)
        size += stream.nbytes
    if len(groups) == 1:
        return [make_shard("model.safetensors", groups[0])]
    count = len(groups)
    return [make_shard(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


def index_json(shards: list[Shard]) -> str:
    """The text of model.safetensors.index.json for several shards."""
    weight_map = {stream.name: shard.file for shard in shards for stream in shard.streams}
    total_size = sum(shard.data_bytes for shard in shards)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def write_shards(
    staging: Staging, shards: list[Shard], progress: Callable[[int], object] = lambda count: None
) -> Written:
    """Write the files into `staging.output`, going on where an earlier run was stopped.

    Finished files and tensors are not made again, so nothing of their sources is read. Of a file that was not finished
    the finished tensors are compared with their checksums, which finds what a power cut lost. `progress` is called
    with the number of bytes done since its last call.
    """
    files = {entry["file"]: entry["bytes"] for entry in staging.entries if "file" in entry}
    checksums = {entry["tensor"]: entry["crc32"] for entry in staging.entries if "tensor" in entry}
    resumed = 0
    for shard in shards:
        path = staging.output / shard.file
        if shard.file in files:
            if not path.is_file() or path.stat().st_size != shard.nbytes:
                raise OSError(
                    f"{path} was finished with {shard.nbytes} bytes and has been changed or removed since then; delete "
                    f"{staging.partial} to begin anew."
                )
            resumed += len(shard.streams)
            progress(shard.data_bytes)
            continue
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            finished = _keep_finished(descriptor, shard, checksums)
            progress(sum(stream.nbytes for stream in shard.streams[:finished]))
            resumed += finished
            for stream in shard.streams[finished:]:
                checksum = _write_tensor(descriptor, stream, progress)
                staging.record({"tensor": stream.name, "crc32": checksum})
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        staging.record({"file": shard.file, "bytes": shard.nbytes}, durable=True)
    streams = [stream for shard in shards for stream in shard.streams]
    return Written(len(streams), sum(stream.nbytes for stream in streams), resumed)


def _keep_finished(descriptor: int, shard: Shard, checksums: dict[str, int]) -> int:
    """Cut the file behind its last finished tensor and stand there; how many tensors it holds then."""
    finished, end = 0, len(shard.header)
    if os.pread(descriptor, end, 0) == shard.header:
        for stream in shard.streams:
            if stream.name not in checksums or _checksum(descriptor, end, stream.nbytes) != checksums[stream.name]:
                break
            finished, end = finished + 1, end + stream.nbytes
    else:
        os.ftruncate(descriptor, 0)
        write_all(descriptor, shard.header)
    os.ftruncate(descriptor, end)
    os.lseek(descriptor, end, os.SEEK_SET)
    return finished


def _checksum(descriptor: int, offset: int, nbytes: int) -> int | None:
    checksum, end = 0, offset + nbytes
    while offset < end:
        data = os.pread(descriptor, min(_CHECK_BYTES, end - offset), offset)
        if not data:
            return None
        checksum = zlib.crc32(data, checksum)
        offset += len(data)
    return checksum


def _write_tensor(descriptor: int, stream: TensorStream, progress: Callable[[int], object]) -> int:
    """Append the tensor, piece by piece; its checksum."""
    checksum = written = 0
    for piece in stream.pieces():
        if piece.dtype != stream.dtype or piece.shape[1:] != stream.shape[1:]:
            raise RuntimeError(
                f"a piece of {stream.name} is {piece.dtype} {list(piece.shape)}; planned are rows of {stream.dtype} "
                f"{list(stream.shape)}."
            )
        if not piece.numel():
            continue
        data = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
        write_all(descriptor, data)
        checksum = zlib.crc32(data, checksum)
        written += len(data)
        progress(len(data))
    if written != stream.nbytes:
        raise RuntimeError(f"the pieces of {stream.name} have {written} bytes instead of {stream.nbytes}.")
    return checksum


def check_written(shards: Iterable[Shard], checkpoint, where: Path) -> None:
    """Raise `OSError` unless `checkpoint`, opened from the finished files in `where`, holds what was planned."""
    planned = {stream.name: (stream.dtype, stream.shape) for shard in shards for stream in shard.streams}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.items()}
    wrong = sorted(name for name in {*planned, *found} if planned.get(name) != found.get(name))
    if wrong:
        raise OSError(f"{where} does not hold what was written, first {wrong[0]!r}; delete it and begin anew.")
