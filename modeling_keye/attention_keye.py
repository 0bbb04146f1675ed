"""Decoder attention: rotary embeddings, the two lightning indexers, MLA and GQA.

MLA is computed in absorbed form against the latent cache (DeepSeek-V2 report, section 2.1): the key up-projection
moves into the query and the value up-projection behind the attention, so that the cache holds one row per token.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .autocast_keye import in_autocast_dtype
from .indexer_objective_keye import IndexerLoss, caught_mass, query_weights
from .packing_keye import attend_each, join_selections, sequence_lengths
from .sparse_attention_keye import (
    Selection,
    dense_attention,
    dense_attention_with_lse,
    dense_latent_attention,
    gqa_backend,
    mla_backend,
    select_tokens,
    sparse_gqa,
    sparse_mla,
)
from .sparse_eager_keye import eager_attention, eager_objective, eager_selection

# Queries per selection and attention step: bounds the absorbed queries and the index list of one step.
_QUERY_STEP = 512
# The same for grouped queries on a GPU, where units of neighbours share a program and 512 queries are too few of them.
_GROUPED_STEP_ON_CUDA = 4096
# Largest expanded key tensor, in elements: dense MLA over more expands the latents of some heads at a time.
_MAX_EXPANDED_ELEMENTS = 2**27
# The share of the attention that a selection catches is measured on this many runs of neighbouring queries.
_RECALL_RUNS, _RECALL_RUN = 4, 8


class KeyeRMSNorm(nn.Module):
    """Root-mean-square norm: float32 statistics, cast back, then the weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class KeyeRotaryEmbedding(nn.Module):
    """cos and sin of the decoder's rotary embedding, 1-D or with contiguous M-RoPE sections.

    The attribute names are the ones by which the library restores `inv_freq` after loading.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = self.rope_kind(config)
        self.mrope_section = self.scaled_section(config)
        init: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def rope_kind(config) -> str:
        return config.rope_parameters["rope_type"]

    @staticmethod
    def scaled_section(config) -> list[int] | None:
        return config.mrope_section

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies theta^(-2i/d) [d/2] over the rotary dimension, and the factor 1.0."""
        return _inverse_frequencies(config.rope_parameters["rope_theta"], config.head_dim, device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [B, S], or [3, B, S] with sections -> cos, sin [B, S, d] in the dtype of x."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        if self.mrope_section is not None:
            axes = freqs.split(self.mrope_section, dim=-1)
            freqs = torch.cat([part[i] for i, part in enumerate(axes)], dim=-1)
        emb = torch.cat((freqs, freqs), dim=-1)
        return (emb.cos() * self.attention_scaling).to(x.dtype), (emb.sin() * self.attention_scaling).to(x.dtype)


class KeyeIndexerRotaryEmbedding(KeyeRotaryEmbedding):
    """Rotary embedding of the keye_vl_2 indexer: all its dimensions, theta of the decoder, scaled sections."""

    @staticmethod
    def rope_kind(config) -> str:
        return "default"

    @staticmethod
    def scaled_section(config) -> list[int] | None:
        if config.mrope_section is None:
            return None
        return [n * config.index_head_dim // config.head_dim for n in config.mrope_section]

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        return _inverse_frequencies(config.rope_parameters["rope_theta"], config.index_head_dim, device), 1.0


def _inverse_frequencies(theta: float, dim: int, device=None) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding of x [B, S, heads, d] by cos, sin [B, S, d].

    Half-split pairs (i, i + d/2). With `interleaved` the input pairs are (2i, 2i + 1); the output is laid out
    half-split all the same, which changes nothing as long as queries and keys agree.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KeyeDeepseekIndexer(nn.Module):
    """Lightning indexer of DeepSeek-V3.2: `I[t,s] = sum_j w[t,j] relu(q[t,j] . k[s])`, gates scaled by (Hi Di)^-0.5.

    Queries come from the query latent of MLA, keys and gates from the layer input. Only the first `qk_rope_head_dim`
    dimensions are rotated, half-split although the attention itself is interleaved. The Hadamard transform and fp8
    of the original leave the dot product as it is and are left out.
    """

    reads_query_latent = True

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim, self.rope_dim = (
            config.index_n_heads,
            config.index_head_dim,
            config.qk_rope_head_dim,
        )
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def forward(self, hidden_states, query_latent, cos, sin):
        """hidden_states [B, S, hidden], query_latent [B, S, q_lora_rank], cos and sin [B, S, R] ->
        queries [B, S, Hi, Di], keys [B, S, Di], gates [B, S, Hi] float32."""
        q, gates = self.queries(hidden_states, query_latent, cos, sin)
        return q, self.keys(hidden_states, cos, sin), gates

    def queries(self, hidden_states, query_latent, cos, sin):
        """Queries and gates alone."""
        q = self._rotate(self.wq_b(query_latent).unflatten(-1, (self.num_heads, self.head_dim)), cos, sin)
        gates = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float()
        return q, gates * (self.num_heads * self.head_dim) ** -0.5

    def keys(self, hidden_states, cos, sin):
        """Keys alone."""
        return self._rotate(self.k_norm(self.wk(hidden_states)).unsqueeze(2), cos, sin).squeeze(2)

    def _rotate(self, x, cos, sin):
        return torch.cat([rotate(x[..., : self.rope_dim], cos, sin), x[..., self.rope_dim :]], dim=-1)


class KeyeFusedIndexer(nn.Module):
    """Lightning indexer of Keye-VL-2.0: reads the layer input only, gates are the last rows of `q_proj`.

    Queries are RMS-normalised per head, keys go through a LayerNorm with bias, all dimensions are rotated. Gates are
    scaled by Di^-0.5 only and may be negative.
    """

    reads_query_latent = False

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * (self.head_dim + 1), bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.q_norm = KeyeRMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)

    def forward(self, hidden_states, query_latent, cos, sin):
        """As `KeyeDeepseekIndexer.forward`; `query_latent` is not read, cos and sin are [B, S, Di]."""
        q, gates = self.queries(hidden_states, query_latent, cos, sin)
        return q, self.keys(hidden_states, cos, sin), gates

    def queries(self, hidden_states, query_latent, cos, sin):
        """Queries and gates alone."""
        q, gates = self.q_proj(hidden_states).split([self.num_heads * self.head_dim, self.num_heads], dim=-1)
        q = rotate(self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))), cos, sin)
        return q, gates.float() * self.head_dim**-0.5

    def keys(self, hidden_states, cos, sin):
        """Keys alone."""
        return rotate(self.k_norm(self.k_proj(hidden_states)).unsqueeze(2), cos, sin).squeeze(2)


