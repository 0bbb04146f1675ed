"""The keys of a published `config.json`, and what kind of value each may hold."""

from collections.abc import Callable
from typing import Any

TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Read by published code only; kept so that it gets them back.
OTHER_TOKEN_IDS = ("vision_token_id", "fast_video_token_id")
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "spatial_merge_size",
)
TEXT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# What the published classes take where `vision_config` is silent.
VISION_FALLBACKS = {
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tokens_per_second": 2,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}
# What the published classes take where the text keys are silent; every size must be said.
TEXT_FALLBACKS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED_EXPERTS = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
# The published code takes these, not the shipped 16 x 64, where `sa_config` is silent.
INDEXER_KEYS = {"indexer_num_heads": 4, "indexer_head_dim": 128, "topk": 2048}
FLOATS = ("rms_norm_eps", "layer_norm_eps", "initializer_range")


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
            *TEXT_SIZES,
            *VISION_SIZES,
            *LATENT_SIZES,
            *INDEXER_KEYS,
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
            *TOKEN_IDS,
            *OTHER_TOKEN_IDS,
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
            *FLOATS,
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


class Keys:
    """Keys of one part of a `config.json`. Raises `ValueError` for a value that is not of its kind."""

    def __init__(self, values: dict, where: str = "config.json"):
        self.values, self.where = values, where
        for name, value in values.items():
            words, is_kind = _KIND_OF.get(name, ("", None))
            if is_kind and value is not None and not is_kind(value):
                self.refuse(name, f"it must be {words}.")
        # The configuration classes tell 0.0 from 0 in these.
        self.values = values | {name: float(values[name]) for name in FLOATS if values.get(name) is not None}

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

    def architecture(self) -> str | None:
        """The class that the file names first."""
        return next(iter(self.get("architectures", ())), None)
