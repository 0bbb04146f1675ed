"""The published Keye and DeepSeek checkpoints: which one a `config.json` describes, and what it says in our words.

A published file is flat (text keys at the top, `vision_config` nested) or, once re-saved, nested; it may carry keys of
several releases of Transformers. `our_config` reads it into the arguments of `KeyeConfig`. A known key that asks for a
computation that `KeyeForVideoQA` does not have is refused; unknown keys are ignored. Sizes are never guessed: a missing
one is an error.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The classes of this project; their configurations need no translation.
OUR_MODEL_TYPES = ("keye", "keye_text", "keye_vision")

_HEAD = r"visual\.vision_model\.head\..+"
_PACKING = r"visual\.vision_model\.embeddings\.packing_position_embedding\.weight"
_ROTARY = r".+\.rotary_emb\.inv_freq"

_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Read by published code only; kept so that it gets them back.
_OTHER_TOKEN_IDS = ("vision_token_id", "fast_video_token_id")
_VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "spatial_merge_size",
)
# What the published classes take where `vision_config` is silent.
_VISION_FALLBACKS = {
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tokens_per_second": 2,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
_TEXT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# What the published classes take where the text keys are silent; every size must be said.
_TEXT_FALLBACKS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_GROUPED_EXPERTS = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
# The layouts whose published code reads an indexer, and which kinds.
_INDEXERS = {"keye_vl_2": (None, "keye_vl_2"), "deepseek_v32": ("deepseek_v32",)}
# The published code takes these, not the shipped 16 x 64, where `sa_config` is silent.
_INDEXER_KEYS = {"indexer_num_heads": 4, "indexer_head_dim": 128, "topk": 2048}
# DeepSeek-V3's, where the file does not say how many rows and columns share a scale.
FP8_BLOCK = (128, 128)
# In a nested file these may stand at the top and in `text_config`, and must agree.
_DECODER_KEYS = (
    *_TEXT_SIZES,
    *_LATENT_SIZES,
    "q_lora_rank",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "sa_config",
    "index_topk",
    "index_n_heads",
    "index_head_dim",
    "num_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    *_GROUPED_EXPERTS,
    "quantization_config",
)
# Settings per rotary type that the decoder can compute.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_SAME_ROPE = {"mrope": "default", "deepseek_yarn": "yarn"}
_FLOATS = ("rms_norm_eps", "layer_norm_eps", "initializer_range")
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Settings of other decoders, with the values that leave this one's computation as it is (null always does).
_HARMLESS: dict[str, tuple] = {
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "mlp_bias": (False,),
    "attn_output_gate": (False,),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "scale_emb": (1,),
    "num_kv_shared_layers": (0,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_chunk_size": (),
    "clip_qkv": (),
}


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_number(value: object) -> bool:
    # float32 holds no more, and a NaN is not below anything.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38


def _is_list(value: object, is_item: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(is_item, value))


# What a value must be unless it is null: words, test, the keys it is asked of.
_KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    # Later entries go before earlier ones; lists are made as long as there are layers.
    (
        "a whole number from 1 up",
        lambda value: _is_whole(value, 1),
        (
            *_TEXT_SIZES,
            *_VISION_SIZES,
            *_LATENT_SIZES,
            *_INDEXER_KEYS,
            "q_lora_rank",
            "intermediate_size",
            "moe_intermediate_size",
            "num_key_value_heads",
            "head_dim",
            "num_channels",
            "tokens_per_second",
            "index_topk",
            "index_n_heads",
            "index_head_dim",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "moe_layer_freq",
            "original_max_position_embeddings",
        ),
    ),
    (
        "a whole number from 0 up",
        _is_whole,
        (
            *_TOKEN_IDS,
            *_OTHER_TOKEN_IDS,
            "bos_token_id",
            "num_experts",
            "num_local_experts",
            "n_shared_experts",
            "first_k_dense_replace",
            "decoder_sparse_step",
        ),
    ),
    ("a whole number", lambda value: _is_whole(value, -1), ("pad_token_id",)),
    (
        "a whole number or a list of them",
        lambda value: _is_whole(value) or _is_list(value, _is_whole),
        ("eos_token_id",),
    ),
    (
        "a number",
        _is_number,
        (
            *_FLOATS,
            "attention_dropout",
            "routed_scaling_factor",
            "mscale",
            "mscale_all_dim",
        ),
    ),
    (
        "a number above 0",
        lambda value: _is_number(value) and value > 0,
        (
            "rope_theta",
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "low_freq_factor",
            "high_freq_factor",
        ),
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        ("attention_bias", "use_cache", "norm_topk_prob", "rope_interleave", "truncate", "tie_word_embeddings"),
    ),
    (
        "a string",
        lambda value: isinstance(value, str),
        ("hidden_act", "dtype", "torch_dtype", "type", "rope_type"),
    ),
    (
        "a list of strings",
        lambda value: _is_list(value, lambda item: isinstance(item, str)),
        ("architectures", "layer_types", "mlp_layer_types", "indexer_types"),
    ),
    ("a list of whole numbers", lambda value: _is_list(value, _is_whole), ("mlp_only_layers", "mrope_section")),
    (
        "two whole numbers from 1 up, rows and columns",
        lambda value: _is_list(value, lambda item: _is_whole(item, 1)) and len(value) == 2,
        ("weight_block_size",),
    ),
    ("a whole number from 1 to 9999", lambda value: _is_whole(value, 1) and value < 10_000, ("num_hidden_layers",)),
    ("an object", lambda value: isinstance(value, dict), ("sa_config", "quantization_config")),
)
_KIND_OF = {name: (words, is_kind) for words, is_kind, names in _KINDS for name in names}


@dataclass(frozen=True)
class Layout:
    """How a family of published checkpoints names itself and stores its tensors.

    architectures, model_types: what its `config.json` holds. family: its preprocessing (`frame_budget_keye.FAMILIES`).
    experts: "input_major" (one tensor per layer, [experts, in, out]), "per_expert" (one matrix per expert, [out, in]),
        or None for a dense decoder.
    ignorable: patterns of published tensor names that the model does not use.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    family: str
    has_vision: bool
    latent_attention: bool
    experts: str | None
    ignorable: tuple[str, ...]

    def is_ignorable(self, name: str, num_hidden_layers: int) -> bool:
        """Whether the tensor of this (published, flat) name may be left out.

        Decoders with latent attention may be followed by layers for multi-token prediction, which are not run.
        """
        if any(re.fullmatch(pattern, name) for pattern in self.ignorable):
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", name) if self.latent_attention else None
        return layer is not None and int(layer[1]) >= num_hidden_layers


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="keye_vl_preview",
            architectures=("KeyeForConditionalGeneration",),
            model_types=("Keye",),
            family="keye_vl_preview",
            has_vision=True,
            latent_attention=False,
            experts=None,
            ignorable=(_HEAD, _PACKING, _ROTARY),
        ),
        Layout(
            name="keye_vl_1_5",
            architectures=("KeyeVL1_5ForConditionalGeneration",),
            model_types=("KeyeVL1_5",),
            family="keye_vl_1_5",
            has_vision=True,
            latent_attention=False,
            experts=None,
            ignorable=(_HEAD, _PACKING, _ROTARY),
        ),
        Layout(
            name="keye_vl_671b",
            architectures=("KeyeVLMoeForConditionalGeneration",),
            model_types=(),
            family="keye_vl_671b",
            has_vision=True,
            latent_attention=True,
            experts="per_expert",
            ignorable=(_HEAD, _PACKING, _ROTARY),
        ),
        Layout(
            name="keye_vl_2",
            architectures=("KeyeVL2MoeForConditionalGeneration", "KeyeVL2ForConditionalGeneration"),
            model_types=("KeyeVL2",),
            family="keye_vl_2",
            has_vision=True,
            latent_attention=False,
            experts="input_major",
            ignorable=(_PACKING, _ROTARY),
        ),
        Layout(
            name="deepseek_v3",
            architectures=("DeepseekV3ForCausalLM",),
            model_types=("deepseek_v3",),
            family="keye_vl_2",
            has_vision=False,
            latent_attention=True,
            experts="per_expert",
            ignorable=(_ROTARY,),
        ),
        Layout(
            name="deepseek_v32",
            architectures=("DeepseekV32ForCausalLM",),
            model_types=("deepseek_v32",),
            family="keye_vl_2",
            has_vision=False,
            latent_attention=True,
            experts="per_expert",
            ignorable=(_ROTARY,),
        ),
    )
}


