"""Keye video question answering: read this file first.

`KeyeForVideoQA` = vision tower and projector (`vision_keye`) -> decoder with sparse attention (`attention_keye`,
`sparse_attention_keye`) and experts -> language-model head. A video is encoded once, in chunks of frames; a long prompt
runs through the decoder in chunks of tokens; the cache keeps one row per token and layer (`cache_keye`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_keye import ATTENTIONS, KeyeAttention, KeyeIndexerRotaryEmbedding, KeyeRMSNorm, KeyeRotaryEmbedding
from .cache_keye import adopt_growing_layers, cached_length, refuse_full_cache
from .configuration_keye import KeyeConfig, KeyeTextConfig, KeyeVisionConfig
from .generation_keye import KeyeGenerationMixin
from .indexer_objective_keye import LossScale, attach_objective, follow_loss, labelled_share
from .loading_keye import published_state_dict
from .packing_keye import packed_bounds, restart_positions
from .positions_keye import rope_index
from .sparse_attention_keye import ATTENTION_NAME
from .vision_keye import KeyeProjector, KeyeVisionAttention, KeyeVisionLayer, KeyeVisionTransformer, encode_media


class KeyeMLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x)."""

    def __init__(self, config, intermediate_size: int | None = None):
        super().__init__()
        size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class KeyeRouter(nn.Module):
    """Chooses experts per token; returns (logits [N, E], weights [N, k], indices [N, k]).

    `sigmoid` (DeepSeek-V3, eq. 12-16): the correction bias and the groups decide the choice, the weights are the
    unbiased sigmoids. `softmax` (Qwen3-MoE): softmax over all experts, then the top k.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        if config.scoring_func == "softmax":
            logits = nn.functional.linear(hidden_states, self.weight)
            scores = choice = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        else:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            with torch.autocast(hidden_states.device.type, enabled=False):
                logits = nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))
            scores = logits.sigmoid()
            choice = self._within_groups(scores + self.e_score_correction_bias)
        indices = choice.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, (weights * config.routed_scaling_factor).to(hidden_states.dtype), indices

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        if self.config.n_group == self.config.topk_group:
            return choice
        groups = choice.unflatten(-1, (self.config.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.config.topk_group, dim=-1).indices
        excluded = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        # Not zero: a biased score can be negative and would lose against an excluded one.
        return groups.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(-2)


@use_experts_implementation
class KeyeExperts(nn.Module):
    """All experts of a layer as 3-D weights; `gate_up_proj` holds the gate rows, then the up rows."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [N, hidden], top_k_index and top_k_weights [N, k] -> [N, hidden]. The plain loop; the library
        replaces it by grouped matrix products unless "eager" is asked for."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (result * top_k_weights[token, place, None]).to(output.dtype))
        return output


