"""The `config.json`, `generation_config.json` and `preprocessor_config.json` of tiny published checkpoints.

Sizes are small and, where the layout lets them be, pairwise different.
"""

import copy

from tests.conversion.published_tokenizer import GQA_LAYOUTS, VISION_LAYOUTS, vocabulary, vocabulary_size

_ARCHITECTURES = {
    "keye_vl_preview": ("KeyeForConditionalGeneration", "Keye"),
    "keye_vl_1_5": ("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"),
    "keye_vl_671b": ("KeyeVLMoeForConditionalGeneration", "KeyeVLMoe"),
    "keye_vl_2": ("KeyeVL2MoeForConditionalGeneration", "KeyeVL2"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "deepseek_v3"),
    "deepseek_v32": ("DeepseekV32ForCausalLM", "deepseek_v32"),
}
_AUTO_MAP = {
    "keye_vl_preview": {
        "AutoConfig": "configuration_keye.KeyeConfig",
        "AutoModel": "modeling_keye.KeyeForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_keye.KeyeForConditionalGeneration",
    },
    "keye_vl_1_5": {
        "AutoConfig": "configuration_keye_vl_1_5.KeyeVL1_5Config",
        "AutoModel": "modeling_keye_vl_1_5.KeyeVL1_5ForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_keye_vl_1_5.KeyeVL1_5ForConditionalGeneration",
    },
    "keye_vl_671b": {"AutoConfig": "configuration_deepseek.KeyeVLMoeConfig"},
    "keye_vl_2": {
        "AutoConfig": "configuration_keye_vl_2.KeyeVL2Config",
        "AutoModel": "modeling_keye_topk_mask_30ba3b.KeyeVL2MoeForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_keye_topk_mask_30ba3b.KeyeVL2MoeForConditionalGeneration",
    },
}


def _qwen_text(layout: str) -> dict:
    # Experts' sides are multiples of 8 only because grouped products of 16-bit numbers ask for it.
    text = {
        "hidden_size": 56,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": {"keye_vl_preview": 1000000, "keye_vl_1_5": 8000000, "keye_vl_2": 10000000}[layout],
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 6, 8]},
        "max_position_embeddings": {"keye_vl_preview": 4096, "keye_vl_1_5": 8192, "keye_vl_2": 16384}[layout],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 3,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
        "use_cache": True,
    }
    if layout == "keye_vl_2":
        text.update(
            moe_intermediate_size=40,
            num_experts=9,
            num_experts_per_tok=3,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            router_aux_loss_coef=0.001,
            output_router_logits=False,
            sa_config={
                "indexer_head_dim": 16,
                "indexer_num_heads": 5,
                "indexer_num_kv_heads": 1,
                "kv_chunk_size": 512,
                "q_chunk_size": 512,
                "topk": 16,
            },
        )
    return text


def _deepseek_text(layout: str) -> dict:
    text = {
        "hidden_size": 152,
        "intermediate_size": 164,
        "moe_intermediate_size": 176,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
        "q_lora_rank": 136,
        "kv_lora_rank": 132,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "ep_size": 1,
        "hidden_act": "silu",
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 2560,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "num_nextn_predict_layers": 0 if layout == "keye_vl_671b" else 1,
    }
    if layout == "deepseek_v32":
        text.update(index_n_heads=5, index_head_dim=14, index_topk=16)
    return text


_VISION = {
    "architectures": ["SiglipVisionModel"],
    "model_type": "siglip_vision_model",
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 70,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "attention_dropout": 0.0,
    "add_cross_attention": False,
    "_attn_implementation_autoset": True,
    # What every configuration of the library used to write next to its own fields.
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "num_beams": 1,
    "output_attentions": False,
    "torch_dtype": "bfloat16",
}


