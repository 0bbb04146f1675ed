"""Reading safetensors checkpoints: the same values as the library's own reader, whole or by rows."""

import json
import os
import pickle
import random
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_keye.checkpoint_keye import DTYPES, Checkpoint, CheckpointError, StoredTensor
from tests.conversion.safetensors_files import (
    ONE,
    SHARDS,
    assert_same,
    random_tensor,
    raw,
    three_tensors,
    write,
    write_sharded,
)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(7, 3), (5,), (2, 3, 4), (), (0,), (3, 0), (0, 3)], ids=str)
def test_every_dtype_reads_as_the_library_reads_it(tmp_path, name, shape):
    tensor = random_tensor(shape, DTYPES[name])
    # The first tensor shifts the second to an odd offset.
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "x": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint["x"].dtype == DTYPES[name] and checkpoint["x"].shape == shape
    assert_same(checkpoint.read("x"), load_file(tmp_path / "model.safetensors")["x"])
    assert_same(checkpoint.read("x"), tensor)


def test_odd_offsets_are_read(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]}
    values = torch.tensor([1.5, -2.25], dtype=torch.float64)
    checkpoint = Checkpoint.open(write(tmp_path / "x.safetensors", header, b"\7" + raw(values)))
    assert checkpoint["b"].offset % 2 == 1 or checkpoint["a"].offset % 2 == 1
    assert_same(checkpoint.read("b"), values)