def detect_layout(raw: dict) -> Layout | None:
    """The layout that a `config.json` describes, None for a configuration of this project.

    `architectures[0]` decides, then `model_type`. Raises `ValueError` for any other model.
    """
    architecture = _architecture(_Keys({"architectures": raw.get("architectures")}))
    model_type = raw.get("model_type")
    for layout in LAYOUTS.values():
        if architecture in layout.architectures:
            return layout
    if model_type in OUR_MODEL_TYPES:
        return None
    for layout in LAYOUTS.values():
        if model_type in layout.model_types:
            return layout
    known = [name for layout in LAYOUTS.values() for name in layout.architectures]
    raise ValueError(
        f"config.json describes architectures[0] {architecture!r} with model_type {model_type!r}, which is no "
        f"checkpoint that Keye can load. Known are {', '.join(known)}, and models saved by KeyeForVideoQA."
    )


def our_config(raw: dict) -> dict:
    """The arguments for `KeyeConfig` that a published `config.json` amounts to.

    Raises `ValueError` when the file is not one of `LAYOUTS`, lacks a size, says two things at once, or asks for
    something that `KeyeForVideoQA` does not compute.
    """
    layout = detect_layout(raw)
    if layout is None:
        raise ValueError("This config.json is KeyeForVideoQA's own; there is nothing to translate.")
    keys = _Keys(_flat(raw))
    text = _latent_text(keys, layout) if layout.latent_attention else _grouped_text(keys, layout)
    ours = {
        "vision_config": _vision(raw, layout) if layout.has_vision else {},
        "text_config": text,
        "video_position_ids": "clip" if layout.name == "keye_vl_preview" else "frame",
        "tie_word_embeddings": False,
    }
    if layout.has_vision:
        ours.update({name: keys.need(name) for name in _TOKEN_IDS})
        ours.update({name: keys.values[name] for name in _OTHER_TOKEN_IDS if keys.values.get(name) is not None})
    else:
        first = text["vocab_size"] - 5
        order = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        ours.update({name: first + number for number, name in enumerate(order)})
    quantization = keys.get("quantization_config")
    if quantization is not None:
        if quantization.get("quant_method") != "fp8":
            keys.refuse("quantization_config", "only fp8 in blocks, as DeepSeek-V3 stores it, can be read.")
        fp8_block(raw)
    dtype_key = "dtype" if keys.get("dtype") is not None else "torch_dtype"
    dtype = keys.get(dtype_key)
    if quantization is not None and dtype in (None, "float8_e4m3fn"):
        # The weights are multiplied out while they are loaded; what is left is an ordinary checkpoint.
        dtype = "bfloat16"
    if dtype is not None:
        if dtype not in _DTYPES:
            keys.refuse(dtype_key, f"it must be one of {', '.join(_DTYPES)}.")
        ours["dtype"] = dtype
    return ours