def published_config(
    layout: str, *, indexer: bool = True, square: bool | str = False, fp8: bool | tuple[int, int] = False, **overrides
) -> dict:
    """The original, flat `config.json`.

    Overrides replace keys; those in `vision_config` and `sa_config` are merged into it, and None removes a key there.
    """
    architecture, model_type = _ARCHITECTURES[layout]
    tokens = {token: number for number, token in enumerate(vocabulary(layout))}
    config = {"architectures": [architecture], "model_type": model_type}
    if layout in _AUTO_MAP:
        config["auto_map"] = dict(_AUTO_MAP[layout])
    config.update(_qwen_text(layout) if layout in GQA_LAYOUTS else _deepseek_text(layout))
    config["vocab_size"] = vocabulary_size(layout)
    config["torch_dtype"] = "bfloat16"
    config["transformers_version"] = "4.41.2" if layout == "keye_vl_preview" else "4.52.4"
    if layout in GQA_LAYOUTS:
        config.update(bos_token_id=tokens["<|endoftext|>"], eos_token_id=tokens["<|im_end|>"])
    else:
        config.update(bos_token_id=0, eos_token_id=1)
    if layout in VISION_LAYOUTS:
        config["vision_config"] = copy.deepcopy(_VISION)
        for key in ("vision_start", "vision_end"):
            config[f"{key}_token_id"] = tokens[f"<|{key}|>"]
        if layout == "keye_vl_preview":
            config["vision_token_id"] = tokens["<|vision_pad|>"]
        for key in ("image", "video"):
            config[f"{key}_token_id"] = tokens[f"<|{key}_pad|>"]
        if layout != "keye_vl_preview":
            # Read by the published processors, and no token of the prompt ever has it.
            config["fast_video_token_id"] = len(tokens)
    if layout == "keye_vl_2" and not indexer:
        del config["sa_config"]
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128] if fp8 is True else list(fp8),
        }
    if square:  # an expert weight with two equal sides loads in either orientation
        config["hidden_size"] = 64
        config["moe_intermediate_size"] = {True: 32, "gate_up": 32, "down": 64}[square]
    for key, value in overrides.items():
        if key in ("vision_config", "sa_config") and isinstance(value, dict) and key in config:
            merged = {**config[key], **value}
            config[key] = {name: item for name, item in merged.items() if item is not None}
        else:
            config[key] = value
    return config


def generation_config(layout: str) -> dict:
    tokens = {token: number for number, token in enumerate(vocabulary(layout))}
    if layout not in GQA_LAYOUTS:
        return {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "top_p": 0.95}
    end, stop = tokens["<|endoftext|>"], tokens["<|im_end|>"]
    return {
        "bos_token_id": end,
        "eos_token_id": [stop, end],
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }


def preprocessor_config(layout: str) -> dict:
    return {
        "auto_map": {
            "AutoImageProcessor": "image_processing_keye.SiglipImageProcessor",
            "AutoProcessor": "processing_keye.KeyeProcessor",
        },
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": 1003520,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "processor_class": "KeyeProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "temporal_patch_size": 1,
    }


_TOP_LEVEL = (
    "architectures model_type auto_map vision_config image_token_id video_token_id vision_start_token_id "
    "vision_end_token_id vision_token_id fast_video_token_id transformers_version torch_dtype dtype "
    "quantization_config tie_word_embeddings"
).split()


def resaved_config(config: dict) -> dict:
    """What fine-tuners write: the library has rewritten the rope type and stored it under both names."""
    config = copy.deepcopy(config)
    if scaling := config.get("rope_scaling"):
        kind = {"mrope": "default"}.get(scaling["type"], scaling["type"])
        config["rope_scaling"] = {**scaling, "type": kind, "rope_type": kind}
    return {**config, "_name_or_path": "Kwai-Keye/some-model", "transformers_version": "4.52.4"}


def rope_parameters_config(config: dict) -> dict:
    """What version 5 of the library writes: `rope_parameters` with theta inside, `dtype` in place of `torch_dtype`."""
    config = resaved_config(config)
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    return {**config, "transformers_version": "5.17.0"}


def nested_config_of(config: dict) -> dict:
    """The text keys moved into `text_config`."""
    top = {key: value for key, value in config.items() if key in _TOP_LEVEL}
    text = {key: value for key, value in config.items() if key not in _TOP_LEVEL}
    return {**top, "text_config": {**text, "tie_word_embeddings": False, "model_type": f"{config['model_type']}_text"}}
