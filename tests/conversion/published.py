"""Tiny random checkpoints in the published layouts: what `config.json`, weight files and tokenizer look like on disk.

Written from the description of the published files alone, without a line of the loading or converting code, so that
a test which compares the two compares two readings of that description. Sizes are small and pairwise different where
the layout lets them be; tensors are drawn per name, so the same seed gives the same values in every storage form.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

LAYOUT_NAMES = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "keye_vl_2", "deepseek_v3", "deepseek_v32")
GQA_LAYOUTS = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_2")
VISION_LAYOUTS = (*GQA_LAYOUTS, "keye_vl_671b")
FP8_MAX = 448.0

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

# Tokens of the Qwen-based members, in the order of their ids (151643 and up in the published tokenizer).
_QWEN_TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call>
<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>
<think> </think> <|point_start|> <|point_end|> <|ocr_text_start|> <|ocr_text_end|> <|clip_time_start|>
<|clip_time_end|>
""".split()
_QWEN_SPECIAL = {*_QWEN_TOKENS[:3], *_QWEN_TOKENS[9:14]}
_FRAME_TOKENS = ["<|frame|>", "<|fast_start|>", "<|fast_end|>"]
_DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
_VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

# The published `chat_template.json`: the only one with a branch for images and videos.
_VISUAL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What `tokenizer_config.json` holds instead: text only, visual parts are lost.
_TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def vocabulary(layout: str) -> list[str]:
    """Every token of the layout's tokenizer in the order of its ids: 256 bytes and the added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if layout in GQA_LAYOUTS:
        return [*letters, *_QWEN_TOKENS, *([] if layout == "keye_vl_preview" else _FRAME_TOKENS)]
    visual = [*_VISION_TOKENS, *_FRAME_TOKENS] if layout == "keye_vl_671b" else []
    return [*_DEEPSEEK_TOKENS, *letters, *visual]


def vocabulary_size(layout: str) -> int:
    """Rows of the embedding table: a few more than tokens, as published."""
    return len(vocabulary(layout)) + (17 if layout in GQA_LAYOUTS else 13)


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
        config["vision_config"] = json.loads(json.dumps(_VISION))
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


class _Draw:
    """Random tensors, each a function of the seed and of its name."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.seed, self.dtype = seed, dtype

    def __call__(self, name: str, shape: tuple[int, ...], scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return (offset + scale * torch.randn(shape, generator=generator)).to(self.dtype)

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return self(name, (rows, columns), gain / math.sqrt(columns))

    def norm(self, name: str, size: int, centre: float = 1.0) -> torch.Tensor:
        return self(name, (size,), 0.2 * centre, centre)


# Each block adds little to a small residual stream: small enough that 1e-6 and 1e-5 as epsilon of a norm differ.
_SMALL = 0.02


def _vision_tensors(config: dict, draw: _Draw, head: bool, packing: bool) -> dict[str, torch.Tensor]:
    vision = config["vision_config"]
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    side = vision["image_size"] // patch
    t: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: int, columns: int, gain: float = 1.0, bias: float = 0.2) -> None:
        t[f"{name}.weight"] = draw.linear(f"{name}.weight", rows, columns, gain)
        t[f"{name}.bias"] = draw(f"{name}.bias", (rows,), bias)

    def norm(name: str, size: int, centre: float = 1.0) -> None:
        t[f"{name}.weight"] = draw.norm(f"{name}.weight", size, centre)
        t[f"{name}.bias"] = draw(f"{name}.bias", (size,), 0.2 * centre)

    root = "visual.vision_model"
    weight = draw.linear(f"{root}.embeddings.patch_embedding.weight", width, 3 * patch * patch, 0.01)
    t[f"{root}.embeddings.patch_embedding.weight"] = weight.view(width, 3, patch, patch)
    t[f"{root}.embeddings.patch_embedding.bias"] = draw(f"{root}.embeddings.patch_embedding.bias", (width,), 0.003)
    name = f"{root}.embeddings.position_embedding.weight"
    t[name] = draw(name, (side * side, width), 0.01)
    if packing:
        name = f"{root}.embeddings.packing_position_embedding.weight"
        t[name] = draw(name, (37, width), 0.01)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{root}.encoder.layers.{i}"
        norm(f"{layer}.layer_norm1", width)
        norm(f"{layer}.layer_norm2", width)
        for part in ("q_proj", "k_proj", "v_proj"):
            linear(f"{layer}.self_attn.{part}", width, width, 1.4)
        linear(f"{layer}.self_attn.out_proj", width, width, _SMALL, _SMALL / 4)
        linear(f"{layer}.mlp.fc1", inner, width, 2.0)
        linear(f"{layer}.mlp.fc2", width, inner, _SMALL, _SMALL / 4)
    # So small that the projector's norm sees a variance near its epsilon.
    norm(f"{root}.post_layernorm", width, 0.006)
    if head:
        t[f"{root}.head.probe"] = draw(f"{root}.head.probe", (1, 1, width))
        for part, shape in (("in_proj_weight", (3 * width, width)), ("in_proj_bias", (3 * width,))):
            t[f"{root}.head.attention.{part}"] = draw(f"{root}.head.attention.{part}", shape)
        linear(f"{root}.head.attention.out_proj", width, width)
        norm(f"{root}.head.layernorm", width)
        linear(f"{root}.head.mlp.fc1", inner, width)
        linear(f"{root}.head.mlp.fc2", width, inner)
    merged = width * vision["spatial_merge_size"] ** 2
    preview = config["architectures"][0] == "KeyeForConditionalGeneration"
    norm("mlp_AR.pre_norm", width if preview else merged)
    linear("mlp_AR.linear_1", merged, merged, 2.0)
    linear("mlp_AR.linear_2", config["hidden_size"], merged, _SMALL, _SMALL / 4)
    return t


