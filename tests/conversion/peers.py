"""Transformers' own models, filled from the raw tensors of published checkpoints by the mapping of this file."""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.paddleocr_vl import configuration_paddleocr_vl as paddle_config
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddle

from tests.conversion.published import GQA_LAYOUTS
from tests.conversion.written_out import WrittenOut

_SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings attention_bias tie_word_embeddings bos_token_id eos_token_id"
).split()
_DEEPSEEK = (
    "moe_intermediate_size q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim n_group topk_group "
    "first_k_dense_replace n_routed_experts n_shared_experts num_experts_per_tok norm_topk_prob routed_scaling_factor"
).split()


def text_peer(layout: str, config: dict, tensors: dict[str, torch.Tensor]):
    """The text model of Transformers that the checkpoint's decoder is built on (`tensors` are dequantised)."""
    settings = {name: config[name] for name in _SHARED}
    if layout in GQA_LAYOUTS:
        settings["head_dim"] = config["head_dim"]
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": float(config["rope_theta"])}
        if layout == "keye_vl_2":
            names = "moe_intermediate_size num_experts num_experts_per_tok norm_topk_prob decoder_sparse_step"
            settings.update({name: config[name] for name in names.split()}, mlp_only_layers=config["mlp_only_layers"])
            classes = Qwen3MoeConfig, Qwen3MoeForCausalLM
        else:
            classes = Qwen3Config, Qwen3ForCausalLM
    else:
        scaling = dict(config["rope_scaling"] or {"type": "default"})
        scaling["rope_type"] = scaling.pop("type")
        settings["rope_parameters"] = {"rope_theta": float(config["rope_theta"]), **scaling}
        settings.update({name: config[name] for name in _DEEPSEEK}, rope_interleave=True)
        classes = DeepseekV3Config, DeepseekV3ForCausalLM
        if layout == "deepseek_v32":
            settings.update({name: config[name] for name in ("index_topk", "index_n_heads", "index_head_dim")})
            classes = DeepseekV32Config, DeepseekV32ForCausalLM
    peer_config = classes[0](**settings)
    peer_config._attn_implementation = "eager"
    peer = classes[1](peer_config).eval()
    peer.load_state_dict(text_weights(config, tensors))  # strict: nothing missing, nothing left over
    return peer


def text_weights(config: dict, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Raw text tensors under the names and in the orientation of Transformers' modules."""
    result = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        if (
            not name.startswith(("model.", "lm_head."))
            or ".sa_indexer." in name
            or layer >= config["num_hidden_layers"]
        ):
            continue
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name] = tensor.transpose(1, 2)  # published [E, in, out]
        elif ".mlp.experts." not in name:
            result[name] = tensor
    for i in range(config["num_hidden_layers"]):
        root = f"model.layers.{i}.mlp.experts"
        if f"{root}.0.gate_proj.weight" in tensors:
            gate, up, down = (
                torch.stack([tensors[f"{root}.{e}.{part}_proj.weight"] for e in range(expert_count(config))])
                for part in ("gate", "up", "down")
            )
            result[f"{root}.gate_up_proj"], result[f"{root}.down_proj"] = torch.cat([gate, up], dim=1), down
    return result


def expert_count(config: dict) -> int:
    return config["num_experts"] if "num_experts" in config else config["n_routed_experts"]


def use_selection_of(peer, written: WrittenOut) -> None:
    """Let the deepseek_v32 peer read what the written-out indexer selects from the peer's own layer inputs.

    Of tokens with equal scores the peer takes any, the published rule takes the first.
    """
    topk = written.config["index_topk"]
    step, _ = written.yarn()

    def replacement(name: str):
        def forward(hidden_states, q_resid, *args, **kwargs):
            angles = torch.arange(hidden_states.shape[1]).double()[:, None] * step
            scores = written.deepseek_scores(hidden_states[0].double(), q_resid[0].double(), name, angles)
            rows = [row.nonzero().squeeze(-1) for row in written.select(scores, topk)]
            # A row of fewer tokens repeats its first one, which is then read once.
            return torch.stack([torch.cat([row, row[:1].expand(topk - len(row))]) for row in rows])[None].int()

        return forward

    for i, layer in enumerate(peer.model.layers):
        layer.self_attn.indexer.forward = replacement(f"model.layers.{i}.self_attn.indexer")


def vision_peer(config: dict, tensors: dict[str, torch.Tensor]):
    """PaddleOCR-VL's tower, which attends per frame."""
    vision = config["vision_config"]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
    settings = paddle_config.PaddleOCRVisionConfig(
        **{name: vision[name] for name in names.split()},
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )
    settings._attn_implementation = "eager"
    peer = paddle.PaddleOCRVisionModel(settings).eval()
    unused = ("visual.vision_model.head.", "visual.vision_model.embeddings.packing_position_embedding.")
    weights = {
        name.removeprefix("visual."): tensor
        for name, tensor in tensors.items()
        if name.startswith("visual.") and not name.startswith(unused)
    }
    peer.load_state_dict(weights)
    # Transformers 5.17 resizes the table with aligned corners, which the published tower does not do.
    peer.vision_model.embeddings.interpolation_align_corners = False
    return peer


def projector_peer(config: dict, tensors: dict[str, torch.Tensor]):
    """PaddleOCR-VL's projector, which normalises before the merge, as Preview's does."""
    text = {"hidden_size": config["hidden_size"], "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    settings = paddle_config.PaddleOCRVLConfig(
        vision_config={"hidden_size": config["vision_config"]["hidden_size"], "spatial_merge_size": 2},
        text_config={**text, "vocab_size": 8, "num_hidden_layers": 1, "rope_parameters": rope},
    )
    peer = paddle.PaddleOCRProjector(settings).eval()
    peer.load_state_dict(
        {name.removeprefix("mlp_AR."): tensor for name, tensor in tensors.items() if name.startswith("mlp_AR.")}
    )
    return peer
