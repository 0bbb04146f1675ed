"""Published `config.json` files in every form they come in, what they amount to, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch

from conversion.published_config import published_config
from modeling_keye import KeyeConfig, KeyeForVideoQA
from modeling_keye.configuration_keye import INDEXED_LAYER_TYPE, KeyeTextConfig, KeyeVisionConfig
from modeling_keye.layouts_keye import LAYOUTS, detect_layout, fp8_block
from modeling_keye.presets_keye import PRESETS
from modeling_keye.published_config_keye import our_config
from tests.conversion.full_size import (
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    FULL_SIZE,
    KEYE_1_5,
    KEYE_2_0,
    KEYE_671B,
    PREVIEW,
    VISION,
)
from tests.conversion.published import published_config as tiny_config
from tests.conversion.published import write_published

GQA = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_2")
LATENT = ("keye_vl_671b", "deepseek_v3", "deepseek_v32")
PRESET_OF = {
    "keye_vl_preview": "keye-vl-8b-preview",
    "keye_vl_1_5": "keye-vl-1.5-8b",
    "keye_vl_671b": "keye-vl-671b-a37b",
    "keye_vl_2": "keye-vl-2.0-30b-a3b",
}


def write(folder: Path, raw: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def changed(raw: dict, **keys) -> dict:
    """A copy of `raw` with these keys; "part.key" reaches into a part, `...` removes."""
    raw = copy.deepcopy(raw)
    for name, value in keys.items():
        *parts, key = name.split(".")
        place = raw
        for part in parts:
            place = place[part]
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return raw


def forms(raw: dict) -> dict[str, dict]:
    """The same model as different releases of Transformers write it."""
    scaling, theta = raw["rope_scaling"], raw["rope_theta"]
    kind = "default" if scaling["type"] == "mrope" else scaling["type"]
    both = {**scaling, "type": kind, "rope_type": kind}
    newest = {**raw, "rope_parameters": {**both, "rope_theta": theta}, "dtype": raw["torch_dtype"]}
    newest = {k: v for k, v in newest.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    if "num_experts" in newest:
        newest["num_local_experts"] = newest.pop("num_experts")
    at_the_top = ("architectures", "model_type", "vision_config", "torch_dtype", "quantization_config")
    top = {k: v for k, v in raw.items() if k in at_the_top or k.endswith("_token_id") and k[:3] not in ("bos", "eos")}
    nested = {**top, "text_config": {k: v for k, v in raw.items() if k not in top} | {"model_type": "some_text"}}
    noise = {
        "_name_or_path": "someone/some-model",
        "id2label": {"0": "LABEL_0"},
        "num_beams": 1,
        "max_length": 20,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "pretraining_tp": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "sliding_window": 4096,
        "transformers_version": "4.52.4",
        "something_new": [1, 2],
    }
    return {
        "resaved": {**raw, "rope_scaling": both},
        "rope_parameters": {**newest, "layer_types": ["full_attention"] * raw["num_hidden_layers"]},
        "nested": nested,
        "nested and flat": {**raw, "text_config": {**nested["text_config"], "rope_scaling": both}},
        "noise": {**noise, **{k: v for k, v in raw.items() if k != "sliding_window"}, "use_sliding_window": False},
        "by model type": {**raw, "architectures": ["SomethingElse"]} if "model_type" in raw else raw,
        "without architectures": {**raw, "architectures": None} if "model_type" in raw else raw,
    }


def test_preview_is_what_the_file_says():
    ours = our_config(PREVIEW)
    assert ours == {
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "tokens_per_second": 2,
            "rope_theta": 10000.0,
            "initializer_range": 0.02,
            "video_attention": "clip",
            "projector_norm": "pre_merge",
        },
        "text_config": {
            "attention_type": "gqa",
            "indexer_type": None,
            "local_window": None,
            "anchor_stride": None,
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "pad_token_id": None,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "mlp_layer_types": ["dense"] * 36,
            "first_k_dense_replace": 36,
            "scoring_func": "softmax",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 0,
        },
        "video_position_ids": "clip",
        "tie_word_embeddings": False,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("name", PRESET_OF)
def test_presets_agree_with_the_published_files(name):
    config, preset = KeyeConfig(**our_config(FULL_SIZE[name])), KeyeConfig.from_preset(PRESET_OF[name])
    assert config.vision_config.to_dict() == preset.vision_config.to_dict()
    assert config.video_position_ids == preset.video_position_ids
    found, expected = config.text_config.to_dict(), preset.text_config.to_dict()
    if name != "keye_vl_671b":  # settings of experts that are not there stay open in a preset
        expected = {key: expected[key] for key in PRESETS[PRESET_OF[name]]["text_config"]}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_form_of_a_file_is_the_same_model(name):
    raw = FULL_SIZE[name]
    expected = our_config(raw)
    assert detect_layout(raw) is LAYOUTS[name]
    for form, variant in forms(raw).items():
        before = copy.deepcopy(variant)
        assert our_config(variant) == expected, form
        assert variant == before, form


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name):
    for raw in (FULL_SIZE[name], tiny_config(name)):
        ours = our_config(raw)
        config = KeyeConfig(**ours)
        written = published_config(config.to_dict(), LAYOUTS[name])
        assert detect_layout(written) is LAYOUTS[name]
        assert our_config(written) == ours
        assert KeyeConfig(**our_config(written)).to_dict() == config.to_dict()
        # What the published file says about the model, it says again; labels, versions and code references aside.
        aside = {"auto_map", "transformers_version", "quantization_config", "initializer_factor", "ep_size"}
        aside |= {"num_nextn_predict_layers", "router_aux_loss_coef", "output_router_logits", "model_type"}
        for key in set(raw) - aside - {"vision_config"}:
            assert written[key] == raw[key], key
        vision = {key: raw["vision_config"][key] for key in VISION} if "vision_config" in raw else {}
        assert {key: written["vision_config"][key] for key in vision} == vision


def test_experts_and_indexer_of_20():
    text = our_config(KEYE_2_0)["text_config"]
    assert (text["index_n_heads"], text["index_head_dim"], text["index_topk"]) == (16, 64, 2048)
    assert text["mlp_layer_types"] == ["sparse"] * 48
    assert (text["intermediate_size"], text["moe_intermediate_size"], text["head_dim"]) == (6144, 768, 128)
    every_second = our_config(changed(KEYE_2_0, decoder_sparse_step=2, mlp_only_layers=[1]))["text_config"]
    assert every_second["mlp_layer_types"] == ["dense"] * 3 + ["sparse", "dense"] * 22 + ["sparse"]
    written = published_config(
        KeyeConfig(**our_config(KEYE_2_0) | {"text_config": every_second}).to_dict(), LAYOUTS["keye_vl_2"]
    )
    assert our_config(written)["text_config"] == every_second
    # No dense layer, no size of one; renormalised unless the file says otherwise.
    text = our_config(changed(KEYE_2_0, intermediate_size=..., norm_topk_prob=...))["text_config"]
    assert (text["intermediate_size"], text["norm_topk_prob"]) == (768, True)
    assert our_config(changed(KEYE_2_0, norm_topk_prob=False))["text_config"]["norm_topk_prob"] is False


def test_missing_indexer_settings_are_not_the_shipped_ones():
    text = our_config(changed(KEYE_2_0, sa_config={}))["text_config"]
    assert text["indexer_type"] == "keye_vl_2"
    assert (text["index_n_heads"], text["index_head_dim"], text["index_topk"]) == (4, 128, 2048)
    assert our_config(changed(KEYE_2_0, sa_config=...))["text_config"]["indexer_type"] is None


def test_the_dense_sibling_of_20():
    expert_keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers")
    raw = changed(KEYE_2_0, architectures=["KeyeVL2ForConditionalGeneration"], **dict.fromkeys(expert_keys, ...))
    ours = our_config(raw)
    assert ours["text_config"]["mlp_layer_types"] == ["dense"] * 48
    assert ours["text_config"]["indexer_type"] == "keye_vl_2"
    written = published_config(KeyeConfig(**ours).to_dict(), LAYOUTS["keye_vl_2"])
    assert written["architectures"] == ["KeyeVL2ForConditionalGeneration"] and our_config(written) == ours


def test_deepseek_settings():
    text = our_config(KEYE_671B)["text_config"]
    assert text["attention_type"] == "mla" and text["indexer_type"] is None
    assert text["mlp_layer_types"] == ["dense"] * 3 + ["sparse"] * 58
    assert text["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    assert "quantization_config" not in our_config(KEYE_671B) and our_config(KEYE_671B)["dtype"] == "bfloat16"
    assert our_config(changed(KEYE_671B, torch_dtype=...))["dtype"] == "bfloat16"
    assert our_config(changed(KEYE_671B, torch_dtype="float8_e4m3fn"))["dtype"] == "bfloat16"
    text = our_config(DEEPSEEK_V32)["text_config"]
    assert (text["indexer_type"], text["index_n_heads"], text["index_head_dim"]) == ("deepseek_v32", 64, 128)
    with_indexer = changed(KEYE_671B, index_topk=9, index_n_heads=3, index_head_dim=128)
    assert our_config(with_indexer)["text_config"]["indexer_type"] == "deepseek_v32"
    # Null says something: no query latent, no shared expert, no scaled positions.
    text = our_config(changed(DEEPSEEK_V3, q_lora_rank=None, n_shared_experts=None, rope_scaling=None))["text_config"]
    assert text["q_lora_rank"] is None and text["n_shared_experts"] == 0
    assert text["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    text = our_config(changed(DEEPSEEK_V3, moe_layer_freq=2))["text_config"]
    assert text["mlp_layer_types"] == ["dense"] * 4 + ["sparse", "dense"] * 28 + ["sparse"]


def test_token_ids():
    ids = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    assert [our_config(KEYE_671B)[name] for name in ids] == [129270, 129271, 129272, 129273]
    assert our_config(KEYE_671B)["fast_video_token_id"] == 129274
    # A text checkpoint has none: the unused end of its vocabulary, as in the flagship.
    assert [our_config(DEEPSEEK_V3)[name] for name in ids] == [129275, 129276, 129277, 129278]
    assert [getattr(KeyeConfig(), name) for name in ids] == [129275, 129276, 129277, 129278]
    nested = changed(KEYE_1_5, image_token_id=..., text_config={"image_token_id": 151655})
    assert our_config(nested) == our_config(KEYE_1_5)
    # The library's own defaults must not stand in for what a file leaves open.
    bare = our_config(changed(KEYE_1_5, bos_token_id=..., eos_token_id=...))["text_config"]
    assert bare["bos_token_id"] is None and bare["eos_token_id"] is None


def test_a_decoder_with_biases_keeps_them():
    ours = our_config(changed(tiny_config("keye_vl_1_5"), attention_bias=True))
    with torch.device("meta"):
        model = KeyeForVideoQA(KeyeConfig(**ours))
    assert model.model.language_model.layers[0].self_attn.q_proj.bias is not None


REFUSED = [
    (PREVIEW, {"use_sliding_window": True}, "use_sliding_window"),
    (PREVIEW, {"attention_dropout": 0.1}, "attention_dropout"),
    (PREVIEW, {"tie_word_embeddings": True}, "tie_word_embeddings"),
    (PREVIEW, {"mlp_bias": True}, "mlp_bias"),
    (PREVIEW, {"num_experts": 8}, "num_experts"),
    (PREVIEW, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    (PREVIEW, {"rope_scaling.mrope_interleaved": True}, "mrope_interleaved"),
    (PREVIEW, {"mrope_interleaved": True}, "mrope_interleaved"),
    (PREVIEW, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (PREVIEW, {"rope_scaling.type": "dynamic"}, "dynamic"),
    (PREVIEW, {"rope_scaling.rope_type": "yarn"}, "must agree"),
    (PREVIEW, {"rope_scaling.factor": 4.0}, "factor"),
    (PREVIEW, {"rope_scaling": None}, "mrope_section"),
    (PREVIEW, {"rope_scaling": [16, 24, 24]}, "rope_scaling"),
    (PREVIEW, {"rope_parameters": {"rope_theta": 5e5, "mrope_section": [16, 24, 24]}}, "rope_theta"),
    (PREVIEW, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one object"),
    (PREVIEW, {"rope_parameters": {"mrope_section": [24, 20, 20]}}, "rope_parameters"),
    (PREVIEW, {"text_config": {"hidden_size": 2048}}, "hidden_size"),
    (PREVIEW, {"text_config": {"rope_theta": 5e5}}, "rope_theta"),
    (PREVIEW, {"text_config": "none"}, "text_config"),
    (PREVIEW, {"vision_config": ...}, "vision_config"),
    (PREVIEW, {"vision_config.temporal_patch_size": 4}, "temporal_patch_size"),
    (PREVIEW, {"vision_config.window_size": 112}, "window_size"),
    (PREVIEW, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    (KEYE_2_0, {"scoring_func": "sigmoid"}, "scoring_func"),
    (KEYE_2_0, {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size"),
    (KEYE_2_0, {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
    (KEYE_2_0, {"sa_config.indexer_num_kv_heads": 2}, "indexer_num_kv_heads"),
    (KEYE_671B, {"scoring_func": "softmax"}, "scoring_func"),
    (KEYE_671B, {"topk_method": "greedy"}, "topk_method"),
    (KEYE_671B, {"rope_scaling.mrope_section": [8, 12, 12]}, "mrope_section"),
    (PREVIEW, {"sa_config": KEYE_2_0["sa_config"]}, "sa_config.*keye_vl_preview"),
    (KEYE_1_5, {"sa_config": {}}, "sa_config.*keye_vl_1_5"),
    (KEYE_1_5, {"logit_scale": 0.5}, "logit_scale.*only 1 or null"),
    (KEYE_1_5, {"final_logit_softcapping": 30.0}, "final_logit_softcapping.*only null"),
    (KEYE_1_5, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (KEYE_1_5, {"use_qk_norm": False}, "use_qk_norm.*only true or null"),
    (DEEPSEEK_V3, {"use_qk_norm": True}, "use_qk_norm.*only false or null"),
    (KEYE_2_0, {"residual_multiplier": 0.22}, "residual_multiplier"),
    (KEYE_2_0, {"embedding_multiplier": 12}, "embedding_multiplier"),
    (KEYE_2_0, {"attention_multiplier": 0.01}, "attention_multiplier"),
    (KEYE_2_0, {"logits_scaling": 16}, "logits_scaling"),
    (KEYE_2_0, {"attn_output_gate": True}, "attn_output_gate"),
    # Damaged values.
    (KEYE_1_5, {"num_hidden_layers": "3"}, "`num_hidden_layers` '3': it must be a whole number"),
    (KEYE_1_5, {"num_hidden_layers": True}, "num_hidden_layers"),
    (KEYE_1_5, {"num_hidden_layers": 10**12}, "num_hidden_layers"),
    (KEYE_1_5, {"vocab_size": "x"}, "vocab_size"),
    (KEYE_1_5, {"head_dim": 128.0}, "head_dim"),
    (KEYE_1_5, {"rms_norm_eps": float("nan")}, "rms_norm_eps.*a number"),
    (KEYE_1_5, {"vision_config.patch_size": "14"}, "vision_config has `patch_size` '14'"),
    (KEYE_1_5, {"rope_scaling.mrope_section": "abc"}, "mrope_section"),
    (KEYE_1_5, {"torch_dtype": "float7"}, "`torch_dtype` 'float7': it must be one of bfloat16"),
    (KEYE_1_5, {"dtype": ["bfloat16"]}, "`dtype`.*a string"),
    (KEYE_1_5, {"architectures": 5}, "architectures.*a list of strings"),
    (KEYE_2_0, {"sa_config": 5}, "sa_config.*an object"),
    (KEYE_2_0, {"sa_config.topk": "2048"}, "sa_config has `topk` '2048'"),
    (KEYE_2_0, {"mlp_only_layers": 3}, "mlp_only_layers"),
    (KEYE_671B, {"quantization_config": "fp8"}, "quantization_config.*an object"),
    (KEYE_671B, {"quantization_config.weight_block_size": [0, 0]}, "weight_block_size"),
    (KEYE_671B, {"moe_layer_freq": 0}, "moe_layer_freq"),
    (KEYE_671B, {"rope_scaling.factor": ...}, "rope_scaling lacks `factor`"),
    (DEEPSEEK_V32, {"indexer_types": ["full", "shared"]}, "indexer_types"),
    (DEEPSEEK_V32, {"index_topk_freq": 4}, "index_topk_freq"),
]


@pytest.mark.parametrize(
    ("raw", "keys", "named"), REFUSED, ids=lambda value: ",".join(value) if isinstance(value, dict) else None
)
def test_what_would_compute_something_else_is_refused(raw, keys, named):
    with pytest.raises(ValueError, match=named):
        our_config(changed(raw, **keys))


def test_harmless_settings_of_other_decoders_are_read_over():
    neutral = {"logit_scale": 1.0, "final_logit_softcapping": None, "attn_output_gate": False, "residual_multiplier": 1}
    assert our_config({**KEYE_1_5, **neutral, "use_qk_norm": True}) == our_config(KEYE_1_5)
    assert our_config({**DEEPSEEK_V3, **neutral, "use_qk_norm": False}) == our_config(DEEPSEEK_V3)


def places(raw: dict, above: str = ""):
    for key, value in raw.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from places(value, f"{above}{key}.")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_file_is_a_configuration_or_a_sentence(name):
    raw = tiny_config(name, fp8=name in LATENT)
    refused = 0
    for place in places(raw):
        for value in ("x", [], {"a": 1}, 0, True, float("nan"), 10**400, None, ...):
            damaged = changed(raw, **{place: value})
            try:
                fp8_block(damaged)
                KeyeConfig(**our_config(damaged))
            except ValueError as error:
                refused += 1
                assert str(error).endswith("."), (place, value)
    assert refused > 200


def test_fp8_block():
    assert fp8_block(KEYE_1_5) == fp8_block(KEYE_671B) == (128, 128)
    other = changed(KEYE_671B, **{"quantization_config.weight_block_size": [64, 32]})
    assert fp8_block(other) == (64, 32)
    assert fp8_block({"text_config": {"quantization_config": other["quantization_config"]}}) == (64, 32)
    for block in ([128], [0, 0], "x", [128, 128, 1], [128, True], [128.0, 128]):
        with pytest.raises(ValueError, match="`weight_block_size` .* two whole numbers from 1 up"):
            fp8_block(changed(KEYE_671B, **{"quantization_config.weight_block_size": block}))
    with pytest.raises(ValueError, match="`quantization_config` 'fp8': it must be an object"):
        fp8_block({"quantization_config": "fp8"})


SIZES = {
    **dict.fromkeys(GQA, ("num_key_value_heads", "head_dim", "rope_theta", "image_token_id", "video_token_id")),
    **dict.fromkeys(LATENT, ("q_lora_rank", "kv_lora_rank", "n_group", "first_k_dense_replace", "n_shared_experts")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_size_is_never_a_default(name):
    raw = FULL_SIZE[name]
    common = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps")
    for key in (*common, "max_position_embeddings", *SIZES[name]):
        with pytest.raises(ValueError, match=f"lacks `{key}`"):
            our_config(changed(raw, **{key: ...}))
    for key in ("hidden_size", "patch_size", "num_hidden_layers", "image_size") if "vision_config" in raw else ():
        with pytest.raises(ValueError, match=f"vision_config lacks `{key}`"):
            our_config(changed(raw, **{f"vision_config.{key}": ...}))
    extra = {"keye_vl_preview": "intermediate_size", "keye_vl_2": "moe_intermediate_size", "deepseek_v32": "index_topk"}
    if name in extra:
        with pytest.raises(ValueError, match=f"lacks `{extra[name]}`"):
            our_config(changed(raw, **{extra[name]: ...}))
    if name == "keye_vl_2":
        with pytest.raises(ValueError, match="lacks `num_experts`"):
            our_config(changed(raw, num_experts=...))


def test_other_models_are_refused_and_ours_need_nothing():
    with pytest.raises(ValueError, match="'Qwen3ForCausalLM'.*'qwen3'.*KeyeVL2MoeForConditionalGeneration"):
        detect_layout({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    with pytest.raises(ValueError, match="None"):
        detect_layout({})
    assert detect_layout({"architectures": ["KeyeForVideoQA"], "model_type": "keye"}) is None
    assert detect_layout(KeyeConfig().to_dict()) is None
    assert detect_layout(KeyeTextConfig().to_dict()) is None
    with pytest.raises(ValueError, match="nothing to translate"):
        our_config(KeyeConfig().to_dict())
    # The class decides where the type says something else: a fine-tuner's 671B may call itself DeepSeek.
    assert detect_layout({**KEYE_671B, "model_type": "deepseek_v3"}).name == "keye_vl_671b"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_config": {"local_window": 64}}, "local_window"),
        ({"text_config": {"anchor_stride": 64}}, "anchor_stride"),
        ({"vision_config": {"projector_norm": "pre_merge"}}, "projector_norm"),
        ({"vision_config": {"video_attention": "clip"}}, "video_attention"),
        ({"video_position_ids": "clip"}, "video_position_ids"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"text_config": {"layer_types": [INDEXED_LAYER_TYPE] * 47 + ["full_attention"]}}, "layer_types"),
        ({"text_config": {"layer_types": ["full_attention"] * 48}}, "layer_types"),
        ({"text_config": {"n_shared_experts": 1}}, "n_shared_experts"),
        ({"text_config": {"routed_scaling_factor": 2.5}}, "routed_scaling_factor"),
        ({"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}}, "mrope_section"),
    ],
)
def test_what_a_layout_cannot_say_is_not_published_in_it(changes, named):
    config = KeyeConfig.from_preset("keye-vl-2.0-30b-a3b", **changes)
    with pytest.raises(ValueError, match=named):
        published_config(config.to_dict(), LAYOUTS["keye_vl_2"])


def test_the_wrong_layout_is_refused():
    configs = {name: KeyeConfig(**our_config(raw)).to_dict() for name, raw in FULL_SIZE.items()}
    pairs = [("keye_vl_2", "keye_vl_1_5"), ("keye_vl_preview", "keye_vl_1_5"), ("keye_vl_671b", "keye_vl_2")]
    for source, target in [*pairs, ("keye_vl_1_5", "deepseek_v3"), ("deepseek_v32", "deepseek_v3")]:
        with pytest.raises(ValueError, match=f"a {target} checkpoint"):
            published_config(configs[source], LAYOUTS[target])
    mixed = ["dense", "sparse", "sparse", "dense", *["sparse"] * 57]
    config = KeyeConfig(**changed(our_config(KEYE_671B), **{"text_config.mlp_layer_types": mixed}))
    with pytest.raises(ValueError, match="mlp_layer_types"):
        published_config(config.to_dict(), LAYOUTS["keye_vl_671b"])


@pytest.mark.parametrize("name", ["keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "deepseek_v3"])
def test_a_layout_without_an_indexer_cannot_carry_one(name):
    config = KeyeConfig(**our_config(FULL_SIZE[name])).with_indexer()
    with pytest.raises(ValueError, match=f"`indexer_type` is .* but a {name} checkpoint can only say None; .*keep"):
        published_config(config.to_dict(), LAYOUTS[name])


def test_ignorable_names():
    head, packing = "visual.vision_model.head.probe", "visual.vision_model.embeddings.packing_position_embedding.weight"
    further, rotary = "model.layers.61.eh_proj.weight", "model.layers.3.self_attn.rotary_emb.inv_freq"
    expected = {
        "keye_vl_preview": (head, packing, rotary),
        "keye_vl_1_5": (head, packing, rotary),
        "keye_vl_671b": (head, packing, further, rotary),
        "keye_vl_2": (packing, rotary),
        "deepseek_v3": (further, rotary),
        "deepseek_v32": (further, rotary),
    }
    used = (
        "visual.vision_model.embeddings.position_embedding.weight",
        "visual.vision_model.header.weight",
        "model.layers.60.mlp.gate.weight",
        "lm_head.weight",
        "rotary_emb.weight",
    )
    for name, layout in LAYOUTS.items():
        found = tuple(key for key in (head, packing, further, rotary, *used) if layout.is_ignorable(key, 61))
        assert found == expected[name], name


# Folders and the Hub.


def without_source(config) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "_commit_hash")}


@pytest.mark.compat
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_is_read_like_one_of_ours(name, tmp_path):
    raw = tiny_config(name)
    expected = KeyeConfig(**our_config(raw))
    write(tmp_path / "inner", raw)
    config, unused = KeyeConfig.from_pretrained(tmp_path / "inner", return_unused_kwargs=True, something=3)
    assert without_source(config) == without_source(expected)
    assert unused == {"something": 3}
    assert "KeyeForVideoQA" in config.auto_map["AutoModel"]
    assert KeyeConfig.from_pretrained(tmp_path, subfolder="inner").to_dict() == config.to_dict()
    assert KeyeConfig.from_pretrained(tmp_path / "inner" / "config.json").to_dict() == config.to_dict()
    text, vision = (part.from_pretrained(tmp_path / "inner") for part in (KeyeTextConfig, KeyeVisionConfig))
    assert text.to_dict() == expected.text_config.to_dict()
    assert vision.to_dict() == expected.vision_config.to_dict()
    # Saved, it is ours.
    config.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "keye" and detect_layout(saved) is None
    again = KeyeConfig.from_pretrained(tmp_path / "ours")
    assert again.text_config.to_dict() == config.text_config.to_dict()


@pytest.mark.compat
def test_overrides_of_a_part_change_only_their_fields(tmp_path):
    raw = tiny_config("keye_vl_2")
    write(tmp_path, raw)
    config = KeyeConfig.from_pretrained(
        tmp_path, text_config={"index_topk": 5}, vision_config={"encode_chunk_patches": 7}, video_token_id=3
    )
    assert (config.text_config.index_topk, config.vision_config.encode_chunk_patches) == (5, 7)
    assert config.text_config.hidden_size == raw["hidden_size"] and config.video_token_id == 3
    assert config.vision_config.hidden_size == raw["vision_config"]["hidden_size"]
    with pytest.raises(Exception, match="num_hidden_layers"):
        KeyeConfig.from_pretrained(tmp_path, text_config={"num_hidden_layers": 2})


def hub_copy(cache: Path, repo: str, folder: Path) -> None:
    """What the Hub's client leaves in its cache after downloading the files of `folder`."""
    base = cache / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    (base / "snapshots").mkdir()
    folder.rename(base / "snapshots" / commit)