def published_config(config: dict, layout: Layout) -> dict:
    """The flat `config.json` of a layout for one of our configurations (`KeyeConfig.to_dict()`).

    `our_config` of the result gives back every setting that the layout can say. Raises `ValueError` for a setting that
    it cannot say and that changes the computation.
    """
    text, vision = config["text_config"], config["vision_config"]
    _refuse_unsayable(config, layout)
    raw = {name: text[name] for name in (*_TEXT_SIZES, *_TEXT_FALLBACKS, "intermediate_size", "rms_norm_eps")}
    raw["attention_dropout"] = 0.0
    raw["tie_word_embeddings"] = False
    raw.update(_published_rope(text["rope_parameters"]))
    raw.update(_published_latent(text) if layout.latent_attention else _published_grouped(text))
    sparse = "sparse" in text["mlp_layer_types"]
    architecture = layout.architectures[0]
    if layout.name == "keye_vl_2" and not sparse:
        architecture = "KeyeVL2ForConditionalGeneration"
    raw["architectures"] = [architecture]
    if layout.model_types:
        raw["model_type"] = layout.model_types[0]
    if layout.has_vision:
        raw["vision_config"] = {name: vision[name] for name in (*_VISION_SIZES, *_VISION_FALLBACKS)}
        raw["vision_config"]["temporal_patch_size"] = 2
        names = (*_TOKEN_IDS, *(name for name in _OTHER_TOKEN_IDS if config.get(name) is not None))
        raw.update({name: config[name] for name in names})
    if config.get("dtype") is not None:
        raw["torch_dtype"] = config["dtype"]
    return raw


