"""Bad checkpoints are refused when they are opened, with a sentence that names the file and what to do."""

import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_keye.checkpoint_keye import DTYPES, Checkpoint, CheckpointError
from tests.conversion.safetensors_files import ONE, SHARDS, TWO, assert_same, three_tensors, write, write_sharded


def assert_refused(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as refusal:
        Checkpoint.open(path)
    return str(refusal.value)


def test_absent_folder_is_refused(tmp_path):
    assert_refused(tmp_path / "absent", "absent does not exist; expected a checkpoint folder")


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert_refused(tmp_path, "no weights: expected model.safetensors or model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    assert_refused(tmp_path, rf"only pickle files \('{name}'\).*convert to safetensors first")
    assert_refused(tmp_path / name, "is a pickle.*convert it to safetensors first")
    with pytest.raises(CheckpointError, match="convert it to safetensors first"):
        Checkpoint.from_files([tmp_path / name])


def test_shards_without_index_are_refused(tmp_path):
    save_file(three_tensors(), tmp_path / SHARDS[0])
    assert_refused(tmp_path, f"neither .* only '{SHARDS[0]}'; download model.safetensors.index.json")


@pytest.mark.parametrize(
    "name, problem",
    [("model.safetensors", "model.safetensors does not exist"), ("model.safetensors.index.json", "cannot read .*json")],
)
def test_broken_link_is_refused(tmp_path, name, problem):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert_refused(tmp_path, problem)


def test_index_beside_a_single_file_is_refused(tmp_path):
    write_sharded(tmp_path)
    save_file(three_tensors(), tmp_path / "model.safetensors")
    assert_refused(tmp_path, "holds both model.safetensors.index.json and model.safetensors")


def test_missing_shard_is_refused(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert_refused(tmp_path, f"lacks 1 of the 2 shards .*: '{SHARDS[1]}'; download the missing files")


def test_missing_file_of_a_list_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x.safetensors does not exist"):
        Checkpoint.from_files([tmp_path / "x.safetensors"])


def test_key_in_two_shards_is_refused(tmp_path):
    write_sharded(tmp_path)
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, tmp_path / SHARDS[1])
    assert_refused(tmp_path, f"'a' is stored twice, in .*{SHARDS[0]} and in .*{SHARDS[1]}; remove the file")


def test_key_that_no_shard_holds_is_refused(tmp_path):
    write_sharded(tmp_path, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]})
    assert_refused(tmp_path, "names tensors that no shard holds \\(1\\): 'd'.*download them together")


def test_key_that_the_index_does_not_name_is_refused(tmp_path):
    write_sharded(tmp_path, {"a": SHARDS[0], "c": SHARDS[1]})
    assert_refused(tmp_path, "hold tensors that model.safetensors.index.json does not name \\(1\\): 'b'")


def test_key_in_another_shard_is_refused(tmp_path):
    write_sharded(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    assert_refused(tmp_path, f"says that 'b' is in {SHARDS[1]}, but it is in {SHARDS[0]}")


def test_long_lists_are_cut(tmp_path):
    write_sharded(tmp_path, {f"x{i}": SHARDS[i % 2] for i in range(100)})
    assert_refused(tmp_path, "names tensors that no shard holds \\(100\\): 'x0', 'x1', 'x2', 'x3', 'x4' and 95 more;")


@pytest.mark.parametrize(
    "path",
    [
        "../model.safetensors",
        "sub/../../model.safetensors",
        "/etc/model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "\\\\host\\share\\model.safetensors",
    ],
)
def test_index_path_outside_the_folder_is_refused(tmp_path, path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")  # it would be there
    write_sharded(folder, {"a": path})
    message = assert_refused(folder, "outside of its folder for 'a'.*do not use this checkpoint")
    assert repr(path) in message


def test_index_path_in_a_sub_folder_is_read(tmp_path):
    (tmp_path / "sub").mkdir()
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "sub" / "x.safetensors")
    index = {"weight_map": {"a": "sub/x.safetensors", "b": "./sub/x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(tmp_path).read("a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model-00001-of-00002.bin", "a pickle; convert it to safetensors first"),
        ("model.gguf", "expected a .safetensors file"),
        ("", "expected a .safetensors file|names no file"),
        (".", "expected a .safetensors file"),
        (3, "names no file for 'a', but 3"),
        (None, "names no file for 'a', but None"),
        (["x.safetensors"], "names no file for 'a'"),
        ("x\0.safetensors", "names no file for 'a'"),
        ("x\n.safetensors", "names no file for 'a'"),
    ],
)
def test_index_with_something_else_than_shards_is_refused(tmp_path, file, message):
    write_sharded(tmp_path, {"a": file})
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "index.json is not usable JSON"),
        ("{", "index.json is not usable JSON"),
        ("[" * 100_000, "index.json is not usable JSON"),
        ("[]", "must be a JSON object, not list"),
        ("{}", "is no index: expected an object 'weight_map'"),
        ('{"weight_map": {}}', "is no index"),
        ('{"weight_map": ["a"]}', "is no index"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": 3}', "is no index"),
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "duplicate key 'a'"),
        ('{"weight_map": {"\\ud800": "x.safetensors"}}', "not usable JSON"),
    ],
)
def test_broken_index_is_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, message)


