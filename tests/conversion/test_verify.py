"""`conversion.verify`: equal checkpoints are called equal in every pair of layouts, and nothing small escapes it.

Our form of each checkpoint is made here by hand from the published tensors, without the code that loads or converts.
"""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.arithmetic import count_parts
from conversion.compare import TensorStream, compare, stored_stream
from conversion.convert import convert
from conversion.folder import expected_shapes, meta_model
from conversion.verify import main, verify
from modeling_keye.checkpoint_keye import Checkpoint
from modeling_keye.configuration_keye import KeyeConfig
from tests.conversion.ours_by_hand import NEW, write_ours
from tests.conversion.published import (
    LAYOUT_NAMES,
    VISION_LAYOUTS,
    dequantised,
    published_checkpoint,
    write_published,
)

BLOCK = (16, 16)


def edit(folder: Path, change, file: str = "model.safetensors") -> None:
    """Rewrite the tensors of a folder after `change(tensors)`."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


OPTIONS = {
    "keye_vl_preview": {},
    "keye_vl_1_5": {"inv_freq": True},
    "keye_vl_671b": {"fp8": BLOCK},
    "keye_vl_2": {},
    "deepseek_v3": {"mtp": True},
    "deepseek_v32": {"fp8": BLOCK, "mtp": True},
}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_published_and_ours_are_equal_in_both_directions(layout, tmp_path, capsys):
    published = write_published(tmp_path / "published", layout, shards=3, **OPTIONS[layout])
    ours = write_ours(tmp_path / "ours", layout, **OPTIONS[layout])
    for pair in ((published, ours), (ours, published)):
        code, out, _ = run(capsys, *pair)
        assert code == 0, out
        assert out.splitlines()[-1].startswith("EQUAL: ")
        assert "compared under our names" in out
        assert ("way back:" in out) == bool(OPTIONS[layout].get("fp8"))

    _, tensors = published_checkpoint(layout, **OPTIONS[layout])
    stored = sum(tensor.numel() for tensor in tensors.values())
    scales = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("weight_scale_inv"))
    ours_stored = load_file(ours / "model.safetensors")
    known = [name for name in ours_stored if layout in VISION_LAYOUTS or not name.startswith(NEW)]
    implied = sum(ours_stored[name].numel() for name in known)
    whole = sum(tensor.numel() for tensor in ours_stored.values())
    report = verify(published, ours)
    arithmetic = report.a["parameters"]
    assert (arithmetic["stored"], arithmetic["implied"]) == (stored, implied)
    assert arithmetic["closes"] and sum(arithmetic["unused"].values()) == stored - implied
    assert arithmetic["equation"].startswith(f"A: {stored:,} stored = {implied:,} implied by the configuration")
    assert report.b["parameters"]["equation"] == f"B: {whole:,} stored = {whole:,} implied by the configuration"
    if not OPTIONS[layout].get("mtp"):
        assert arithmetic["unused"].get("fp8 scales", 0) == scales


def test_arithmetic_names_every_part(tmp_path):
    published = write_published(tmp_path / "a", "deepseek_v32", mtp=True)
    parts = verify(published, published).a["parameters"]
    assert set(parts["parts"]) == {"head", "indexers", "experts", "router corrections (buffers)", "decoder body"}
    assert set(parts["unused"]) == {"multi-token prediction layers"}
    published = write_published(tmp_path / "b", "keye_vl_preview", inv_freq=True)
    parts = verify(published, published).a["parameters"]
    assert set(parts["parts"]) == {"head", "vision tower", "projector", "decoder body"}
    assert set(parts["unused"]) == {"vision pooling head", "packing position table", "rotary buffers"}
    assert parts["unused"]["packing position table"] == 37 * 36


def test_arithmetic_of_the_published_sizes():
    """The numbers of the family's description, from the presets alone."""
    parts = count_parts(expected_shapes(meta_model(KeyeConfig.from_preset("keye-vl-2.0-30b-a3b"))))
    assert parts["indexers"] == 48 * 2_261_184 and parts["vision tower"] == 412_987_248
    assert parts["projector"] == 30_686_720
    assert sum(parts.values()) + 37_748_736 == 31_122_082_160
    parts = count_parts(expected_shapes(meta_model(KeyeConfig.from_preset("keye-vl-8b-preview"))))
    assert sum(parts.values()) + 37_748_736 + 15_238_352 == 8_696_828_736
    parts = count_parts(expected_shapes(meta_model(KeyeConfig.from_preset("keye-vl-671b-a37b"))))
    assert sum(parts.values()) == 671_493_691_248


