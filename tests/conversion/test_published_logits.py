"""Logits of published checkpoints against computations that share no code with the model.

Three of them: Transformers' own text models and vision tower, filled from the raw tensors by the mapping of this file;
the same text models with the rotary angles of three-axis positions put in; and `written_out`, float64 maths from the
raw files alone. The last part makes each mistake that a reader of the published files could make and shows that the
logits would have moved by far more than the tolerance.
"""

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
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

from modeling_keye.configuration_keye import KeyeConfig, KeyeVisionConfig
from modeling_keye.modeling_keye import KeyeForVideoQA
from modeling_keye.processing_keye import KeyeProcessor
from tests.conversion.published import GQA_LAYOUTS, block_scales, dequantised, published_checkpoint, write_published
from tests.conversion.written_out import WrittenOut, choices_of

pytestmark = pytest.mark.compat

# Largest difference measured: 4.0e-5, of logits up to 9.5.
TOLERANCE = 1e-4
# Relative to the largest value, because the random tower's features are small on purpose.
TOWER_TOLERANCE = 2e-6
PROJECTOR_TOLERANCE = 1e-6
VISUAL = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "keye_vl_2")
GQA = GQA_LAYOUTS
MLA = ("deepseek_v3", "deepseek_v32")
SMALL_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass
class Prompt:
    """One prompt with two images and a video of several frames, as a processor would make it."""

    ids: list[int]
    pixels: torch.Tensor | None = None
    image_grid: list[list[int]] = field(default_factory=list)
    video_pixels: torch.Tensor | None = None
    video_grid: list[list[int]] = field(default_factory=list)
    seconds: list[float] | None = None

    def for_written_out(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "ids"}

    def for_model(self) -> dict:
        inputs = {"input_ids": torch.tensor([self.ids])}
        if self.pixels is not None:
            inputs.update(pixel_values=self.pixels, image_grid_thw=torch.tensor(self.image_grid))
        if self.video_pixels is not None:
            inputs.update(pixel_values_videos=self.video_pixels, video_grid_thw=torch.tensor(self.video_grid))
        if self.seconds is not None:
            inputs["second_per_grid_ts"] = self.seconds
        return inputs


