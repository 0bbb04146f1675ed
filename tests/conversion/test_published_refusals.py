"""Published folders that `from_pretrained` refuses: it names the tensor, and nothing has been read by then."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_keye.checkpoint_keye import CheckpointError
from modeling_keye.configuration_keye import KeyeConfig, KeyeVisionConfig
from modeling_keye.modeling_keye import KeyeForVideoQA
from tests.conversion.loading import load_published as load
from tests.conversion.loading import recorded_reads
from tests.conversion.published import published_checkpoint, write_published, write_weights

pytestmark = pytest.mark.compat

LAYER = "model.layers.1"
ATTENTION = f"{LAYER}.self_attn"
MERGED = 144  # four patches of the tiny tower, which is 36 wide


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    return recorded_reads(monkeypatch)


@pytest.fixture
def edited(tmp_path) -> Callable[..., Path]:
    """A folder whose tensors went through `edit`."""

    def make(layout: str, edit: Callable[[dict], object], **options) -> Path:
        folder = write_published(tmp_path / "edited", layout, tokenizer=False, **options)
        _, tensors = published_checkpoint(layout, **options)
        edit(tensors)
        write_weights(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
        return folder

    return make


UNKNOWN = [
    ("keye_vl_preview", f"{ATTENTION}.q_proj.bias"),
    ("keye_vl_preview", "model.layers.3.input_layernorm.weight"),
    ("keye_vl_preview", f"{LAYER}.mlp.gate.weight"),
    ("keye_vl_preview", f"{ATTENTION}.sa_indexer.k_proj.weight"),
    ("keye_vl_1_5", "visual.vision_model.encoder.layers.2.layer_norm1.weight"),
    ("keye_vl_1_5", "mlp_AR.linear_3.weight"),
    ("keye_vl_1_5", "something.else"),
    ("keye_vl_2", f"{LAYER}.mlp.experts.gate_up_proj.weight"),
    ("keye_vl_2", f"{LAYER}.mlp.shared_experts.up_proj.weight"),
    ("keye_vl_2", f"{LAYER}.mlp.gate.e_score_correction_bias"),
    ("keye_vl_2", f"{ATTENTION}.indexer.wk.weight"),
    ("keye_vl_2", "visual.vision_model.head.probe"),
    ("keye_vl_671b", f"{LAYER}.mlp.experts.gate_up_proj"),
    ("keye_vl_671b", f"{ATTENTION}.indexer.wk.weight"),
    ("keye_vl_671b", f"{ATTENTION}.o_proj.bias_scale_inv"),
    ("keye_vl_671b", f"{ATTENTION}.lost_proj.weight_scale_inv"),
    ("deepseek_v3", f"{ATTENTION}.indexer.wk.weight"),
    ("deepseek_v3", "visual.vision_model.post_layernorm.weight"),
    ("deepseek_v32", f"{ATTENTION}.sa_indexer.k_proj.weight"),
]


@pytest.mark.parametrize("layout, name", UNKNOWN)
def test_unknown_tensor_is_named(layout, name, edited, reads):
    folder = edited(layout, lambda tensors: tensors.update({name: torch.ones(3, 5)}))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert name in str(caught.value) and "nothing was loaded" in str(caught.value)
    assert [read for read in reads if not read.endswith("weight_scale_inv")] == []


MISSING = [
    ("keye_vl_preview", "lm_head.weight"),
    ("keye_vl_preview", "mlp_AR.pre_norm.bias"),
    ("keye_vl_1_5", "visual.vision_model.embeddings.position_embedding.weight"),
    ("keye_vl_1_5", f"{LAYER}.mlp.up_proj.weight"),
    ("keye_vl_2", f"{LAYER}.mlp.gate.weight"),
    ("keye_vl_2", f"{LAYER}.mlp.experts.down_proj"),
    ("keye_vl_2", f"{ATTENTION}.sa_indexer.k_norm.bias"),
    ("keye_vl_671b", f"{LAYER}.mlp.gate.e_score_correction_bias"),
    ("keye_vl_671b", f"{LAYER}.mlp.shared_experts.down_proj.weight"),
    ("keye_vl_671b", "mlp_AR.linear_1.weight"),
    ("deepseek_v3", f"{ATTENTION}.q_a_layernorm.weight"),
    ("deepseek_v32", f"{ATTENTION}.indexer.weights_proj.weight"),
]


def words_of(name: str) -> str:
    """The part of a published name that ours shares."""
    return name.removeprefix("model.").removeprefix("mlp_AR.").replace("sa_indexer", "indexer")


@pytest.mark.parametrize("layout, name", MISSING)
def test_missing_tensor_is_named(layout, name, edited, reads):
    folder = edited(layout, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "missing" in str(caught.value) and words_of(name) in str(caught.value)
    assert reads == []


@pytest.mark.parametrize("expert, part", [(0, "gate"), (5, "up"), (11, "down")])
def test_missing_expert_is_named(expert, part, edited):
    name = f"{LAYER}.mlp.experts.{expert}.{part}_proj.weight"
    with pytest.raises(CheckpointError) as caught:
        load(edited("keye_vl_671b", lambda tensors: tensors.pop(name)))
    text = str(caught.value)
    assert "layers.1.mlp.experts" in text and f"{part}_proj" in text and f"expert {expert}" in text


def test_fewer_experts_than_the_configuration_says(edited):
    def without_last(tensors):
        for name in [name for name in tensors if ".mlp.experts.11." in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"shape.*experts.gate_up_proj.*\[11, .*asks for \[12, "):
        load(edited("keye_vl_671b", without_last))


def set_tensor(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


WRONG_SHAPES = [
    # The projector's norm of the other families.
    ("keye_vl_preview", "mlp_AR.pre_norm.weight", (MERGED,)),
    ("keye_vl_2", "mlp_AR.pre_norm.weight", (MERGED // 4,)),
    ("keye_vl_1_5", "model.layers.0.self_attn.q_proj.weight", (56, 192)),
    ("keye_vl_2", f"{LAYER}.mlp.experts.gate_up_proj", (9, 80, 56)),
    ("keye_vl_2", f"{LAYER}.mlp.experts.down_proj", (9, 56, 40)),
    ("keye_vl_2", f"{ATTENTION}.sa_indexer.q_proj.weight", (80, 56)),
    ("keye_vl_671b", f"{ATTENTION}.kv_a_proj_with_mqa.weight", (132, 152)),
    ("keye_vl_671b", f"{LAYER}.mlp.experts.3.up_proj.weight", (152, 176)),
    ("deepseek_v3", "model.embed_tokens.weight", (271, 152)),
]


@pytest.mark.parametrize("layout, name, shape", WRONG_SHAPES)
def test_wrong_shape_is_named(layout, name, shape, edited, reads):
    folder = edited(layout, set_tensor(name, *shape))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(CheckpointError) as caught:
            load(folder, **options)
        assert name in str(caught.value) or words_of(name) in str(caught.value)
    assert reads == []


WRONG_CONFIGURATIONS = [
    ("keye_vl_2", {"head_dim": 10}, "q_proj"),  # hidden_size / num_attention_heads
    ("keye_vl_2", {"moe_intermediate_size": 76}, "experts"),  # intermediate_size
    ("keye_vl_2", {"sa_config": {"indexer_num_heads": 4}}, "indexer.q_proj"),
    ("keye_vl_2", {"mlp_only_layers": [1]}, "layers.1.mlp"),
    ("keye_vl_2", {"num_hidden_layers": 2}, "layers.2."),
    ("keye_vl_671b", {"first_k_dense_replace": 0}, "layers.0.mlp"),
    ("keye_vl_671b", {"n_shared_experts": 1}, "shared_experts"),
    ("keye_vl_671b", {"v_head_dim": 12}, "kv_b_proj"),
    ("keye_vl_1_5", {"vision_config": {"num_hidden_layers": 3}}, "layers.2"),
    ("keye_vl_1_5", {"vision_config": {"image_size": 84}}, "position_embedding"),
]


@pytest.mark.parametrize("layout, overrides, named", WRONG_CONFIGURATIONS)
def test_weights_that_do_not_fit_the_configuration(layout, overrides, named, tmp_path):
    folder = write_published(tmp_path, layout, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    for key, value in overrides.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    if "head_dim" in overrides:
        config["rope_scaling"]["mrope_section"] = [1, 2, 2]
        config["sa_config"]["indexer_head_dim"] = 10
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert named in str(caught.value)


def test_experts_in_both_forms(edited):
    name = f"{LAYER}.mlp.experts.{{}}.{{}}_proj.weight"
    singles = {name.format(e, part): torch.ones(40, 56) for e in range(9) for part in ("gate", "up")}
    singles.update({name.format(e, "down"): torch.ones(56, 40) for e in range(9)})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is stored both"):
        load(edited("keye_vl_2", lambda tensors: tensors.update(singles)))


def test_every_problem_is_listed_at_once(edited):
    def edit(tensors):
        del tensors["lm_head.weight"]
        tensors["model.extra"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(57)

    with pytest.raises(CheckpointError) as caught:
        load(edited("keye_vl_1_5", edit))
    text = str(caught.value)
    assert "lm_head.weight" in text and "model.extra" in text and "norm.weight" in text
    assert "[57]" in text and "[56]" in text


def test_another_model_is_refused(tmp_path):
    folder = write_published(
        tmp_path, "keye_vl_1_5", architectures=["LlavaForConditionalGeneration"], model_type="llava"
    )
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration.*KeyeVL2MoeForConditionalGeneration"):
        KeyeForVideoQA.from_pretrained(folder)


@pytest.mark.parametrize("part", [KeyeConfig, KeyeVisionConfig])
def test_folder_without_configuration(part, tmp_path):
    """The default configuration is the flagship, whose weights nobody wants to see made up."""
    folder = write_published(tmp_path, "keye_vl_1_5", tokenizer=False)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        part.from_pretrained(folder)


def test_only_pickles(tmp_path):
    folder = write_published(tmp_path, "keye_vl_1_5", tokenizer=False)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load(folder)
    with pytest.raises(ValueError, match="convert them to safetensors"):
        load(folder, use_safetensors=False)


def test_bad_fp8_scales_are_named(edited):
    name = f"{ATTENTION}.o_proj.weight_scale_inv"

    def poisoned(value: float):
        def edit(tensors):
            tensors[name][1, 0] = value

        return edit

    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=r"self_attn\.o_proj\.weight_scale_inv.*\[1, 0\]"):
            load(edited("keye_vl_671b", poisoned(value), fp8=True))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight' is stored as fp8 without its 'weight_scale_inv'"):
        load(edited("keye_vl_671b", lambda tensors: tensors.pop(name), fp8=True))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight' has the scale .* is torch.bfloat16"):
        load(edited("keye_vl_671b", set_tensor(name, 2, 1)))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_scale_inv.*\[2, 2\].*\[2, 1\]"):
        load(edited("keye_vl_671b", set_tensor(name, 2, 2), fp8=True))
    expert = f"{LAYER}.mlp.experts.4.up_proj.weight_scale_inv"
    with pytest.raises(CheckpointError, match=r"experts\.4\.up_proj\.weight"):
        load(edited("keye_vl_671b", lambda tensors: tensors.pop(expert), fp8=True))