@pytest.mark.parametrize(
    ("layout", "first", "second", "names"),
    [
        ("keye_vl_preview", {}, {"shards": 4}, "keye_vl_preview names"),
        ("keye_vl_1_5", {}, {"nested_config": True, "nested_weights": True, "resaved": True}, "keye_vl_1_5 names"),
        ("keye_vl_2", {}, {"experts": "unfused", "shards": 2}, "our names"),
        ("keye_vl_2", {"indexer": False}, {"indexer": False, "resaved": "rope_parameters"}, "keye_vl_2 names"),
        ("deepseek_v32", {"fp8": BLOCK}, {"fp8": BLOCK, "shards": 2}, "deepseek_v32 names"),
    ],
)
def test_two_published_forms_are_equal(layout, first, second, names, tmp_path):
    a = write_published(tmp_path / "a", layout, **first)
    b = write_published(tmp_path / "b", layout, **second)
    report = verify(a, b)
    assert report.equal, report.verdict
    assert report.names == names


def test_ignorable_tensors_in_one_folder_only_are_no_difference(tmp_path):
    a = write_published(tmp_path / "a", "keye_vl_preview", head=True)
    b = write_published(tmp_path / "b", "keye_vl_preview", head=False, packing=False)
    report = verify(a, b)
    assert report.equal, report.verdict
    assert any("of what no model uses, 12 tensors are only in A, for example" in text for text in report.warnings)
    assert report.a["parameters"]["closes"] and report.b["parameters"]["closes"]


# What is done to one tensor (or two) of ours, and what the report must name.
def flip_lowest_bit(tensors):
    name = "model.language_model.layers.1.self_attn.o_proj.weight"
    tensors[name].view(torch.int16)[7, 11] ^= 1
    return [name]


def swap_vision_q_and_k(tensors):
    names = [f"model.visual.vision_model.encoder.layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    return names


def transpose_square_experts(tensors):
    name = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    assert tensors[name].shape[1] == tensors[name].shape[2]
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    return [name]


def transpose_square_down(tensors):
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert tensors[name].shape[1] == tensors[name].shape[2]
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    return [name]


def swap_gate_and_up(tensors):
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)
    return [name]


def swap_two_experts(tensors):
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]
    return [name]


def move_gates_of_the_indexer(tensors):
    name = "model.language_model.layers.0.self_attn.indexer.q_proj.weight"
    tensors[name] = tensors[name].roll(5, dims=0)
    return [name]


@pytest.mark.parametrize(
    ("change", "square"),
    [
        (flip_lowest_bit, False),
        (swap_vision_q_and_k, False),
        (transpose_square_experts, "gate_up"),
        (transpose_square_down, "down"),
        (swap_gate_and_up, False),
        (swap_two_experts, False),
        (move_gates_of_the_indexer, False),
    ],
)
def test_a_wrong_value_is_found(change, square, tmp_path, capsys):
    published = write_published(tmp_path / "published", "keye_vl_2", square=square)
    ours = write_ours(tmp_path / "ours", "keye_vl_2", square=square)
    assert run(capsys, published, ours)[0] == 0
    touched = []
    edit(ours, lambda tensors: touched.extend(change(tensors)))
    for pair in ((published, ours), (ours, published)):
        report = verify(*pair)
        assert not report.equal and report.exit_code == 1
        assert sorted(difference.name for difference in report.differences) == sorted(touched)
        assert {difference.kind for difference in report.differences} == {"values"}
    code, out, _ = run(capsys, published, ours)
    assert code == 1 and out.splitlines()[-1].startswith("DIFFERENT: ")
    assert all(name in out for name in touched)