def test_index_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xff": "x.safetensors"}}')
    assert_refused(tmp_path, "index.json is not usable JSON")


def test_git_lfs_pointer_is_refused(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 1234\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert_refused(tmp_path, "Git LFS pointer, not the weights; run `git lfs pull`")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 60, -9, -1])
def test_truncated_file_is_refused(tmp_path, size):
    file = write(tmp_path / "model.safetensors", {"one": ONE, "two": TWO})
    os.truncate(file, size % file.stat().st_size)
    assert_refused(tmp_path, "model.safetensors is truncated: .* download it again")


def test_longer_file_is_refused(tmp_path):
    write(tmp_path / "model.safetensors", {"one": ONE, "two": TWO}, bytes(33))
    assert_refused(tmp_path, "longer than its header says: it has 1.. bytes, its header describes 1..; download")


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_too_large_header_is_refused_unread(tmp_path, length):
    file = write(tmp_path / "model.safetensors", "{}", b"", length=length)
    os.truncate(file, 200_000_000)
    assert_refused(tmp_path, f"header of {length} bytes, more than the 100000000 that safetensors allows")


def test_header_of_the_largest_size_is_read(tmp_path):
    write(tmp_path / "model.safetensors", "{}".ljust(100_000_000), b"")
    assert len(Checkpoint.open(tmp_path)) == 0


@pytest.mark.parametrize(
    "header", ["", " {}", "[]", "\n{}", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"\x80\x04K\x01."]
)
def test_header_that_does_not_begin_with_a_brace_is_refused(tmp_path, header):
    write(tmp_path / "model.safetensors", header, b"")
    assert_refused(tmp_path, "header of .*model.safetensors does not begin with '{'")


@pytest.mark.parametrize(
    "header",
    ["{", "{}}", "{} x", "{}\0", '{"one": }', "{'one': 1}", b'{"\xff": 1}', '{"\\ud800": 1}', '{"a": ' + "[" * 100_000],
)
def test_header_that_is_no_json_is_refused(tmp_path, header):
    write(tmp_path / "model.safetensors", header, b"")
    assert_refused(tmp_path, "header of .*model.safetensors is not usable JSON: .*download the file again")


def test_duplicate_key_in_a_header_is_refused(tmp_path):
    one, two = json.dumps(ONE), json.dumps(TWO)
    write(tmp_path / "model.safetensors", f'{{"one": {one}, "one": {two}}}')
    assert_refused(tmp_path, "header of .*model.safetensors is not usable JSON: duplicate key 'one'")


@pytest.mark.parametrize("metadata", [None, [], "text", {"format": 1}, {"format": None}, {"format": {}}])
def test_metadata_must_be_strings(tmp_path, metadata):
    write(tmp_path / "model.safetensors", {"__metadata__": metadata, "one": ONE, "two": TWO})
    assert_refused(tmp_path, "__metadata__ in the header of .* must map strings to strings")


