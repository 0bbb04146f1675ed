"""Configuration of Keye video question answering: `KeyeConfig` = `KeyeVisionConfig` + `KeyeTextConfig`.

The defaults describe the flagship: the Keye vision tower under a DeepSeek-V3.2 style decoder (multi-head latent
attention, lightning indexer, sigmoid-routed experts). Every published Keye checkpoint is another setting of the same
switches; `KeyeConfig.from_preset` names them.
"""

import json
import math
import os
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import ALLOWED_LAYER_TYPES, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .checkpoint_keye import Checkpoint
from .layouts_keye import detect_layout
from .presets_keye import PRESETS
from .published_config_keye import our_config

# The library renamed the layer type that selects a cache with indexer keys after 5.17.
_INDEXED_NAMES = ("indexed_attention", "deepseek_sparse_attention")
INDEXED_LAYER_TYPE = next(name for name in _INDEXED_NAMES if name in ALLOWED_LAYER_TYPES)

AUTO_MAP = {
    "AutoConfig": "configuration_keye.KeyeConfig",
    "AutoModel": "modeling_keye.KeyeForVideoQA",
    "AutoModelForImageTextToText": "modeling_keye.KeyeForVideoQA",
    "AutoModelForMultimodalLM": "modeling_keye.KeyeForVideoQA",
    "AutoProcessor": "processing_keye.KeyeProcessor",
}


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(repr(a) for a in allowed)}.")


def _positive(name: str, value: int | None, least: int = 1) -> None:
    if value is not None and value < least:
        raise ValueError(f"`{name}` is {value}; it must be at least {least}.")


