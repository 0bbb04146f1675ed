"""Tiny models with random weights, and inputs for them: small enough for every test, with no two sizes equal.

Weights are drawn much wider than for training, so that logits are far apart and greedy decoding does not hang on
rounding; norms, biases and router corrections are moved away from 1 and 0, so that each of them matters.
"""

import torch

from modeling_keye.configuration_keye import KeyeConfig
from modeling_keye.modeling_keye import KeyeForVideoQA

VOCABULARY = 109
# Ids below this one are plain text in `text_ids`; the special ones stand above it.
FIRST_SPECIAL = 100
TOKENS = {
    "vision_start_token_id": 101,
    "vision_end_token_id": 102,
    "image_token_id": 103,
    "video_token_id": 104,
}
PATCH = 14

VISION = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 5 * PATCH,
    "patch_size": PATCH,
    "initializer_range": 0.15,
}

_TEXT = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "index_topk": 9,
    "local_window": 6,
    "anchor_stride": 11,
    "max_position_embeddings": 4096,
    "prefill_chunk_tokens": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_SIGMOID_EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 40,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
}
_SOFTMAX_EXPERTS = {
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 40,
    "scoring_func": "softmax",
    "n_routed_experts": 5,
    "n_shared_experts": 0,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
_MLA = {
    **_TEXT,
    **_SIGMOID_EXPERTS,
    "attention_type": "mla",
    "indexer_type": "deepseek_v32",
    "index_n_heads": 5,
    "index_head_dim": 14,
    "hidden_size": 56,
    "intermediate_size": 76,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_GQA = {
    **_TEXT,
    "attention_type": "gqa",
    "indexer_type": "keye_vl_2",
    "index_n_heads": 5,
    "index_head_dim": 32,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
_DENSE = {"indexer_type": None, "local_window": None, "anchor_stride": None}

TEXT_CONFIGS = {
    "mla": _MLA,
    "mla_dense": {**_MLA, **_DENSE},
    "gqa": {**_GQA, **_SOFTMAX_EXPERTS},
    "gqa_dense": {**_GQA, **_DENSE, "mlp_layer_types": ["dense"] * 3},
    "gqa_moe": {
        **_GQA,
        **_DENSE,
        **_SOFTMAX_EXPERTS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def tiny_config(kind: str = "mla", **text_overrides) -> KeyeConfig:
    """A configuration of one of the kinds of `TEXT_CONFIGS`; keywords replace fields of its text part.

    mla: MLA, deepseek_v32 indexer, sigmoid experts (1.5-style frames). mla_dense: the same without a selection.
    gqa: GQA, keye_vl_2 indexer, M-RoPE, softmax experts (2.0-like). gqa_dense: GQA, M-RoPE, no experts, clip-wise
    video (Preview-like). gqa_moe: GQA, 1-D positions, softmax experts, no selection (Qwen3-MoE-like).
    """
    clip = kind == "gqa_dense"
    return KeyeConfig(
        vision_config={
            **VISION,
            "video_attention": "clip" if clip else "frame",
            "projector_norm": "pre_merge" if clip else "post_merge",
        },
        text_config={**TEXT_CONFIGS[kind], **text_overrides},
        video_position_ids="clip" if clip else "frame",
        **TOKENS,
    )


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move norms, biases and router corrections away from their initial 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and ("norm" in name or name.endswith(("bias", "e_score_correction_bias"))):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator).to(tensor))
    return model


def tiny_model(
    kind: str = "mla", *, seed: int = 0, attn_implementation: str | None = None, dtype=torch.float32, **text_overrides
) -> KeyeForVideoQA:
    """A random model in evaluation mode; equal arguments give equal weights."""
    return model_of(
        tiny_config(kind, **text_overrides), seed=seed, attn_implementation=attn_implementation, dtype=dtype
    )


def model_of(
    config: KeyeConfig, *, seed: int = 0, attn_implementation: str | None = None, dtype=torch.float32
) -> KeyeForVideoQA:
    """`tiny_model` for a configuration of one's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        model = KeyeForVideoQA(config)
    model = randomise(model, seed).eval()
    with torch.no_grad():
        # Logit 0 is far below the largest: no placeholder is ever generated.
        model.lm_head.weight[FIRST_SPECIAL:] = 0
    for name, weight in model.named_parameters():  # as loading in `dtype` does: buffers and some weights stay float32
        if not any(key in name for key in model._keep_in_fp32_modules_strict):
            weight.data = weight.data.to(dtype)
    model.generation_config.eos_token_id = None  # generated lengths are the asked ones
    return model


def text_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random text tokens [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, FIRST_SPECIAL, (batch, length), generator=generator)


def video_inputs(
    config: KeyeConfig, grid: tuple[tuple[int, int, int], ...] = ((3, 4, 6),), *, text: int = 7, seed: int = 0
) -> dict[str, torch.Tensor]:
    """What the processor emits for one prompt with one video: `text` tokens, the frames of `grid`, `text` tokens.

    Each row of `grid` is (frames, height, width) in patches. Frames are preceded by two timestamp tokens, except for
    clip-wise models, whose placeholders are contiguous.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(5, FIRST_SPECIAL, (count,), generator=generator).tolist()

    ids = [*words(text), config.vision_start_token_id]
    for frames, height, width in grid:
        for _ in range(frames):
            ids += [] if config.video_position_ids == "clip" else words(2)
            ids += [config.video_token_id] * (height * width // config.vision_config.spatial_merge_size**2)
    ids += [config.vision_end_token_id, *words(text)]
    input_ids = torch.tensor([ids])
    patches = sum(frames * height * width for frames, height, width in grid)
    size = config.vision_config.patch_size
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == config.video_token_id) * 2,
        "pixel_values_videos": torch.randn(patches, 3, size, size, generator=generator),
        "video_grid_thw": torch.tensor(grid),
    }