def _mlp(t: dict, draw: _Draw, name: str, hidden: int, inner: int) -> None:
    for part in ("gate_proj", "up_proj"):
        t[f"{name}.{part}.weight"] = draw.linear(f"{name}.{part}.weight", inner, hidden, 1.5)
    t[f"{name}.down_proj.weight"] = draw.linear(f"{name}.down_proj.weight", hidden, inner, _SMALL)


def _gqa_layer(t: dict, draw: _Draw, config: dict, i: int, experts: str) -> None:
    hidden, dim = config["hidden_size"], config["head_dim"]
    layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
    for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
        name = f"{attention}.{part}_proj.weight"
        t[name] = draw.linear(name, config[heads] * dim, hidden)
    name = f"{attention}.o_proj.weight"
    t[name] = draw.linear(name, hidden, config["num_attention_heads"] * dim, 2 * _SMALL)
    for part in ("q_norm", "k_norm"):
        t[f"{attention}.{part}.weight"] = draw.norm(f"{attention}.{part}.weight", dim, 1.3)
    sa = config.get("sa_config")
    if sa is not None:
        heads, index_dim = sa.get("indexer_num_heads", 4), sa.get("indexer_head_dim", 128)
        name = f"{attention}.sa_indexer.q_proj.weight"
        # Small query rows, so that the epsilon of the norm behind them matters; gates of either sign.
        queries = draw.linear(f"{name}:queries", heads * index_dim, hidden, 0.004)
        gates = draw.linear(f"{name}:gates", heads, hidden, 1.0)
        t[name] = torch.cat([queries, gates])
        name = f"{attention}.sa_indexer.k_proj.weight"
        t[name] = draw.linear(name, index_dim, hidden, 0.004)
        t[f"{attention}.sa_indexer.q_norm.weight"] = draw.norm(f"{attention}.sa_indexer.q_norm.weight", index_dim)
        t[f"{attention}.sa_indexer.k_norm.weight"] = draw.norm(f"{attention}.sa_indexer.k_norm.weight", index_dim)
        t[f"{attention}.sa_indexer.k_norm.bias"] = draw(f"{attention}.sa_indexer.k_norm.bias", (index_dim,), 0.4)
    if "num_experts" not in config or i in config["mlp_only_layers"] or (i + 1) % config["decoder_sparse_step"]:
        _mlp(t, draw, f"{layer}.mlp", hidden, config["intermediate_size"])
        return
    t[f"{layer}.mlp.gate.weight"] = draw.linear(f"{layer}.mlp.gate.weight", config["num_experts"], hidden, 2.0)
    single: dict[str, torch.Tensor] = {}
    for e in range(config["num_experts"]):
        _mlp(single, draw, f"{layer}.mlp.experts.{e}", hidden, config["moe_intermediate_size"])
    if experts == "unfused":
        t.update(single)
        return

    def stacked(part: str) -> torch.Tensor:  # [experts, in, out]
        names = (f"{layer}.mlp.experts.{e}.{part}.weight" for e in range(config["num_experts"]))
        return torch.stack([single[name].T for name in names])

    t[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=2).contiguous()
    t[f"{layer}.mlp.experts.down_proj"] = stacked("down_proj").contiguous()