class TranslatesPublished:
    """Reads the `config.json` of a published checkpoint (`layouts_keye.LAYOUTS`) as if it were ours."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """As `PreTrainedConfig.get_config_dict`, in our words.

        Raises `OSError` without a `config.json`, `ValueError` when it describes a model that is neither ours nor
        published Keye nor DeepSeek.
        """
        raw, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if set(raw) <= {"_commit_hash"}:
            # The library would go on with the defaults, which are those of the largest model.
            raise OSError(f"{pretrained_model_name_or_path} has no config.json, or an empty one; a model needs it.")
        if detect_layout(raw) is None:
            return raw, unused
        ours = our_config(raw)
        if ours["text_config"]["indexer_type"] == "keye_vl_2":
            names = _stored_names(pretrained_model_name_or_path, **kwargs)
            if names is not None and not any(".sa_indexer." in name for name in names):
                # The runtime of Keye-VL-2.0 takes such weights too, and attends densely.
                ours["text_config"]["indexer_type"] = None
        if "_commit_hash" in raw:
            ours["_commit_hash"] = raw["_commit_hash"]
        return ours, unused


def _stored_names(folder_or_repo: str | os.PathLike, **kwargs) -> list[str] | None:
    """Names of the tensors stored beside a `config.json`, None without weights: from their index or their header.

    From the Hub these files come into the cache, where the loading of the weights finds them.
    """
    if os.path.isfile(folder_or_repo):
        folder_or_repo = os.path.dirname(folder_or_repo) or "."
    hub = ("cache_dir", "proxies", "token", "local_files_only", "revision", "subfolder")
    options: dict[str, Any] = {name: kwargs[name] for name in hub if kwargs.get(name) is not None}
    options.update(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    index = cached_file(folder_or_repo, SAFE_WEIGHTS_INDEX_NAME, **options)
    try:
        if index is not None:
            with open(index, encoding="utf-8") as file:
                return list(json.load(file)["weight_map"])
        weights = cached_file(folder_or_repo, SAFE_WEIGHTS_NAME, **options)
        return None if weights is None else list(Checkpoint.from_files([weights]))
    except (ValueError, KeyError, TypeError):
        return None  # Damaged weights are reported by what loads them.


@strict
class KeyeVisionConfig(TranslatesPublished, PreTrainedConfig):
    r"""
    Configuration of the vision tower (a SigLIP encoder with 2-D rotary embeddings) and of the projector.

    Args:
        hidden_size (`int`, defaults to 1152): Width of the tower.
        intermediate_size (`int`, defaults to 4304): Width of its MLP.
        num_hidden_layers (`int`, defaults to 27): Number of encoder blocks.
        num_attention_heads (`int`, defaults to 16): Attention heads; the head size must be a multiple of 4.
        num_channels (`int`, defaults to 3): Colour channels of a patch.
        image_size (`int`, defaults to 384): Training resolution; fixes the grid of the learned position table.
        patch_size (`int`, defaults to 14): Side of a patch in pixels.
        spatial_merge_size (`int`, defaults to 2): Patches per side that become one token.
        tokens_per_second (`int`, defaults to 2): Time scale of the clip-wise position ids (Preview only).
        video_attention (`str`, defaults to `"frame"`): `"frame"`: a frame attends to itself (1.5, 671B, 2.0);
            `"clip"`: all frames of a video attend to each other (Preview).
        projector_norm (`str`, defaults to `"post_merge"`): where the projector normalises: `"post_merge"` over the
            merged patches, `"pre_merge"` over each patch (Preview).
        encode_chunk_patches (`int`, defaults to 8192): The tower encodes whole frames in chunks of about this many
            patches, so that its memory does not grow with the video. Results do not depend on it.
    """

    model_type = "keye_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 1
    tokens_per_second: int = 2
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    rope_theta: float | int = 10000.0
    video_attention: str = "frame"
    projector_norm: str = "post_merge"
    encode_chunk_patches: int = 8192
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("patch_size", "spatial_merge_size", "num_attention_heads", "encode_chunk_patches"):
            _positive(name, getattr(self, name))
        if self.num_channels != 3:
            raise ValueError(f"`num_channels` is {self.num_channels}; frames come in three colours, so it must be 3.")
        if self.temporal_patch_size != 1:
            raise ValueError(
                f"`temporal_patch_size` is {self.temporal_patch_size}; the Keye tower encodes each frame alone, so "
                "it must be 1."
            )
        _one_of("video_attention", self.video_attention, ("frame", "clip"))
        _one_of("projector_norm", self.projector_norm, ("post_merge", "pre_merge"))
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} with `num_attention_heads` {self.num_attention_heads} gives no head "
                "size that is a multiple of 4, which the 2-D rotary embedding needs (half for rows, half for columns)."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}, which the library does not know.")
        if self.image_size < self.patch_size:
            raise ValueError(f"`image_size` {self.image_size} is smaller than `patch_size` {self.patch_size}.")


@strict
class KeyeTextConfig(TranslatesPublished, PreTrainedConfig):
    r"""
    Configuration of the decoder. Fields that `DeepseekV32Config` has keep their name and meaning.

    Args:
        attention_type (`str`, defaults to `"mla"`): `"mla"` (multi-head latent attention, DeepSeek) or `"gqa"`
            (grouped-query attention with normalised heads, Qwen3).
        indexer_type (`str`, *optional*, defaults to `"deepseek_v32"`): the lightning indexer: `"deepseek_v32"` (reads
            the query latent, needs MLA), `"keye_vl_2"` (reads the hidden state, rotates every dimension), or None.
        index_topk (`int`, defaults to 2048): tokens the indexer keeps per query.
        index_n_heads (`int`, defaults to 64), index_head_dim (`int`, defaults to 128): heads of the indexer.
        local_window (`int`, *optional*, defaults to 128): each query also keeps itself and this many tokens before it.
        anchor_stride (`int`, *optional*, defaults to 64): each query also keeps every `anchor_stride`-th token.
        indexer_loss_coef (`float`, defaults to 0.0): weight of the indexer's own loss in training, per layer; with 0
            none is computed. The loss follows what is backpropagated from the model's output, so no training loop
            has to add it.
        indexer_stage (`str`, defaults to `"adaptation"`): what the indexer learns while `indexer_loss_coef` is above
            0: `"warmup"`: training attends densely, and the indexer is drawn to that distribution over all tokens
            (freeze the rest with `training.indexer_training.freeze_all_but_indexer`); `"adaptation"`: training reads
            the selection, and the indexer is drawn to the attention over the selected tokens.
        layer_types (`list[str]`, *optional*): per layer `"indexed_attention"` (the selection above) or
            `"full_attention"` (dense). Defaults to the selection everywhere, or dense when all three parts are off.
        mlp_layer_types (`list[str]`, *optional*): per layer `"dense"` or `"sparse"` (experts). Defaults to
            `first_k_dense_replace` dense layers, then experts.
        scoring_func (`str`, defaults to `"sigmoid"`): router: `"sigmoid"` (DeepSeek-V3: groups, correction bias) or
            `"softmax"` (Qwen3-MoE).
        rope_parameters (`dict`, *optional*): with `mrope_section` the position ids have three axes (contiguous
            sections); without it they are 1-D. The default is DeepSeek's YaRN.
        rope_interleave (`bool`, defaults to `True`): MLA only: rotate neighbouring pairs instead of halves.
        prefill_chunk_tokens (`int`, defaults to 2048): without gradients, a long prompt runs through the decoder in
            chunks of this many tokens, which bounds activation memory. Results do not depend on it.
    """

    model_type = "keye_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "indexer_selections",
        "indexer_loss",
        "indexer_recall",
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
    }
    ignore_keys_at_rope_validation: ClassVar[set[str]] = {"mrope_section", "mrope_interleaved"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    attention_type: str = "mla"
    indexer_type: str | None = "deepseek_v32"
    index_topk: int = 2048
    index_n_heads: int = 64
    index_head_dim: int = 128
    local_window: int | None = 128
    anchor_stride: int | None = 64
    indexer_loss_coef: float | int = 0.0
    indexer_stage: str = "adaptation"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    head_dim: int | None = None
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163840
    rope_parameters: dict | None = None
    rope_interleave: bool = True
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    mlp_bias: bool = False
    first_k_dense_replace: int = 3
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    scoring_func: str = "sigmoid"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    router_aux_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    prefill_chunk_tokens: int = 2048
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            _positive(name, getattr(self, name))
        if self.rope_parameters is None and "rope_theta" not in kwargs and "rope_scaling" not in kwargs:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
            if self.attention_type == "mla":
                self.rope_parameters = {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 40.0,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                }
        if self.attention_type == "mla":
            self.head_dim = self.qk_rope_head_dim  # what the rotary embedding is computed for
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.qk_head_dim = (
            self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention_type == "mla" else self.head_dim
        )
        if self.mlp_layer_types is None:
            dense = min(self.first_k_dense_replace, self.num_hidden_layers)
            self.mlp_layer_types = ["dense"] * dense + ["sparse"] * (self.num_hidden_layers - dense)
        if self.layer_types is None:
            self.layer_types = [INDEXED_LAYER_TYPE if self.has_selection else "full_attention"] * self.num_hidden_layers
        self.layer_types = [INDEXED_LAYER_TYPE if name in _INDEXED_NAMES else name for name in self.layer_types]
        super().__post_init__(**kwargs)
        self._refuse_contradictions()

    @property
    def has_selection(self) -> bool:
        """Whether attention reads a selection of tokens (indexer, window or anchors) instead of all of them."""
        return self.indexer_type is not None or self.local_window is not None or self.anchor_stride is not None

    @property
    def mrope_section(self) -> list[int] | None:
        """Rotary pairs per axis (time, height, width), or None when position ids are 1-D."""
        return (self.rope_parameters or {}).get("mrope_section")

    def _refuse_contradictions(self) -> None:
        _one_of("attention_type", self.attention_type, ("mla", "gqa"))
        _one_of("indexer_type", self.indexer_type, ("deepseek_v32", "keye_vl_2", None))
        _one_of("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        counts = ["index_topk", "index_n_heads", "index_head_dim", "anchor_stride", "prefill_chunk_tokens"]
        if self.attention_type == "mla":
            counts += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        for name in (*counts, "head_dim", "max_position_embeddings"):
            _positive(name, getattr(self, name))
        _positive("local_window", self.local_window, least=0)
        _positive("n_shared_experts", self.n_shared_experts, least=0)
        if "dense" in self.mlp_layer_types:
            _positive("intermediate_size", self.intermediate_size)
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` is {self.rms_norm_eps}; it must be a positive number.")
        if self.pad_token_id is not None and not -1 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id` {self.pad_token_id} is outside the vocabulary of {self.vocab_size}.")
        _one_of("indexer_stage", self.indexer_stage, ("warmup", "adaptation"))
        if not 0 <= self.indexer_loss_coef < math.inf:
            raise ValueError(f"`indexer_loss_coef` is {self.indexer_loss_coef}; it must be a number from 0 up.")
        if self.indexer_loss_coef and (self.indexer_type is None or INDEXED_LAYER_TYPE not in self.layer_types):
            raise ValueError(
                f"`indexer_loss_coef` is {self.indexer_loss_coef}, but no layer has an indexer to train. Set it to 0, "
                "or give the model an indexer with `KeyeConfig.with_indexer`."
            )
        if self.attention_dropout:
            raise ValueError(
                f"`attention_dropout` is {self.attention_dropout}; the decoder has no attention dropout: set it to 0."
            )
        if self.mlp_bias:
            raise ValueError("`mlp_bias` is True, but the MLPs of this decoder have no bias; set it to False.")
        if self.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef` is {self.router_aux_loss_coef}, but there is no auxiliary loss; set it to 0."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}, which the library does not know.")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("`partial_rotary_factor` must be 1: the rotary dimension is `head_dim`.")
        rope_types = ("default", *ROPE_INIT_FUNCTIONS)
        if (rope_type := self.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
            raise ValueError(
                f"`rope_type` {rope_type!r} chooses its frequencies by the length of a call, and "
                "cached keys keep those of theirs, so that answers would depend on how a prompt is cut. Use 'yarn' or "
                "'linear'."
            )
        if self.rope_parameters["rope_type"] not in rope_types:
            raise ValueError(
                f"`rope_type` is {self.rope_parameters['rope_type']!r}; it must be one of {', '.join(rope_types)}. "
                "Three-axis positions are 'default' together with `mrope_section`."
            )
        if self.indexer_type == "deepseek_v32":
            if self.attention_type == "gqa" or self.q_lora_rank is None:
                raise ValueError(
                    "`indexer_type='deepseek_v32'` reads the query latent of MLA, but there is none "
                    f"(`attention_type={self.attention_type!r}`, `q_lora_rank={self.q_lora_rank}`). Use "
                    "`indexer_type='keye_vl_2'`, which reads the hidden state, or `indexer_type=None`."
                )
            if self.index_head_dim < self.qk_rope_head_dim:
                raise ValueError(
                    f"`index_head_dim` {self.index_head_dim} is smaller than `qk_rope_head_dim` "
                    f"{self.qk_rope_head_dim}: the deepseek_v32 indexer rotates as many of its dimensions."
                )
        if self.indexer_type == "keye_vl_2" and self.index_head_dim % 2:
            raise ValueError(
                f"`index_head_dim` is {self.index_head_dim}; the keye_vl_2 indexer rotates pairs of dimensions, so "
                "it must be even."
            )
        if self.attention_type == "gqa" and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} is not a multiple of `num_key_value_heads` "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"The rotary dimension is {self.head_dim}; it must be even.")
        if self.mrope_section is not None:
            if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
                raise ValueError(
                    f"`mrope_section` {self.mrope_section} must hold three numbers that add up to half the rotary "
                    f"dimension ({self.head_dim // 2})."
                )
            if self.rope_parameters.get("mrope_interleaved"):
                raise ValueError(
                    "`mrope_interleaved=True` is the Qwen3-VL layout; Keye checkpoints use contiguous sections."
                )
            if self.indexer_type == "keye_vl_2":
                scaled = [n * self.index_head_dim // self.head_dim for n in self.mrope_section]
                if 2 * sum(scaled) != self.index_head_dim:
                    raise ValueError(
                        f"`mrope_section` {self.mrope_section} scaled to `index_head_dim` {self.index_head_dim} gives "
                        f"{scaled}, which does not cover the indexer's {self.index_head_dim // 2} rotary pairs."
                    )
        if self.has_selection is False and INDEXED_LAYER_TYPE in self.layer_types:
            raise ValueError(
                "`layer_types` asks for 'indexed_attention', but `indexer_type`, `local_window` and `anchor_stride` "
                "are all None. Switch one of them on, or use 'full_attention'."
            )
        if unknown := sorted(set(self.layer_types) - {INDEXED_LAYER_TYPE, "full_attention"}):
            raise ValueError(f"`layer_types` holds {unknown}; use 'indexed_attention' or 'full_attention'.")
        if "sparse" in self.mlp_layer_types:
            for name in ("moe_intermediate_size", "num_experts_per_tok"):
                _positive(name, getattr(self, name))
            if self.num_experts_per_tok > self.n_routed_experts:
                raise ValueError(
                    f"`num_experts_per_tok` {self.num_experts_per_tok} exceeds `n_routed_experts` "
                    f"{self.n_routed_experts}."
                )
            if self.scoring_func == "sigmoid":
                if self.n_routed_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
                    raise ValueError(
                        f"`n_routed_experts` {self.n_routed_experts} cannot be split in `n_group` {self.n_group} equal "
                        f"groups of which `topk_group` {self.topk_group} are kept."
                    )
                in_groups = self.n_routed_experts // self.n_group * self.topk_group
                if self.n_routed_experts // self.n_group < 2 or self.num_experts_per_tok > in_groups:
                    raise ValueError(
                        f"Groups of {self.n_routed_experts // self.n_group} experts, {self.topk_group} kept, do not "
                        f"allow `num_experts_per_tok` {self.num_experts_per_tok}: a group needs two experts or more, "
                        "and the kept groups as many as are chosen."
                    )
            elif self.n_group != 1 or self.topk_group != 1:
                raise ValueError(
                    f"`scoring_func='softmax'` has no groups, but `n_group` is {self.n_group} and `topk_group` "
                    f"{self.topk_group}; set both to 1."
                )


@strict
class KeyeConfig(TranslatesPublished, PreTrainedConfig):
    r"""
    Configuration of `KeyeModel` and `KeyeForVideoQA`.

    Args:
        vision_config (`KeyeVisionConfig` or `dict`, *optional*): tower and projector.
        text_config (`KeyeTextConfig` or `dict`, *optional*): decoder.
        video_position_ids (`str`, defaults to `"frame"`): with three-axis position ids, `"frame"` starts a new block
            per frame (1.5, 671B, 2.0), `"clip"` makes one time-scaled block per video (Preview).
        image_token_id, video_token_id (`int`): the placeholders that features replace; they must differ.
    """

    model_type = "keye"
    sub_configs_defaults = {"vision_config": KeyeVisionConfig, "text_config": KeyeTextConfig}
    sub_configs = {"vision_config": KeyeVisionConfig, "text_config": KeyeTextConfig}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "rope_deltas",
        "router_logits",
        "indexer_selections",
        "indexer_loss",
        "indexer_recall",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    video_position_ids: str = "frame"
    image_token_id: int = 129277
    video_token_id: int = 129278
    vision_start_token_id: int = 129275
    vision_end_token_id: int = 129276
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                known, found = config_class.model_type, (value or {}).get("model_type")
                if found not in (None, known):
                    raise ValueError(f"`{name}` has the `model_type` {found!r}; it must be {known!r}, or left out.")
                setattr(self, name, config_class(**(value or {})))
        # A saved model must name its classes for `trust_remote_code`, whichever class saved it.
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)
        _one_of("video_position_ids", self.video_position_ids, ("frame", "clip"))
        if self.text_config.tie_word_embeddings and not self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` is True in `text_config` only; set it on the whole configuration.")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"`image_token_id` and `video_token_id` are both {self.image_token_id}; they must differ.")
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"`{name}` {getattr(self, name)} is outside the vocabulary of {self.text_config.vocab_size}."
                )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "KeyeConfig":
        """Configuration of a named model (`presets_keye.PRESETS`); overrides of a part change only the given fields.

        Raises `ValueError` when the name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; known: {', '.join(sorted(PRESETS))}.")
        settings = dict(PRESETS[name])
        for key, value in overrides.items():
            part = settings.get(key)
            settings[key] = {**part, **value} if isinstance(part, dict) and isinstance(value, dict) else value
        return cls(**settings)

    def with_indexer(
        self, index_n_heads: int | None = None, index_head_dim: int | None = None, index_topk: int | None = None
    ) -> "KeyeConfig":
        """A copy whose decoder has a lightning indexer in every layer, for a checkpoint trained without one.

        Loading the checkpoint with it leaves the indexer's weights at their initial values: normal with
        `initializer_range`, norms at one and zero. An untrained indexer must not choose, so `index_topk` defaults to
        `max_position_embeddings`: everything is kept, attention stays dense and answers stay the same up to that
        length. Train the indexer, then lower `index_topk`.

        Args:
            index_n_heads, index_head_dim: defaults are those of Keye-VL-2.0 (16 x 64) for grouped-query attention and
                of DeepSeek-V3.2 (64 x 128) for latent attention.

        Raises `ValueError` when there is an indexer already.
        """
        text = self.text_config.to_dict()
        if text["indexer_type"] is not None:
            raise ValueError(
                f"This configuration has the indexer {text['indexer_type']!r} already; change its fields instead."
            )
        latent = text["attention_type"] == "mla"
        heads, size = (64, 128) if latent else (16, 64)
        text.update(
            indexer_type="deepseek_v32" if latent else "keye_vl_2",
            index_n_heads=index_n_heads or heads,
            index_head_dim=index_head_dim or size,
            index_topk=index_topk or text["max_position_embeddings"],
            layer_types=None,
        )
        return type(self).from_dict({**self.to_dict(), "text_config": text})


__all__ = ["KeyeConfig", "KeyeTextConfig", "KeyeVisionConfig"]