def test_first_difference_is_named_with_index_values_and_distance(tmp_path, capsys):
    published = write_published(tmp_path / "published", "keye_vl_1_5", dtype=torch.float32)
    ours = write_ours(tmp_path / "ours", "keye_vl_1_5", dtype=torch.float32)
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    values = {}

    def change(tensors):
        values["a"] = float(tensors[name][3, 5])
        tensors[name][3, 5] = values["a"] + 0.5
        tensors[name][70, 1] -= 2.0

    edit(ours, change)
    (difference,) = verify(published, ours).differences
    assert difference.index == (3, 5) and difference.elements == 2
    assert difference.first_a == values["a"] and difference.first_b == pytest.approx(values["a"] + 0.5)
    assert difference.max_abs_difference == pytest.approx(2.0)
    _, out, _ = run(capsys, published, ours)
    assert f"{name}: 2 elements differ, first at [3, 5]: {values['a']!r} in A" in out
    assert "largest difference 2" in out


def test_missing_additional_and_misshapen_tensors_of_ours(tmp_path, capsys):
    published = write_published(tmp_path / "published", "keye_vl_preview")
    ours = write_ours(tmp_path / "ours", "keye_vl_preview")
    gone, cut = "model.language_model.layers.0.mlp.gate_proj.weight", "model.projector.linear_1.bias"
    before = load_file(ours / "model.safetensors")
    rows, (length,) = list(before[gone].shape), before[cut].shape

    def change(tensors):
        del tensors[gone]
        tensors["model.language_model.layers.7.extra"] = torch.ones(3)
        tensors[cut] = tensors[cut][:-1]

    edit(ours, change)
    code, out, _ = run(capsys, published, ours)
    assert code == 1
    assert f"{gone}: only in A (bfloat16 {rows})" in out
    assert "model.language_model.layers.7.extra: only in B (float32 [3])" in out
    assert f"{cut}: shape [{length}] in A, [{length - 1}] in B" in out
    verdict = out.splitlines()[-1]
    for words in ("1 tensor differs", "1 tensor is only in A", "1 tensor is only in B"):
        assert words in verdict
    lost = -before[gone].numel() + 3 - 1
    assert f"it differs by {lost:+,}" in out and "the arithmetic does not close" in out


def test_missing_tensor_of_two_published_folders(tmp_path, capsys):
    a, b = (write_published(tmp_path / name, "keye_vl_2") for name in "ab")
    name = "model.layers.1.self_attn.sa_indexer.k_norm.bias"
    edit(b, lambda tensors: tensors.pop(name))
    code, out, _ = run(capsys, a, b)
    assert code == 1 and f"{name}: only in A (bfloat16 [16])" in out and "it differs by -16" in out


def test_published_folder_that_is_not_whole_cannot_be_compared_with_ours(tmp_path, capsys):
    published = write_published(tmp_path / "published", "keye_vl_2")
    ours = write_ours(tmp_path / "ours", "keye_vl_2")
    name = "model.layers.1.self_attn.sa_indexer.k_norm.bias"
    edit(published, lambda tensors: tensors.pop(name))
    code, out, err = run(capsys, published, ours)
    assert code == 2 and out == ""
    assert "model.language_model.layers.1.self_attn.indexer.k_norm.bias" in err and str(published) in err


@pytest.mark.parametrize("layout", ["keye_vl_1_5", "keye_vl_671b"])
def test_another_dtype_is_reported_as_such(layout, tmp_path, capsys):
    options = OPTIONS[layout] if layout == "keye_vl_671b" else {}
    published = write_published(tmp_path / "published", layout, **options)
    ours = write_ours(tmp_path / "ours", layout, cast=torch.float32, **options)
    code, out, _ = run(capsys, published, ours)
    assert code == 1 and "have another dtype and equal values (--allow-dtype accepts that)" in out
    assert "lm_head.weight: bfloat16 in A, float32 in B, the values are equal" in out
    code, out, _ = run(capsys, published, ours, "--allow-dtype")
    assert code == 0 and "tensors have another dtype and equal values" in out
    assert "after rounding A to B's dtypes; 1 warning" in out.splitlines()[-1]
    # The other way A is rounded to B's dtype, too.
    assert run(capsys, ours, published, "--allow-dtype")[0] == 0

    edit(ours, lambda tensors: tensors["model.language_model.norm.weight"].add_(0.25))
    code, out, _ = run(capsys, published, ours, "--allow-dtype")
    assert code == 1 and "model.language_model.norm.weight (bfloat16 in A, float32 in B)" in out


