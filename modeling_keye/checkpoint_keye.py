"""Safetensors checkpoints: which tensors there are, and their rows one part at a time.

`Checkpoint.open` reads headers only and refuses whatever they say wrong, so that a bad checkpoint stops before anything
is computed or written. `Checkpoint.read` copies the asked rows out of the file instead of mapping it: mapped pages
count as memory of the process, and a conversion must not grow with the size of its files.
"""

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The types of the format that torch can hold one element per item; the packed ones (F4, F6) are not among them.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_SIZE = 2**63 - 1  # torch counts bytes, elements and strides in int64
_MAX_DIMS = 64  # of an operation in torch and of an array in numpy
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class CheckpointError(ValueError):
    """Weights that cannot be used. The message names the file or tensor, what is wrong with it and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes at the absolute byte `offset` of `file`, row-major, little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors of one or several safetensors files by name, in the order in which they lie on disk.

    Attributes: `folder` (where the checkpoint was opened, None for a list of files), `files` (sorted). Holds no open
    file; may be used from several threads and pickled.
    """

    def __init__(
        self,
        tensors: Iterable[StoredTensor],
        files: Iterable[Path],
        folder: Path | None = None,
    ):
        self.folder = folder
        self.files = sorted(files)
        self._tensors: dict[str, StoredTensor] = {}
        for tensor in sorted(tensors, key=lambda t: (str(t.file), t.offset, t.nbytes, t.name)):
            first = self._tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is stored twice, in {first.file} and in {tensor.file}; "
                    "remove the file that does not belong to this checkpoint"
                )

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Checkpoint":
        """The checkpoint in `folder`: the shards named by `model.safetensors.index.json`, or else `model.safetensors`.
        The path of one `.safetensors` file is accepted too.

        Reads the index and the headers only. CheckpointError for whatever is wrong with them or the files' sizes.
        """
        folder = Path(folder)
        if folder.is_file():
            return cls(_read_header(folder), [folder], folder.parent)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} does not exist; expected a checkpoint folder or a .safetensors file")
        if os.path.lexists(folder / INDEX_NAME) and os.path.lexists(folder / WEIGHTS_NAME):
            raise CheckpointError(
                f"{folder} holds both {INDEX_NAME} and {WEIGHTS_NAME}, and programs differ in which they read; "
                "remove the one that does not belong to this checkpoint"
            )
        if os.path.lexists(folder / INDEX_NAME):
            return cls._open_sharded(folder)
        if os.path.lexists(folder / WEIGHTS_NAME):
            return cls(_read_header(folder / WEIGHTS_NAME), [folder / WEIGHTS_NAME], folder)
        raise CheckpointError(_explain_no_weights(folder))

    @classmethod
    def from_files(cls, files: Iterable[str | os.PathLike]) -> "Checkpoint":
        """All tensors of these safetensors files, without an index to check them against."""
        files = [Path(file) for file in files]
        return cls([tensor for file in files for tensor in _read_header(file)], files)

    @classmethod
    def _open_sharded(cls, folder: Path) -> "Checkpoint":
        index = folder / INDEX_NAME
        weight_map = _read_index(index)
        shards = {name: folder / name for name in sorted(set(weight_map.values()))}
        missing = [name for name, file in shards.items() if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX_NAME} names: "
                f"{listed(missing, form=repr)}; download the missing files"
            )
        files = sorted(set(shards.values()))
        checkpoint = cls([tensor for file in files for tensor in _read_header(file)], files, folder)
        absent = [name for name in weight_map if name not in checkpoint]
        if absent:
            raise CheckpointError(
                f"{index} names tensors that no shard holds ({len(absent)}): {listed(absent, form=repr)}; "
                "index and shards are of different checkpoints, download them together"
            )
        unnamed = [name for name in checkpoint if name not in weight_map]
        if unnamed:
            raise CheckpointError(
                f"the shards of {folder} hold tensors that {INDEX_NAME} does not name ({len(unnamed)}): "
                f"{listed(unnamed, form=repr)}; index and shards are of different checkpoints, download them together"
            )
        for name, tensor in checkpoint.items():
            if tensor.file != shards[weight_map[name]]:
                raise CheckpointError(
                    f"{index} says that {name!r} is in {weight_map[name]}, but it is in {tensor.file.name}; "
                    "index and shards are of different checkpoints, download them together"
                )
        return checkpoint

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({len(self)} tensors in {len(self.files)} files, folder={str(self.folder)!r})"

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, part: int | None = None
    ) -> torch.Tensor:
        """Tensor `name`, or its rows `[start:stop]` along the first dimension with the rules of Python slices, in its
        stored dtype, on the CPU, in memory of its own. With `part`, the same of `tensor[part]`, such as one of several
        experts. Only the asked bytes are read.

        Raises KeyError for an unknown name, IndexError for a part that is not there, ValueError for rows of a 0-dim
        tensor, CheckpointError when the file has become shorter since it was opened.
        """
        stored = self[name]
        shape, offset, nbytes = stored.shape, stored.offset, stored.nbytes
        if part is not None:
            if not 0 <= part < (shape[0] if shape else 0):
                raise IndexError(f"tensor {name!r} of shape {list(shape)} has no part {part}")
            shape, nbytes = shape[1:], nbytes // shape[0]
            offset += part * nbytes
        if start is not None or stop is not None:
            if not shape:
                raise ValueError(f"tensor {name!r} has no dimensions, so rows {start}:{stop} cannot be read")
            first, last, _ = slice(start, stop).indices(shape[0])
            rows, row_bytes = max(0, last - first), nbytes // max(1, shape[0])
            shape, offset, nbytes = (rows, *shape[1:]), offset + first * row_bytes, rows * row_bytes
        # The device is named because loading runs under `torch.device("meta")`.
        data = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if _read_into(memoryview(data.numpy()), stored.file, offset) < nbytes:
            raise CheckpointError(
                f"{stored.file} ends inside tensor {name!r}: the file was changed after it was opened; open it again"
            )
        return data.view(stored.dtype).reshape(shape)

    def merged(self, other: "Checkpoint") -> "Checkpoint":
        """The tensors of both; CheckpointError for a name in both. The folder stays if it is the same one."""
        folder = self.folder if self.folder == other.folder else None
        return Checkpoint([*self.values(), *other.values()], {*self.files, *other.files}, folder)