def _mla_layer(t: dict, draw: _Draw, config: dict, i: int) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, q_latent = config["kv_lora_rank"], config["q_lora_rank"]
    layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
    shapes = {
        "q_a_proj": (q_latent, hidden, 1.0),
        "q_b_proj": (heads * (nope + rope), q_latent, 1.2),
        "kv_a_proj_with_mqa": (latent + rope, hidden, 0.8),
        "kv_b_proj": (heads * (nope + value), latent, 1.2),
        "o_proj": (hidden, heads * value, 2 * _SMALL),
    }
    if q_latent is None:
        del shapes["q_a_proj"], shapes["q_b_proj"]
        shapes["q_proj"] = (heads * (nope + rope), hidden, 1.2)
    else:
        t[f"{attention}.q_a_layernorm.weight"] = draw.norm(f"{attention}.q_a_layernorm.weight", q_latent)
    for part, (rows, columns, gain) in shapes.items():
        t[f"{attention}.{part}.weight"] = draw.linear(f"{attention}.{part}.weight", rows, columns, gain)
    t[f"{attention}.kv_a_layernorm.weight"] = draw.norm(f"{attention}.kv_a_layernorm.weight", latent)
    if "index_topk" in config:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        root = f"{attention}.indexer"
        t[f"{root}.wq_b.weight"] = draw.linear(f"{root}.wq_b.weight", index_heads * index_dim, q_latent)
        t[f"{root}.wk.weight"] = draw.linear(f"{root}.wk.weight", index_dim, hidden, 0.004)
        t[f"{root}.k_norm.weight"] = draw.norm(f"{root}.k_norm.weight", index_dim)
        t[f"{root}.k_norm.bias"] = draw(f"{root}.k_norm.bias", (index_dim,), 0.4)
        t[f"{root}.weights_proj.weight"] = draw.linear(f"{root}.weights_proj.weight", index_heads, hidden)
    if i < config["first_k_dense_replace"] or i % config["moe_layer_freq"]:
        _mlp(t, draw, f"{layer}.mlp", hidden, config["intermediate_size"])
        return
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    t[f"{layer}.mlp.gate.weight"] = draw.linear(f"{layer}.mlp.gate.weight", experts, hidden)
    # Mostly negative, so that a chosen expert can score below 0; float32 whatever the rest is.
    bias = draw(f"{layer}.mlp.gate.e_score_correction_bias", (experts,))
    t[f"{layer}.mlp.gate.e_score_correction_bias"] = bias.float() * 0.123 - 0.6
    for e in range(experts):
        _mlp(t, draw, f"{layer}.mlp.experts.{e}", hidden, inner)
    if config["n_shared_experts"]:
        _mlp(t, draw, f"{layer}.mlp.shared_experts", hidden, inner * config["n_shared_experts"])


_QUANTISED = (
    "q_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj wq_b wk eh_proj"
).split()


def quantised_names(tensors: dict[str, torch.Tensor], projector: bool = False) -> list[str]:
    """The weights that a block-wise fp8 checkpoint quantises: attention and MLP projections of the decoder."""
    names = [name for name in tensors if name.startswith("model.") and name.endswith(".weight")]
    names = [name for name in names if name.split(".")[-2] in _QUANTISED]
    return names + (["mlp_AR.linear_1.weight", "mlp_AR.linear_2.weight"] if projector else [])