INDEXERS = {"deepseek_v32": KeyeDeepseekIndexer, "keye_vl_2": KeyeFusedIndexer}


class KeyeAttention(nn.Module):
    """What MLA and GQA share: the indexer and its loss, the cache, and the split into dense and sparse queries.

    The two kinds differ in `project`, `expand`, `attend_dense` and `attend_sparse`; the last two also return what their
    scores were made of, queries [B, n, H, D] and keys [B, G, T, D], which `score_operands` gives for any queries, and
    the log-sum-exp of these scores [B, n, H]. `attend_dense` returns None in place of what it does not have.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.is_sparse = config.layer_types[layer_idx] != "full_attention"
        self.indexer = None
        self.other_selection: Selection | None = None  # in the place of what the config says
        self.backend_ran: str | None = None
        if self.is_sparse and config.indexer_type:
            self.indexer = INDEXERS[config.indexer_type](config)

    @property
    def selection(self) -> Selection:
        """What a query keeps: as the config says now, unless there is an `other_selection`."""
        if self.other_selection is not None:
            return self.other_selection
        if not self.is_sparse:
            return Selection()
        return Selection(
            topk=None if self.indexer is None else self.config.index_topk,
            local_window=self.config.local_window,
            anchor_stride=self.config.anchor_stride,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        index_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_offset: int | torch.Tensor = 0,
        first_slot: int = 0,
        output_indexer_selections: bool = False,
        with_objective: bool = False,
        bounds: tuple[int, ...] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: [B, S, hidden], the normalised layer input.
            attention_mask: bool [B, T] at real tokens, or None; for `eager` also bool [B, 1, S, T].
            query_offset: cache slot of the first query; int64 [] in a step over a static cache whose slot the host does
                not know, where T is the whole cache. first_slot: lowest slot that holds a real token.
            with_objective: compute the indexer's loss; in its warm-up stage attention is dense then.
            bounds: of the sequences of a packed row (`packing_keye`), which comes without mask and cache.

        Returns:
            output [B, S, hidden], attention weights [B, H, S, T] (`eager` only), selected slots int32 [B, S, K] when
            `output_indexer_selections`, and float32 [2] `with_objective` on a layer with an indexer: its loss, with
            gradient, and the share of the dense attention that its selection catches.
        """
        queries, states, query_latent = self.project(hidden_states, *position_embeddings)
        queries, *states = in_autocast_dtype(queries, *states)
        index = None
        with_objective = with_objective and self.indexer is not None
        if self.indexer is not None:
            positions = index_position_embeddings or position_embeddings
            index = self._index(hidden_states, query_latent, positions, with_objective)
            if past_key_values is not None:
                index = (index[0], past_key_values.update_indexer(index[1], self.layer_idx), index[2])
        if past_key_values is not None:
            states = past_key_values.update(*states, self.layer_idx)
        at_slot = isinstance(query_offset, torch.Tensor)
        if not at_slot:
            num_keys = query_offset + hidden_states.shape[1]
            states = tuple(state[:, :, :num_keys] for state in states)
        # With a graph for the indexer's loss, without one for the selection.
        learned = index if with_objective else None
        index = None if index is None else tuple(part.detach() for part in index)
        weights = None
        if self.config._attn_implementation == "eager":
            self.backend_ran = "dense mask"
            output, weights, selected, objective = self._eager(
                queries, states, index, learned, attention_mask, query_offset, output_indexer_selections, bounds
            )
        elif at_slot:
            slot = query_offset.to(hidden_states.device)
            output, selected = self._at_slot(queries, states, index, attention_mask, slot)
            selected, objective = selected if output_indexer_selections else None, None
        else:
            self.backend_ran = "dense"  # until a query has to select
            attend = self._tiled if bounds is None else partial(attend_each, self._tiled, bounds)
            output, selected, objective = attend(
                queries, states, index, learned, attention_mask, query_offset, first_slot, output_indexer_selections
            )
        return self.o_proj(output.flatten(2)), weights, selected, objective

    def _index(self, hidden_states, query_latent, position_embeddings, with_objective: bool):
        # The loss of the indexer stays in the indexer; without it nothing needs a graph here, as a selection has no
        # gradient: the language-model loss never reaches the indexer.
        latent = None if query_latent is None else query_latent.detach()
        with torch.set_grad_enabled(with_objective and torch.is_grad_enabled()):
            q, k, gates = self.indexer(hidden_states.detach(), latent, *position_embeddings)
            return *in_autocast_dtype(q, k), gates

    def _tiled(self, queries, states, index, learned, key_mask, query_offset, first_slot, output_selections):
        batch, num_queries = queries.shape[:2]
        warmup = learned is not None and self.config.indexer_stage == "warmup"
        selection = Selection() if warmup else self.selection
        num_visible = query_offset + num_queries - first_slot
        num_dense = selection.dense_length(num_visible) + first_slot - query_offset
        num_dense = num_queries if selection.is_dense else min(max(num_dense, 0), num_queries)
        loss = None if learned is None else self._start_loss(queries, learned, query_offset, key_mask)
        outputs, selections = [], []
        if num_dense:
            keys = tuple(state[:, :, : query_offset + num_dense] for state in states)
            mask = None if key_mask is None else key_mask[:, : query_offset + num_dense]
            place = (queries[:, :num_dense], keys, query_offset, mask)
            output, scored, lse = self.attend_dense(*place, with_lse=loss is not None)
            outputs.append(output)
            if loss is not None:
                loss.add_dense(0, *(scored or self.score_operands(*place[:2])), self.scaling, lse)
        step = self.query_step(queries.device)
        for begin in range(num_dense, num_queries, step):
            end = min(begin + step, num_queries)
            selected = self._select(index, batch, begin, end, query_offset, key_mask, queries.device)
            output, scored, lse = self.attend_sparse(queries[:, begin:end], states, selected)
            outputs.append(output)
            if loss is not None:
                loss.add_sparse(begin, *scored, lse, selected, self.scaling)
            if output_selections:
                selections.append(selected)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        kept = None
        if output_selections and self.is_sparse:
            if num_dense:
                selections.insert(0, self._select(index, batch, 0, num_dense, query_offset, key_mask, queries.device))
            kept = join_selections(selections)
        objective = None
        if loss is not None:
            recall = self._sampled_recall(queries, states, index, key_mask, query_offset, first_slot)
            objective = torch.stack([loss.result().float(), recall.float()])
        return output, kept, objective

    def query_step(self, device: torch.device) -> int:
        """Queries whose lists are made and read at once."""
        return _QUERY_STEP

    def _at_slot(self, queries, states, index, key_mask, slot) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and selected slots of a few queries over a whole static cache; nothing depends on where they stand."""
        batch, num_queries = queries.shape[:2]
        if self.selection.is_dense:
            self.backend_ran = "dense"
            return self.attend_dense(queries, states, slot, key_mask)[0], None
        num_keys = states[0].shape[2]
        selected = self._select(index, batch, 0, num_queries, slot, key_mask, queries.device, num_keys)
        return self.attend_sparse(queries, states, selected)[0], selected

    def _select(self, index, batch, begin, end, query_offset, key_mask, device, num_keys=None):
        q, k, gates = (
            (None, None, None) if index is None else (index[0][:, begin:end], index[1], index[2][:, begin:end])
        )
        return select_tokens(
            self.selection,
            q,
            k,
            gates,
            batch_size=batch,
            num_queries=end - begin,
            query_offset=query_offset + begin,
            key_mask=key_mask,
            device=device,
            num_keys=num_keys,
        )

    def _start_loss(self, queries, learned, query_offset, key_mask) -> IndexerLoss:
        if queries.shape[2] != self.num_heads:
            raise ValueError(
                f"The indexer's target is the mean over all {self.num_heads} heads, but this process holds "
                f"{queries.shape[2]} of them. Train the indexer without tensor parallelism (DDP and FSDP work), or set "
                "`indexer_loss_coef` to 0."
            )
        return IndexerLoss(*learned, query_offset=query_offset, key_mask=key_mask)

    @torch.no_grad()
    def _sampled_recall(self, queries, states, index, key_mask, query_offset, first_slot) -> torch.Tensor:
        """Share of the dense attention that the selection catches, mean over evenly spread queries: []."""
        batch, num_queries = queries.shape[:2]
        last_begin = max(0, num_queries - _RECALL_RUN)
        begins = sorted({last_begin * i // (_RECALL_RUNS - 1) for i in range(_RECALL_RUNS)})
        weights = query_weights(queries.shape[:2], query_offset, key_mask, queries.device, torch.float32)
        caught = total = torch.zeros((), device=queries.device)
        for begin in begins:
            end = min(begin + _RECALL_RUN, num_queries)
            weight = weights[:, begin:end]
            total = total + weight.sum()
            if self.selection.keeps_everything(query_offset + end - first_slot):
                caught = caught + weight.sum()
                continue
            selected = self._select(index, batch, begin, end, query_offset, key_mask, queries.device)
            share = caught_mass(
                *self.score_operands(queries[:, begin:end], states),
                selected,
                scaling=self.scaling,
                query_offset=query_offset + begin,
                key_mask=key_mask,
            )
            caught = caught + (share * weight).sum()
        return caught / total

    def _eager(self, queries, states, index, learned, attention_mask, query_offset, output_selections, bounds):
        place = (queries.shape[:2], query_offset, attention_mask, queries.device, bounds)
        kept = eager_selection(self.selection, index, *place)
        keys, values = self.expand(states)
        objective = None
        if learned is None:
            output, weights = eager_attention(queries, keys, values, kept, self.scaling)
        else:
            visible = eager_selection(Selection(), None, *place)
            attended = visible if self.config.indexer_stage == "warmup" else kept
            output, weights = eager_attention(queries, keys, values, attended, self.scaling)
            dense = eager_attention(queries, keys, values, visible, self.scaling)[1]
            objective = eager_objective(learned, weights, attended, dense, visible, kept, query_offset)
        selection = None
        if output_selections and self.is_sparse:
            num_keys = kept.shape[-1]
            slots = torch.where(kept, torch.arange(num_keys, device=kept.device), num_keys).sort(dim=-1).values
            width = self.selection.width(num_keys if bounds is None else max(sequence_lengths(bounds)))
            selection = slots.masked_fill(slots == num_keys, -1)[..., :width].to(torch.int32)
        return output, weights, selection, objective


class KeyeLatentAttention(KeyeAttention):
    """Multi-head latent attention with a selection; parameter names as in DeepSeek-V3."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.nope_dim, self.rope_dim, self.value_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.kv_lora_rank = config.kv_lora_rank
        self.interleaved = config.rope_interleave
        head_dim = self.nope_dim + self.rope_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, self.num_heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = KeyeRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, self.kv_lora_rank + self.rope_dim, bias=config.attention_bias
        )
        self.kv_a_layernorm = KeyeRMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, self.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, config.hidden_size, bias=config.attention_bias)
        self.scaling = head_dim**-0.5 * _yarn_temperature(config.rope_parameters)

    def project(self, hidden_states, cos, sin):
        """-> queries [B, S, H, nope + R], (cache rows [B, 1, S, C + R], empty values), query latent or None."""
        latent = None
        if self.config.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
            q = self.q_b_proj(latent)
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope_dim + self.rope_dim)).split(
            [self.nope_dim, self.rope_dim], dim=-1
        )
        kv, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        queries = torch.cat([q_nope, rotate(q_rope, cos, sin, self.interleaved)], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin, self.interleaved).squeeze(2)
        rows = torch.cat([self.kv_a_layernorm(kv), k_rope], dim=-1).unsqueeze(1)
        return queries, (rows, rows[..., :0]), latent

    def _up_projections(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK [H, nope, C] and W_UV [H, value, C], on the device and in the dtype of the queries."""
        if type(self.kv_b_proj) is nn.Linear and not hasattr(self.kv_b_proj, "_hf_hook"):
            weight = self.kv_b_proj.weight
        else:  # adapters, quantised and offloaded layers have no plain weight: read it through the layer itself
            eye = torch.eye(self.kv_lora_rank, dtype=queries.dtype, device=queries.device)
            weight = self.kv_b_proj(eye).T
        return weight.unflatten(0, (-1, self.nope_dim + self.value_dim)).split([self.nope_dim, self.value_dim], dim=1)

    def expand_kv(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """latent [B, 1, T, C], k_rope [B, 1, T, R] -> keys [B, H, T, nope + R], values [B, H, T, value]."""
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, self.nope_dim + self.value_dim)).transpose(1, 2)
        k_nope, values = kv.split([self.nope_dim, self.value_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1), values

    def expand(self, states):
        return self.expand_kv(*states[0].split([self.kv_lora_rank, self.rope_dim], dim=-1))

    def _absorb(self, queries: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope = queries.split([self.nope_dim, self.rope_dim], dim=-1)
        return torch.cat([torch.einsum("bshn,hnc->bshc", q_nope, w_uk), q_rope], dim=-1)

    def score_operands(self, queries, states):
        return self._absorb(queries, self._up_projections(queries)[0]), states[0]

    def attend_sparse(self, queries, states, selected):
        w_uk, w_uv = self._up_projections(queries)
        absorbed, rows = self._absorb(queries, w_uk), states[0]
        self.backend_ran = mla_backend(absorbed, rows.squeeze(1), self.kv_lora_rank)
        out, lse = sparse_mla(absorbed, rows.squeeze(1), selected, self.scaling, self.kv_lora_rank)
        return torch.einsum("bshc,hvc->bshv", out, w_uv), (absorbed, rows), lse

    def attend_dense(self, queries, states, query_offset, key_mask, with_lse=False):
        batch, num_queries, heads = queries.shape[:3]
        num_keys = states[0].shape[2]
        place = {"scaling": self.scaling, "query_offset": query_offset, "key_mask": key_mask}
        # Expanding costs C (nope + value) per key and saves this much per query and key.
        saved = 2 * self.kv_lora_rank - self.nope_dim - self.value_dim
        if num_queries * saved <= self.kv_lora_rank * (self.nope_dim + self.value_dim):
            w_uk, w_uv = self._up_projections(queries)
            absorbed, rows = self._absorb(queries, w_uk), states[0]
            out = dense_latent_attention(absorbed, rows.squeeze(1), value_dim=self.kv_lora_rank, **place)
            return torch.einsum("bshc,hvc->bshv", out, w_uv), (absorbed, rows), None
        at_once = _MAX_EXPANDED_ELEMENTS // (batch * num_keys * (self.nope_dim + self.rope_dim))
        if at_once >= heads:
            keys, values = self.expand(states)
            out, lse = _attend(queries, keys, values, with_lse, **place)
            return out, (queries, keys), lse
        w_uk, w_uv = self._up_projections(queries)
        attend = partial(self._attend_expanded, rows=states[0].squeeze(1), **place)
        if torch.is_grad_enabled():  # what is expanded is made again in backward, not kept
            attend = partial(checkpoint, attend, use_reentrant=False)
        at_once = max(1, at_once)
        parts = [slice(begin, begin + at_once) for begin in range(0, heads, at_once)]
        return torch.cat([attend(queries[:, :, part], w_uk[part], w_uv[part]) for part in parts], dim=2), None, None

    def _attend_expanded(self, queries, w_uk, w_uv, rows, **place):
        """Dense attention of some heads: queries [B, S, h, nope + R], rows [B, T, C + R] -> [B, S, h, value]."""
        latent, k_rope = rows.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        k_nope, values = (torch.einsum("btc,hdc->bhtd", latent, weight) for weight in (w_uk, w_uv))
        keys = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        return dense_attention(queries.transpose(1, 2), keys, values, **place)


class KeyeGroupedAttention(KeyeAttention):
    """Grouped-query attention with normalised heads and a selection; parameter names as in Qwen3."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim, self.num_groups = config.head_dim, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = KeyeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = KeyeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.scaling = self.head_dim**-0.5

    def project(self, hidden_states, cos, sin):
        """-> queries [B, S, H, D], (keys, values [B, G, S, D]), None."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return q, (k.transpose(1, 2), v.transpose(1, 2)), None

    def expand(self, states):
        return states

    def query_step(self, device):
        return _GROUPED_STEP_ON_CUDA if device.type == "cuda" else _QUERY_STEP

    def score_operands(self, queries, states):
        return queries, states[0]

    def attend_sparse(self, queries, states, selected):
        self.backend_ran = gqa_backend(queries, *states)
        out, lse = sparse_gqa(queries, *states, selected, self.scaling)
        return out, (queries, states[0]), lse

    def attend_dense(self, queries, states, query_offset, key_mask, with_lse=False):
        place = {"scaling": self.scaling, "query_offset": query_offset, "key_mask": key_mask}
        out, lse = _attend(queries, *states, with_lse, **place)
        return out, (queries, states[0]), lse


def _attend(queries, keys, values, with_lse: bool, **place) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention of queries [B, S, H, D], with its log-sum-exp where that is wanted and known."""
    if with_lse:
        return dense_attention_with_lse(queries.transpose(1, 2), keys, values, **place)
    return dense_attention(queries.transpose(1, 2), keys, values, **place), None


ATTENTIONS = {"mla": KeyeLatentAttention, "gqa": KeyeGroupedAttention}


def _yarn_temperature(rope_parameters: dict) -> float:
    """m^2 of YaRN (DeepSeek-V3 `modeling`: mscale_all_dim), 1 without scaling."""
    mscale = rope_parameters.get("mscale_all_dim", 0)
    factor = rope_parameters.get("factor", 1.0)
    if rope_parameters["rope_type"] == "default" or not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2
