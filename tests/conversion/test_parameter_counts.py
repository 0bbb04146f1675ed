"""The published configurations, through `our_config`, have the parameters that the published files hold."""

import pytest
import torch
from torch import nn

from modeling_keye import KeyeConfig, KeyeForVideoQA
from modeling_keye.published_config_keye import our_config
from tests.conversion.full_size import FULL_SIZE

# What published files hold beyond our modules: positions for packed images, and the pooling head of SigLIP.
PACKING, HEAD = 37_748_736, 15_238_352
TOWER = 412_987_248


@pytest.fixture(scope="module")
def models() -> dict[str, KeyeForVideoQA]:
    built = {}
    for name, raw in FULL_SIZE.items():
        with torch.device("meta"):
            built[name] = KeyeForVideoQA(KeyeConfig(**our_config(raw)))
    return built


def stored(module: nn.Module) -> int:
    """Numbers in a checkpoint of this module; the routers' correction bias is a buffer here."""
    biases = (buffer for name, buffer in module.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(parameter.numel() for parameter in module.parameters()) + sum(bias.numel() for bias in biases)


def indexers(model: KeyeForVideoQA) -> list[int]:
    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    return [stored(attention.indexer) for attention in attentions if attention.indexer is not None]


@pytest.mark.parametrize(
    ("name", "published", "left_out"),
    [
        ("keye_vl_preview", 8_696_828_736, PACKING + HEAD),
        ("keye_vl_671b", 671_493_691_248, 0),
        ("keye_vl_2", 31_122_082_160, PACKING),
    ],
)
def test_totals(models, name, published, left_out):
    assert stored(models[name]) == published - left_out


@pytest.mark.parametrize(
    ("name", "projector", "text"),
    [
        ("keye_vl_preview", 40_119_040, 8_190_735_360),
        ("keye_vl_1_5", 40_125_952, 8_190_735_360),
        ("keye_vl_671b", 54_284_800, 671_026_419_200),
        ("keye_vl_2", 30_686_720, 30_532_122_624),
    ],
)
def test_parts(models, name, projector, text):
    model = models[name]
    decoder = stored(model.model.language_model) + stored(model.lm_head) - sum(indexers(model))
    assert stored(model.model.visual) == TOWER
    assert stored(model.model.projector) == projector
    assert decoder == text


def test_indexers(models):
    assert indexers(models["keye_vl_2"]) == [2_261_184] * 48
    per_layer = 64 * 128 * 1536 + 128 * 7168 + 2 * 128 + 64 * 7168
    assert indexers(models["deepseek_v32"]) == [per_layer] * 61
    assert not any(indexers(models[name]) for name in FULL_SIZE if name not in ("keye_vl_2", "deepseek_v32"))


def test_a_text_checkpoint_gets_the_published_tower(models):
    for name in ("deepseek_v3", "deepseek_v32"):
        model = models[name]
        assert stored(model.model.visual) + stored(model.model.projector) == TOWER + 54_284_800
        assert stored(model) - sum(indexers(model)) == 671_493_691_248


def test_an_attached_indexer_is_all_that_is_added(models):
    config = KeyeConfig(**our_config(FULL_SIZE["keye_vl_1_5"])).with_indexer()
    with torch.device("meta"):
        model = KeyeForVideoQA(config)
    per_layer = (16 * 64 + 16) * 4096 + 64 * 4096 + 64 + 128
    assert indexers(model) == [per_layer] * 36
    assert stored(model) - stored(models["keye_vl_1_5"]) == 36 * per_layer
