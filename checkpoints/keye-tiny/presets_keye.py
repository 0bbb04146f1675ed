"""Named configurations: our flagship, the four published Keye checkpoints, and keye-tiny.

Values come from the published `config.json` files where those exist; see `docs/architecture.md` for what is inherited
from the backbone instead. `KeyeConfig.from_preset(name)` turns an entry into a configuration.
"""

_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

_QWEN_TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}

_QWEN3_TEXT = {
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
    "mlp_layer_types": ["dense"] * 36,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

PRESETS: dict[str, dict] = {
    "flagship": {},
    "keye-vl-8b-preview": {
        "vision_config": {**_VISION, "video_attention": "clip", "projector_norm": "pre_merge"},
        "text_config": {
            **_QWEN3_TEXT,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
        "video_position_ids": "clip",
        **_QWEN_TOKENS,
    },
    "keye-vl-1.5-8b": {
        "vision_config": dict(_VISION),
        "text_config": {
            **_QWEN3_TEXT,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 8000000.0, "mrope_section": [16, 24, 24]},
        },
        **_QWEN_TOKENS,
    },
    # The text part holds DeepSeek-V3.1-Terminus values: the published file itself was not available.
    "keye-vl-671b-a37b": {
        "vision_config": dict(_VISION),
        "text_config": {"indexer_type": None, "local_window": None, "anchor_stride": None},
    },
    "keye-vl-2.0-30b-a3b": {
        "vision_config": dict(_VISION),
        "text_config": {
            **_QWEN3_TEXT,
            "indexer_type": "keye_vl_2",
            "index_n_heads": 16,
            "index_head_dim": 64,
            "index_topk": 2048,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "mlp_layer_types": ["sparse"] * 48,
            "scoring_func": "softmax",
            "n_routed_experts": 128,
            "n_shared_experts": 0,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 262144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "mrope_section": [16, 24, 24]},
        },
        **_QWEN_TOKENS,
    },
    # The checkpoint in `checkpoints/keye-tiny`; the vocabulary is the one of `training/tokenizer.py`.
    "keye-tiny": {
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        "text_config": {
            "attention_type": "gqa",
            "indexer_type": "keye_vl_2",
            "vocab_size": 1387,
            "hidden_size": 192,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 48,
            "index_n_heads": 4,
            "index_head_dim": 64,
            "index_topk": 32,
            "local_window": 64,
            "anchor_stride": 64,
            "first_k_dense_replace": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            # Slow enough that some pairs hardly turn within 20,000 frames: time stamps are matched by them.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
            "max_position_embeddings": 262144,
            "initializer_range": 0.06,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
        },
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "image_token_id": 6,
        "video_token_id": 7,
    },
}