@pytest.mark.compat
def test_a_hub_name_is_read_like_a_folder(tmp_path):
    write_published(tmp_path / "folder", "keye_vl_2", indexer=True, shards=2)
    expected = KeyeConfig.from_pretrained(tmp_path / "folder").text_config.to_dict()
    hub_copy(tmp_path / "cache", "someone/Keye-VL-2.0", tmp_path / "folder")
    config = KeyeConfig.from_pretrained("someone/Keye-VL-2.0", cache_dir=tmp_path / "cache", local_files_only=True)
    assert config.text_config.to_dict() == expected and config.text_config.indexer_type == "keye_vl_2"


@pytest.mark.compat
@pytest.mark.parametrize("shards", [1, 2])
def test_without_stored_indexers_attention_is_dense(shards, tmp_path):
    raw = tiny_config("keye_vl_2")
    for where, indexer in (("with", True), ("without", False)):
        write_published(tmp_path / where, "keye_vl_2", indexer=indexer, shards=shards)
        write(tmp_path / where, raw)
    text = KeyeConfig.from_pretrained(tmp_path / "without").text_config
    assert text.indexer_type is None and set(text.layer_types) == {"full_attention"}
    text = KeyeConfig.from_pretrained(tmp_path / "with").text_config
    assert text.indexer_type == "keye_vl_2" and text.layer_types == [INDEXED_LAYER_TYPE] * 3
    assert KeyeTextConfig.from_pretrained(tmp_path / "without").indexer_type is None
    assert KeyeConfig.from_pretrained(tmp_path, subfolder="without").text_config.indexer_type is None
    # Without weights the file is all there is to go by, and what is damaged is for the loader to report.
    assert KeyeConfig.from_pretrained(write(tmp_path / "bare", raw)).text_config.indexer_type == "keye_vl_2"
    (write(tmp_path / "torn", raw) / "model.safetensors").write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f{")
    assert KeyeConfig.from_pretrained(tmp_path / "torn").text_config.indexer_type == "keye_vl_2"
    hub_copy(tmp_path / "cache", "someone/dense", tmp_path / "without")
    config = KeyeConfig.from_pretrained("someone/dense", cache_dir=tmp_path / "cache", local_files_only=True)
    assert config.text_config.indexer_type is None


def test_a_folder_of_another_model_is_refused(tmp_path):
    write(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 8})
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        KeyeConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="empty"):
        KeyeTextConfig.from_pretrained(write(tmp_path, {}))