def test_router_corrections_cast_to_bfloat16_are_a_difference(tmp_path):
    published = write_published(tmp_path / "published", "keye_vl_671b")
    ours = write_ours(tmp_path / "ours", "keye_vl_671b")
    name = "model.language_model.layers.1.mlp.gate.e_score_correction_bias"
    edit(ours, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    report = verify(published, ours)
    assert [(d.name, d.kind) for d in report.differences] == [(name, "dtype")]
    edit(ours, lambda tensors: tensors.update({name: tensors[name].float()}))
    report = verify(published, ours)
    assert [(d.name, d.kind) for d in report.differences] == [(name, "values")]


class TestFp8:
    @pytest.fixture
    def pair(self, tmp_path):
        return (
            write_published(tmp_path / "published", "keye_vl_671b", fp8=BLOCK, shards=2),
            write_ours(tmp_path / "ours", "keye_vl_671b", fp8=BLOCK),
        )

    def test_kept_scales_give_the_published_bytes(self, pair, capsys):
        code, out, _ = run(capsys, *pair)
        assert code == 0
        assert re.search(r"way back: \d+ tensors quantised again from ours, bit for bit as published", out)

    def test_wrong_kept_scale(self, pair, capsys):
        name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"

        def change(scales):
            scales[name][-1, 2] *= 1.5

        edit(pair[1], change, "fp8_scales.safetensors")
        code, out, _ = run(capsys, *pair)
        assert code == 1
        assert f"way back: {name}: 1 element differs" in out
        assert "way back: model.layers.0.self_attn.kv_a_proj_with_mqa.weight: " in out

    def test_kept_scales_of_two_folders_of_ours(self, pair, tmp_path):
        other = write_ours(tmp_path / "other", "keye_vl_671b", fp8=BLOCK)
        assert verify(pair[1], other).verdict.endswith("bit for bit")
        name = "model.layers.0.mlp.up_proj.weight_scale_inv"
        edit(other, lambda scales: scales[name].mul_(1.5), "fp8_scales.safetensors")
        (difference,) = verify(pair[1], other).differences
        assert difference.name == f"fp8_scales.safetensors: {name}"
        (other / "fp8_scales.safetensors").unlink()
        report = verify(pair[1], other)
        assert report.equal and report.warnings == ["only A holds fp8_scales.safetensors"]

    def test_absent_kept_scales(self, pair, capsys):
        (pair[1] / "fp8_scales.safetensors").unlink()
        code, out, _ = run(capsys, *pair)
        assert code == 0
        assert "warning: the way back to fp8 was not checked, because B holds no fp8_scales.safetensors" in out

    def test_wrong_published_scale(self, tmp_path, pair):
        other = write_published(tmp_path / "other", "keye_vl_671b", fp8=BLOCK)
        name = "model.layers.1.mlp.experts.4.up_proj.weight_scale_inv"

        def change(tensors):
            tensors[name][3, 1] *= 1.0078125

        edit(other, change)
        (difference,) = verify(pair[0], other).differences
        assert difference.name == name and difference.index == (3, 1)
        differences = {difference.name for difference in verify(other, pair[1]).differences}
        assert "model.language_model.layers.1.mlp.experts.gate_up_proj" in differences
        assert f"way back: {name}" in differences

    def test_scale_that_is_no_number(self, pair, capsys):
        published, ours = pair
        name = "model.layers.2.self_attn.o_proj.weight_scale_inv"
        file = next(f for f in published.glob("model-*.safetensors") if name in load_file(f))

        def change(tensors):
            tensors[name][0, 0] = float("nan")

        edit(published, change, file.name)
        code, out, err = run(capsys, ours, published)
        assert code == 2 and out == "" and name in err and "B (" in err

    def test_dequantised_and_fp8_publications_are_equal(self, pair, tmp_path):
        """The same model published in bfloat16."""
        raw, tensors = published_checkpoint("keye_vl_671b", fp8=BLOCK)
        meant = dequantised(tensors, BLOCK)
        plain = {
            name: meant[name].bfloat16() if tensors[name].dtype == torch.float8_e4m3fn else tensors[name]
            for name in meant
        }
        folder = write_published(tmp_path / "bf16", "keye_vl_671b")
        save_file(plain, folder / "model.safetensors")
        report = verify(pair[0], folder)
        assert report.equal and report.names == "our names", report.verdict


def test_not_a_number_is_equal_to_its_own_bits_only(tmp_path):
    a = write_ours(tmp_path / "a", "keye_vl_1_5")
    b = write_ours(tmp_path / "b", "keye_vl_1_5")
    name = "model.language_model.norm.weight"

    def put(bits):
        def change(tensors):
            tensors[name].view(torch.int16)[4] = bits

        return change

    for folder in (a, b):
        edit(folder, put(0x7FC1))
    assert verify(a, b).equal
    edit(b, put(0x7FC2))
    report = verify(a, b)
    (difference,) = report.differences
    assert difference.index == (4,) and difference.max_abs_difference != difference.max_abs_difference
    assert report.to_json()["differences"][0]["max_abs_difference"] == "nan"
    # Zero and minus zero are different bits, too.
    edit(a, put(0))
    edit(b, put(-0x8000))
    (difference,) = verify(a, b).differences
    assert difference.max_abs_difference == 0.0


def test_at_most_twenty_differences_are_listed(tmp_path, capsys):
    a = write_ours(tmp_path / "a", "keye_vl_1_5")
    b = write_ours(tmp_path / "b", "keye_vl_1_5", seed=1)
    report = verify(a, b)
    tensors = len(load_file(a / "model.safetensors"))
    assert len(report.differences) == 20 and report.more_differences == tensors - 20
    _, out, _ = run(capsys, a, b)
    assert f"  and {tensors - 20} more" in out and out.count("largest difference") == 20
    assert f"DIFFERENT: {tensors} tensors differ" in out


def test_text_checkpoint_against_a_model_with_a_new_tower(tmp_path, capsys):
    published = write_published(tmp_path / "published", "deepseek_v3")
    ours = write_ours(tmp_path / "ours", "deepseek_v3")
    new = sum("visual" in name or "projector" in name for name in load_file(ours / "model.safetensors"))
    code, out, _ = run(capsys, published, ours)
    assert code == 0
    assert f"A is a text checkpoint: {new} tensors of tower and projector are in B only and were not compared" in out
    edit(ours, lambda tensors: tensors["model.language_model.norm.weight"].add_(0.25))
    assert run(capsys, ours, published)[0] == 1


def test_configurations(tmp_path, capsys):
    a = write_published(tmp_path / "a", "keye_vl_1_5")
    b = write_published(tmp_path / "b", "keye_vl_1_5")
    edit_config(b, eos_token_id=3, transformers_version="4.0.0")
    code, out, _ = run(capsys, a, b)
    assert code == 0 and "which no weight depends on" in out and "text_config.eos_token_id" in out
    edit_config(b, rope_theta=1000000)
    code, out, _ = run(capsys, a, b)
    assert code == 1
    assert "text_config.rope_parameters.rope_theta: 8000000.0 in A, 1000000.0 in B (changes what is computed)" in out
    assert "the configurations compute differently (text_config.rope_parameters.rope_theta)" in out


def test_files_beside_the_weights(tmp_path, capsys):
    a = write_published(tmp_path / "a", "keye_vl_1_5")
    b = write_published(tmp_path / "b", "keye_vl_1_5")
    template = json.loads((b / "chat_template.json").read_text())
    (b / "chat_template.json").write_text(json.dumps(template, indent=7))
    tokenizer = json.loads((b / "tokenizer_config.json").read_text())
    (b / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 7}))
    (b / "vocab.json").unlink()
    code, out, _ = run(capsys, a, b)
    assert code == 0
    assert "chat_template.json: same" in out and "tokenizer.json: same" in out
    assert "tokenizer_config.json: different" in out and "vocab.json: only in A" in out
    assert "warning: tokenizer_config.json differs\n" in out


