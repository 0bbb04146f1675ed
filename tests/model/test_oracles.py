"""Logits against Transformers' own models with the same weights: deepseek_v32, deepseek_v3 and qwen3_moe.

deepseek_v32 runs with our selection put in place of its own, layer by layer, so that every layer of both models gets
the same input; its own choice is recorded first. The two choices may differ only where scores lie within rounding.
"""

import math

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from modeling_keye.modeling_keye import KeyeForVideoQA
from tests.model.factories import text_ids, tiny_model

pytestmark = pytest.mark.compat

PROMPT, STEPS, TOPK = 1024, 32, 64
TOLERANCE = 1e-4
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "moe_intermediate_size num_experts_per_tok norm_topk_prob attention_bias rms_norm_eps max_position_embeddings "
    "rope_parameters pad_token_id bos_token_id eos_token_id"
).split()
DEEPSEEK_FIELDS = (
    "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim first_k_dense_replace n_routed_experts "
    "n_shared_experts n_group topk_group routed_scaling_factor"
).split()


def peer_of(model: KeyeForVideoQA, config_class, model_class, fields, attention: str = "eager", **more):
    """A Transformers model with the sizes and the text weights of `model`."""
    text = model.config.text_config
    config = config_class(**{name: getattr(text, name) for name in (*SHARED_FIELDS, *fields)}, **more)
    config._attn_implementation = attention
    peer = model_class(config).eval()
    weights = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    peer.load_state_dict(weights)  # strict: the same names and shapes, none left over
    return peer


def run_steps(model, ids: torch.Tensor, prompt: int, **kwargs):
    """Prefill of `prompt` tokens and one cached step per further token; yields (first slot, output)."""
    cache = None
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        with torch.no_grad():  # not around the `yield`: two of these run in turns
            output = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **kwargs)
        cache = output.past_key_values
        yield begin, output


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