def prompt_of(layout: str, config: dict, *, text: int = 60, media: bool = True, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(3, 256, (count,), generator=generator).tolist()

    if not media:
        return Prompt(words(text))
    start, end = config["vision_start_token_id"], config["vision_end_token_id"]
    image_grid = [[1, 4, 6], [1, 6, 4]]
    ids = words(text // 2)
    for _, height, width in image_grid:
        ids += [start, *[config["image_token_id"]] * (height * width // 4), end, *words(3)]
    ids.append(start)
    # Slow and fast frames in temporal order; neighbours of one size are one row. Preview has one size only.
    video_grid = [[3, 4, 6]] if layout == "keye_vl_preview" else [[2, 4, 6], [2, 2, 4], [1, 4, 6]]
    for frames, height, width in video_grid:
        for _ in range(frames):
            ids += [] if layout == "keye_vl_preview" else words(4)
            ids += [config["video_token_id"]] * (height * width // 4)
    ids += [end, *words(text - text // 2)]

    def patches(grid: list[list[int]]) -> torch.Tensor:
        count = sum(t * h * w for t, h, w in grid)
        return torch.rand(count, 3, 14, 14, generator=generator) * 2 - 1

    seconds = [0.77] if layout == "keye_vl_preview" else None
    return Prompt(ids, patches(image_grid), image_grid, patches(video_grid), video_grid, seconds)


_made: dict[str, tuple] = {}


def raw(layout: str, **options) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Raw configuration, raw tensors, and what the tensors mean in float32."""
    key = f"{layout} {json.dumps(options, sort_keys=True)}"
    if key not in _made:
        config, tensors = published_checkpoint(layout, **options)
        block = config.get("quantization_config", {}).get("weight_block_size", (128, 128))
        _made[key] = config, tensors, dequantised(tensors, tuple(block))
    return _made[key]


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Callable[..., KeyeForVideoQA]:
    """The model that `from_pretrained` makes of a published folder, in float32."""
    folder = tmp_path_factory.mktemp("published")
    loaded = {}

    def load(layout: str, attention: str | None = None, **options) -> KeyeForVideoQA:
        key = f"{layout} {attention} {json.dumps(options, sort_keys=True)}"
        if key not in loaded:
            place = write_published(folder / str(len(loaded)), layout, shards=2, tokenizer=False, **options)
            settings = {} if attention is None else {"attn_implementation": attention}
            if layout in MLA:  # a text checkpoint leaves the tower to the caller; the default is the full-size one
                settings["config"] = KeyeConfig.from_pretrained(place)
                settings["config"].vision_config = KeyeVisionConfig(**SMALL_TOWER)
            loaded[key] = KeyeForVideoQA.from_pretrained(place, dtype=torch.float32, **settings).eval()
        return loaded[key]

    return load


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.isfinite().all() and theirs.isfinite().all()
    return float((ours.double() - theirs.double()).abs().max())


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return difference(ours, theirs) / float(theirs.abs().max())


# Transformers' own models, filled from the raw tensors.

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
    step, _ = written._yarn()

    def replacement(name: str):
        def forward(hidden_states, q_resid, *args, **kwargs):
            angles = torch.arange(hidden_states.shape[1]).double()[:, None] * step
            scores = written.deepseek_scores(hidden_states[0].double(), q_resid[0].double(), name, angles)
            rows = [row.nonzero().squeeze(-1) for row in written._select(scores, topk)]
            # A row of fewer tokens repeats its first one, which is then read once.
            return torch.stack([torch.cat([row, row[:1].expand(topk - len(row))]) for row in rows])[None].int()

        return forward

    for i, layer in enumerate(peer.model.layers):
        layer.self_attn.indexer.forward = replacement(f"model.layers.{i}.self_attn.indexer")


TEXT_CASES = {
    "preview": ("keye_vl_preview", {}),
    "1.5": ("keye_vl_1_5", {}),
    "2.0 dense attention": ("keye_vl_2", {"indexer": False}),
    "2.0 unfused": ("keye_vl_2", {"indexer": False, "experts": "unfused"}),
    "2.0 dense layers": ("keye_vl_2", {"indexer": False, "mlp_only_layers": [1]}),
    "2.0 budget never reached": ("keye_vl_2", {"sa_config": {"topk": 500}}),
    "671B": ("keye_vl_671b", {}),
    "671B fp8": ("keye_vl_671b", {"fp8": True}),
    "671B fp8, small blocks": ("keye_vl_671b", {"fp8": (16, 48)}),
    "V3": ("deepseek_v3", {"mtp": True}),
    "V3 fp8": ("deepseek_v3", {"mtp": True, "fp8": True}),
    "V3 no query latent": ("deepseek_v3", {"q_lora_rank": None, "rope_scaling": None}),
    "V3.2": ("deepseek_v32", {"mtp": True}),
    "V3.2 fp8": ("deepseek_v32", {"fp8": True}),
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_decoder_equals_transformers(case, load):
    layout, options = TEXT_CASES[case]
    config, _, weights = raw(layout, **options)
    prompt = prompt_of(layout, config, text=200, media=False, seed=4)
    peer = text_peer(layout, config, weights)
    if layout == "deepseek_v32":
        use_selection_of(peer, WrittenOut(layout, config, weights))
    model = load(layout, **options)
    with torch.no_grad():
        expected = peer(torch.tensor([prompt.ids])).logits
        got = model(**prompt.for_model()).logits
    worst = difference(got, expected)
    print(f"{case}: largest logit {float(expected.abs().max()):.1f}, largest difference {worst:.1e}")
    assert worst <= TOLERANCE


# Seeds for which no two scores that decide a selection lie within float32 rounding of each other.
MEDIA_SEED = 10
SELECTION_SEEDS = {("keye_vl_2", True): MEDIA_SEED, ("keye_vl_2", False): 5, ("deepseek_v32", False): 4}
SELECTION_MARGIN = 2e-5


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
@pytest.mark.parametrize("layout, media", [key for key in SELECTION_SEEDS])
def test_sparse_attention_equals_written_out_maths(layout, media, attention, load):
    config, _, weights = raw(layout)
    prompt = prompt_of(layout, config, text=60 if media else 200, media=media, seed=SELECTION_SEEDS[layout, media])
    written = WrittenOut(layout, config, weights)
    expected = written.logits(prompt.ids, **prompt.for_written_out())
    assert written.margin > SELECTION_MARGIN, "this prompt decides a selection by rounding: choose another seed"
    model = load(layout, attention)
    with torch.no_grad():
        output = model(**prompt.for_model(), output_indexer_selections=True)
    topk = config["index_topk"] if layout == "deepseek_v32" else config["sa_config"]["topk"]
    assert topk * 6 < len(prompt.ids)
    for layer, rows in enumerate(written.selected):
        for t, row in enumerate(rows):
            chosen = output.indexer_selections[layer][0, t]
            assert chosen[chosen >= 0].tolist() == row.tolist(), f"layer {layer}, query {t}"
    worst = difference(output.logits[0], expected)
    print(f"{layout}, {attention}, media {media}: largest difference {worst:.1e}")
    assert worst <= TOLERANCE


# The vision tower and the projector.


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


VISION_GRID = [[2, 4, 6], [1, 6, 4], [2, 2, 4], [1, 8, 10]]


def frames_of(grid: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[1, h, w] for t, h, w in grid for _ in range(t)])


@pytest.mark.parametrize("layout", VISUAL)
def test_tower_and_projector(layout, load):
    config, _, weights = raw(layout)
    model = load(layout)
    count = sum(t * h * w for t, h, w in VISION_GRID)
    pixels = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(3)) * 2 - 1
    grid, frames = torch.tensor(VISION_GRID), frames_of(VISION_GRID)
    written = WrittenOut(layout, config, weights)
    features = written.tower(pixels, VISION_GRID, video=True)
    tokens = written.projector(features, VISION_GRID)
    tower_errors, projector_errors = {}, {}
    with torch.no_grad():
        peer = vision_peer(config, weights)(pixels[None], grid_thw=frames).last_hidden_state
        got = model.model.visual(pixels, frames).last_hidden_state
        tower_errors["paddleocr_vl"] = relative_difference(got, peer)
        got = model.model.visual(pixels, grid, video=True).last_hidden_state
        tower_errors["written out"] = relative_difference(got, features)
        got = model.model.projector(features.float(), grid)
        projector_errors["written out"] = relative_difference(got, tokens)
        if layout == "keye_vl_preview":
            peer = projector_peer(config, weights)(features.float(), grid)
            projector_errors["paddleocr_vl"] = relative_difference(got, peer)
    print(f"{layout}: tower {tower_errors}, projector {projector_errors}")
    assert max(tower_errors.values()) <= TOWER_TOLERANCE
    assert max(projector_errors.values()) <= PROJECTOR_TOLERANCE
    # 3: the two forms of GELU are so close that they are told apart here and not in the logits.
    wrong = WrittenOut(layout, config, weights, choices_of(layout, tower_gelu="none", projector_gelu="tanh"))
    assert relative_difference(wrong.tower(pixels, VISION_GRID, True), features) > 100 * TOWER_TOLERANCE
    assert relative_difference(wrong.projector(features, VISION_GRID), tokens) > 100 * PROJECTOR_TOLERANCE


# Whole prompts with images and a video.


@pytest.mark.parametrize("layout", VISUAL)
def test_prompt_with_images_and_video_equals_written_out_maths(layout, load):
    options = {"fp8": True, "fp8_projector": True} if layout == "keye_vl_671b" else {}
    config, _, weights = raw(layout, **options)
    prompt = prompt_of(layout, config, seed=MEDIA_SEED)
    written = WrittenOut(layout, config, weights)
    expected = written.logits(prompt.ids, **prompt.for_written_out())
    assert written.margin > SELECTION_MARGIN
    model = load(layout, **options)
    steps = 3
    inputs = prompt.for_model()
    with torch.no_grad():
        whole = model(**inputs).logits[0]
        # The same prompt with its last tokens decoded one by one: their positions go on after the largest one.
        ids = inputs.pop("input_ids")
        output = model(input_ids=ids[:, :-steps], use_cache=True, **inputs)
        decoded = [output.logits[0]]
        for token in range(ids.shape[1] - steps, ids.shape[1]):
            output = model(input_ids=ids[:, token : token + 1], past_key_values=output.past_key_values, use_cache=True)
            decoded.append(output.logits[0])
    errors = difference(whole, expected), difference(torch.cat(decoded), expected)
    print(f"{layout}: largest difference {errors[0]:.1e}, with cached steps {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("layout", VISUAL)
def test_left_padded_batch_equals_written_out_maths(layout, load):
    config, _, weights = raw(layout)
    prompts = [prompt_of(layout, config, seed=MEDIA_SEED), prompt_of(layout, config, text=24, seed=0)]
    width = max(len(prompt.ids) for prompt in prompts)
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(p.ids)) + p.ids for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts]),
        "pixel_values": torch.cat([p.pixels for p in prompts]),
        "image_grid_thw": torch.tensor([row for p in prompts for row in p.image_grid]),
        "pixel_values_videos": torch.cat([p.video_pixels for p in prompts]),
        "video_grid_thw": torch.tensor([row for p in prompts for row in p.video_grid]),
    }
    if layout == "keye_vl_preview":
        batch["second_per_grid_ts"] = [p.seconds[0] for p in prompts]
    with torch.no_grad():
        logits = load(layout)(**batch).logits
    for row, prompt in zip(logits, prompts, strict=True):
        written = WrittenOut(layout, config, weights)
        expected = written.logits(prompt.ids, **prompt.for_written_out())
        assert written.margin > SELECTION_MARGIN
        assert difference(row[-len(prompt.ids) :], expected) <= TOLERANCE


@pytest.mark.parametrize("layout", VISUAL)
def test_prompt_with_images_and_video_equals_transformers_parts(layout, load):
    """Features of PaddleOCR-VL's tower, put into Transformers' text model, which turns by our own angles."""
    options = {"indexer": False} if layout == "keye_vl_2" else {}
    config, _, weights = raw(layout, **options)
    prompt = prompt_of(layout, config, seed=MEDIA_SEED)
    written = WrittenOut(layout, config, weights)
    tower, peer = vision_peer(config, weights), text_peer(layout, config, weights)
    embeddings = peer.get_input_embeddings()(torch.tensor(prompt.ids)).detach()
    with torch.no_grad():
        for pixels, grid, kind in (
            (prompt.pixels, prompt.image_grid, "image"),
            (prompt.video_pixels, prompt.video_grid, "video"),
        ):
            if layout == "keye_vl_preview" and kind == "video":
                features = written.tower(pixels, grid, video=True).float()  # frames of a clip attend to each other
            else:
                features = tower(pixels[None], grid_thw=frames_of(grid)).last_hidden_state
            if layout == "keye_vl_preview":
                tokens = projector_peer(config, weights)(features, torch.tensor(grid))
            else:
                tokens = written.projector(features.double(), grid).float()
            embeddings[torch.tensor(prompt.ids) == config[f"{kind}_token_id"]] = tokens
        if layout in GQA_LAYOUTS:
            positions = written.positions(prompt.ids, prompt.image_grid, prompt.video_grid, prompt.seconds)
            angles = written._angles(positions, config["head_dim"], config["rope_theta"], [2, 6, 8]).repeat(1, 2)
            peer.model.rotary_emb.forward = lambda x, position_ids: (
                angles.cos()[None].float(),
                angles.sin()[None].float(),
            )
        expected = peer(inputs_embeds=embeddings[None]).logits
        got = load(layout, **options)(**prompt.for_model()).logits
    worst = difference(got, expected)
    print(f"{layout}: largest difference {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("layout", VISUAL)
def test_processor_and_model_of_one_folder_equal_written_out_maths(layout, tmp_path):
    """From pixels to logits: what the processor of the folder makes, in the model of the folder."""
    folder = write_published(tmp_path, layout)
    config, _, weights = raw(layout)
    processor = KeyeProcessor.from_pretrained(folder)
    generator = np.random.default_rng(2)
    frames = generator.integers(0, 256, (4, 84, 120, 3), dtype=np.uint8)
    inputs = processor(
        text="see <|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|video_pad|><|vision_end|>: which?",
        images=Image.fromarray(generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)),
        videos=[frames],
        fps=2.0,
        min_pixels=4 * 784,
        max_pixels=12 * 784,
        return_tensors="pt",
    )
    model = KeyeForVideoQA.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(**inputs).logits[0]
    seconds = inputs.get("second_per_grid_ts")
    assert (seconds is not None) == (layout == "keye_vl_preview")
    written = WrittenOut(layout, config, weights)
    expected = written.logits(
        inputs["input_ids"][0].tolist(),
        pixels=inputs["pixel_values"],
        image_grid=inputs["image_grid_thw"].tolist(),
        video_pixels=inputs["pixel_values_videos"],
        video_grid=inputs["video_grid_thw"].tolist(),
        seconds=None if seconds is None else [float(value) for value in seconds],
    )
    assert written.margin > SELECTION_MARGIN and len(got) > 3 * 16
    worst = difference(got, expected)
    print(f"{layout}: {len(got)} tokens, largest difference {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("layout", GQA)
def test_golden_positions(layout, load):
    """Two frames of 4 x 4 patches after three text tokens, as the family reference lists them."""
    model, (config, _, weights) = load(layout), raw(layout)
    video, text = config["video_token_id"], 5
    start = config["vision_start_token_id"]
    if layout == "keye_vl_preview":
        ids, grid, seconds = [text, text, start, *[video] * 8, text, text], [[2, 4, 4]], [0.5]
        expected = [
            [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6],
            [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 5, 6],
            [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 5, 6],
        ]
    else:
        stamp = [text] * 4
        ids, grid, seconds = [text, text, start, *stamp, *[video] * 4, *stamp, *[video] * 4, text], [[2, 4, 4]], None
        lead, middle = list(range(7)), [9, 10, 11, 12]
        expected = [
            [*lead, 7, 7, 7, 7, *middle, 13, 13, 13, 13, 15],
            [*lead, 7, 7, 8, 8, *middle, 13, 13, 14, 14, 15],
            [*lead, 7, 8, 7, 8, *middle, 13, 14, 13, 14, 15],
        ]
    positions, deltas = model.model.get_rope_index(
        torch.tensor([ids]), video_grid_thw=torch.tensor(grid), second_per_grid_ts=seconds
    )
    assert positions[:, 0].tolist() == expected
    assert deltas.tolist() == [[expected[0][-1] + 1 - len(ids)]]
    assert WrittenOut(layout, config, weights).positions(ids, videos=grid, seconds=seconds).tolist() == expected
    # Padding gets position 1 and counts for the difference between slot and position.
    mask = torch.tensor([[0, 0, *[1] * len(ids)]])
    positions, deltas = model.model.get_rope_index(
        torch.tensor([[0, 0, *ids]]), video_grid_thw=torch.tensor(grid), second_per_grid_ts=seconds, attention_mask=mask
    )
    assert positions[:, 0].tolist() == [[1, 1, *axis] for axis in expected]
    assert deltas.tolist() == [[expected[0][-1] - 1 - len(ids)]]


# Mistakes: what each would have done to the logits.


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
    assert len(gate) % 128 and difference(naive, right) > 0.05
