"""Our configuration in the words of a published layout: the `config.json` of the way back."""

from modeling_keye.layouts_keye import Layout
from modeling_keye.published_config_keye import leading_dense
from modeling_keye.published_keys_keye import (
    GROUPED_EXPERTS,
    LATENT_SIZES,
    OTHER_TOKEN_IDS,
    TEXT_FALLBACKS,
    TEXT_SIZES,
    TOKEN_IDS,
    VISION_FALLBACKS,
    VISION_SIZES,
)

# The layouts whose published code reads an indexer, and which kinds.
_INDEXERS = {"keye_vl_2": (None, "keye_vl_2"), "deepseek_v32": ("deepseek_v32",)}


def published_config(config: dict, layout: Layout) -> dict:
    """The flat `config.json` of a layout for one of our configurations (`KeyeConfig.to_dict()`).

    `our_config` of the result gives back every setting that the layout can say. Raises `ValueError` for a setting that
    it cannot say and that changes the computation.
    """
    text, vision = config["text_config"], config["vision_config"]
    _refuse_unsayable(config, layout)
    raw = {name: text[name] for name in (*TEXT_SIZES, *TEXT_FALLBACKS, "intermediate_size", "rms_norm_eps")}
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
        raw["vision_config"] = {name: vision[name] for name in (*VISION_SIZES, *VISION_FALLBACKS)}
        raw["vision_config"]["temporal_patch_size"] = 2
        names = (*TOKEN_IDS, *(name for name in OTHER_TOKEN_IDS if config.get(name) is not None))
        raw.update({name: config[name] for name in names})
    if config.get("dtype") is not None:
        raw["torch_dtype"] = config["dtype"]
    return raw


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
    names = (*LATENT_SIZES, *GROUPED_EXPERTS, "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
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
    dense = leading_dense(types)
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
