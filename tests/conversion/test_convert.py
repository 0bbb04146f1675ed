"""`python -m conversion.convert`: both directions, what is written, and what is refused before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling_keye.configuration_keye as configuration_keye
from conversion.convert import convert, main
from modeling_keye import KeyeConfig, KeyeForVideoQA, KeyeProcessor
from modeling_keye.configuration_keye import AUTO_MAP
from tests.conversion.folders import assert_nothing_written, contents, copied, different, stored
from tests.conversion.published import VISION_LAYOUTS, dequantised, published_checkpoint, write_published
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


pytestmark = pytest.mark.usefixtures("small_new_towers")


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
        wanted = json.loads((published / file).read_text())
        # Where somebody's copy was saved from is nobody else's business.
        for part in (wanted, wanted.get("text_config", {}), wanted.get("vision_config", {})):
            part.pop("_name_or_path", None)
        assert json.loads((tmp_path / "back" / file).read_text()) == wanted
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
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        assert total <= 300_000 or len(header) == 1


def test_dtypes_of_different_width_in_one_file_are_aligned(tmp_path):
    """The correction bias is float32 between tensors of bfloat16 with odd sizes; readers count offsets in elements."""
    published = write_published(tmp_path / "published", "keye_vl_671b", kv_lora_rank=131)
    convert(published, tmp_path / "ours")
    data = (tmp_path / "ours" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    wide = {name: entry["data_offsets"][0] for name, entry in header.items() if entry["dtype"] == "F32"}
    assert len(wide) == 2 and all(name.endswith("e_score_correction_bias") for name in wide)
    assert [name for name, offset in wide.items() if offset % 4] == []


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


def test_a_model_trained_further_is_published_with_its_record(ours, tmp_path):
    """conversion.json, copied beside weights that were saved again, restores names and files for the new values."""
    model = KeyeForVideoQA.from_pretrained(ours, dtype="auto")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "trained")
    shutil.copy(ours / "conversion.json", tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "back", to="published")
    config, tensors = published_checkpoint("keye_vl_2")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORABLE)}
    kept["lm_head.weight"] = kept["lm_head.weight"] * 2
    assert different(stored(tmp_path / "back"), kept) == []
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


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


def test_preprocessing_is_published_by_the_name_of_its_layout(ours, tmp_path, capsys):
    """What was set in our processor is what the published files say."""
    edited = copied(ours, tmp_path / "edited")
    processor = KeyeProcessor.from_pretrained(edited)
    settings = {"min_pixels": 7840, "max_pixels": 15680, "image_mean": (0.4, 0.5, 0.6), "resample": 2}
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    processor.video_processor.image_mean = settings["image_mean"]
    processor.chat_template = "{{- 'mine' -}}" + processor.chat_template
    processor.save_pretrained(edited)
    assert main([str(edited), str(tmp_path / "x"), "--to=published", "--layout=keye_vl_2"]) == 0
    assert "warning" not in capsys.readouterr().err
    again = KeyeProcessor.from_pretrained(tmp_path / "x")
    assert {name: getattr(again.image_processor, name) for name in settings} == settings
    for part in ("image_processor", "video_processor"):
        found, wanted = (json.loads(getattr(p, part).to_json_string()) for p in (again, processor))
        del wanted["auto_map"]
        assert found == wanted
    assert again.chat_template == processor.chat_template
    processor.video_processor.max_frames = 12
    processor.save_pretrained(edited)
    assert main([str(edited), str(tmp_path / "y"), "--to=published", "--layout=keye_vl_2", "--dry-run"]) == 0
    assert "warning: keye_vl_2 has no place for video_processor.max_frames" in capsys.readouterr().err


def test_the_recorded_way_back_says_what_it_puts_back(source, ours, tmp_path, capsys):
    assert main([str(ours), str(tmp_path / "x"), "--to=published", "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().err
    edited = copied(ours, tmp_path / "edited")
    processor = KeyeProcessor.from_pretrained(edited)
    processor.image_processor.max_pixels = 15680
    processor.chat_template = "{{- 'mine' -}}" + processor.chat_template
    processor.save_pretrained(edited)
    generation = json.loads((edited / "generation_config.json").read_text())
    (edited / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 7}))
    assert main([str(edited), str(tmp_path / "x"), "--to=published"]) == 0
    warning = "warning: edited since the conversion, put back as published: "
    assert f"{warning}chat_template, image_processor.max_pixels, generation.max_new_tokens\n" in capsys.readouterr().err
    for name in ("preprocessor_config.json", "chat_template.json"):
        assert (tmp_path / "x" / name).read_bytes() == (source / name).read_bytes()


def test_line_ends_of_published_files_come_back(tmp_path):
    published = write_published(tmp_path / "published", "keye_vl_1_5")
    file = published / "preprocessor_config.json"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    convert(published, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="published")
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_where_a_copy_was_saved_from_is_not_recorded(tmp_path):
    published = write_published(tmp_path / "published", "keye_vl_1_5")
    config = json.loads((published / "config.json").read_text())
    config = {**config, "_name_or_path": "/somewhere/model", "vision_config": {**config["vision_config"]}}
    config["vision_config"]["_name_or_path"] = "/somewhere/tower"
    (published / "config.json").write_text(json.dumps(config))
    convert(published, tmp_path / "ours")
    assert "/somewhere/" not in "".join(file.read_text() for file in (tmp_path / "ours").glob("*.json"))


def test_float16_has_no_way_back_to_fp8(tmp_path, capsys):
    """It cannot hold the values of every block, so its way back is 16 bit, and the plan says so."""
    published = write_published(tmp_path / "published", "keye_vl_671b", fp8=True)
    assert main([str(published), str(tmp_path / "ours"), "--dtype=float16"]) == 0
    assert "fp8: blocks become float16" in capsys.readouterr().err
    assert not (tmp_path / "ours" / "fp8_scales.safetensors").exists()
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text())["fp8_block"] is None
    convert(tmp_path / "ours", tmp_path / "back", to="published")
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in raw and raw["torch_dtype"] == "float16"
    dtypes = {tensor.dtype for name, tensor in stored(tmp_path / "back").items() if "correction_bias" not in name}
    assert dtypes == {torch.float16}
    assert KeyeForVideoQA.from_pretrained(tmp_path / "back").config.text_config.num_hidden_layers == 3


@pytest.mark.parametrize("option", ["--layout=keye_vl_671b", "--dtype=bfloat16"])
def test_fp8_left_behind_is_told(option, tmp_path, capsys):
    convert(write_published(tmp_path / "published", "keye_vl_671b", fp8=True), tmp_path / "ours")
    capsys.readouterr()
    assert main([str(tmp_path / "ours"), str(tmp_path / "x"), "--to=published", option]) == 0
    assert "fp8: left behind" in capsys.readouterr().err
    assert torch.float8_e4m3fn not in {tensor.dtype for tensor in stored(tmp_path / "x").values()}