def test_our_files_are_left_alone(tmp_path):
    config = KeyeConfig.from_preset("keye-tiny")
    config.save_pretrained(tmp_path)
    raw, _ = KeyeConfig.get_config_dict(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert {key: value for key, value in raw.items() if key != "_commit_hash"} == on_disk


# An indexer for a checkpoint that has none.


def test_with_indexer():
    config = KeyeConfig(**our_config(KEYE_1_5))
    before = config.to_dict()
    sparse = config.with_indexer()
    text = sparse.text_config
    assert (text.indexer_type, text.index_n_heads, text.index_head_dim) == ("keye_vl_2", 16, 64)
    # Everything is kept until it is trained.
    assert text.index_topk == text.max_position_embeddings == 131072
    assert text.layer_types == [INDEXED_LAYER_TYPE] * 36 and text.mlp_layer_types == ["dense"] * 36
    assert config.to_dict() == before and config.text_config.indexer_type is None
    assert {**sparse.to_dict(), "text_config": None} == {**before, "text_config": None}
    assert text.rope_parameters == config.text_config.rope_parameters
    latent = KeyeConfig(**our_config(KEYE_671B)).with_indexer(index_topk=2048).text_config
    assert (latent.indexer_type, latent.index_n_heads, latent.index_head_dim) == ("deepseek_v32", 64, 128)
    assert latent.index_topk == 2048
    with pytest.raises(ValueError, match="indexer 'keye_vl_2' already"):
        sparse.with_indexer()
    with pytest.raises(ValueError, match="mrope_section"):
        config.with_indexer(index_head_dim=10)


def test_an_attached_indexer_changes_nothing_until_it_is_trained(tmp_path):
    folder = write_published(tmp_path, "keye_vl_1_5", dtype=torch.float32)
    config = KeyeConfig.from_pretrained(folder)
    dense = KeyeForVideoQA.from_pretrained(folder, dtype=torch.float32).eval()
    sparse = KeyeForVideoQA.from_pretrained(
        folder, config=config.with_indexer(index_n_heads=4, index_head_dim=16), dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(dense(ids).logits, sparse(ids).logits)
    indexer = sparse.model.language_model.layers[1].self_attn.indexer
    assert 0.5 < indexer.q_proj.weight.std() / config.text_config.initializer_range < 1.5
    assert torch.equal(indexer.k_norm.weight, torch.ones(16)) and not indexer.k_norm.bias.any()
    # The published code of 1.5 has no indexer; that of 2.0 has.
    with pytest.raises(ValueError, match="'keye_vl_2', but a keye_vl_1_5 checkpoint.*write that layout"):
        published_config(sparse.config.to_dict(), LAYOUTS["keye_vl_1_5"])
    written = published_config(sparse.config.to_dict(), LAYOUTS["keye_vl_2"])
    assert written["sa_config"]["topk"] == config.text_config.max_position_embeddings


# What generation takes from the folder.


@pytest.mark.compat
@pytest.mark.parametrize("name", ["keye_vl_preview", "keye_vl_671b"])
def test_generation_settings_of_the_folder_stay_and_placeholders_are_never_written(name, tmp_path):
    folder = write_published(tmp_path, name)
    raw, published = (json.loads((folder / file).read_text()) for file in ("config.json", "generation_config.json"))
    model = KeyeForVideoQA.from_pretrained(folder)
    settings = model.generation_config
    assert settings.suppress_tokens == [raw["image_token_id"], raw["video_token_id"]]
    for key in set(published) - {"transformers_version", "_from_model_config"}:
        assert getattr(settings, key) == published[key], key
    (folder / "generation_config.json").write_text(json.dumps({**published, "suppress_tokens": [5]}))
    assert KeyeForVideoQA.from_pretrained(folder).generation_config.suppress_tokens == [5]
    (folder / "generation_config.json").unlink()
    settings = KeyeForVideoQA.from_pretrained(folder).generation_config
    assert settings.eos_token_id == raw["eos_token_id"]
    assert settings.suppress_tokens == [raw["image_token_id"], raw["video_token_id"]]
