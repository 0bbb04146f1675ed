"""Configurations: round trips, presets, parameter counts of the published models, and every refused contradiction."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from modeling_keye import KeyeConfig, KeyeForVideoQA, KeyeTextConfig, KeyeVisionConfig
from modeling_keye.configuration_keye import AUTO_MAP, INDEXED_LAYER_TYPE
from modeling_keye.presets_keye import PRESETS
from tests.model.factories import TEXT_CONFIGS, TOKENS, tiny_config

GQA = {
    "attention_type": "gqa",
    "indexer_type": None,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def plain(config) -> dict:
    """Everything but the folder that the configuration came from."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def rope(**extra) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, **extra}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"patch_size": 0}, "`patch_size` is 0; it must be at least 1"),
        ({"spatial_merge_size": 0}, "`spatial_merge_size` is 0; it must be at least 1"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0; it must be at least 1"),
        ({"num_channels": 1}, "`num_channels` is 1; frames come in three colours, so it must be 3"),
        ({"encode_chunk_patches": 0}, "`encode_chunk_patches` is 0; it must be at least 1"),
        ({"temporal_patch_size": 2}, "`temporal_patch_size` is 2; the Keye tower encodes each frame alone"),
        ({"video_attention": "window"}, "`video_attention` is 'window'; it must be one of 'frame', 'clip'"),
        ({"projector_norm": "none"}, "`projector_norm` is 'none'; it must be one of 'post_merge', 'pre_merge'"),
        (
            {"hidden_size": 100},
            "`hidden_size` 100 with `num_attention_heads` 16 gives no head size that is a multiple of 4",
        ),
        (
            {"hidden_size": 96},
            "`hidden_size` 96 with `num_attention_heads` 16 gives no head size that is a multiple of 4",
        ),
        ({"image_size": 13}, "`image_size` 13 is smaller than `patch_size` 14"),
    ],
)
def test_contradictions_in_the_vision_part_are_refused(settings, sentence):
    with pytest.raises(ValueError) as error:
        KeyeVisionConfig(**settings)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attention_type": "mha"}, "`attention_type` is 'mha'; it must be one of 'mla', 'gqa'"),
        ({"indexer_type": "v4"}, "`indexer_type` is 'v4'; it must be one of 'deepseek_v32', 'keye_vl_2', None"),
        ({"scoring_func": "tanh"}, "`scoring_func` is 'tanh'; it must be one of 'sigmoid', 'softmax'"),
        *(
            ({name: 0}, f"`{name}` is 0; it must be at least 1")
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "q_lora_rank",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "index_topk",
                "index_n_heads",
                "index_head_dim",
                "anchor_stride",
                "prefill_chunk_tokens",
                "max_position_embeddings",
                "moe_intermediate_size",
                "num_experts_per_tok",
            )
        ),
        ({"local_window": -1}, "`local_window` is -1; it must be at least 0"),
        ({"n_shared_experts": -1}, "`n_shared_experts` is -1; it must be at least 0"),
        ({"intermediate_size": 0}, "`intermediate_size` is 0; it must be at least 1"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps` is -1.0; it must be a positive number"),
        ({"pad_token_id": 129280}, "`pad_token_id` 129280 is outside the vocabulary of 129280"),
        ({**GQA, "num_attention_heads": 0}, "`num_attention_heads` is 0; it must be at least 1"),
        ({"attention_dropout": 0.1}, "`attention_dropout` is 0.1; the decoder has no attention dropout"),
        (
            {**GQA, "indexer_type": "deepseek_v32"},
            "reads the query latent of MLA, but there is none (`attention_type='gqa'`",
        ),
        (
            {"q_lora_rank": None},
            "reads the query latent of MLA, but there is none (`attention_type='mla'`, `q_lora_rank=None`)",
        ),
        ({"index_head_dim": 32}, "`index_head_dim` 32 is smaller than `qk_rope_head_dim` 64"),
        ({"indexer_type": "keye_vl_2", "index_head_dim": 65}, "`index_head_dim` is 65; the keye_vl_2 indexer"),
        ({**GQA, "num_key_value_heads": 3}, "`num_attention_heads` 4 is not a multiple of `num_key_value_heads` 3"),
        ({"qk_rope_head_dim": 63}, "The rotary dimension is 63; it must be even"),
        ({**GQA, "head_dim": 15}, "The rotary dimension is 15; it must be even"),
        (
            {"rope_parameters": rope(rope_type="dynamic", factor=2.0)},
            "`rope_type` 'dynamic' chooses its frequencies by the length of a call",
        ),
        ({"rope_parameters": rope(rope_type="mrope")}, "`rope_type` is 'mrope'; it must be one of default,"),
        ({**GQA, "rope_parameters": rope(mrope_section=[4, 4])}, "`mrope_section` [4, 4] must hold three numbers"),
        ({**GQA, "rope_parameters": rope(mrope_section=[2, 3, 4])}, "add up to half the rotary dimension (8)"),
        (
            {**GQA, "rope_parameters": rope(mrope_section=[2, 3, 3], mrope_interleaved=True)},
            "`mrope_interleaved=True` is the Qwen3-VL layout",
        ),
        (
            {
                **GQA,
                "indexer_type": "keye_vl_2",
                "index_head_dim": 8,
                "rope_parameters": rope(mrope_section=[2, 3, 3]),
            },
            "`mrope_section` [2, 3, 3] scaled to `index_head_dim` 8 gives [1, 1, 1]",
        ),
        (
            {
                "indexer_type": None,
                "local_window": None,
                "anchor_stride": None,
                "layer_types": ["indexed_attention"] * 61,
            },
            "`indexer_type`, `local_window` and `anchor_stride` are all None",
        ),
        ({"layer_types": ["sliding_attention"] * 61}, "`layer_types` holds ['sliding_attention']"),
        (
            {"layer_types": ["full_attention"]},
            "`num_hidden_layers` (61) must be equal to the number of `layer_types` (1)",
        ),
        (
            {"mlp_layer_types": ["sparse"]},
            "`num_hidden_layers` (61) must be equal to the number of `mlp_layer_types` (1)",
        ),
        ({"mlp_layer_types": ["moe"] * 61}, "`mlp_layer_types` entries must be in"),
        ({"num_experts_per_tok": 300}, "`num_experts_per_tok` 300 exceeds `n_routed_experts` 256"),
        ({"n_group": 7}, "`n_routed_experts` 256 cannot be split in `n_group` 7 equal groups"),
        ({"topk_group": 9}, "of which `topk_group` 9 are kept"),
        ({"n_routed_experts": 8}, "a group needs two experts or more"),
        ({"n_routed_experts": 16, "topk_group": 2}, "do not allow `num_experts_per_tok` 8"),
        ({"scoring_func": "softmax"}, "`scoring_func='softmax'` has no groups, but `n_group` is 8 and `topk_group` 4"),
    ],
)
def test_contradictions_in_the_text_part_are_refused(settings, sentence):
    # The lengths and names of the two lists are checked by the library.
    with pytest.raises((ValueError, StrictDataclassClassValidationError)) as error:
        KeyeTextConfig(**settings)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"video_position_ids": "chunk"}, "`video_position_ids` is 'chunk'; it must be one of 'frame', 'clip'"),
        (
            {"image_token_id": 5, "video_token_id": 5},
            "`image_token_id` and `video_token_id` are both 5; they must differ",
        ),
        *(
            ({name: value}, f"`{name}` {value} is outside the vocabulary of 129280")
            for name in TOKENS
            for value in (-1, 129280)
        ),
        ({"text_config": {"index_topk": 0}}, "`index_topk` is 0; it must be at least 1"),
        ({"vision_config": {"patch_size": 0}}, "`patch_size` is 0; it must be at least 1"),
        (
            {"text_config": {"model_type": "llama"}},
            "`text_config` has the `model_type` 'llama'; it must be 'keye_text', or left out",
        ),
    ],
)
def test_contradictions_between_the_parts_are_refused(settings, sentence):
    with pytest.raises(ValueError) as error:
        KeyeConfig(**settings)
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", ["64", 64.0, None])
def test_a_setting_of_the_wrong_type_is_refused(value):
    with pytest.raises(Exception, match="index_topk.*expected int"):
        KeyeTextConfig(index_topk=value)


def test_an_unknown_preset_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="no preset 'keye-9000'; known: flagship, keye-tiny, keye-vl-1.5-8b"):
        KeyeConfig.from_preset("keye-9000")


@pytest.mark.compat
@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_config_to_json_and_back(kind, tmp_path):
    config = tiny_config(kind)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    assert KeyeConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["text_config"]["hidden_size"] == config.text_config.hidden_size


@pytest.mark.compat
@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_config_save_and_load(kind, tmp_path):
    config = tiny_config(kind)
    config.save_pretrained(tmp_path)
    for loaded in (KeyeConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is KeyeConfig
        assert plain(loaded) == plain(config)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.compat
def test_composite_config_sub_configs_load_alone(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    text, vision = KeyeTextConfig.from_pretrained(tmp_path), KeyeVisionConfig.from_pretrained(tmp_path)
    assert plain(text) == plain(config.text_config)
    assert plain(vision) == plain(config.vision_config)
    text.save_pretrained(tmp_path / "text")
    assert plain(KeyeTextConfig.from_pretrained(tmp_path / "text")) == plain(text)


@pytest.mark.compat
def test_config_accepts_sub_configs_as_objects_and_as_dicts():
    text, vision = KeyeTextConfig(index_topk=7), KeyeVisionConfig(num_hidden_layers=3)
    from_objects = KeyeConfig(text_config=text, vision_config=vision)
    from_dicts = KeyeConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    assert from_objects.to_dict() == from_dicts.to_dict()
    assert from_dicts.text_config.index_topk == 7 and from_dicts.vision_config.num_hidden_layers == 3


@pytest.mark.compat
@pytest.mark.parametrize("config_class", [KeyeConfig, KeyeTextConfig, KeyeVisionConfig])
def test_config_init_without_params(config_class):
    config = config_class()
    assert config.to_diff_dict()["model_type"] == config_class.model_type


def test_config_common_properties():
    config = KeyeConfig()
    text = config.get_text_config()
    assert text is config.text_config
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(text, name) > 0
    text.num_experts = 12
    assert text.n_routed_experts == text.num_local_experts == 12
    assert text.qk_head_dim == text.qk_nope_head_dim + text.qk_rope_head_dim


def test_config_can_be_initialized_with_num_labels():
    config = KeyeConfig(num_labels=3)
    assert config.num_labels == 3 and len(config.id2label) == 3


def test_the_defaults_are_the_flagship():
    config, text = KeyeConfig(), KeyeTextConfig()
    assert KeyeConfig.from_preset("flagship").to_dict() == config.to_dict()
    assert (text.attention_type, text.indexer_type, text.scoring_func) == ("mla", "deepseek_v32", "sigmoid")
    assert (text.local_window, text.anchor_stride, text.index_topk) == (128, 64, 2048)
    assert text.layer_types == [INDEXED_LAYER_TYPE] * 61
    assert text.mlp_layer_types == ["dense"] * 3 + ["sparse"] * 58
    assert config.vision_config.video_attention == "frame" and config.video_position_ids == "frame"


def test_both_names_of_the_indexed_layer_type_are_read():
    for name in ("indexed_attention", "deepseek_sparse_attention"):
        assert KeyeTextConfig(layer_types=[name] * 61).layer_types == [INDEXED_LAYER_TYPE] * 61


@pytest.mark.parametrize("name", ["local_window", "anchor_stride", "indexer_type"], ids=lambda name: f"without_{name}")
def test_each_part_of_the_selection_can_be_off(name):
    text = KeyeTextConfig(**{name: None})
    assert text.has_selection and text.layer_types == [INDEXED_LAYER_TYPE] * 61


def test_without_any_part_every_layer_is_dense():
    text = KeyeTextConfig(indexer_type=None, local_window=None, anchor_stride=None)
    assert not text.has_selection and set(text.layer_types) == {"full_attention"}


@pytest.mark.compat
def test_rope_settings_of_older_files_are_read():
    text = KeyeTextConfig(**GQA, rope_theta=5e5, rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3]})
    assert text.rope_parameters["rope_theta"] == 5e5 and text.mrope_section == [2, 3, 3]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_take_overrides_and_survive_saving(name, tmp_path):
    config = KeyeConfig.from_preset(name, tie_word_embeddings=True)
    assert config.tie_word_embeddings
    config.save_pretrained(tmp_path)
    assert plain(KeyeConfig.from_pretrained(tmp_path)) == plain(config)
    assert KeyeConfig.from_preset(name).tie_word_embeddings is False


# What published files hold beyond our modules: a table for packed images that no published code reads, and the
# attention-pooling head of SigLIP.
PACKING_TABLE = 37_748_736
POOLING_HEAD = 15_238_352


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("keye-vl-8b-preview", 8_696_828_736 - POOLING_HEAD - PACKING_TABLE),
        ("keye-vl-2.0-30b-a3b", 31_122_082_160 - PACKING_TABLE),
        ("keye-vl-671b-a37b", 671_493_691_248),
    ],
)
def test_presets_have_the_parameters_of_the_published_models(name, published):
    with torch.device("meta"):
        model = KeyeForVideoQA(KeyeConfig.from_preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    # The published sum counts the routers' correction bias, which a checkpoint stores and which is a buffer here.
    count += sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias"))
    assert count == published


def test_15_differs_from_preview_by_the_projector_norm():
    counts = {}
    for name in ("keye-vl-8b-preview", "keye-vl-1.5-8b"):
        with torch.device("meta"):
            counts[name] = KeyeForVideoQA(KeyeConfig.from_preset(name)).num_parameters()
    assert counts["keye-vl-1.5-8b"] - counts["keye-vl-8b-preview"] == 2 * (4 * 1152 - 1152)


def test_the_flagship_builds_on_the_meta_device():
    config = KeyeConfig()
    with torch.device("meta"):
        model = KeyeForVideoQA(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    text = config.text_config
    indexer = (
        text.q_lora_rank * text.index_n_heads * text.index_head_dim
        + text.hidden_size * (text.index_head_dim + text.index_n_heads)
        + 2 * text.index_head_dim
    )
    indexers = sum(parameter.numel() for key, parameter in model.named_parameters() if ".indexer." in key)
    assert indexers == 61 * indexer
    biases = 58 * text.n_routed_experts
    assert model.num_parameters() == 671_493_691_248 - biases + indexers


def test_keye_tiny_is_a_few_million_parameters():
    with torch.device("meta"):
        model = KeyeForVideoQA(KeyeConfig.from_preset("keye-tiny"))
    assert 1e6 < model.num_parameters() < 12e6