def test_unknown_dtype_is_refused_with_the_known(tmp_path):
    write(tmp_path / "model.safetensors", {"one": {**ONE, "dtype": "F4"}, "two": TWO})
    message = assert_refused(tmp_path, "'one' in the header of .* unknown dtype 'F4'; known are BOOL, ")
    assert all(name in message for name in DTYPES)


@pytest.mark.parametrize("change", ["absent", "extra", "not an object"])
def test_incomplete_entries_are_refused(tmp_path, change):
    entry = {"absent": {"dtype": "F32", "shape": [2, 3]}, "extra": {**ONE, "strides": [3, 1]}, "not an object": 3}
    write(tmp_path / "model.safetensors", {"one": entry[change], "two": TWO})
    assert_refused(tmp_path, "'one' in the header of .* must have dtype, shape and data_offsets, not ")


@pytest.mark.parametrize("dtype", [None, 3, [], {}, "f32", "float32", ""])
def test_dtypes_that_are_no_names_are_refused(tmp_path, dtype):
    write(tmp_path / "model.safetensors", {"one": {**ONE, "dtype": dtype}, "two": TWO})
    assert_refused(tmp_path, f"'one' .* unknown dtype {re.escape(repr(dtype))}")


@pytest.mark.parametrize(
    "shape",
    [6, None, "23", [2, 3.0], [2, -3], [-2, -3], [True, 6], [2, "3"], [0, 2**63], [2**62, 2**62], [0, *[2**32] * 3]],
)
def test_impossible_shapes_are_refused(tmp_path, shape):
    write(tmp_path / "model.safetensors", {"one": {**ONE, "shape": shape}, "two": TWO})
    assert_refused(tmp_path, "'one' .* impossible shape")


def test_deeply_nested_headers_are_refused(tmp_path):
    """Up to the depth at which Python's parser gives up, which is not the one at which its `repr` does."""
    for depth in range(700, 1010):
        write(tmp_path / "model.safetensors", '{"one": ' + depth * "[" + depth * "]" + "}", b"")
        assert_refused(tmp_path, "'one' .* must have dtype|not usable JSON")


def test_a_shape_of_a_million_dimensions_is_refused_at_once(tmp_path):
    write(tmp_path / "model.safetensors", {"one": {**ONE, "shape": [2**62] * 1_000_000}, "two": TWO})
    assert len(assert_refused(tmp_path, "'one' .* impossible shape")) < 500


@pytest.mark.parametrize(
    "offsets", [24, None, [], [24], [0, 12, 24], [0.0, 24], [-24, 0], [False, 24], ["0", "24"], [0, 2**64]]
)
def test_impossible_offsets_are_refused(tmp_path, offsets):
    write(tmp_path / "model.safetensors", {"one": {**ONE, "data_offsets": offsets}, "two": TWO})
    assert_refused(tmp_path, r"'one' .* impossible data_offsets .*expected \[begin, end\]")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2, 4]},
        {"shape": []},
        {"shape": [0]},
        {"dtype": "F64"},
        {"data_offsets": [0, 23]},
        {"data_offsets": [24, 0]},
    ],
    ids=str,
)
def test_offsets_that_do_not_fit_dtype_and_shape_are_refused(tmp_path, change):
    write(tmp_path / "model.safetensors", {"one": {**ONE, **change}, "two": TWO})
    assert_refused(tmp_path, r"'one' in .* has data_offsets .* bytes, but shape .* takes \d+; .*download it again")


def test_overlap_is_refused(tmp_path):
    write(tmp_path / "model.safetensors", {"one": ONE, "two": {**TWO, "data_offsets": [16, 24]}}, bytes(24))
    assert_refused(
        tmp_path, "'two' in .* overlaps the tensor before it: it begins at byte 16 of the data instead of 24"
    )


@pytest.mark.parametrize(
    ("begin", "expected"), [(25, "'two' .* leaves a gap before it"), (2**40, "'two' .* leaves a gap before it")]
)
def test_gap_is_refused(tmp_path, begin, expected):
    write(tmp_path / "model.safetensors", {"one": ONE, "two": {**TWO, "data_offsets": [begin, begin + 8]}}, bytes(33))
    assert_refused(tmp_path, expected)