def block_scales(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """`weight_scale_inv` of each element: that of its block, [row // block rows, column // block columns]."""
    rows = torch.arange(shape[0]) // block[0]
    columns = torch.arange(shape[1]) // block[1]
    return scale[rows][:, columns]


def quantise(weight: torch.Tensor, block: tuple[int, int], draw: _Draw, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [out, in] and its float32 scales [ceil(out / rows), ceil(in / columns)].

    The scales are then varied by up to 2 in either direction, so that each block needs its own.
    """
    rows, columns = (math.ceil(size / step) for size, step in zip(weight.shape, block))
    scale = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            part = weight[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            scale[r, c] = part.float().abs().max() / FP8_MAX
    stored = (weight.float() / block_scales(scale, weight.shape, block)).to(torch.float8_e4m3fn)
    return stored, scale * 2 ** draw(f"{name}:scales", (rows, columns), 0.6).float().clamp(-1, 1)


def dequantised(tensors: dict[str, torch.Tensor], block: tuple[int, int] = (128, 128)) -> dict[str, torch.Tensor]:
    """The same tensors in float32 (float8 times its block's scale), without the scales: what the weights mean."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale_inv"):
            continue
        value = tensor.float()
        if f"{name}_scale_inv" in tensors:
            value = value * block_scales(tensors[f"{name}_scale_inv"], value.shape, block)
        result[name] = value
    return result


def published_tensors(
    config: dict,
    *,
    layout: str,
    seed: int = 0,
    experts: str = "fused",
    head: bool | None = None,
    packing: bool = True,
    mtp: bool = False,
    inv_freq: bool = False,
    fp8_projector: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint under its published name.

    Args:
        config: as `published_config` gives it; with `quantization_config` the projections are fp8.
        experts: "fused" ([E, in, out], 2.0 only) or "unfused" (one matrix per expert and projection).
        head: the vision tower's pooling head; None as published (not in 2.0).
        mtp: a layer after the last one, for multi-token prediction (DeepSeek family).
        inv_freq: also store rotary frequencies, as old code did.
    """
    draw = _Draw(seed, dtype)
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    t: dict[str, torch.Tensor] = {}
    if layout in VISION_LAYOUTS:
        t.update(_vision_tensors(config, draw, layout != "keye_vl_2" if head is None else head, packing))
    t["model.embed_tokens.weight"] = draw("model.embed_tokens.weight", (vocab, hidden), 0.01)
    for i in range(layers + mtp):
        layer = f"model.layers.{i}"
        for part in ("input_layernorm", "post_attention_layernorm"):
            t[f"{layer}.{part}.weight"] = draw.norm(f"{layer}.{part}.weight", hidden)
        if layout in GQA_LAYOUTS:
            _gqa_layer(t, draw, config, i, experts)
        else:
            _mla_layer(t, draw, config, i)
        if inv_freq and i < layers:
            t[f"{layer}.self_attn.rotary_emb.inv_freq"] = draw(f"{layer}.inv_freq", (7,))
        if i >= layers:
            for part in ("enorm", "hnorm", "shared_head.norm"):
                t[f"{layer}.{part}.weight"] = draw.norm(f"{layer}.{part}.weight", hidden)
            t[f"{layer}.eh_proj.weight"] = draw.linear(f"{layer}.eh_proj.weight", hidden, 2 * hidden)
            for part in ("embed_tokens", "shared_head.head"):
                t[f"{layer}.{part}.weight"] = draw(f"{layer}.{part}.weight", (vocab, hidden), 0.01)
    t["model.norm.weight"] = draw.norm("model.norm.weight", hidden)
    t["lm_head.weight"] = draw.linear("lm_head.weight", vocab, hidden, 2.0)
    if quantisation := config.get("quantization_config"):
        block = tuple(quantisation["weight_block_size"])
        for name in quantised_names(t, fp8_projector):
            t[name], t[f"{name}_scale_inv"] = quantise(t[name], block, draw, name)
    return t


def published_checkpoint(
    layout: str,
    *,
    seed: int = 0,
    experts: str = "fused",
    fp8: bool | tuple[int, int] = False,
    indexer: bool = True,
    head: bool | None = None,
    packing: bool = True,
    mtp: bool = False,
    inv_freq: bool = False,
    fp8_projector: bool = False,
    square: bool | str = False,
    dtype: torch.dtype = torch.bfloat16,
    **config_overrides,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Raw `config.json` (flat, as published) and raw tensors under their published names.

    `indexer=False` leaves out the indexer's weights and `sa_config`; `square` makes 2I == H (True or "gate_up") or
    I == H ("down") in 2.0; `fp8` is True (blocks of 128 x 128) or the block size.
    """
    config_overrides.setdefault("torch_dtype", str(dtype).removeprefix("torch."))
    config = published_config(layout, indexer=indexer, square=square, fp8=fp8, **config_overrides)
    tensors = published_tensors(
        config,
        layout=layout,
        seed=seed,
        experts=experts,
        head=head,
        packing=packing,
        mtp=mtp,
        inv_freq=inv_freq,
        fp8_projector=fp8_projector,
        dtype=dtype,
    )
    return config, tensors


_TOP_LEVEL = (
    "architectures model_type auto_map vision_config image_token_id video_token_id vision_start_token_id "
    "vision_end_token_id vision_token_id fast_video_token_id transformers_version torch_dtype dtype "
    "quantization_config tie_word_embeddings"
).split()


def resaved_config(config: dict) -> dict:
    """What fine-tuners write: the library has rewritten the rope type and stored it under both names."""
    config = json.loads(json.dumps(config))
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


def nested_names(tensors: dict[str, torch.Tensor], projector: str = "mm_projector") -> dict[str, torch.Tensor]:
    """Names of a file saved from a nested module tree: `model.visual`, `model.mm_projector`, `model.language_model`."""

    def renamed(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        if name.startswith("mlp_AR."):
            return f"model.{projector}.{name.removeprefix('mlp_AR.')}"
        return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """`model.safetensors`, or that many shards and an index. Every second name goes on to the next shard."""
    folder = Path(folder)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map, total = {}, 0
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in part})
        total += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tokenizer(folder: Path, layout: str) -> None:
    """Byte-level tokenizer files: a token per byte, and the layout's added tokens under the ids of `vocabulary`."""
    tokens = vocabulary(layout)
    added = [token for token in tokens if len(token) > 2]
    letters = {token: number for number, token in enumerate(tokens) if token not in added}
    qwen = layout in GQA_LAYOUTS
    special = _QWEN_SPECIAL if qwen else {*_DEEPSEEK_TOKENS, *_VISION_TOKENS}
    # In the DeepSeek tokenizer the first ids are added tokens, and the model knows them as well.
    known = letters if qwen else {token: number for number, token in enumerate(tokens) if token not in added[3:]}
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[]))
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in added])
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    numbers = {token: number for number, token in enumerate(tokens)}
    config = {
        "added_tokens_decoder": {
            str(numbers[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in special,
            }
            for token in added
        },
        "bos_token": None if qwen else _DEEPSEEK_TOKENS[0],
        "chat_template": _TEXT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if qwen else _DEEPSEEK_TOKENS[1],
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>" if qwen else _DEEPSEEK_TOKENS[1],
        "tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast",
    }
    if qwen:
        config.update(add_bos_token=False, add_prefix_space=False, errors="replace", split_special_tokens=False)
        config["unk_token"] = None
        (folder / "vocab.json").write_text(json.dumps(letters, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        (folder / "added_tokens.json").write_text(json.dumps({token: numbers[token] for token in added}))
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_published(
    folder: str | Path,
    layout: str,
    *,
    seed: int = 0,
    shards: int = 1,
    experts: str = "fused",
    fp8: bool | tuple[int, int] = False,
    indexer: bool = True,
    head: bool | None = None,
    packing: bool = True,
    mtp: bool = False,
    inv_freq: bool = False,
    fp8_projector: bool = False,
    square: bool | str = False,
    dtype: torch.dtype = torch.bfloat16,
    nested_config: bool = False,
    nested_weights: bool | str = False,
    resaved: bool | str = False,
    tokenizer: bool = True,
    **config_overrides,
) -> Path:
    """Write a checkpoint folder of `layout` (one of `LAYOUT_NAMES`) as it is published; returns the folder.

    The options of `published_checkpoint`, and:
        shards: number of weight files; more than one come with an index.
        nested_config: text keys inside `text_config`. nested_weights: names of a nested module tree, with
            `model.mm_projector` (True) or the given name for the projector.
        resaved: True for a fine-tuner's config.json, "rope_parameters" for one written by version 5 of the library.
        config_overrides: keys of the flat config.json; `vision_config` and `sa_config` are merged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = published_checkpoint(
        layout,
        seed=seed,
        experts=experts,
        fp8=fp8,
        indexer=indexer,
        head=head,
        packing=packing,
        mtp=mtp,
        inv_freq=inv_freq,
        fp8_projector=fp8_projector,
        square=square,
        dtype=dtype,
        **config_overrides,
    )
    if resaved:
        config = rope_parameters_config(config) if resaved == "rope_parameters" else resaved_config(config)
    if nested_config:
        config = nested_config_of(config)
    if nested_weights:
        tensors = nested_names(tensors, "mm_projector" if nested_weights is True else nested_weights)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(layout))
    write_weights(folder, tensors, shards)
    if layout in VISION_LAYOUTS:
        _write_json(folder / "preprocessor_config.json", preprocessor_config(layout))
        _write_json(folder / "chat_template.json", {"chat_template": _VISUAL_TEMPLATE})
    if tokenizer:
        write_tokenizer(folder, layout)
    return folder