class KeyeMoE(nn.Module):
    """Routed experts plus, if configured, shared experts that see every token."""

    def __init__(self, config):
        super().__init__()
        self.gate = KeyeRouter(config)
        self.experts = KeyeExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = KeyeMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(flat)
        output = self.experts(flat, indices, weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class KeyeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a dense or routed MLP."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTIONS[config.attention_type](config, layer_idx)
        self.mlp = KeyeMoE(config) if config.mlp_layer_types[layer_idx] == "sparse" else KeyeMLP(config)
        self.input_layernorm = KeyeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KeyeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, objective: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, S, hidden] -> the same; with `objective` [2], the sums of the layers so far, also those."""
        attended = self.self_attn(self.input_layernorm(hidden_states), with_objective=objective is not None, **kwargs)
        hidden_states = hidden_states + attended[0]
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        if objective is None:
            return hidden_states
        return hidden_states, objective if attended[3] is None else objective + attended[3]


class KeyePreTrainedModel(PreTrainedModel):
    config: KeyeConfig
    config_class = KeyeConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["KeyeDecoderLayer", "KeyeVisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "indexer.weights_proj"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    # Where the tensors of this model stand in the checkpoint of the whole.
    checkpoint_part = ""

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = None, **kwargs):
        """As the library's; accepts published Keye and DeepSeek-V3 folders too, and nothing but safetensors."""
        if use_safetensors is False:
            raise ValueError("`use_safetensors=False` would read pickled weights; convert them to safetensors first.")
        return super().from_pretrained(*args, use_safetensors=True, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # The library's own mapping is one per class, but the same name means other things in other published layouts.
        if state_dict is None and checkpoint_files:
            local = Path(
                load_config.pretrained_model_name_or_path, (load_config.download_kwargs or {}).get("subfolder") or ""
            )
            folder = local if local.is_dir() else Path(checkpoint_files[0]).parent
            state_dict = published_state_dict(model, folder, checkpoint_files, load_config.dtype)
            checkpoint_files = checkpoint_files if state_dict is None else None
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(self, *args, **kwargs):
        """As the library's; the folder gets this code also where FSDP2 gave the model a class of its own."""
        wrapped = type(self)
        self.__class__ = next(kind for kind in wrapped.__mro__ if not kind.__module__.startswith("torch."))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = wrapped

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", None) or self.config.get_text_config().initializer_range
        if isinstance(module, KeyeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, KeyeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if self.config.get_text_config().scoring_func == "sigmoid":
                init.zeros_(module.e_score_correction_bias)


class KeyeVisionModel(KeyePreTrainedModel):
    """The vision tower as a model: patches [N, 3, P, P] and their grid -> one vector per patch."""

    config: KeyeVisionConfig
    config_class = KeyeVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    checkpoint_part = "model.visual."
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": KeyeVisionLayer, "attentions": KeyeVisionAttention}

    def __init__(self, config: KeyeVisionConfig):
        super().__init__(config)
        self.vision_model = KeyeVisionTransformer(config)
        self.post_init()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # The decoder's implementation, given as a plain string, reaches the tower as well.
        requested = "sdpa" if requested_attention == ATTENTION_NAME else requested_attention
        return super().get_correct_attn_implementation(requested, is_init_check)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, video: bool = False, **kwargs
    ) -> BaseModelOutput:
        """pixel_values [N, 3, P, P], grid_thw [rows, 3] in patches, `video` whether rows are runs of frames."""
        features = self.vision_model(
            pixel_values,
            grid_thw,
            video,
            output_attentions=bool(kwargs.get("output_attentions")),
            output_hidden_states=bool(kwargs.get("output_hidden_states")),
        )
        return BaseModelOutput(last_hidden_state=features)


@dataclass
class KeyeModelOutputWithPast(ModelOutput):
    """Output of `KeyeTextModel` and `KeyeModel`.

    rope_deltas: int64 [B, 1], what a text token's position adds to its slot (three-axis position ids, not packed).
    indexer_selections: one int32 [B, S, K] per layer that selects, in order: the slots that each query kept
        (`output_indexer_selections=True`).
    indexer_loss: float32 [], the KL divergence that trains the indexer, mean over real tokens and over layers, without
        gradient; indexer_recall: float32 [], the share of the dense attention that the selection catches, mean over a
        sample of tokens and over layers. Both in training with `indexer_loss_coef` above 0, else None.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    indexer_selections: tuple[torch.Tensor, ...] | None = None
    indexer_loss: torch.Tensor | None = None
    indexer_recall: torch.Tensor | None = None
    rope_deltas: torch.Tensor | None = None


@dataclass
class KeyeForVideoQAOutput(ModelOutput):
    """Output of `KeyeForVideoQA`: loss [], logits [B, S, vocabulary], and what `KeyeModelOutputWithPast` holds."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    indexer_selections: tuple[torch.Tensor, ...] | None = None
    indexer_loss: torch.Tensor | None = None
    indexer_recall: torch.Tensor | None = None
    rope_deltas: torch.Tensor | None = None


class KeyeTextModel(KeyePreTrainedModel):
    """The decoder without a head."""

    config: KeyeTextConfig
    config_class = KeyeTextConfig
    input_modalities = ("text",)
    checkpoint_part = "model.language_model."
    _can_record_outputs = {
        "hidden_states": KeyeDecoderLayer,
        "attentions": OutputRecorder(KeyeAttention, index=1),
        "router_logits": OutputRecorder(KeyeRouter, index=0),
        "indexer_selections": OutputRecorder(KeyeAttention, index=2),
    }

    def __init__(self, config: KeyeTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([KeyeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = KeyeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = KeyeRotaryEmbedding(config)
        self.index_rotary_emb = KeyeIndexerRotaryEmbedding(config) if config.indexer_type == "keye_vl_2" else None
        self.gradient_checkpointing = False
        self.indexer_loss_scale = LossScale()
        self.post_init()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # SDPA has no selection; the sparse core uses it where a query keeps everything.
        requested = ATTENTION_NAME if requested_attention in (None, "sdpa") else requested_attention
        if requested not in (ATTENTION_NAME, "eager"):
            raise ValueError(
                f"The decoder runs under {ATTENTION_NAME!r} or 'eager', not {requested!r}. To choose "
                f"for the vision tower only, pass a dict: {{'text_config': {ATTENTION_NAME!r}, 'vision_config': "
                f"{requested!r}}}."
            )
        return super().get_correct_attn_implementation(requested, is_init_check)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.IntTensor | Sequence[int] | None = None,
        **kwargs,
    ) -> KeyeModelOutputWithPast:
        """
        Args:
            attention_mask: [B, T] with 1 at real tokens; `eager` also takes bool or additive [B, 1, S, T].
            position_ids: [B, S], or [3, B, S] (time, height, width) when the configuration has `mrope_section`; a
                fourth, leading text row is not rotated by.
            cu_seq_lens_q: int32 [n + 1] from 0 to S, where the n sequences of a packed row (batch 1) begin and end.
                Each attends to itself only; window, anchors and top k count from its own first token; the indexer's
                loss and recall are means over all tokens of the row. Without it, position ids that start anew tell,
                given neither a mask nor a cache (`packing_keye.packed_bounds`). A packed row is never chunked and
                returns no cache. `cu_seq_lens_k`, `max_length_q` and `max_length_k` are accepted and not needed.
            prefill_chunk_size (keyword): overrides the configuration's for this call.
            hidden_states_to_keep (keyword): a prompt that is read in chunks returns hidden states for its last n tokens
                only, and keeps none of the others; 0 means all.
            indexer_loss_scale (keyword): where the scale of this call's loss will stand, see `follow_loss`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, num_queries = inputs_embeds.shape[:2]
        if num_queries == 0:
            raise ValueError("The input holds no token; pass at least one.")
        bounds = packed_bounds(cu_seq_lens_q, position_ids, attention_mask, past_key_values, batch, num_queries)
        chunk = self._chunk_size(num_queries, kwargs)
        if bounds is not None:
            use_cache, chunk = False, num_queries
        keep_cache = use_cache
        if past_key_values is None and (use_cache or chunk < num_queries):
            past_key_values = DynamicCache(config=self.config)
        offset = cached_length(past_key_values, num_queries)
        if self.config._attn_implementation == "eager":
            offset = int(offset)
        at_slot = isinstance(offset, torch.Tensor)
        if past_key_values is not None and not at_slot:
            adopt_growing_layers(past_key_values, self.config.num_hidden_layers, offset + num_queries)
            refuse_full_cache(past_key_values, offset + num_queries)
        if isinstance(attention_mask, dict):
            attention_mask = next(iter(attention_mask.values()))
        if at_slot:
            mask, first_slot = self._whole_mask(attention_mask, batch, past_key_values.layers[0].max_cache_len), 0
        else:
            mask, first_slot = self._prepare_mask(attention_mask, batch, offset + num_queries)
        if bounds is not None:
            if mask is not None:
                raise ValueError(
                    f"`attention_mask` {tuple(mask.shape)} masks tokens of {len(bounds) - 1} packed sequences. A "
                    "packed row has no padding: leave the mask out."
                )
            if position_ids is None:
                position_ids = restart_positions(torch.arange(num_queries, device=inputs_embeds.device)[None], bounds)
        position_ids = self._prepare_positions(position_ids, mask, batch, offset, num_queries, inputs_embeds.device)

        scale = kwargs.pop("indexer_loss_scale", None)
        objective = self._start_objective(inputs_embeds.device)
        kept, first_kept = None, num_queries - min(kwargs.pop("hidden_states_to_keep", 0) or num_queries, num_queries)
        for begin in range(0, num_queries, chunk):
            end = min(begin + chunk, num_queries)
            hidden_states, objective = self._decode(
                inputs_embeds[:, begin:end],
                objective,
                position_ids[..., begin:end],
                mask if mask is None or mask.dim() == 4 or at_slot else mask[:, : offset + end],
                past_key_values,
                offset + begin,
                first_slot,
                bounds=bounds,
                **kwargs,
            )
            if chunk < num_queries and end > first_kept:
                if kept is None:
                    kept = hidden_states.new_empty(batch, num_queries - first_kept, hidden_states.shape[-1])
                skipped = max(first_kept - begin, 0)
                kept[:, begin + skipped - first_kept : end - first_kept] = hidden_states[:, skipped:]
        hidden_states = hidden_states if kept is None else kept
        loss = recall = None
        if objective is not None:
            scales = (self.indexer_loss_scale,) if scale is None else (scale, self.indexer_loss_scale)
            hidden_states = attach_objective(hidden_states, objective, self.config.indexer_loss_coef, scales)
            num_indexers = sum(layer.self_attn.indexer is not None for layer in self.layers)
            loss, recall = (objective.detach() / num_indexers).unbind()
        return KeyeModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if keep_cache else None,
            indexer_loss=loss,
            indexer_recall=recall,
        )

    def _start_objective(self, device) -> torch.Tensor | None:
        """Zeros [2] for the layers to add their losses and recalls to, None when the indexer is not to be trained."""
        if not (self.training and torch.is_grad_enabled() and self.config.indexer_loss_coef):
            return None
        # It travels beside the hidden states and asks for a gradient: reentrant checkpoints need an input that does.
        return torch.zeros(2, device=device, requires_grad=True)

    def _decode(
        self, hidden_states, objective, position_ids, mask, past_key_values, query_offset, first_slot, **kwargs
    ):
        positions = self.rotary_emb(hidden_states, position_ids)
        index_positions = None
        if self.index_rotary_emb is not None:
            index_positions = self.index_rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            output = layer(
                hidden_states,
                objective,
                position_embeddings=positions,
                index_position_embeddings=index_positions,
                attention_mask=mask,
                past_key_values=past_key_values,
                query_offset=query_offset,
                first_slot=first_slot,
                **kwargs,
            )
            hidden_states, objective = (output, None) if objective is None else output
        return self.norm(hidden_states), objective

    def _chunk_size(self, num_queries: int, kwargs: dict) -> int:
        chunk = kwargs.pop("prefill_chunk_size", None)
        chunk = self.config.prefill_chunk_tokens if chunk is None else chunk
        if chunk < 1:
            raise ValueError(f"`prefill_chunk_size` is {chunk}; it must be at least 1.")
        sparse = self.config._attn_implementation != "eager"
        if sparse and (kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False)):
            raise ValueError(
                "Sparse attention makes no attention matrix to return. Load the model with "
                "`attn_implementation='eager'` for `output_attentions`, or ask for `output_indexer_selections`."
            )
        recorded = any(
            kwargs.get(f"output_{name}") or getattr(self.config, f"output_{name}", False)
            for name in self._can_record_outputs
        )
        if recorded or torch.is_grad_enabled() or self.config._attn_implementation == "eager":
            return max(num_queries, 1)
        return chunk

    def _prepare_mask(self, attention_mask, batch: int, num_keys: int) -> tuple[torch.Tensor | None, int]:
        """Bool mask, None when nothing is masked, and the first slot that any sequence uses."""
        if attention_mask is None:
            return None, 0
        if attention_mask.dim() == 4:
            if self.config._attn_implementation != "eager":
                raise ValueError(
                    f"A 4-D attention mask {tuple(attention_mask.shape)} needs `attn_implementation='eager'`; sparse "
                    "attention takes the padding mask [batch, tokens]."
                )
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
            return allowed, 0
        if attention_mask.shape[0] != batch or attention_mask.shape[1] < num_keys:
            raise ValueError(
                f"`attention_mask` {tuple(attention_mask.shape)} must cover all {num_keys} tokens (with cached ones) "
                f"of {batch} sequences."
            )
        mask = attention_mask[:, :num_keys].bool()
        if bool(mask.all()):
            return None, 0
        return mask, int(mask.any(dim=0).to(torch.uint8).argmax())

    def _whole_mask(self, attention_mask, batch: int, room: int) -> torch.Tensor | None:
        """Bool [B, room] over a static cache, for a step that reads no value of it; None when there is none.

        What lies behind the given mask is real: the step's own tokens, and slots that no query sees.
        """
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(
                f"A compiled step takes the padding mask [{batch}, tokens], not one of {tuple(attention_mask.shape)}."
            )
        mask = attention_mask[:, :room].bool()
        return nn.functional.pad(mask, (0, room - mask.shape[1]), value=True)

    def _prepare_positions(self, position_ids, mask, batch, offset, num_queries, device) -> torch.Tensor:
        if position_ids is None:
            slots = torch.arange(num_queries, device=device) + offset
            if mask is not None and mask.dim() == 2:
                position_ids = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, slots.to(mask.device)]
            else:
                position_ids = slots.expand(batch, -1)
        if position_ids.shape[-1] != num_queries:
            raise ValueError(
                f"`position_ids` {tuple(position_ids.shape)} must describe the {num_queries} tokens of this call, not "
                "those in the cache."
            )
        if self.config.mrope_section is None:
            if position_ids.dim() == 3 and position_ids.shape[0] != 4:
                raise ValueError(
                    f"Three-axis `position_ids` {tuple(position_ids.shape)} need a configuration with `mrope_section`."
                )
            return position_ids[0] if position_ids.dim() == 3 else position_ids
        if position_ids.dim() == 2:
            return position_ids.expand(3, -1, -1)
        return position_ids[-3:]


class KeyeModel(KeyePreTrainedModel):
    """Vision tower, projector and decoder: token ids and pixels in, hidden states out."""

    checkpoint_part = "model."

    def __init__(self, config: KeyeConfig):
        super().__init__(config)
        self.visual = KeyeVisionModel._from_config(config.vision_config)
        self.projector = KeyeProjector(config.vision_config, config.text_config.hidden_size)
        self.language_model = KeyeTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs):
        """Token features of images: `pooler_output` holds one [tokens, hidden] tensor per image."""
        return self._features(pixel_values, image_grid_thw, video=False, **kwargs)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs
    ):
        """Token features of videos: `pooler_output` holds one [tokens, hidden] tensor per row of `video_grid_thw`.

        The tower runs over chunks of frames, so its memory does not grow with the video; only with
        `output_hidden_states` or `output_attentions` it runs once over everything.
        """
        return self._features(pixel_values_videos, video_grid_thw, video=True, **kwargs)

    def _features(self, pixel_values, grid_thw, video: bool, **kwargs) -> BaseModelOutputWithPooling:
        if grid_thw is None:
            name = "video_grid_thw" if video else "image_grid_thw"
            raise ValueError(f"Pixels were passed without `{name}`. Build the inputs with `KeyeProcessor`.")
        recorded = {name: True for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)}
        if not recorded:
            tokens = encode_media(self.visual, self.projector, pixel_values, grid_thw, video)
            return BaseModelOutputWithPooling(pooler_output=tuple(tokens))
        output = self.visual(pixel_values, grid_thw, video, **recorded)
        tokens = self.projector(output.last_hidden_state, grid_thw)
        lengths = (grid_thw.prod(dim=-1) // self.config.vision_config.spatial_merge_size**2).tolist()
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=tokens.split(lengths),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        second_per_grid_ts: Iterable[float] | None = None,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Three-axis positions [3, B, S] of a prompt and `rope_deltas` [B, 1]; see `positions_keye.rope_index`."""
        return rope_index(
            self.config,
            input_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            second_per_grid_ts=second_per_grid_ts,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: Iterable[float] | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.IntTensor | Sequence[int] | None = None,
        **kwargs,
    ) -> KeyeModelOutputWithPast:
        """
        Args:
            input_ids: [B, S] with a placeholder per visual token, as `KeyeProcessor` makes them.
            pixel_values, pixel_values_videos: patches [N, 3, P, P] of all images / all frames of the batch, in order.
            image_grid_thw, video_grid_thw: [rows, 3] (frames, height, width) in patches.
            mm_encoder_outputs: {"image": ..., "video": ...} from `get_image_features` / `get_video_features` in place
                of pixels.
            position_ids, cu_seq_lens_q: see `KeyeTextModel.forward`. Media of packed sequences stand in their order;
                three-axis positions that are not given are made, from `cu_seq_lens_q` then.

        Raises `ValueError` when the placeholders and the features differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        features = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            features["image"] = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        if pixel_values_videos is not None:
            features["video"] = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for modality, output in features.items():
            if output is not None:
                inputs_embeds = self._insert(input_ids, inputs_embeds, modality, output)

        three_axes = self.config.text_config.mrope_section is not None
        shape = inputs_embeds.shape[:2]
        past_length = cached_length(past_key_values, shape[1])
        at_slot = isinstance(past_length, torch.Tensor)
        if not at_slot and past_length == 0:
            if getattr(past_key_values, "rope_deltas", None) is not None:
                # The cache was reset: where the prompt before this one went on is no matter of this one.
                past_key_values.rope_deltas = None
            if input_ids is not None:
                self._refuse_lone_placeholders(input_ids, features)
        bounds = packed_bounds(cu_seq_lens_q, position_ids, attention_mask, past_key_values, *shape)
        if bounds is not None and use_cache:
            raise ValueError(
                f"A row of {len(bounds) - 1} packed sequences leaves no cache to go on from: leave out "
                "`use_cache=True`."
            )
        if position_ids is None and three_axes:
            if input_ids is None and features:
                raise ValueError("Three-axis positions of images and videos need `input_ids` or `position_ids`.")
            padding = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
            position_ids = self.get_continued_positions(
                input_ids, inputs_embeds.shape[1], padding, past_key_values, image_grid_thw, video_grid_thw,
                second_per_grid_ts,
            )  # fmt: skip
            if position_ids is not None and bounds is not None:
                position_ids = restart_positions(position_ids, bounds)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seq_lens_q=bounds or (0, shape[1]),  # what was found here is not searched for again
            return_dict=True,
            **kwargs,
        )
        if three_axes and position_ids is not None and position_ids.dim() == 3 and bounds is None:
            seen = past_length + inputs_embeds.shape[1]
            outputs.rope_deltas = position_ids[-3:].amax(dim=(0, 2)).unsqueeze(1) + 1 - seen
            # A step in a graph goes on where the prefill said, and what it returns lives in the graph's own memory.
            if outputs.past_key_values is not None and not at_slot:
                # Where a later turn goes on belongs to what it goes on from.
                outputs.past_key_values.rope_deltas = outputs.rope_deltas
        return outputs

    def _insert(self, input_ids, inputs_embeds, modality: str, output) -> torch.Tensor:
        placeholder = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            places = input_ids == placeholder
        else:
            ids = torch.tensor(placeholder, device=inputs_embeds.device)
            places = (inputs_embeds == self.get_input_embeddings()(ids)).all(dim=-1)
        tokens = self.check_features(places, modality, output).to(inputs_embeds.device, inputs_embeds.dtype)
        if tokens.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"The {modality} features are {tokens.shape[-1]} wide, this decoder {inputs_embeds.shape[-1]}: "
                "they were encoded for another model."
            )
        if input_ids is None or torch.is_grad_enabled():
            return inputs_embeds.masked_scatter(places.unsqueeze(-1), tokens)
        # Embedded here and for no gradient: a long video needs no second copy of its prompt.
        inputs_embeds.view(-1, tokens.shape[-1]).index_copy_(0, places.flatten().nonzero().squeeze(1), tokens)
        return inputs_embeds

    def check_features(self, places: torch.Tensor, modality: str, output) -> torch.Tensor:
        """The features of a modality as [tokens, hidden]; raises `ValueError` unless they fill `places` exactly."""
        tokens = output["pooler_output"] if isinstance(output, dict) else output
        if not isinstance(tokens, torch.Tensor):
            tokens = tokens[0] if len(tokens) == 1 else torch.cat(list(tokens))
        if int(places.sum()) != tokens.shape[0]:
            raise ValueError(
                f"The prompt holds {int(places.sum())} {modality} placeholders, but the {modality} features are "
                f"{tokens.shape[0]} tokens. Build the inputs with `KeyeProcessor`; behind a cache, give only the media "
                "of the tokens that are not in it."
            )
        return tokens

    def _refuse_lone_placeholders(self, input_ids: torch.Tensor, features: dict) -> None:
        for modality in ("image", "video"):
            placeholder = getattr(self.config, f"{modality}_token_id")
            if features.get(modality) is None and bool((input_ids == placeholder).any()):
                raise ValueError(
                    f"The prompt holds {modality} placeholders (id {placeholder}), but no {modality} was passed. "
                    "Build the inputs with `KeyeProcessor`."
                )

    def get_continued_positions(
        self,
        input_ids: torch.LongTensor | None,
        num_tokens: int,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: Iterable[float] | None = None,
    ) -> torch.LongTensor | None:
        """Three-axis positions [3, B, num_tokens] of the tokens behind the cache, None where plain counting is right.

        `input_ids` are those tokens alone; the grids describe the media among them. `attention_mask` covers the cache
        as well. The cache remembers from which position its text goes on.
        """
        past_length = cached_length(past_key_values, num_tokens)
        has_media = input_ids is not None and (image_grid_thw is not None or video_grid_thw is not None)
        past_length = int(past_length) if has_media else past_length
        at_slot = isinstance(past_length, torch.Tensor)
        deltas = getattr(past_key_values, "rope_deltas", None) if at_slot or past_length else None
        if has_media:
            mask = None if attention_mask is None else attention_mask[:, past_length:]
            positions, _ = self.get_rope_index(input_ids, image_grid_thw, video_grid_thw, mask, second_per_grid_ts)
        elif deltas is None:
            return None
        else:
            positions = torch.arange(num_tokens, device=deltas.device).expand(3, 1, -1)
        if at_slot or past_length:
            positions = positions + past_length + (0 if deltas is None else deltas.to(positions.device))
        return positions


class KeyeForVideoQA(KeyePreTrainedModel, KeyeGenerationMixin):
    """Answers questions about videos and images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = True

    def __init__(self, config: KeyeConfig):
        super().__init__(config)
        self.model = KeyeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # The library picks a loss by class name, and this name matches none.
        self.loss_type = "ForConditionalGeneration"
        self.suppress_placeholders()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs):
        """See `KeyeModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs
    ):
        """See `KeyeModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def attention_backend_report(self) -> list[dict]:
        """Per decoder layer: implementation, what a query keeps, and which backend ran in the last call.

        `ran` is "torch" or "triton" (the selection was made and read), "dense" (every query kept everything, so nothing
        had to be selected), "dense mask" (`eager`), or None before the first call.
        """
        report = []
        for i, layer in enumerate(self.model.language_model.layers):
            attention = layer.self_attn
            report.append(
                {
                    "layer": i,
                    "implementation": attention.config._attn_implementation,
                    "ran": attention.backend_ran,
                    "topk": attention.selection.topk,
                    "local_window": attention.selection.local_window,
                    "anchor_stride": attention.selection.anchor_stride,
                }
            )
        return report

    def follow_loss(self, loss: torch.Tensor, share: torch.Tensor | float = 1.0) -> torch.Tensor:
        """For a loss that is not `outputs.loss`: returns it unchanged, and from then on the indexer's loss is scaled
        as it is (accumulation, loss scaling of mixed precision); without this, its weight per backward pass is
        `indexer_loss_coef` as it stands. `share`: what part of an optimizer step this batch is, where `loss` is
        already divided by the whole step."""
        return follow_loss(loss, self.model.language_model.indexer_loss_scale, share)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: Iterable[float] | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seq_lens_q: torch.IntTensor | Sequence[int] | None = None,
        **kwargs,
    ) -> KeyeForVideoQAOutput:
        """
        Args:
            labels: [B, S] token ids, -100 where no loss is wanted (padding, prompt, placeholders); shifted inside. The
                first label of each sequence of a packed row must be -100, as the library's
                `DataCollatorWithFlattening` sets it: the token before it belongs to another sequence.
            logits_to_keep: compute logits for the last n tokens only, or for the given indices; 0 means all.

        The other arguments are those of `KeyeModel.forward`.
        """
        scale = None if labels is None else LossScale()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            return_dict=True,
            indexer_loss_scale=scale,
            hidden_states_to_keep=max(logits_to_keep, 0) if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        partial = not isinstance(logits_to_keep, int) or logits_to_keep > 0
        if labels is not None and partial:
            raise ValueError("`labels` need all logits: leave out `logits_to_keep`.")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if outputs.indexer_loss is not None:
                loss = follow_loss(loss, scale, labelled_share(labels, kwargs.get("num_items_in_batch")))
        return KeyeForVideoQAOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            indexer_selections=outputs.indexer_selections,
            indexer_loss=outputs.indexer_loss,
            indexer_recall=outputs.indexer_recall,
            rope_deltas=outputs.rope_deltas,
        )


__all__ = ["KeyeForVideoQA", "KeyeModel", "KeyePreTrainedModel", "KeyeTextModel", "KeyeVisionModel"]