class SelectionSwap:
    """Puts our selection into the peer's indexer and compares it with what the peer would have chosen."""

    def __init__(self, model: KeyeForVideoQA, peer, monkeypatch):
        self.rows = self.ties = self.rounded = 0
        self.worst_rounding = 0.0
        self.first_slot = 0
        self.ours: tuple[torch.Tensor, ...] = ()
        self.index = {}
        self.peer_keys: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(model.model.language_model.layers):
            layer.self_attn.indexer.register_forward_hook(self._record(i))
        for i, layer in enumerate(peer.model.layers):
            indexer = layer.self_attn.indexer
            monkeypatch.setattr(indexer, "forward", self._replacement(i, indexer, indexer.forward))

    def _record(self, layer: int):
        def hook(module, args, output):
            q, k, gates = output
            if layer in self.index:
                k = torch.cat([self.index[layer][1], k], dim=1)
            self.index[layer] = (q, k, gates)

        return hook

    def _replacement(self, layer: int, indexer, original):
        def forward(*args, **kwargs):
            theirs = original(*args, **kwargs)
            ours = self.ours[layer]
            self._compare(layer, ours[0], theirs[0], self._peer_scores(layer, indexer, *args, **kwargs))
            return torch.where(ours < 0, ours[..., :1], ours)  # a slot chosen twice is chosen once

        return forward

    def _peer_scores(self, layer, indexer, hidden_states, q_resid, position_embeddings, *args, **kwargs):
        """The peer's scores [S, T], written out from its weights and its inputs, in float64."""
        cos, sin = (x.double().unsqueeze(2) for x in position_embeddings)
        rope = indexer.qk_rope_head_dim

        def rotated(x):
            head, tail = x[..., :rope], x[..., rope:]
            first, second = head.chunk(2, dim=-1)
            return torch.cat([head * cos + torch.cat([-second, first], dim=-1) * sin, tail], dim=-1)

        q = (q_resid.double() @ indexer.wq_b.weight.double().T).unflatten(-1, (indexer.n_heads, -1))
        k = torch.nn.functional.layer_norm(
            hidden_states.double() @ indexer.wk.weight.double().T,
            (indexer.head_dim,),
            indexer.k_norm.weight.double(),
            indexer.k_norm.bias.double(),
            1e-6,
        )
        q, k = rotated(q)[0], rotated(k.unsqueeze(2))[0, :, 0]
        self.peer_keys[layer] = k = torch.cat([self.peer_keys.get(layer, k[:0]), k])
        gates = hidden_states[0].double() @ indexer.weights_proj.weight.double().T
        products = torch.einsum("shd,td->sht", q, k).relu()
        return torch.einsum("sht,sh->st", products, gates) * (indexer.n_heads * indexer.head_dim) ** -0.5

    def _compare(self, layer, ours, theirs, their_scores):
        q, k, gates = (x[0].double() for x in self.index[layer])
        our_scores = torch.einsum("sht,sh->st", torch.einsum("shd,td->sht", q, k).relu(), gates)
        for row in range(ours.shape[0]):
            t = self.first_slot + row
            first = {s for s in ours[row].tolist() if s >= 0}
            second = {s for s in theirs[row].tolist() if s <= t}
            assert len(first) == len(second) == min(t + 1, TOPK)
            self.rows += 1
            if first == second:
                continue
            # Both models score with float32 inputs that agree to rounding; what that moves is the allowed distance.
            scores = their_scores[row, : t + 1]
            size = float(scores.abs().max())
            moved = float((scores - our_scores[row, : t + 1]).abs().max())
            self.worst_rounding = max(self.worst_rounding, moved / size)
            threshold = scores.topk(TOPK).values[-1]
            distance = (scores[list(first ^ second)] - threshold).abs().max()
            if float(distance) == 0.0:
                self.ties += 1
            else:
                self.rounded += 1
            assert distance <= 2 * moved + 4 * torch.finfo(torch.float32).eps * size, (
                f"layer {layer}, query {t}: swapped tokens lie {distance:.2e} from the threshold"
            )


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
def test_deepseek_v32(attention, monkeypatch):
    model = tiny_model(
        "mla",
        attn_implementation=attention,
        local_window=None,
        anchor_stride=None,
        index_topk=TOPK,
        max_position_embeddings=2048,
        rope_parameters=dict(YARN),
    )
    text = model.config.text_config
    index = {name: getattr(text, name) for name in ("index_topk", "index_n_heads", "index_head_dim")}
    peer = peer_of(model, DeepseekV32Config, DeepseekV32ForCausalLM, DEEPSEEK_FIELDS, **index)
    swap = SelectionSwap(model, peer, monkeypatch)
    ids = text_ids(1, PROMPT + STEPS)
    worst = 0.0
    peer_steps = run_steps(peer, ids, PROMPT)
    for begin, output in run_steps(model, ids, PROMPT, output_indexer_selections=True):
        swap.first_slot, swap.ours = begin, output.indexer_selections
        _, theirs = next(peer_steps)
        worst = max(worst, largest_difference(output.logits, theirs.logits))
    assert swap.rows == (PROMPT + STEPS) * text.num_hidden_layers
    ties, rounded = swap.ties / swap.rows, swap.rounded / swap.rows
    print(
        f"deepseek_v32 ({attention}): largest logit difference {worst:.1e}; of {swap.rows} rows {ties:.2%} select "
        f"differently among equal scores and {rounded:.2%} among scores within rounding (which moves scores by at most "
        f"{swap.worst_rounding:.1e} of the largest)"
    )
    assert worst <= TOLERANCE
    assert rounded <= 0.02 and ties <= 0.05
    assert swap.worst_rounding <= 1e-5


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
def test_deepseek_v3(attention):
    model = tiny_model("mla_dense", attn_implementation=attention, max_position_embeddings=2048, rope_parameters=YARN)
    peer = peer_of(model, DeepseekV3Config, DeepseekV3ForCausalLM, (*DEEPSEEK_FIELDS, "rope_interleave"))
    check_logits(model, peer, "deepseek_v3", attention)


def test_deepseek_v3_without_query_latent_or_interleave():
    model = tiny_model("mla_dense", q_lora_rank=None, rope_interleave=False)
    peer = peer_of(model, DeepseekV3Config, DeepseekV3ForCausalLM, (*DEEPSEEK_FIELDS, "rope_interleave"))
    check_logits(model, peer, "deepseek_v3, no query latent, half-split rope", "keye_sparse")


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
def test_qwen3_moe(attention):
    model = tiny_model("gqa_moe", attn_implementation=attention)
    fields = ("head_dim",)
    peer = peer_of(model, Qwen3MoeConfig, Qwen3MoeForCausalLM, fields, num_experts=5, decoder_sparse_step=1)
    check_logits(model, peer, "qwen3_moe", attention)


