"""The tensors of tiny published checkpoints under their published names, plain and in fp8 blocks.

Tensors are drawn per name, so the same seed gives the same values in every storage form.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conversion.published_tokenizer import GQA_LAYOUTS, VISION_LAYOUTS

FP8_MAX = 448.0


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
