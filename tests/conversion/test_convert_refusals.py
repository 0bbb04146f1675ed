"""What `python -m conversion.convert` refuses, with a sentence and before anything is written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import shard_writer, staging
from conversion.convert import convert, main
from conversion.staging import partial_folder
from modeling_keye import KeyeProcessor
from tests.conversion.folders import (
    assert_nothing_written,
    contents,
    copied,
    different,
    refusal,
    stored,
)
from tests.conversion.published import write_published
from tests.conversion.safetensors_files import write


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def change_header(folder: Path, change) -> None:
    data = first_shard(folder).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    write(first_shard(folder), change(data[8:end].decode()), data[end:])


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(first_shard(folder))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, first_shard(folder))


def rename_in_index(folder: Path, file: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], name: file}}))


def shift_offsets(header: str) -> dict:
    entries = json.loads(header)
    entry = next(entry for name, entry in entries.items() if name != "__metadata__" and entry["data_offsets"][0] > 0)
    entry["data_offsets"] = [position + 2 for position in entry["data_offsets"]]
    return entries


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def unknown_key(folder: Path) -> None:
    tensors = stored(folder)
    for file in folder.glob("model*"):
        file.unlink()
    save_file({**tensors, "model.layers.0.mlp.something.weight": torch.ones(2)}, folder / "model.safetensors")


def missing_key(folder: Path) -> None:
    tensors = stored(folder)
    for file in folder.glob("model*"):
        file.unlink()
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def mixed_experts(folder: Path) -> None:
    """The last layer's experts one by one, as an editor of single layers would save them."""
    tensors = stored(folder)
    for file in folder.glob("model*"):
        file.unlink()
    prefix = max(name for name in tensors if name.endswith("experts.gate_up_proj")).removesuffix("gate_up_proj")
    both, down = tensors.pop(prefix + "gate_up_proj"), tensors.pop(prefix + "down_proj")
    for expert, (into, out) in enumerate(zip(both.transpose(1, 2), down.transpose(1, 2))):
        gate, up = into.chunk(2)
        for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", out)):
            tensors[f"{prefix}{expert}.{name}.weight"] = tensor.clone(memory_format=torch.contiguous_format)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def no_bytes_at_the_end(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 1)