def _read_into(buffer: memoryview, file: Path, offset: int) -> int:
    """Fills `buffer` from the bytes of `file` at `offset`; returns how many there were."""
    done = 0
    with open(file, "rb", buffering=0) as stream:
        stream.seek(offset)
        # One call gives at most 2 GiB.
        while done < len(buffer) and (count := stream.readinto(buffer[done:])):
            done += count
    return done


def _read_index(index: Path) -> dict[str, str]:
    """`weight_map`; every file named lies in the index's folder, by its name, and is no pickle.

    Names are not resolved: in the Hub's cache each file is a link into another folder.
    """
    try:
        content = _parse_json(index.read_bytes(), str(index))
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error}") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata") or {}, dict):
        raise CheckpointError(f"{index} is no index: expected an object 'weight_map' of tensor names and file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.isprintable():
            raise CheckpointError(f"{index} names no file for {name!r}, but {_brief(file)}")
        path = PureWindowsPath(file)  # knows both separators, and drives
        if path.anchor or ".." in path.parts:
            raise CheckpointError(
                f"{index} names a path outside of its folder for {name!r}: {file!r}; do not use this checkpoint"
            )
        if path.suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(f"{index} names {file!r}, a pickle; convert it to safetensors first")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{index} names {file!r} for {name!r}; expected a .safetensors file")
    return weight_map


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file. The format: header length (8 bytes, little-endian), header (JSON), data without gaps."""
    if file.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(f"{file} is a pickle, which can run code when loaded; convert it to safetensors first")
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist or is no file; download it")
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(prefix) == 8 and length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} announces a header of {length} bytes, more than the {_MAX_HEADER_BYTES} that safetensors "
                    "allows; this is no safetensors file, or it is damaged: download it again"
                )
            if size < 8 + length:
                raise CheckpointError(f"{file} is truncated: {size} bytes end inside its header; download it again")
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not header.startswith(b"{"):
        raise CheckpointError(f"the header of {file} does not begin with '{{'; this is no safetensors file")
    entries = _parse_json(header, f"the header of {file}")
    _check_file_metadata(entries.pop("__metadata__", {}), file)
    tensors = [_parse_entry(name, entry, file, 8 + length) for name, entry in entries.items()]
    _check_layout(tensors, file, 8 + length, size)
    return tensors


def _check_file_metadata(metadata: object, file: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"__metadata__ in the header of {file} must map strings to strings")


def _parse_entry(name: str, entry: object, file: Path, data_start: int) -> StoredTensor:
    where = f"tensor {name!r} in the header of {file}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, not {_brief(entry)}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{where} has the unknown dtype {_brief(entry['dtype'])}; known are {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS or math.prod(max(1, size) for size in shape) > _MAX_SIZE:
        raise CheckpointError(f"{where} has the impossible shape {_brief(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has impossible data_offsets {_brief(offsets)}; expected [begin, end]")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} has data_offsets {offsets}, {offsets[1] - offsets[0]} bytes, but shape {shape} of "
            f"{entry['dtype']} takes {nbytes}; the file is damaged, download it again"
        )
    return StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0], nbytes)


def _check_layout(tensors: list[StoredTensor], file: Path, data_start: int, size: int) -> None:
    """The tensors fill the file from `data_start` to its end without gap or overlap."""
    end = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"tensor {tensor.name!r} in {file} {problem}: it begins at byte {tensor.offset - data_start} of the "
                f"data instead of {end - data_start}; the file is damaged, download it again"
            )
        end += tensor.nbytes
    if size < end:
        raise CheckpointError(
            f"{file} is truncated: it has {size} bytes, its header describes {end}; download it again"
        )
    if size > end:
        raise CheckpointError(
            f"{file} is longer than its header says: it has {size} bytes, its header describes {end}; download it again"
        )


def _are_sizes(values: object) -> bool:
    """A list of whole numbers that int64 holds; `type` because True is an int to isinstance."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values)


def _parse_json(data: bytes, what: str) -> dict:
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not usable JSON: {error}; download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} must be a JSON object, not {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    content: dict[str, object] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"duplicate key {key!r}")
        key.encode("utf-8")  # half of a surrogate pair passes Python's parser but is no text
        content[key] = value
    return content


def _parse_int(text: str) -> int | float:
    """-0 is a float to the format's own reader."""
    return -0.0 if text == "-0" else int(text)


def _explain_no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if found := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}, only {listed(found, form=repr)}; "
            f"download {INDEX_NAME}, or name one .safetensors file"
        )
    if found := [name for name in names if name.endswith(_PICKLE_SUFFIXES)]:
        return (
            f"{folder} has only pickle files ({listed(found, form=repr)}), which can run code when loaded; "
            "convert to safetensors first"
        )
    return f"{folder} has no weights: expected {WEIGHTS_NAME} or {INDEX_NAME} with its shards"


def listed(names: Sequence[str], limit: int = 5, form: Callable[[str], str] = str) -> str:
    """The first names for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(form, names[:limit])) + more


def _brief(value: object) -> str:
    """`repr` of what a file says, which may be megabytes long and nested deeper than `repr` goes."""
    return reprlib.repr(value)
