"""What a published `config.json` says in our words.

A published file is flat (text keys at the top, `vision_config` nested) or, once re-saved, nested; it may carry keys of
several releases of Transformers. `our_config` reads it into the arguments of `KeyeConfig`. A known key that asks for a
computation that `KeyeForVideoQA` does not have is refused; unknown keys are ignored. Sizes are never guessed: a missing
one is an error.
"""

import json

from .layouts_keye import Layout, detect_layout, fp8_block
from .published_keys_keye import (
    GROUPED_EXPERTS,
    INDEXER_KEYS,
    LATENT_SIZES,
    OTHER_TOKEN_IDS,
    TEXT_FALLBACKS,
    TEXT_SIZES,
    TOKEN_IDS,
    VISION_FALLBACKS,
    VISION_SIZES,
    Keys,
)

# In a nested file these may stand at the top and in `text_config`, and must agree.
_DECODER_KEYS = (
    *TEXT_SIZES,
    *LATENT_SIZES,
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
    *GROUPED_EXPERTS,
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


def our_config(raw: dict) -> dict:
    """The arguments for `KeyeConfig` that a published `config.json` amounts to.

    Raises `ValueError` when the file is not one of `LAYOUTS`, lacks a size, says two things at once, or asks for
    something that `KeyeForVideoQA` does not compute.
    """
    layout = detect_layout(raw)
    if layout is None:
        raise ValueError("This config.json is KeyeForVideoQA's own; there is nothing to translate.")
    keys = Keys(_flat(raw))
    text = _latent_text(keys, layout) if layout.latent_attention else _grouped_text(keys, layout)
    ours = {
        "vision_config": _vision(raw, layout) if layout.has_vision else {},
        "text_config": text,
        "video_position_ids": "clip" if layout.name == "keye_vl_preview" else "frame",
        "tie_word_embeddings": False,
    }
    if layout.has_vision:
        ours.update({name: keys.need(name) for name in TOKEN_IDS})
        ours.update({name: keys.values[name] for name in OTHER_TOKEN_IDS if keys.values.get(name) is not None})
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


def _flat(raw: dict) -> dict:
    """Text keys of a flat or nested file; raises where the two places disagree about the decoder."""
    nested = raw.get("text_config")
    if nested is None:
        return raw
    if not isinstance(nested, dict):
        raise ValueError(f"config.json has `text_config` {nested!r}; it must be an object or be left out.")
    flat = {**raw, **{name: value for name, value in nested.items() if value is not None}}
    for name in ("architectures", "model_type", "tie_word_embeddings", *TOKEN_IDS, *OTHER_TOKEN_IDS):
        if raw.get(name) is not None:
            flat[name] = raw[name]
    for name in _DECODER_KEYS:
        if raw.get(name) is not None and nested.get(name) is not None and raw[name] != nested[name]:
            raise ValueError(
                f"config.json says `{name}` {raw[name]!r} at the top and {nested[name]!r} in `text_config`; keep the "
                "one that the weights were trained with."
            )
    rope = {name: raw[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if raw.get(name) is not None}
    if rope and _rope(Keys({**flat, **rope})) != _rope(Keys(flat)):
        raise ValueError(f"config.json says {rope} at the top and something else in `text_config`; keep what is right.")
    return flat


def _vision(raw: dict, layout: Layout) -> dict:
    if not isinstance(raw.get("vision_config"), dict):
        raise ValueError(
            f"config.json of {layout.name} needs a `vision_config` object, got {raw.get('vision_config')!r}."
        )
    keys = Keys(raw["vision_config"], "vision_config")
    # The published value 2 is never used: every frame is a patch of its own in time.
    if keys.get("temporal_patch_size", 2) not in (1, 2):
        keys.refuse("temporal_patch_size", "frames are encoded one by one, so it must be 1 or the unused 2.")
    if keys.get("window_size", -1) != -1:
        keys.refuse("window_size", "the vision tower has no windowed attention; it must be -1 or left out.")
    preview = layout.name == "keye_vl_preview"
    return {
        **{name: keys.need(name) for name in VISION_SIZES},
        **{name: keys.get(name, fallback) for name, fallback in VISION_FALLBACKS.items()},
        "video_attention": "clip" if preview else "frame",
        "projector_norm": "pre_merge" if preview else "post_merge",
    }


def _common_text(keys: Keys, layout: Layout) -> dict:
    if keys.get("tie_word_embeddings"):
        keys.refuse("tie_word_embeddings", "published Keye checkpoints store `lm_head.weight`; set it to false.")
    # Qwen3 normalises queries and keys per head, DeepSeek their latents only.
    for name, harmless in {**_HARMLESS, "use_qk_norm": (not layout.latent_attention,)}.items():
        if keys.values.get(name) not in (None, *harmless):
            allowed = " or ".join(json.dumps(value) for value in (*harmless, None))
            keys.refuse(name, f"the decoder does not compute this; only {allowed} can be loaded.")
    return {
        **{name: keys.need(name) for name in TEXT_SIZES},
        "rms_norm_eps": keys.need("rms_norm_eps"),
        **{name: keys.get(name, fallback) for name, fallback in TEXT_FALLBACKS.items()},
        "attention_dropout": 0.0,
        # A published checkpoint computes what it was trained to compute: nothing is kept besides the indexer's choice.
        "local_window": None,
        "anchor_stride": None,
    }


def _grouped_text(keys: Keys, layout: Layout) -> dict:
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
        indexer = Keys(sa_config, "sa_config")
        if indexer.get("indexer_num_kv_heads", 1) != 1:
            indexer.refuse("indexer_num_kv_heads", "the indexer has one key head; it must be 1.")
        heads, size, topk = (indexer.get(name, fallback) for name, fallback in INDEXER_KEYS.items())
        text.update(indexer_type="keye_vl_2", index_n_heads=heads, index_head_dim=size, index_topk=topk)
    _check_layer_types(keys, text["indexer_type"])
    return text


def _softmax_experts(keys: Keys, layout: Layout) -> dict:
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
    if layout.experts is None or (not count and keys.architecture() == "KeyeVL2ForConditionalGeneration"):
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
        "first_k_dense_replace": leading_dense(types),
        "n_routed_experts": count or keys.need("num_experts"),
        "num_experts_per_tok": keys.need("num_experts_per_tok"),
        "moe_intermediate_size": moe_size,
        "norm_topk_prob": keys.get("norm_topk_prob", True),
    }


def _latent_text(keys: Keys, layout: Layout) -> dict:
    """671B and DeepSeek: latent attention, experts behind a sigmoid router with groups."""
    text = {"attention_type": "mla", **_common_text(keys, layout)}
    text.update({name: keys.need(name) for name in LATENT_SIZES})
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


def _sigmoid_experts(keys: Keys) -> dict:
    layers = keys.need("num_hidden_layers")
    if keys.get("scoring_func", "sigmoid") != "sigmoid":
        keys.refuse("scoring_func", "experts beside latent attention need the sigmoid router of DeepSeek-V3.")
    if keys.get("topk_method", "noaux_tc") != "noaux_tc":
        keys.refuse("topk_method", "only 'noaux_tc', the bias-corrected choice of DeepSeek-V3, is supported.")
    dense, step = keys.need("first_k_dense_replace"), keys.get("moe_layer_freq", 1)
    types = ["sparse" if i >= dense and i % step == 0 else "dense" for i in range(layers)]
    types = _given_layer_types(keys, types)
    sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", *GROUPED_EXPERTS)
    return {
        "intermediate_size": keys.need("intermediate_size"),
        "mlp_layer_types": types,
        "first_k_dense_replace": leading_dense(types),
        "scoring_func": "sigmoid",
        "n_shared_experts": keys.need_or_null("n_shared_experts", 0),
        **{name: keys.need(name) for name in sizes},
    }


def _given_layer_types(keys: Keys, types: list[str]) -> list[str]:
    given = keys.get("mlp_layer_types", types)
    if len(given) != len(types) or set(given) - {"dense", "sparse"}:
        keys.refuse("mlp_layer_types", f"it must hold 'dense' or 'sparse' for each of the {len(types)} layers.")
    return list(given)


def leading_dense(types: list[str]) -> int:
    return next((i for i, kind in enumerate(types) if kind == "sparse"), len(types))


def _check_layer_types(keys: Keys, indexer_type: str | None) -> None:
    selecting = {"indexed_attention", "deepseek_sparse_attention"} if indexer_type else {"full_attention"}
    given = set(keys.get("layer_types", []))
    # Older files call every layer full, also those behind an indexer.
    if given and not (given <= selecting or given == {"full_attention"}):
        keys.refuse("layer_types", "every layer must attend in the same way; windows and mixtures are not supported.")


def _rope(keys: Keys) -> dict:
    """One dict of rotary settings, out of `rope_parameters` or out of `rope_theta` with `rope_scaling`."""
    given = [name for name in ("rope_parameters", "rope_scaling") if keys.get(name) is not None]
    found = [_rope_settings(keys, name) for name in given or ["rope_scaling"]]
    if found[0] != found[-1]:
        keys.refuse("rope_parameters", f"`rope_scaling` says {keys.get('rope_scaling')!r}; keep the trained one.")
    return found[0]


def _rope_settings(keys: Keys, where: str) -> dict:
    given = keys.get(where, {})
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        keys.refuse(where, "it must be one object for all layers.")
    rope = Keys({name: value for name, value in given.items() if value is not None}, f"{keys.where}, {where}")
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


__all__ = ["our_config"]