def fp8_block(raw: dict) -> tuple[int, int]:
    """Rows and columns of a weight that share one fp8 scale, by a `config.json`; 128 x 128 where it is silent.

    Raises `ValueError` when `weight_block_size` is anything but two whole numbers from 1 up.
    """
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            settings = _Keys(_Keys(part).need("quantization_config"), "quantization_config")
            return tuple(settings.get("weight_block_size", FP8_BLOCK))
    return FP8_BLOCK


class _Keys:
    """Keys of one part of a `config.json`. Raises `ValueError` for a value that is not of its kind."""

    def __init__(self, values: dict, where: str = "config.json"):
        self.values, self.where = values, where
        for name, value in values.items():
            words, is_kind = _KIND_OF.get(name, ("", None))
            if is_kind and value is not None and not is_kind(value):
                self.refuse(name, f"it must be {words}.")
        # The configuration classes tell 0.0 from 0 in these.
        self.values = values | {name: float(values[name]) for name in _FLOATS if values.get(name) is not None}

    def get(self, name: str, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str):
        if self.values.get(name) is None:
            raise ValueError(f"{self.where} lacks `{name}`, which has no safe default; add it to the file.")
        return self.values[name]

    def need_or_null(self, name: str, null=None):
        """The value of a key that may be null, but not absent."""
        return null if name in self.values and self.values[name] is None else self.need(name)

    def refuse(self, name: str, reason: str):
        raise ValueError(f"{self.where} has `{name}` {self.values.get(name)!r}: {reason}")