# How a folder of two shards is damaged, and what stands in the refusal.
EMBEDDING = "visual.vision_model.embeddings.patch_embedding.weight"
BAD = {
    "missing shard": (lambda folder: first_shard(folder).unlink(), "lacks 1 of the 2 shards"),
    "truncated file": (no_bytes_at_the_end, "is truncated"),
    "wrong shape": (lambda f: change_tensor(f, EMBEDDING, lambda t: t[:-1]), "patch_embedding.weight makes"),
    "duplicate key": (
        lambda f: change_header(f, lambda h: h.strip()[:-1] + "," + h.strip()[1:]),
        "duplicate key",
    ),
    "path outside": (lambda f: rename_in_index(f, "../model.safetensors"), "outside of its folder"),
    "lying offsets": (lambda f: change_header(f, shift_offsets), "leaves a gap|overlaps"),
    "unknown dtype": (lambda f: change_header(f, lambda h: h.replace('"BF16"', '"BF17"', 1)), "unknown dtype 'BF17'"),
    "only pickles": (only_pickles, "only pickle files"),
    "unknown key": (unknown_key, "unknown: model.layers.0.mlp.something.weight"),
    "missing key": (missing_key, "missing: model.language_model.norm.weight"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "another model": (
        lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'),
        "LlamaForCausalLM",
    ),
    "experts in both forms": (
        mixed_experts,
        "stores some experts as one tensor (model.layers.0.mlp.experts.gate_up_proj) and some one by one",
    ),
    "template in another encoding": (
        lambda f: (f / "chat_template.json").write_bytes(b'{"chat_template": "\xff"}'),
        "chat_template.json is no UTF-8 text",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is no JSON"),
    "tokenizer of another form": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer and processor files of",
    ),
    "contradicting generation config": (
        lambda f: (f / "generation_config.json").write_text('{"num_beams": 1, "num_return_sequences": 3}'),
        "generation_config.json contradicts itself",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_and_nothing_written(name, source, tmp_path, capsys):
    damage, pattern = BAD[name]
    bad = copied(source, tmp_path / "bad")
    damage(bad)
    message = refusal(capsys, bad, tmp_path / "ours")
    assert any(part in message for part in pattern.split("|")), message
    assert_nothing_written(tmp_path / "ours")


def test_nan_in_a_scale_is_refused_and_nothing_written(tmp_path, capsys):
    bad = write_published(tmp_path / "bad", "keye_vl_671b", fp8=True)
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, bad / "model.safetensors")
    for option in ([], ["--dry-run"]):
        assert name in refusal(capsys, bad, tmp_path / "ours", *option)
        assert_nothing_written(tmp_path / "ours")


def test_destinations_in_use_are_refused(source, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert f"{taken} exists and is not an empty folder" in refusal(capsys, source, taken)
    assert contents(taken).keys() == {"notes.txt"} and not partial_folder(taken).exists()
    foreign = partial_folder(tmp_path / "ours")
    foreign.mkdir()
    (foreign / "letters").write_text("mine")
    assert "is no unfinished conversion (letters)" in refusal(capsys, source, tmp_path / "ours")
    assert contents(foreign).keys() == {"letters"}


def test_an_empty_destination_is_taken(source, tmp_path):
    (tmp_path / "ours").mkdir()
    convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file()


def test_too_small_a_disk_is_refused(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    message = refusal(capsys, source, tmp_path / "ours")
    assert "has 1,000 left" in message and "choose another disk" in message
    assert_nothing_written(tmp_path / "ours")


def test_sources_that_are_nothing_are_refused(tmp_path, capsys):
    for name in (tmp_path / "absent", "./absent", "a/b/c"):
        assert "is no folder, and no repository of the Hub has such a name" in refusal(capsys, name, tmp_path / "ours")
    message = refusal(capsys, "someone/nothing", tmp_path / "ours")
    assert "there is no folder someone/nothing, and the Hub says" in message
    assert_nothing_written(tmp_path / "ours")


def test_the_wrong_direction_is_refused(source, ours, tmp_path, capsys):
    assert "`--to published` is the way back" in refusal(capsys, ours, tmp_path / "x")
    assert "is published already, as keye_vl_2" in refusal(capsys, source, tmp_path / "x", "--to", "published")
    assert "`layout` is for the way back" in refusal(capsys, source, tmp_path / "x", "--layout", "keye_vl_2")


def test_the_way_back_needs_what_conversion_json_keeps(ours, tmp_path, capsys):
    bare = copied(ours, tmp_path / "bare")
    (bare / "conversion.json").unlink()
    message = refusal(capsys, bare, tmp_path / "x", "--to", "published")
    assert "has no conversion.json" in message and "--layout: keye_vl_preview" in message
    (bare / "conversion.json").write_text('{"format": 7}')
    assert "has format 7" in refusal(capsys, bare, tmp_path / "x", "--to", "published")
    assert "a deepseek_v3 checkpoint can only say" in refusal(
        capsys, bare, tmp_path / "x", "--to", "published", "--layout", "deepseek_v3"
    )
    assert_nothing_written(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layout": []}, "has layout '[]'"),
        ({"unfused_experts": "x"}, "has unfused_experts 'x'"),
        ({"dropped": 3}, "has dropped '3'"),
        ({"dropped": [3]}, "something else than names of tensors in dropped"),
        ({"fp8_block": 128}, "has fp8_block '128'"),
        ({"published_files": []}, "has published_files '[]'"),
        ({"published_files": {"../evil": "x"}}, "has '../evil' in published_files"),
        ({"published_files": {"tokenizer_config.json": 3}}, "something else than texts in published_files"),
    ],
)
def test_a_damaged_record_is_refused(change, problem, ours, tmp_path, capsys):
    damaged = copied(ours, tmp_path / "damaged")
    record = json.loads((damaged / "conversion.json").read_text())
    (damaged / "conversion.json").write_text(json.dumps(record | change))
    assert problem in refusal(capsys, damaged, tmp_path / "x", "--to", "published")
    assert_nothing_written(tmp_path / "x")


def test_a_changed_configuration_is_not_published_as_it_was(ours, tmp_path, capsys):
    changed = copied(ours, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5e6
    (changed / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, changed, tmp_path / "x", "--to", "published")
    assert "has changed since it was converted: rope_theta was 10000000.0, is 5000000.0" in message
    convert(changed, tmp_path / "x", to="published", layout="keye_vl_2")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["rope_theta"] == 5e6


def test_fp8_cannot_come_back_without_its_scales(tmp_path, capsys):
    convert(write_published(tmp_path / "published", "keye_vl_671b", fp8=True), tmp_path / "ours")
    (tmp_path / "ours" / "fp8_scales.safetensors").unlink()
    assert "lacks fp8_scales.safetensors" in refusal(capsys, tmp_path / "ours", tmp_path / "x", "--to", "published")
    assert_nothing_written(tmp_path / "x")
    convert(tmp_path / "ours", tmp_path / "x", to="published", dtype="bfloat16")


def test_weights_of_ours_that_do_not_fit_are_refused(ours, tmp_path, capsys):
    bad = copied(ours, tmp_path / "bad")
    tensors = stored(bad)
    for file in bad.glob("model*"):
        file.unlink()
    del tensors["lm_head.weight"]
    save_file(tensors, bad / "model.safetensors")
    assert "missing: lm_head.weight" in refusal(capsys, bad, tmp_path / "x", "--to", "published")


@pytest.mark.parametrize("size", ["", "5", "5 cats", "-1GB", "0.5B", "0"])
def test_nonsense_sizes_are_refused_or_taken_as_bytes(size, source, tmp_path, capsys):
    if size == "5":
        assert shard_writer.parse_size(size) == 5
    else:
        assert "is no size of a file" in refusal(capsys, source, tmp_path / "x", f"--max-shard-size={size}")
    assert [shard_writer.parse_size(text) for text in ("5GB", "1.5 MiB", "7kb")] == [5 * 10**9, 3 * 2**19, 7000]


def test_a_source_without_a_name_is_refused(tmp_path, capsys):
    assert "the name of a source is empty" in refusal(capsys, "", tmp_path / "x")


def test_destinations_that_cannot_be_renamed_to_are_refused(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    for options in ([], ["--dry-run"]):
        assert f"{link} is a link" in refusal(capsys, source, link, *options)
        assert "/ is the root of a file system" in refusal(capsys, source, "/", *options)
    monkeypatch.setattr(staging.os.path, "ismount", lambda path: Path(path).name == "disk")
    assert "disk is the root of a file system" in refusal(capsys, source, tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_fp8_values_that_cannot_be_restored_are_refused(tmp_path, capsys):
    """A scale of zero over values that are not: nothing would lead back to them."""
    bad = write_published(tmp_path / "bad", "keye_vl_671b", fp8=True)
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[f"{name}_scale_inv"][0, 0] = 0
    save_file(tensors, bad / "model.safetensors")
    assert name in refusal(capsys, bad, tmp_path / "x") and not (tmp_path / "x").exists()
    assert convert(bad, tmp_path / "halves", dtype="float16")["tensors"] > 0


@pytest.fixture
def text_model(small_new_towers, tmp_path) -> Path:
    """DeepSeek-V3 with the new tower that a conversion gives it."""
    published = write_published(tmp_path / "published", "deepseek_v3")
    convert(published, tmp_path / "text-ours", max_shard_size="1GB")
    return tmp_path / "text-ours"


@pytest.mark.parametrize("options", [[], ["--layout=deepseek_v3"]], ids=["recorded", "named"])
def test_a_trained_projector_is_not_lost_silently(options, text_model, tmp_path, capsys):
    way = ["--to=published", *options]
    assert main([str(text_model), str(tmp_path / "new"), *way]) == 0
    assert "left out: model." in capsys.readouterr().err
    name = "model.projector.linear_2.weight"
    tensors = load_file(text_model / "model.safetensors")
    tensors[name][0, 0] += 1
    save_file(tensors, text_model / "model.safetensors")
    for option in ([], ["--dry-run"]):
        message = refusal(capsys, text_model, tmp_path / "x", *way, *option)
        assert f"have been changed since they were new ({name})" in message and "--drop-vision" in message
        assert_nothing_written(tmp_path / "x")
    assert main([str(text_model), str(tmp_path / "x"), *way, "--drop-vision"]) == 0
    assert "left out: model." in capsys.readouterr().err
    assert different(stored(tmp_path / "x"), stored(tmp_path / "new")) == []


def test_a_tower_of_unknown_origin_is_not_lost_silently(text_model, tmp_path, capsys):
    (text_model / "conversion.json").unlink()
    way = ["--to=published", "--layout=deepseek_v3"]
    message = refusal(capsys, text_model, tmp_path / "x", *way)
    assert "deepseek_v3 has no vision" in message and "not all of them are new (model.projector." in message
    assert_nothing_written(tmp_path / "x")
    assert main([str(text_model), str(tmp_path / "x"), *way, "--drop-vision"]) == 0


def test_a_layout_of_another_family_than_the_processor_is_refused(ours, tmp_path, capsys):
    processor = KeyeProcessor.from_pretrained(ours)
    other = copied(ours, tmp_path / "other")
    processor.video_processor.family = "keye_vl_1_5"
    processor.save_pretrained(other)
    message = refusal(capsys, other, tmp_path / "x", "--to=published", "--layout=keye_vl_2")
    assert "the family 'keye_vl_1_5', but keye_vl_2 is of the family 'keye_vl_2'" in message
    assert_nothing_written(tmp_path / "x")


def test_a_value_that_the_configuration_cannot_have_is_a_sentence(ours, tmp_path, capsys):
    bad = copied(ours, tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    config["text_config"]["hidden_size"] = "x"
    (bad / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, bad, tmp_path / "x", "--to=published")
    assert "hidden_size" in message and message.count("\n") == 1