def test_gap_before_the_first_tensor_is_refused(tmp_path):
    write(tmp_path / "model.safetensors", {"two": TWO})
    assert_refused(tmp_path, "'two' .* leaves a gap before it: it begins at byte 24 of the data instead of 0")


def test_offsets_behind_the_end_are_refused(tmp_path):
    write(tmp_path / "model.safetensors", {"one": {**ONE, "shape": [2, 3000], "data_offsets": [0, 24000]}})
    assert_refused(tmp_path, "model.safetensors is truncated: .* its header describes 24")


def test_a_bad_shard_is_named(tmp_path):
    write_sharded(tmp_path)
    os.truncate(tmp_path / SHARDS[1], 70)
    assert_refused(tmp_path, f"{SHARDS[1]} is truncated")


def assert_refused_or_same(file: Path) -> bool:
    """Whether the damaged `file` opens. If so, the library opens it too and reads the same."""
    try:
        checkpoint = Checkpoint.open(file)
    except CheckpointError:
        return False
    try:
        expected = load_file(file)
    except SafetensorError as error:
        pytest.fail(f"opened what the library refuses ({error}): {file.read_bytes()[:400]!r}")
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        assert_same(checkpoint.read(name), tensor)
    return True


def damaged_example() -> dict[str, torch.Tensor]:
    return {
        "model.language_model.layers.0.mlp.gate_proj.weight": torch.randn(11, 12),
        "model.language_model.layers.0.mlp.gate_proj.weight_scale_inv": torch.tensor(1.5),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(10, 1).half(),
        "eight": torch.randn(2, 9).to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("seed", range(4))
def test_truncation_anywhere_is_refused(tmp_path, seed):
    save_file(damaged_example(), tmp_path / "whole.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "whole.safetensors").read_bytes()
    for size in random.Random(seed).sample(range(len(content)), 50):
        (tmp_path / "x.safetensors").write_bytes(content[:size])
        assert_refused(tmp_path / "x.safetensors", "truncated")


@pytest.mark.parametrize("seed", range(8))
def test_damaged_headers_are_refused_or_read_as_the_library_does(tmp_path, seed):
    generator = random.Random(seed)
    save_file(damaged_example(), tmp_path / "whole.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "whole.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    likely = b'0123456789-+.eE"\\{}[],: truefalsn\x00\xff'
    opened = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 3])):
            place = generator.randrange(header_end)
            damaged[place] = generator.choice([generator.choice(likely), generator.randrange(256)])
        (tmp_path / "x.safetensors").write_bytes(damaged)
        opened += assert_refused_or_same(tmp_path / "x.safetensors")
    assert 10 < opened < 200  # some damage (in names, in padding) is none, so both ways were seen


@pytest.mark.parametrize("seed", range(4))
def test_spliced_headers_are_refused_or_read_as_the_library_does(tmp_path, seed):
    """Pieces of the header are removed, doubled and moved, and its length is kept true: damage that still parses."""
    generator = random.Random(seed)
    save_file(damaged_example(), tmp_path / "whole.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "whole.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    pieces = re.findall(rb'[{}\[\],:]|"[^"]*"|\d+|\s+', content[8:header_end])
    for _ in range(300):
        changed = list(pieces)
        for _ in range(generator.choice([1, 2])):
            place, other = generator.randrange(len(changed)), generator.randrange(len(changed))
            match generator.randrange(4):
                case 0:
                    changed[place], changed[other] = changed[other], changed[place]
                case 1:
                    del changed[place]
                case 2:
                    changed.insert(place, changed[other])
                case 3:
                    changed[place] = generator.choice(
                        [b"-0", b"0.0", b"1e2", b"01", b"null", b"true", b"[]", b"{}", b'"F4"']
                    )
        write(tmp_path / "x.safetensors", b"".join(changed), content[header_end:])
        assert_refused_or_same(tmp_path / "x.safetensors")