@pytest.mark.parametrize("start", [None, 0, 1, 6, 7, 9, -2])
@pytest.mark.parametrize("stop", [None, 0, 1, 6, 7, 9, -2])
def test_rows_are_those_of_a_slice(tmp_path, start, stop):
    tensors = {"x": torch.randn(7, 2, 3), "flat": torch.arange(7), "nothing": torch.empty(7, 0), "none": torch.empty(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert_same(checkpoint.read(name, start, stop), tensor[start:stop].contiguous())


@pytest.mark.parametrize(("start", "stop"), [(None, None), (1, 3), (4, 9), (-2, None)])
def test_rows_of_a_part_are_those_of_the_part(tmp_path, start, stop):
    tensors = {"x": torch.randn(3, 5, 2), "flat": torch.arange(15).view(3, 5), "empty": torch.empty(3, 5, 0)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        for part in range(3):
            assert_same(checkpoint.read(name, start, stop, part), tensor[part, start:stop].contiguous())


@pytest.mark.parametrize(("name", "part"), [("x", 3), ("x", -1), ("number", 0), ("none", 0)])
def test_parts_that_are_not_there_are_refused(tmp_path, name, part):
    save_file(
        {"x": torch.ones(3, 5), "number": torch.ones(()), "none": torch.empty(0, 5)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(IndexError, match=f"'{name}' of shape .* has no part {part}"):
        Checkpoint.open(tmp_path).read(name, part=part)


def test_rows_of_a_number_are_refused(tmp_path):
    save_file({"x": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ValueError, match="'x' has no dimensions"):
        checkpoint.read("x", 0, 1)
    assert checkpoint.read("x").item() == 3.0


def test_unknown_name_is_a_key_error(tmp_path):
    save_file(three_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="absent"):
        Checkpoint.open(tmp_path).read("absent")


def test_what_is_read_is_fresh_writable_memory(tmp_path):
    tensors = three_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a").zero_()
    assert_same(checkpoint.read("a"), tensors["a"])
    assert checkpoint.read("a", 1, 3).untyped_storage().nbytes() == 2 * 3 * 4


def test_reads_under_the_meta_device_give_values(tmp_path):
    """Models are made under `torch.device("meta")`, and loading runs there too."""
    tensors = three_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        got = Checkpoint.open(tmp_path).read("a")
    assert_same(got, tensors["a"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mapped files")
def test_files_are_not_mapped_and_only_the_asked_rows_take_memory(tmp_path):
    rows, row_bytes = 512, 2**20
    header = {"x": {"dtype": "U8", "shape": [rows, row_bytes], "data_offsets": [0, rows * row_bytes]}}
    file = write(tmp_path / "model.safetensors", header, b"")
    os.truncate(file, file.stat().st_size + rows * row_bytes)  # half a GB of zeros that take no disk
    checkpoint = Checkpoint.open(tmp_path)
    before = resident_bytes()
    kept = [checkpoint.read("x", row, row + 1) for row in range(0, rows, 32)]
    assert resident_bytes() - before < 64 * 2**20
    assert len(kept) == 16 and "model.safetensors" not in Path("/proc/self/maps").read_text()


def resident_bytes() -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_threads_read_the_same(tmp_path):
    tensors = {f"t{i}": torch.randn(50 + i, 17) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    wanted = [(name, start) for name in tensors for start in range(0, 50, 5)] * 5
    random.shuffle(wanted)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda want: checkpoint.read(want[0], want[1], want[1] + 7), wanted))
    for (name, start), rows in zip(wanted, got):
        assert_same(rows, tensors[name][start : start + 7])


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    save_file({"x": torch.randn(10, 10)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(CheckpointError, match="ends inside tensor 'x'.*changed after it was opened"):
        checkpoint.read("x")


def test_single_file(tmp_path):
    tensors = three_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        checkpoint = Checkpoint.open(path)
        assert isinstance(checkpoint, Mapping) and set(checkpoint) == set(tensors) and len(checkpoint) == 3
        assert checkpoint.folder == tmp_path and checkpoint.files == [tmp_path / "model.safetensors"]
        for name, tensor in tensors.items():
            assert_same(checkpoint.read(name), tensor)


def test_entries_say_where_the_bytes_are(tmp_path):
    save_file({"x": torch.randn(5, 3), "y": torch.arange(4)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    for name, entry in checkpoint.items():
        assert isinstance(entry, StoredTensor) and entry.name == name
        assert content[entry.offset : entry.offset + entry.nbytes] == raw(checkpoint.read(name))


def test_sharded(tmp_path):
    tensors = write_sharded(tmp_path, metadata={"total_size": 108})
    (tmp_path / "unrelated.safetensors").write_bytes(b"not named by the index, so not opened")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint) == set(tensors)
    assert [file.name for file in checkpoint.files] == list(SHARDS) and checkpoint.folder == tmp_path
    for name, tensor in tensors.items():
        assert_same(checkpoint.read(name), tensor)


def test_order_is_that_of_the_disk(tmp_path):
    second = {"q": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}
    second["r"] = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    files = [write(tmp_path / "2.safetensors", second, bytes(4)), write(tmp_path / "1.safetensors", {"z": ONE | {}})]
    os.truncate(files[1], files[1].stat().st_size - 8)
    checkpoint = Checkpoint.from_files(files)
    assert list(checkpoint) == ["z", "r", "q"]
    assert checkpoint.files == sorted(files) and checkpoint.folder is None


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """The cache holds blobs elsewhere and links to them by name."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensors = write_sharded(blobs)
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(blobs / f"{i:064x}")
    checkpoint = Checkpoint.open(snapshot)
    assert_same(checkpoint.read("c"), tensors["c"])
    assert {file.parent for file in checkpoint.files} == {snapshot}


def test_header_may_be_padded(tmp_path):
    file = write(tmp_path / "x.safetensors", json.dumps({"x": ONE}) + 13 * " ", bytes(24))
    assert_same(Checkpoint.open(file).read("x"), load_file(file)["x"])


def test_file_without_tensors(tmp_path):
    assert len(Checkpoint.open(write(tmp_path / "x.safetensors", "{}", b""))) == 0


def test_merged(tmp_path):
    tensors = write_sharded(tmp_path)
    first, second = (Checkpoint.open(tmp_path / name) for name in SHARDS)
    both = first.merged(second)
    assert list(both) == list(Checkpoint.open(tmp_path)) and len(both.files) == 2 and both.folder == tmp_path
    assert_same(both.read("c"), tensors["c"])
    (tmp_path / "elsewhere").mkdir()
    save_file({"b": torch.ones(1)}, tmp_path / "elsewhere" / "model.safetensors")
    elsewhere = Checkpoint.open(tmp_path / "elsewhere")
    assert second.merged(elsewhere).folder is None
    with pytest.raises(
        CheckpointError, match=rf"'b' is stored twice, in .*model.safetensors and in .*{SHARDS[0]}; remove"
    ):
        elsewhere.merged(first)


def test_pickled_checkpoint_reads(tmp_path):
    """Worker processes get one."""
    tensors = write_sharded(tmp_path)
    assert_same(pickle.loads(pickle.dumps(Checkpoint.open(tmp_path))).read("a"), tensors["a"])
