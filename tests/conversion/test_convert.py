"""`python -m conversion.convert`: both directions, what is written, and what is refused before anything is written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling_keye.configuration_keye as configuration_keye
from conversion import convert as convert_module
from conversion import shard_writer, staging
from conversion.convert import convert, main
from conversion.staging import Staging, partial_folder
from modeling_keye import KeyeConfig, KeyeForVideoQA, KeyeProcessor
from modeling_keye.configuration_keye import AUTO_MAP
from tests.conversion.folders import contents, different, stored
from tests.conversion.published import VISION_LAYOUTS, dequantised, published_checkpoint, write_published
from tests.conversion.safetensors_files import write
from tests.model.factories import VISION

IGNORABLE = (
    "visual.vision_model.head.",
    "visual.vision_model.embeddings.packing_position_embedding.",
    "model.layers.3.",
)
# Sources that differ in every way the layouts can.
SOURCES = {
    "preview": {"layout": "keye_vl_preview"},
    "1.5, sharded": {"layout": "keye_vl_1_5", "shards": 3},
    "1.5, float32": {"layout": "keye_vl_1_5", "dtype": torch.float32},
    "1.5, nested and re-saved": {
        "layout": "keye_vl_1_5",
        "nested_config": True,
        "nested_weights": True,
        "resaved": "rope_parameters",
    },
    "671b": {"layout": "keye_vl_671b", "inv_freq": True},
    "671b, fp8, sharded": {"layout": "keye_vl_671b", "fp8": True, "shards": 4},
    "671b, fp8 projector": {"layout": "keye_vl_671b", "fp8": True, "fp8_projector": True},
    "671b, small fp8 blocks, further layer": {"layout": "keye_vl_671b", "fp8": (32, 48), "mtp": True},
    "2.0": {"layout": "keye_vl_2"},
    "2.0, square experts, sharded": {"layout": "keye_vl_2", "square": True, "shards": 2},
    "2.0, unfused": {"layout": "keye_vl_2", "experts": "unfused"},
    "2.0, no indexer": {"layout": "keye_vl_2", "indexer": False},
    "DeepSeek-V3, fp8": {"layout": "deepseek_v3", "fp8": True, "mtp": True},
    "DeepSeek-V3.2": {"layout": "deepseek_v32", "shards": 2},
}


@pytest.fixture(autouse=True)
def small_new_towers(monkeypatch):
    """A text checkpoint gets a tower of the default size, 0.4 billion parameters; here it gets a small one."""
    real = configuration_keye.our_config

    def our_config(raw: dict) -> dict:
        ours = real(raw)
        return ours if ours["vision_config"] else {**ours, "vision_config": VISION}

    for module in (configuration_keye, convert_module):
        monkeypatch.setattr(module, "our_config", our_config)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Keye-VL-2.0, which the tests that change it copy."""
    return write_published(tmp_path_factory.mktemp("source") / "keye-2", "keye_vl_2", shards=2)


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "ours"
    convert(source, folder, max_shard_size="300KB")
    return folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def refusal(capsys, *arguments) -> str:
    """What the command says when it refuses."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err[printed.err.index("error: ") :]


def assert_nothing_written(dst: Path) -> None:
    assert not dst.exists() and not partial_folder(dst).exists()


@pytest.mark.parametrize("name", SOURCES)
def test_published_to_ours_and_back_is_bit_identical(name, tmp_path):
    options = dict(SOURCES[name])
    published = write_published(tmp_path / "published", **options)
    there = convert(published, tmp_path / "ours", max_shard_size="200KB")
    back = convert(tmp_path / "ours", tmp_path / "back", to="published", max_shard_size="150KB")
    assert there["shards"] > 1 and back["shards"] > 1
    file_options = ("shards", "nested_config", "nested_weights", "resaved")
    _, tensors = published_checkpoint(**{k: v for k, v in options.items() if k not in file_options})
    kept = {k: v for k, v in tensors.items() if not k.startswith(IGNORABLE) and "inv_freq" not in k}
    assert different(stored(tmp_path / "back"), kept) == []
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((published / file).read_text())
    texts = {"tokenizer_config.json", "chat_template.json", "preprocessor_config.json", "added_tokens.json"}
    assert {n: t for n, t in contents(tmp_path / "back").items() if n in texts} == {
        n: t for n, t in contents(published).items() if n in texts
    }


@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_a_folder_of_ours_loads_like_its_source(layout, tmp_path):
    """Converting first or loading directly is the same model, bit for bit; the processor is the same, too."""
    published = write_published(tmp_path / "published", layout, fp8=layout == "keye_vl_671b")
    convert(published, tmp_path / "ours", max_shard_size="1MB")
    direct, converted = (
        KeyeForVideoQA.from_pretrained(folder, dtype="auto") for folder in (published, tmp_path / "ours")
    )
    assert different(direct.state_dict(), converted.state_dict()) == []
    settings = [model.config.to_dict() for model in (direct, converted)]
    for config in settings:
        for key in ("_name_or_path", "architectures", "transformers_version"):
            config.pop(key, None)
    assert settings[0] == settings[1]
    assert (
        converted.generation_config.suppress_tokens
        == direct.generation_config.suppress_tokens
        == [converted.config.image_token_id, converted.config.video_token_id]
    )
    processors = [KeyeProcessor.from_pretrained(folder) for folder in (published, tmp_path / "ours")]
    for processor, name in zip(processors, ("direct", "converted")):
        processor.save_pretrained(tmp_path / name)
    assert contents(tmp_path / "direct") == contents(tmp_path / "converted")
    text = "<|vision_start|>some words, 3.0"
    assert processors[0].tokenizer(text).input_ids == processors[1].tokenizer(text).input_ids


def test_everything_a_folder_of_ours_needs_is_written(source, ours):
    names = set(contents(ours))
    assert names >= {
        "config.json",
        "generation_config.json",
        "conversion.json",
        "model.safetensors.index.json",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    package = Path(configuration_keye.__file__).parent
    code = {name for name in names if name.endswith(".py")}
    assert {f"{module.split('.')[0]}.py" for module in AUTO_MAP.values()} < code
    assert [name for name in code if (ours / name).read_bytes() != (package / name).read_bytes()] == []
    config = json.loads((ours / "config.json").read_text())
    assert config["architectures"] == ["KeyeForVideoQA"] and config["model_type"] == "keye"
    assert config["auto_map"] == AUTO_MAP and config["dtype"] == "bfloat16"
    generation = json.loads((ours / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == sorted([config["image_token_id"], config["video_token_id"]])
    assert generation["eos_token_id"] == json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    record = json.loads((ours / "conversion.json").read_text())
    assert record["layout"] == "keye_vl_2" and record["source"] == {"name": "keye-2", "revision": None}
    assert record["dropped"] == ["visual.vision_model.embeddings.packing_position_embedding.weight"]
    assert str(source.parent) not in (ours / "conversion.json").read_text()


def test_index_and_shards_are_as_the_library_writes_them(ours):
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    shards = sorted(ours.glob("model-*.safetensors"))
    count = len(shards)
    assert [file.name for file in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    tensors = stored(ours)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"] == {name: file.name for file in shards for name in load_file(file)}
    for file in shards:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
        # The library reads by offsets in elements, which a smaller dtype in front could break.
        assert [entry for entry in header.values() if entry["dtype"] == "F32" and entry["data_offsets"][0] % 4] == []
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        assert total <= 300_000 or len(header) == 1


def test_dtypes_of_different_width_in_one_file_are_aligned(tmp_path):
    """The correction bias is float32 between tensors of bfloat16 with odd sizes."""
    published = write_published(tmp_path / "published", "keye_vl_671b", num_hidden_layers=2, kv_lora_rank=131)
    convert(published, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    biases = [tensor.dtype for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert biases == [torch.float32]


def test_two_runs_write_the_same_bytes(source, ours, tmp_path):
    convert(source, tmp_path / "again", max_shard_size="300KB")
    assert contents(tmp_path / "again") == contents(ours)


def test_fp8_is_dequantised_with_its_scales_and_they_are_kept(tmp_path):
    published = write_published(tmp_path / "published", "keye_vl_671b", fp8=True)
    config, tensors = published_checkpoint("keye_vl_671b", fp8=True)
    convert(published, tmp_path / "ours")
    mine, wanted = stored(tmp_path / "ours"), dequantised(tensors)
    name = "self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(
        mine[f"model.language_model.layers.0.{name}"], wanted[f"model.layers.0.{name}"].to(torch.bfloat16)
    )
    up = torch.cat([wanted[f"model.layers.1.mlp.experts.7.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(mine["model.language_model.layers.1.mlp.experts.gate_up_proj"][7], up.to(torch.bfloat16))
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_scale_inv")}
    assert different(load_file(tmp_path / "ours" / "fp8_scales.safetensors"), scales) == []
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())


def test_dtype_casts_all_but_the_correction_bias(tmp_path):
    published = write_published(tmp_path / "published", "keye_vl_671b", fp8=True)
    convert(published, tmp_path / "ours", dtype="float32")
    assert {tensor.dtype for tensor in stored(tmp_path / "ours").values()} == {torch.float32}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "float32"
    convert(tmp_path / "ours", tmp_path / "half", to="published", dtype="float16")
    halves = stored(tmp_path / "half")
    assert {n for n, t in halves.items() if t.dtype != torch.float16} == {
        n for n in halves if n.endswith("e_score_correction_bias")
    }
    raw = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" not in raw and raw["torch_dtype"] == "float16"
    # The blocks can be made again; what was not quantised stays in float32, and config.json says so.
    convert(tmp_path / "ours", tmp_path / "back", to="published")
    _, tensors = published_checkpoint("keye_vl_671b", fp8=True)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORABLE)}
    wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in kept.items()}
    assert different(stored(tmp_path / "back"), wide) == []
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_a_model_saved_by_the_library_is_published_by_the_name_of_its_layout(layout, tmp_path):
    published = write_published(tmp_path / "published", layout)
    model = KeyeForVideoQA.from_pretrained(published, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", to="published", layout=layout)
    _, tensors = published_checkpoint(layout)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORABLE)}
    assert different(stored(tmp_path / "back"), kept) == []
    again = KeyeConfig.from_pretrained(tmp_path / "back").to_dict()
    assert {**again, "_name_or_path": ""} == {**KeyeConfig.from_pretrained(published).to_dict(), "_name_or_path": ""}


def test_weights_without_the_indexer_of_their_config_come_back(tmp_path):
    """The runtime of 2.0 takes them and attends densely; config.json keeps its `sa_config`."""
    published = write_published(tmp_path / "published", "keye_vl_2")
    weights = {n: t for n, t in stored(published).items() if "sa_indexer" not in n and "packing" not in n}
    save_file(weights, published / "model.safetensors")
    convert(published, tmp_path / "ours")
    assert KeyeConfig.from_pretrained(tmp_path / "ours").text_config.indexer_type is None
    convert(tmp_path / "ours", tmp_path / "back", to="published")
    assert different(stored(tmp_path / "back"), weights) == []
    assert "sa_config" in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_text_checkpoint_gets_a_new_tower_that_depends_on_nothing_else(tmp_path):
    for name in ("deepseek_v3", "deepseek_v32"):
        convert(write_published(tmp_path / name, name), tmp_path / f"{name}-ours", max_shard_size="300KB")
    first, second = (
        {n: t for n, t in stored(tmp_path / f"{name}-ours").items() if n.startswith("model.visual.")}
        for name in ("deepseek_v3", "deepseek_v32")
    )
    assert first and different(first, second) == []
    weights = [tensor for name, tensor in first.items() if name.endswith("fc1.weight")]
    assert len(weights) == VISION["num_hidden_layers"] and not torch.equal(*weights)
    assert all(0.1 < tensor.float().std() < 0.2 for tensor in weights)
    model = KeyeForVideoQA.from_pretrained(tmp_path / "deepseek_v3-ours")
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    record = json.loads((tmp_path / "deepseek_v3-ours" / "conversion.json").read_text())
    assert set(first) < set(record["initialised"])
    names = set(contents(tmp_path / "deepseek_v3-ours"))
    assert "tokenizer.json" in names and "processor_config.json" not in names


def test_a_source_without_tokenizer_has_no_processor(tmp_path, capsys):
    published = write_published(tmp_path / "published", "keye_vl_1_5", tokenizer=False)
    assert main([str(published), str(tmp_path / "ours")]) == 0
    assert "no processor, because SRC holds no tokenizer" in capsys.readouterr().err
    names = set(contents(tmp_path / "ours"))
    assert "processing_keye.py" in names and "tokenizer.json" not in names and "processor_config.json" not in names


def test_dry_run_prints_the_plan_and_writes_nothing(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "ours"), "--dry-run", "--max-shard-size", "300KB"]) == 0
    printed = capsys.readouterr()
    numbers = json.loads(printed.out)
    assert numbers["dry_run"] is True and numbers["shards"] > 1
    assert "keye_vl_2 -> ours" in printed.err and "packing_position_embedding" in printed.err
    assert f"{numbers['parameters']:,} parameters" in printed.err and "model-00001-of-" in printed.err
    assert_nothing_written(tmp_path / "ours")
    model = KeyeForVideoQA.from_pretrained(source)
    assert numbers["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())


def test_the_last_line_sums_up(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "ours")]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    tensors = stored(tmp_path / "ours")
    assert numbers["tensors"] == len(tensors) and numbers["resumed_tensors"] == 0 and numbers["seconds"] >= 0
    assert numbers["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())


# Bad checkpoints. Each function changes a folder of two shards; the pattern stands in the refusal.


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


def no_bytes_at_the_end(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 1)


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
    assert "can only say 'mla'" in refusal(capsys, bare, tmp_path / "x", "--to", "published", "--layout", "deepseek_v3")
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


# Runs that do not end.


def failing_writes(monkeypatch, after: int, error: BaseException) -> None:
    """Writing raises `error` once `after` pieces of data are written."""
    left = [after]
    real = staging.write_all

    def write_all(descriptor: int, data) -> None:
        left[0] -= 1
        if left[0] < 0:
            real(descriptor, memoryview(data)[: len(data) // 2])
            raise error
        real(descriptor, data)

    for module in (staging, shard_writer):
        monkeypatch.setattr(module, "write_all", write_all)


@pytest.mark.parametrize("after", [1, 40])
def test_a_full_disk_is_told_and_the_same_command_goes_on(after, source, ours, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        failing_writes(patch, after, OSError(errno.ENOSPC, "No space left on device"))
        message = refusal(capsys, source, tmp_path / "x", "--max-shard-size=300KB")
    assert "No space left on device" in message and "goes on where this one stopped" in message
    assert not (tmp_path / "x").exists()
    numbers = convert(source, tmp_path / "x", max_shard_size="300KB")
    assert numbers["resumed_tensors"] == max(0, (after - 2) // 2)
    assert contents(tmp_path / "x") == contents(ours) and not partial_folder(tmp_path / "x").exists()


def test_ctrl_c_is_told_and_the_same_command_goes_on(source, ours, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        failing_writes(patch, 50, KeyboardInterrupt())
        assert main([str(source), str(tmp_path / "x"), "--max-shard-size=300KB"]) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err
    assert convert(source, tmp_path / "x", max_shard_size="300KB")["resumed_tensors"] > 0
    assert contents(tmp_path / "x") == contents(ours)


@pytest.fixture
def stopped(source, tmp_path, monkeypatch) -> Path:
    """The DST of a run over a copy of the source, stopped halfway."""
    copied(source, tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        failing_writes(patch, 130, KeyboardInterrupt())
        convert(tmp_path / "source", tmp_path / "x", max_shard_size="300KB")
    return tmp_path / "x"


def test_other_options_or_sources_do_not_continue_a_run(stopped, tmp_path, capsys):
    source = tmp_path / "source"
    before = contents(partial_folder(stopped))
    for options, wanted in (
        (["--max-shard-size=200KB"], "--max-shard-size: was 300000, is 200000"),
        (["--max-shard-size=300KB", "--dtype=float32"], "--dtype: was None, is float32"),
    ):
        message = refusal(capsys, source, stopped, *options)
        assert wanted in message and f"Delete {partial_folder(stopped)}" in message
    shard = source / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    message = refusal(capsys, source, stopped, "--max-shard-size=300KB")
    assert "source/model-00002-of-00002.safetensors: was" in message and "source/config.json" not in message
    assert contents(partial_folder(stopped)) == before
    shutil.rmtree(partial_folder(stopped))
    convert(source, stopped, max_shard_size="200KB")


def test_a_second_run_on_the_same_folder_is_refused(stopped, tmp_path, capsys):
    journal = (partial_folder(stopped) / "journal.jsonl").read_text().splitlines()
    with Staging.open(stopped, json.loads(journal[0])["fingerprint"]):
        message = refusal(capsys, tmp_path / "source", stopped, "--max-shard-size=300KB")
        assert "another run is at work" in message
    convert(tmp_path / "source", stopped, max_shard_size="300KB")


def test_what_a_power_cut_lost_is_written_again(stopped, ours, tmp_path):
    """The journal may have reached the disk when the data had not: checksums tell."""
    shards = sorted((partial_folder(stopped) / "output").glob("*.safetensors"))
    data = bytearray(shards[-1].read_bytes())
    data[-100:] = bytes(100)
    shards[-1].write_bytes(data[:-7])
    convert(tmp_path / "source", stopped, max_shard_size="300KB")
    names = [name for name in contents(ours) if name.startswith("model")]
    assert {name: contents(stopped)[name] for name in names} == {name: contents(ours)[name] for name in names}


def test_a_finished_file_that_was_changed_is_not_trusted(stopped, tmp_path, capsys):
    shard = min((partial_folder(stopped) / "output").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    message = refusal(capsys, tmp_path / "source", stopped, "--max-shard-size=300KB")
    assert shard.name in message and "has been changed or removed" in message
