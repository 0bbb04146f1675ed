"""What each mistake that a reader of the published files could make would do to the logits.

The maths of `written_out` runs once as it should and once with the mistake. Every mistake moves some logit by more than
a hundred times the tolerance of `test_published_logits`, so none of them can hide there. The two forms of GELU, which
are closer, are told apart by the features in that file; mistakes that change a shape are in `test_published_refusals`.
The numbers are those of the family's list of traps.
"""

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from tests.conversion.prompts import MLA, TOLERANCE, VISUAL, prompt_of, raw
from tests.conversion.published import GQA_LAYOUTS as GQA
from tests.conversion.published import block_scales
from tests.conversion.written_out import WrittenOut, choices_of


@dataclass
class Mistake:
    """A wrong reading: `choices` for the maths, `config` and `weights` edit what it starts from."""

    layouts: tuple[str, ...]
    choices: dict = field(default_factory=dict)
    config: Callable[[dict], None] | None = None
    weights: Callable[[dict, dict], None] | None = None
    pixels: Callable[[torch.Tensor, list[list[int]]], torch.Tensor] | None = None
    options: dict = field(default_factory=dict)


def norm_moved(config: dict, weights: dict) -> None:
    """The projector's norm on the other side of the merge, where equal sizes would let it load."""
    size, merged = config["vision_config"]["hidden_size"], 4 * config["vision_config"]["hidden_size"]
    for part in ("weight", "bias"):
        tensor = weights[f"mlp_AR.pre_norm.{part}"]
        weights[f"mlp_AR.pre_norm.{part}"] = tensor.repeat(4) if len(tensor) == size else tensor[: merged // 4]


def in_blocks(pixels: torch.Tensor, grid: list[list[int]]) -> torch.Tensor:
    """Raster order to the 2 x 2 block order of Qwen-VL processors."""
    result, start = [], 0
    for t, h, w in grid:
        frames = pixels[start : start + t * h * w].view(t, h // 2, 2, w // 2, 2, *pixels.shape[1:])
        result.append(frames.transpose(2, 3).reshape(t * h * w, *pixels.shape[1:]))
        start += t * h * w
    return torch.cat(result)


def renamed(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    def edit(config: dict, weights: dict) -> None:
        found = [name for name in weights if pattern in name]
        assert found
        for name in found:
            weights[name] = change(weights[name])

    return edit


def swapped(first: str, second: str, only: str = "") -> Callable[[dict, dict], None]:
    def edit(config: dict, weights: dict) -> None:
        found = [name for name in weights if first in name and only in name]
        assert found
        for name in found:
            other = name.replace(first, second)
            weights[name], weights[other] = weights[other], weights[name]

    return edit


def set_to(**values) -> Callable[[dict], None]:
    return lambda config: config.update(values)


def sections(*values: int) -> Callable[[dict], None]:
    return lambda config: config["rope_scaling"].update(mrope_section=list(values))


def yarn(**values) -> Callable[[dict], None]:
    return lambda config: config["rope_scaling"].update(values)


def vision(**values) -> Callable[[dict], None]:
    return lambda config: config["vision_config"].update(values)


SQUARE = {"square": True, "indexer": False}
MISTAKES = {
    "1 projector norm before or after the merge": [
        Mistake(VISUAL[:1], {"projector_norm": "post_merge"}, weights=norm_moved),
        Mistake(VISUAL[1:], {"projector_norm": "pre_merge"}, weights=norm_moved),
    ],
    "2 epsilons": [
        Mistake(VISUAL, {"tower_eps": 1e-5}),
        Mistake(VISUAL, {"projector_eps": 1e-6}),
        Mistake(("keye_vl_2", "deepseek_v32"), {"index_eps": 1e-5}),
        Mistake((*VISUAL, *MLA), config=set_to(rms_norm_eps=1e-5)),  # also 59
    ],
    "4 patches in block order": [Mistake(VISUAL, pixels=in_blocks)],
    "5 merge order": [Mistake(VISUAL, {"merge": "columns"})],
    "6 resized positions": [
        Mistake(VISUAL, {"align_corners": True}),
        Mistake(VISUAL, {"resize": "bicubic"}),
        Mistake(VISUAL, {"antialias": True}),
    ],
    "8 vision rotary": [
        Mistake(VISUAL, {"vision_frequencies": "interleaved"}),
        Mistake(VISUAL, {"vision_frequencies": "columns first"}),
        Mistake(VISUAL, {"vision_theta": 1e6}),
    ],
    "9 vision rotary exponent": [Mistake(VISUAL, {"vision_exponent": 0.5})],
    "10 segments of a video": [
        Mistake(VISUAL[:1], {"clip_attention": False}),
        Mistake(VISUAL[1:], {"clip_attention": True}),
    ],
    "11 images attend to each other": [Mistake(VISUAL, {"images_attend": "all together"})],
    "13, 14 time axis of Preview": [
        Mistake(VISUAL[:1], config=vision(tokens_per_second=1)),
        Mistake(VISUAL[:1], {"truncate_time": False}),
        Mistake(VISUAL[:1], {"clip_positions": False}),
    ],
    "15, 16 rotary sections": [
        Mistake(GQA, {"sections": "interleaved"}),
        Mistake(GQA, config=sections(8, 6, 2)),
        Mistake(GQA, config=sections(4, 12, 0)),
        Mistake(GQA, {"rope_pairs": "neighbours"}),
        Mistake(GQA, config=set_to(rope_theta=2000000)),
    ],
    "17 sections lost": [Mistake(GQA, {"axes": 1}), Mistake(("keye_vl_671b",), {"axes": 3})],
    "19 text after a block": [Mistake(GQA, {"after_block": "time"})],
    "32 experts in the other orientation": [
        Mistake(GQA[2:], weights=renamed("gate_up_proj", lambda x: x.transpose(1, 2)), options=SQUARE),
        Mistake(
            GQA[2:],
            weights=renamed("experts.down_proj", lambda x: x.transpose(1, 2)),
            options={**SQUARE, "square": "down"},
        ),
    ],
    "34 gate and up": [
        Mistake(GQA[2:], {"gate_first": False}),
        Mistake(GQA[2:], {"gate_up": "interleaved"}),
        Mistake((*VISUAL[:3], *MLA), weights=swapped("gate_proj", "up_proj", only="mlp.")),
    ],
    "35 softmax router": [
        Mistake(GQA[2:], {"softmax_over": "all experts, not renormalised"}),
        Mistake(GQA[2:], config=set_to(num_experts_per_tok=2)),
    ],
    "36 sigmoid router": [
        Mistake(MLA, {"router_weights": "biased"}),
        Mistake(MLA, {"scale_before_normalising": True}),
        Mistake(MLA, {"group_score": "best"}),
        Mistake(MLA, config=set_to(topk_group=4)),
    ],
    "37 excluded groups": [Mistake(MLA, {"excluded": 0.0})],
    "38 correction bias in bfloat16": [
        Mistake(MLA, weights=renamed("e_score_correction_bias", lambda x: x.bfloat16().float()))
    ],
    "40 norms of indexer and attention": [
        Mistake(GQA[2:], weights=swapped(".q_norm.", ".k_norm.", only="self_attn.q_norm.")),
        Mistake(GQA[2:], weights=swapped("sa_indexer.q_norm.", "sa_indexer.k_norm.")),
    ],
    "41 gate rows of the indexer": [
        Mistake(GQA[2:], {"index_gates": "per head"}),
        Mistake(GQA[2:], {"index_gates": "first rows"}),
    ],
    "42 norms of the indexer": [
        Mistake(GQA[2:], {"index_q_norm": "layer"}),
        Mistake(GQA[2:], {"index_k_norm": "rms"}),
        Mistake(("keye_vl_2", "deepseek_v32"), {"index_k_bias": False}),
    ],
    "43 input of the indexer": [Mistake(GQA[2:], {"index_input": "residual"})],
    "44 rotary of the indexer": [
        Mistake(GQA[2:], {"index_rotary": "slice of the main one"}),
        Mistake(GQA[2:], {"index_rotary": "first axis"}),
        Mistake(GQA[2:], {"index_rotary": "half of the dimensions"}),
    ],
    "45 gates of the indexer": [
        Mistake(GQA[2:], {"index_gate_function": "sigmoid"}),
        Mistake(GQA[2:], {"index_gate_function": "softmax"}),
        Mistake(GQA[2:], {"index_relu": False}),
        Mistake(("keye_vl_2", "deepseek_v32"), {"index_masked": 0.0}),
    ],
    "46 budget of the indexer": [
        Mistake(GQA[2:], config=lambda config: config["sa_config"].update(topk=17)),
        Mistake(GQA[2:], config=lambda config: config.pop("sa_config")),
        Mistake(("deepseek_v32",), config=lambda config: config.pop("index_topk")),
    ],
    "52 one set for all groups": [Mistake(GQA[2:], {"index_sets": "per group"})],
    "53 latent norm": [Mistake(MLA, {"kv_norm_over": "everything"})],
    "54 YaRN temperature": [
        Mistake(MLA, {"mla_temperature": "left out"}),
        Mistake(MLA, {"mla_temperature": "in cos and sin too"}),
        Mistake(MLA, config=yarn(factor=20)),
        Mistake(MLA, config=yarn(original_max_position_embeddings=1024)),
        Mistake(MLA, config=yarn(beta_slow=2)),
    ],
    "55 rotary pairs": [
        Mistake(MLA, {"mla_pairs": "halves"}),
        Mistake(("keye_vl_2", "deepseek_v32"), {"index_pairs": "neighbours"}),
        Mistake(("deepseek_v32",), {"index_rotated": "last"}),
    ],
    "59 sizes that defaults would replace": [
        Mistake(VISUAL, config=vision(num_attention_heads=9)),
        Mistake(("keye_vl_1_5", "keye_vl_2"), config=set_to(rope_theta=1000000)),
    ],
}


@functools.cache
def right_logits(layout: str, options: str) -> torch.Tensor:
    return logits_with(Mistake((layout,), options=json.loads(options)), layout)


def logits_with(mistake: Mistake, layout: str) -> torch.Tensor:
    config, _, weights = raw(layout, **mistake.options)
    config, weights = copy.deepcopy(config), dict(weights)
    media = layout not in MLA
    prompt = prompt_of(layout, config, text=60 if media else 200, media=media, seed=4)
    if mistake.config:
        mistake.config(config)
    if mistake.weights:
        mistake.weights(config, weights)
    if mistake.pixels:
        prompt.pixels = mistake.pixels(prompt.pixels, prompt.image_grid)
        prompt.video_pixels = mistake.pixels(prompt.video_pixels, prompt.video_grid)
    written = WrittenOut(layout, config, weights, choices_of(layout, **mistake.choices))
    return written.logits(prompt.ids, **prompt.for_written_out())


@pytest.mark.parametrize("trap", MISTAKES)
def test_mistake_moves_the_logits(trap):
    """Each wrong reading moves some logit by more than a hundred tolerances, so the comparisons above exclude it."""
    for mistake in MISTAKES[trap]:
        for layout in mistake.layouts:
            right = right_logits(layout, json.dumps(mistake.options, sort_keys=True))
            moved = float((logits_with(mistake, layout) - right).abs().max())
            # A row without any key gives NaN, which is far enough.
            assert not moved <= 100 * TOLERANCE, f"{layout}, {mistake}: only {moved:.1e}"


def test_mistakes_with_fp8_scales_move_the_logits():
    """57, 58: dividing, leaving the scale out, transposing the grid, stretching it over the matrix."""
    config, tensors, weights = raw("deepseek_v3", fp8=True, hidden_size=136)
    prompt = prompt_of("deepseek_v3", config, text=100, media=False)
    right = WrittenOut("deepseek_v3", config, weights).logits(prompt.ids)

    def stretched(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        rows = torch.arange(shape[0]) // math.ceil(shape[0] / scale.shape[0])
        columns = torch.arange(shape[1]) // math.ceil(shape[1] / scale.shape[1])
        return scale[rows][:, columns]

    mistakes = {
        "divided": lambda value, scale: value / block_scales(scale, value.shape, (128, 128)),
        "left out": lambda value, scale: value,
        "transposed": lambda value, scale: value * block_scales(scale.T.reshape(scale.shape), value.shape, (128, 128)),
        "stretched": lambda value, scale: value * stretched(scale, value.shape),
        "first block everywhere": lambda value, scale: value * scale[0, 0],
    }
    for name, wrong in mistakes.items():
        changed = dict(weights)
        for key in weights:
            if f"{key}_scale_inv" in tensors:
                changed[key] = wrong(tensors[key].float(), tensors[f"{key}_scale_inv"])
        moved = float((WrittenOut("deepseek_v3", config, changed).logits(prompt.ids) - right).abs().max())
        assert not moved <= 100 * TOLERANCE, f"{name}: only {moved:.1e}"


def test_fp8_gate_and_up_have_scales_of_their_own():
    """58: fused before dequantising, the up rows would be scaled in blocks that begin at the first gate row."""
    config, tensors, weights = raw("deepseek_v3", fp8=True)
    name = "model.layers.1.mlp.experts.3"
    gate, up = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up"))
    scales = torch.cat([tensors[f"{name}.{part}_proj.weight_scale_inv"] for part in ("gate", "up")])
    fused = torch.cat([gate, up]).float()
    rows = (torch.arange(len(fused)) // 128).clamp(max=len(scales) - 1)
    naive = fused * scales[rows][:, torch.arange(fused.shape[1]) // 128]
    right = torch.cat([weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up")])
    assert len(gate) % 128 and (naive - right).abs().max() > 0.05