@pytest.mark.parametrize(
    ("layout", "options"), [("keye_vl_671b", {"fp8": True}), ("keye_vl_2", {"experts": "unfused", "resaved": True})]
)
def test_what_the_converter_writes_is_equal_both_ways(layout, options, tmp_path):
    published = write_published(tmp_path / "published", layout, shards=2, **options)
    convert(published, tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", to="published", max_shard_size="1MB", progress=False)
    there = verify(published, tmp_path / "ours")
    assert there.equal and there.names == "our names", there.verdict
    assert ("bit for bit as published" in there.way_back) == ("fp8" in options)
    back = verify(published, tmp_path / "back")
    assert back.equal and back.names == f"{layout} names", back.verdict
    assert verify(tmp_path / "back", tmp_path / "ours").equal


def test_json(tmp_path, capsys):
    a = write_ours(tmp_path / "a", "keye_vl_2")
    b = write_ours(tmp_path / "b", "keye_vl_2")
    code, out, _ = run(capsys, a, b, "--json")
    report = json.loads(out)
    assert code == 0 and report["equal"] is True and report["verdict"].startswith("EQUAL")
    assert report["compared"] == len(load_file(a / "model.safetensors"))
    edit(b, flip_lowest_bit)
    code, out, _ = run(capsys, a, b, "--json")
    report = json.loads(out)
    assert code == 1 and report["equal"] is False
    assert report["differences"][0]["index"] == [7, 11]
    code, out, _ = run(capsys, a, tmp_path / "none", "--json")
    assert code == 2 and json.loads(out)["equal"] is None


def test_folders_that_cannot_be_compared(tmp_path, capsys):
    good = write_ours(tmp_path / "good", "keye_vl_1_5")

    def refused(folder: Path) -> str:
        code, out, err = run(capsys, good, folder)
        assert (code, out) == (2, "") and err.startswith("verify: ") and str(folder) in err
        assert "Traceback" not in err
        return err

    assert "is no folder" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "it holds no config.json" in refused(tmp_path / "empty")
    other = write_ours(tmp_path / "other", "keye_vl_1_5")
    edit_config(other, architectures=["LlamaForCausalLM"], model_type="llama")
    assert "LlamaForCausalLM" in refused(other)
    cut = write_ours(tmp_path / "cut", "keye_vl_1_5")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-10])
    assert "truncated" in refused(cut)
    (cut / "model.safetensors").unlink()
    torch.save({}, cut / "pytorch_model.bin")
    assert "pickle" in refused(cut)
    (cut / "config.json").write_text("{")
    refused(cut)