def check_logits(model, peer, name: str, attention: str) -> None:
    ids = text_ids(1, PROMPT + STEPS, seed=1)
    worst = 0.0
    for (_, ours), (_, theirs) in zip(run_steps(model, ids, PROMPT), run_steps(peer, ids, PROMPT), strict=True):
        assert ours.logits.isfinite().all()
        worst = max(worst, largest_difference(ours.logits, theirs.logits))
    print(f"{name} ({attention}): largest logit difference {worst:.1e}")
    assert worst <= TOLERANCE

    # A left-padded batch; what stands at padded places is not compared.
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :31] = 0
    batch = text_ids(2, 90, seed=2)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(batch, attention_mask=mask).logits
        theirs = peer(batch, attention_mask=mask, position_ids=positions).logits
    assert math.isfinite(float(ours.sum()))
    assert largest_difference(ours[mask.bool()], theirs[mask.bool()]) <= TOLERANCE


def test_keye_vl_2_attention_written_out():
    """Keye-VL-2.0's attention layer has no peer in the library: its maths from the weights alone, in float64.

    Contiguous three-axis rotary sections, half-split; indexer rotary over all dimensions with scaled sections; gates
    are the last rows of `q_proj`, scaled by Di^-0.5 only.
    """
    topk, num_tokens = 12, 80
    model = tiny_model("gqa", index_topk=topk, local_window=None, anchor_stride=None, num_hidden_layers=1)
    text = model.config.text_config
    layer = model.model.language_model.layers[0]
    attention = layer.self_attn
    # Positions as video tokens have them: different on each axis.
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 200, (3, 1, num_tokens), generator=generator)
    ids = text_ids(1, num_tokens)
    seen = {}
    attention.register_forward_hook(lambda module, args, kwargs, out: seen.update(out=out[0]), with_kwargs=True)
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    with torch.no_grad():
        output = model(ids, position_ids=positions, output_indexer_selections=True)

    w = {name: weight.double() for name, weight in attention.named_parameters()}
    x = seen["x"][0].double()
    embedded = model.get_input_embeddings().weight[ids[0]].double()
    normed = embedded / (embedded.square().mean(-1, keepdim=True) + text.rms_norm_eps).sqrt()
    torch.testing.assert_close(x, normed * layer.input_layernorm.weight.double(), atol=1e-5, rtol=0)

    def rms(value, weight):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotated(value, sections):
        """value [S, heads, d]: pair i = (i, i + d/2) turns by the position of its axis times theta^(-2i/d)."""
        half = value.shape[-1] // 2
        axis = [a for a, count in enumerate(sections) for _ in range(count)]
        result = value.clone()
        for i in range(half):
            angle = positions[axis[i], 0].double() * 10000.0 ** (-i / half)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            first, second = value[..., i], value[..., i + half]
            result[..., i], result[..., i + half] = first * cos - second * sin, second * cos + first * sin
        return result

    heads, dim = text.index_n_heads, text.index_head_dim
    projected = x @ w["indexer.q_proj.weight"].T
    q = rms(projected[:, : heads * dim].unflatten(-1, (heads, dim)), w["indexer.q_norm.weight"])
    gates = projected[:, heads * dim :] * dim**-0.5
    k = x @ w["indexer.k_proj.weight"].T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    k = k * w["indexer.k_norm.weight"] + w["indexer.k_norm.bias"]
    q, k = rotated(q, [4, 6, 6]), rotated(k[:, None], [4, 6, 6])[:, 0]
    scores = torch.einsum("sht,sh->st", torch.einsum("shd,td->sht", q, k).relu(), gates)
    kept = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for t in range(num_tokens):
        kept[t, scores[t, : t + 1].sort(descending=True, stable=True).indices[:topk]] = True
    selected = [row[row >= 0].tolist() for row in output.indexer_selections[0][0]]
    assert selected == [row.nonzero().squeeze(-1).tolist() for row in kept]

    queries = rms((x @ w["q_proj.weight"].T).unflatten(-1, (6, 16)), w["q_norm.weight"])
    keys = rms((x @ w["k_proj.weight"].T).unflatten(-1, (2, 16)), w["k_norm.weight"])
    values = (x @ w["v_proj.weight"].T).unflatten(-1, (2, 16))
    queries, keys = rotated(queries, [2, 3, 3]), rotated(keys, [2, 3, 3])
    result = torch.empty_like(queries)
    for head in range(6):
        weights = queries[:, head] @ keys[:, head // 3].T * 16**-0.5
        weights = weights.masked_fill(~kept, -math.inf).softmax(dim=-1)
        result[:, head] = weights @ values[:, head // 3]
    torch.testing.assert_close(seen["out"][0].double(), result.flatten(1) @ w["o_proj.weight"].T, atol=2e-5, rtol=0)