def _flat(raw: dict) -> dict:
    """Text keys of a flat or nested file; raises where the two places disagree about the decoder."""
    nested = raw.get("text_config")
    if nested is None:
        return raw
    if not isinstance(nested, dict):
        raise ValueError(f"config.json has `text_config` {nested!r}; it must be an object or be left out.")
    flat = {**raw, **{name: value for name, value in nested.items() if value is not None}}
    for name in ("architectures", "model_type", "tie_word_embeddings", *_TOKEN_IDS, *_OTHER_TOKEN_IDS):
        if raw.get(name) is not None:
            flat[name] = raw[name]
    for name in _DECODER_KEYS:
        if raw.get(name) is not None and nested.get(name) is not None and raw[name] != nested[name]:
            raise ValueError(
                f"config.json says `{name}` {raw[name]!r} at the top and {nested[name]!r} in `text_config`; keep the "
                "one that the weights were trained with."
            )
    rope = {name: raw[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if raw.get(name) is not None}
    if rope and _rope(_Keys({**flat, **rope})) != _rope(_Keys(flat)):
        raise ValueError(f"config.json says {rope} at the top and something else in `text_config`; keep what is right.")
    return flat


def _vision(raw: dict, layout: Layout) -> dict:
    if not isinstance(raw.get("vision_config"), dict):
        raise ValueError(
            f"config.json of {layout.name} needs a `vision_config` object, got {raw.get('vision_config')!r}."
        )
    keys = _Keys(raw["vision_config"], "vision_config")
    # The published value 2 is never used: every frame is a patch of its own in time.
    if keys.get("temporal_patch_size", 2) not in (1, 2):
        keys.refuse("temporal_patch_size", "frames are encoded one by one, so it must be 1 or the unused 2.")
    if keys.get("window_size", -1) != -1:
        keys.refuse("window_size", "the vision tower has no windowed attention; it must be -1 or left out.")
    preview = layout.name == "keye_vl_preview"
    return {
        **{name: keys.need(name) for name in _VISION_SIZES},
        **{name: keys.get(name, fallback) for name, fallback in _VISION_FALLBACKS.items()},
        "video_attention": "clip" if preview else "frame",
        "projector_norm": "pre_merge" if preview else "post_merge",
    }


def _common_text(keys: _Keys, layout: Layout) -> dict:
    if keys.get("tie_word_embeddings"):
        keys.refuse("tie_word_embeddings", "published Keye checkpoints store `lm_head.weight`; set it to false.")
    # Qwen3 normalises queries and keys per head, DeepSeek their latents only.
    for name, harmless in {**_HARMLESS, "use_qk_norm": (not layout.latent_attention,)}.items():
        if keys.values.get(name) not in (None, *harmless):
            allowed = " or ".join(json.dumps(value) for value in (*harmless, None))
            keys.refuse(name, f"the decoder does not compute this; only {allowed} can be loaded.")
    return {
        **{name: keys.need(name) for name in _TEXT_SIZES},
        "rms_norm_eps": keys.need("rms_norm_eps"),
        **{name: keys.get(name, fallback) for name, fallback in _TEXT_FALLBACKS.items()},
        "attention_dropout": 0.0,
        # A published checkpoint computes what it was trained to compute: nothing is kept besides the indexer's choice.
        "local_window": None,
        "anchor_stride": None,
    }


def _grouped_text(keys: _Keys, layout: Layout) -> dict:
    """Preview, 1.5 and 2.0: Qwen3's decoder."""
    text = {"attention_type": "gqa", **_common_text(keys, layout)}
    text["num_key_value_heads"] = keys.need("num_key_value_heads")
    text["head_dim"] = keys.need("head_dim")
    text["rope_parameters"] = _rope(keys)
    if "mrope_section" not in text["rope_parameters"]:
        raise ValueError(f"{keys.where} lacks `rope_scaling.mrope_section`, e.g. [16, 24, 24]; add it to the file.")
    text.update(_softmax_experts(keys, layout))
    sa_config = keys.get("sa_config")
    text["indexer_type"] = None
    if sa_config is not None and layout.name != "keye_vl_2":
        keys.refuse("sa_config", f"a {layout.name} checkpoint has no indexer; check `architectures` or remove it.")
    if sa_config is not None:
        indexer = _Keys(sa_config, "sa_config")
        if indexer.get("indexer_num_kv_heads", 1) != 1:
            indexer.refuse("indexer_num_kv_heads", "the indexer has one key head; it must be 1.")
        heads, size, topk = (indexer.get(name, fallback) for name, fallback in _INDEXER_KEYS.items())
        text.update(indexer_type="keye_vl_2", index_n_heads=heads, index_head_dim=size, index_topk=topk)
    _check_layer_types(keys, text["indexer_type"])
    return text


def _softmax_experts(keys: _Keys, layout: Layout) -> dict:
    layers = keys.need("num_hidden_layers")
    dense = {
        "intermediate_size": keys.values.get("intermediate_size"),
        "mlp_layer_types": ["dense"] * layers,
        "first_k_dense_replace": layers,
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "n_shared_experts": 0,
    }
    count = keys.get("num_experts", keys.get("num_local_experts", 0))
    if layout.experts is None and count:
        keys.refuse("num_experts", f"a {layout.name} checkpoint has no experts; check `architectures`.")
    if layout.experts is None or (not count and _architecture(keys) == "KeyeVL2ForConditionalGeneration"):
        return {**dense, "intermediate_size": keys.need("intermediate_size")}
    if keys.get("scoring_func", "softmax") != "softmax":
        keys.refuse("scoring_func", "the router of Keye-VL-2.0 is a softmax.")
    for name in ("n_shared_experts", "shared_expert_intermediate_size"):
        if keys.get(name):
            keys.refuse(name, "Keye-VL-2.0 has no shared expert.")
    step, only_dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    types = ["dense" if i in only_dense or step < 1 or (i + 1) % step else "sparse" for i in range(layers)]
    types = _given_layer_types(keys, types)
    moe_size = keys.need("moe_intermediate_size")
    return {
        **dense,
        "intermediate_size": keys.need("intermediate_size")
        if "dense" in types
        else keys.get("intermediate_size", moe_size),
        "mlp_layer_types": types,
        "first_k_dense_replace": _leading_dense(types),
        "n_routed_experts": count or keys.need("num_experts"),
        "num_experts_per_tok": keys.need("num_experts_per_tok"),
        "moe_intermediate_size": moe_size,
        "norm_topk_prob": keys.get("norm_topk_prob", True),
    }


def _latent_text(keys: _Keys, layout: Layout) -> dict:
    """671B and DeepSeek: latent attention, experts behind a sigmoid router with groups."""
    text = {"attention_type": "mla", **_common_text(keys, layout)}
    text.update({name: keys.need(name) for name in _LATENT_SIZES})
    text["q_lora_rank"] = keys.need_or_null("q_lora_rank")
    text["num_key_value_heads"] = keys.get("num_key_value_heads", text["num_attention_heads"])
    text["rope_interleave"] = keys.get("rope_interleave", True)
    text["rope_parameters"] = _rope(keys)
    if "mrope_section" in text["rope_parameters"]:
        raise ValueError(
            f"{keys.where} has `mrope_section` {text['rope_parameters']['mrope_section']!r} beside latent attention, "
            "whose rotary embedding has one axis: visual tokens are counted like text. Remove the key to load it so."
        )
    text.update(_sigmoid_experts(keys))
    text["indexer_type"] = None
    if keys.get("index_topk") is not None and keys.get("index_n_heads") is not None:
        text.update({name: keys.need(name) for name in ("index_topk", "index_n_heads", "index_head_dim")})
        text["indexer_type"] = "deepseek_v32"
    elif layout.name == "deepseek_v32":
        keys.need("index_topk")
        keys.need("index_n_heads")
    if "shared" in keys.get("indexer_types", []) or keys.get("index_topk_freq", 1) != 1:
        name = "indexer_types" if "shared" in keys.get("indexer_types", []) else "index_topk_freq"
        keys.refuse(name, "layers that share the selection of another layer are not supported.")
    _check_layer_types(keys, text["indexer_type"])
    return text


def _sigmoid_experts(keys: _Keys) -> dict:
    layers = keys.need("num_hidden_layers")
    if keys.get("scoring_func", "sigmoid") != "sigmoid":
        keys.refuse("scoring_func", "experts beside latent attention need the sigmoid router of DeepSeek-V3.")
    if keys.get("topk_method", "noaux_tc") != "noaux_tc":
        keys.refuse("topk_method", "only 'noaux_tc', the bias-corrected choice of DeepSeek-V3, is supported.")
    dense, step = keys.need("first_k_dense_replace"), keys.get("moe_layer_freq", 1)
    types = ["sparse" if i >= dense and i % step == 0 else "dense" for i in range(layers)]
    types = _given_layer_types(keys, types)
    sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", *_GROUPED_EXPERTS)
    return {
        "intermediate_size": keys.need("intermediate_size"),
        "mlp_layer_types": types,
        "first_k_dense_replace": _leading_dense(types),
        "scoring_func": "sigmoid",
        "n_shared_experts": keys.need_or_null("n_shared_experts", 0),
        **{name: keys.need(name) for name in sizes},
    }


def _given_layer_types(keys: _Keys, types: list[str]) -> list[str]:
    given = keys.get("mlp_layer_types", types)
    if len(given) != len(types) or set(given) - {"dense", "sparse"}:
        keys.refuse("mlp_layer_types", f"it must hold 'dense' or 'sparse' for each of the {len(types)} layers.")
    return list(given)


def _leading_dense(types: list[str]) -> int:
    return next((i for i, kind in enumerate(types) if kind == "sparse"), len(types))


def _architecture(keys: _Keys) -> str | None:
    return next(iter(keys.get("architectures", ())), None)


def _check_layer_types(keys: _Keys, indexer_type: str | None) -> None:
    selecting = {"indexed_attention", "deepseek_sparse_attention"} if indexer_type else {"full_attention"}
    given = set(keys.get("layer_types", []))
    # Older files call every layer full, also those behind an indexer.
    if given and not (given <= selecting or given == {"full_attention"}):
        keys.refuse("layer_types", "every layer must attend in the same way; windows and mixtures are not supported.")


def _rope(keys: _Keys) -> dict:
    """One dict of rotary settings, out of `rope_parameters` or out of `rope_theta` with `rope_scaling`."""
    given = [name for name in ("rope_parameters", "rope_scaling") if keys.get(name) is not None]
    found = [_rope_settings(keys, name) for name in given or ["rope_scaling"]]
    if found[0] != found[-1]:
        keys.refuse("rope_parameters", f"`rope_scaling` says {keys.get('rope_scaling')!r}; keep the trained one.")
    return found[0]


def _rope_settings(keys: _Keys, where: str) -> dict:
    given = keys.get(where, {})
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        keys.refuse(where, "it must be one object for all layers.")
    rope = _Keys({name: value for name, value in given.items() if value is not None}, f"{keys.where}, {where}")
    kinds = {_SAME_ROPE.get(kind, kind) for kind in (rope.get("rope_type"), rope.get("type")) if kind is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in _ROPE_KEYS:
        name = "rope_type" if rope.get("rope_type") is not None else "type"
        rope.refuse(name, f"it must be one of mrope, {', '.join(_ROPE_KEYS)}, and `type` must agree with `rope_type`.")
    theta = rope.get("rope_theta", keys.get("rope_theta"))
    if theta is None:
        keys.need("rope_theta")
    if keys.get("rope_theta", theta) != theta:
        keys.refuse("rope_theta", f"`{where}` says {theta!r}; keep the one that the weights were trained with.")
    for part in (keys, rope):
        if part.get("mrope_interleaved"):
            part.refuse("mrope_interleaved", "Keye's rotary sections are contiguous; these weights need other code.")
        if part.get("partial_rotary_factor", 1) != 1:
            part.refuse("partial_rotary_factor", "all dimensions of a head are rotated; it must be 1.")
    neutral = {"type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor"}
    for name in sorted(set(rope.values) - neutral - set(_ROPE_KEYS[kind])):
        rope.refuse(name, f"rotary type {kind!r} has no such setting; remove it or name the type it belongs to.")
    for name in _ROPE_KEYS[kind] if kind == "llama3" else _ROPE_KEYS[kind][:1]:
        rope.need(name)
    settings = {"rope_type": kind, "rope_theta": float(theta)}
    for name in _ROPE_KEYS[kind]:
        if rope.get(name) is not None:
            value = rope.values[name]
            exact = isinstance(value, bool) or name == "original_max_position_embeddings"
            settings[name] = value if exact else float(value)
    if rope.get("mrope_section") is not None:
        settings["mrope_section"] = list(rope.values["mrope_section"])
    return settings


def _published_rope(rope: dict) -> dict:
    scaling = {name: value for name, value in rope.items() if name not in ("rope_type", "rope_theta")}
    kind = rope["rope_type"]
    if kind == "default":
        kind = "mrope" if "mrope_section" in scaling else None
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind is None else {"type": kind, **scaling},
    }


def _published_grouped(text: dict) -> dict:
    raw = {
        "num_key_value_heads": text["num_key_value_heads"],
        "head_dim": text["head_dim"],
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": text["num_hidden_layers"],
    }
    if "sparse" in text["mlp_layer_types"]:
        raw["num_experts"] = text["n_routed_experts"]
        raw.update({name: text[name] for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")})
        raw["decoder_sparse_step"] = 1
        raw["mlp_only_layers"] = [i for i, kind in enumerate(text["mlp_layer_types"]) if kind == "dense"]
    if text["indexer_type"] is not None:
        raw["sa_config"] = {
            "indexer_head_dim": text["index_head_dim"],
            "indexer_num_heads": text["index_n_heads"],
            "indexer_num_kv_heads": 1,
            # Tiles of the published kernels; the result does not depend on them.
            "kv_chunk_size": 512,
            "q_chunk_size": 512,
            "topk": text["index_topk"],
        }
    return raw


def _published_latent(text: dict) -> dict:
    dense, step = _dense_rule(text["mlp_layer_types"])
    names = (*_LATENT_SIZES, *_GROUPED_EXPERTS, "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    raw = {name: text[name] for name in (*names, "moe_intermediate_size", "num_key_value_heads", "rope_interleave")}
    raw.update(
        q_lora_rank=text["q_lora_rank"],
        first_k_dense_replace=dense,
        moe_layer_freq=step,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=0,
    )
    if text["indexer_type"] is not None:
        raw.update({name: text[name] for name in ("index_topk", "index_n_heads", "index_head_dim")})
    return raw


def _dense_rule(types: list[str]) -> tuple[int, int]:
    """(first_k_dense_replace, moe_layer_freq) that give these kinds of layers."""
    dense = _leading_dense(types)
    for step in range(1, len(types) + 1):
        if types == ["sparse" if i >= dense and i % step == 0 else "dense" for i in range(len(types))]:
            return dense, step
    raise ValueError(
        f"`mlp_layer_types` {types} cannot be written as `first_k_dense_replace` with `moe_layer_freq`; keep the "
        "checkpoint in our layout."
    )


def _refuse_unsayable(config: dict, layout: Layout) -> None:
    text, vision = config["text_config"], config["vision_config"]
    latent = layout.latent_attention
    preview = layout.name == "keye_vl_preview"
    wanted = [
        (text, "attention_type", ("mla" if latent else "gqa",)),
        (text, "local_window", (None,)),
        (text, "anchor_stride", (None,)),
        (config, "tie_word_embeddings", (False, None)),
    ]
    if "sparse" in text["mlp_layer_types"]:
        wanted.append((text, "scoring_func", ("sigmoid" if latent else "softmax",)))
        if layout.experts is None:
            wanted.append((text, "mlp_layer_types", (["dense"] * text["num_hidden_layers"],)))
        if not latent:
            wanted += [(text, "n_shared_experts", (0,)), (text, "routed_scaling_factor", (1, 1.0))]
    if layout.has_vision:
        wanted += [
            (config, "video_position_ids", ("clip" if preview else "frame",)),
            (vision, "video_attention", ("clip" if preview else "frame",)),
            (vision, "projector_norm", ("pre_merge" if preview else "post_merge",)),
        ]
    indexer, known = text["indexer_type"], _INDEXERS.get(layout.name, (None,))
    if indexer not in known:
        way_out = "train an indexer (`KeyeConfig.with_indexer`)"
        if indexer is not None:
            able = [name for name, kinds in _INDEXERS.items() if indexer in kinds]
            way_out = f"{' or '.join(able)} can carry it: write that layout, if the rest of the model fits it"
        raise ValueError(
            f"`indexer_type` is {indexer!r}, but a {layout.name} checkpoint can only say "
            f"{' or '.join(repr(kind) for kind in known)}; {way_out}, or keep the checkpoint in our layout."
        )
    for part, name, allowed in wanted:
        if part.get(name) not in allowed:
            raise ValueError(
                f"`{name}` is {part.get(name)!r}, but a {layout.name} checkpoint can only say "
                f"{' or '.join(repr(value) for value in allowed)}; choose another layout or keep ours."
            )
    kinds = set(text["layer_types"])
    if len(kinds) > 1 or ("full_attention" in kinds) != (text["indexer_type"] is None):
        raise ValueError(
            f"`layer_types` holds {sorted(kinds)} beside `indexer_type` {text['indexer_type']!r}; in a {layout.name} "
            "checkpoint every layer selects as soon as there is an indexer."
        )
    sections = (text["rope_parameters"] or {}).get("mrope_section")
    if latent == (sections is not None):
        expected = "no `mrope_section`" if latent else "an `mrope_section`"
        raise ValueError(f"`mrope_section` is {sections!r}; a {layout.name} checkpoint has {expected}.")


__all__ = ["LAYOUTS", "Layout", "detect_layout", "fp8_block", "our_config", "published_config"]