def test_reads_are_small_whatever_the_tensor(tmp_path, monkeypatch):
    """A tensor of 96 MiB is never held as a whole."""
    rows, width = 1536, 16384
    header = {"x": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}
    text = json.dumps(header).encode()
    for name in "ab":
        with open(tmp_path / f"{name}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + rows * width * 4)
    with open(tmp_path / "b.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3f")
    sizes = []
    read = Checkpoint.read

    def recorded(self, *arguments):
        tensor = read(self, *arguments)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", recorded)
    streams = []
    for name in "ab":
        checkpoint = Checkpoint.open(tmp_path / f"{name}.safetensors")
        streams.append(stored_stream("x", checkpoint, checkpoint["x"]))
    done = []
    (difference,) = compare(*streams, done.append)
    assert difference.index == (rows - 1, width - 1) and difference.elements == 1
    assert max(sizes) <= 32 * 2**20 and sum(sizes) == 2 * rows * width * 4 == 2 * sum(done)


def test_pieces_that_stop_early_prove_nothing():
    whole = TensorStream("x", (4, 2), torch.float32, lambda: iter([torch.zeros(4, 2)]))
    half = TensorStream("x", (4, 2), torch.float32, lambda: iter([torch.zeros(2, 2)]))
    ragged = TensorStream("x", (4, 2), torch.float32, lambda: iter([torch.zeros(1, 2), torch.zeros(3, 2)]))
    assert compare(whole, ragged) == [] == compare(ragged, whole)
    for pair in ((whole, half), (half, whole), (half, half)):
        with pytest.raises(ValueError, match="x: the pieces of A and B hold 4 elements in common, the tensor 8"):
            compare(*pair)


def test_scalars_and_empty_tensors():
    for shape in ((), (0, 3), (3, 0)):
        one = TensorStream("x", shape, torch.float32, lambda shape=shape: iter([torch.ones(shape)]))
        two = TensorStream("x", shape, torch.float32, lambda shape=shape: iter([2 * torch.ones(shape)]))
        assert compare(one, one) == []
        assert len(compare(one, two)) == (shape == ())
    assert compare(one, TensorStream("x", (0,), torch.float32, lambda: iter([])))[0].kind == "shape"


def test_a_config_with_an_impossible_value_is_a_sentence(tmp_path, capsys):
    ours = write_ours(tmp_path / "ours", "keye_vl_2")
    config = json.loads((ours / "config.json").read_text())
    edit_config(ours, text_config={**config["text_config"], "hidden_size": "x"})
    code, out, err = run(capsys, ours, ours)
    assert code == 2 and out == "" and "hidden_size" in err and err.count("\n") == 1
