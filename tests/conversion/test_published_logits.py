"""Logits of published checkpoints against computations that share no code with the model.

Three of them: Transformers' own text models and vision tower, filled from the raw tensors by the mapping of this file;
the same text models with the rotary angles of three-axis positions put in; and `written_out`, float64 maths from the
raw files alone. `test_published_mistakes` shows what these comparisons would have caught.
"""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_keye.modeling_keye import KeyeForVideoQA
from modeling_keye.processing_keye import KeyeProcessor
from tests.conversion import peers, published, published_config, published_tensors, published_tokenizer, written_out
from tests.conversion.loading import load_published
from tests.conversion.peers import projector_peer, text_peer, use_selection_of, vision_peer
from tests.conversion.prompts import TOLERANCE, VISUAL, prompt_of, raw
from tests.conversion.published import GQA_LAYOUTS, write_published
from tests.conversion.written_out import WrittenOut, choices_of

pytestmark = pytest.mark.compat

# Relative to the largest value, because the random tower's features are small on purpose.
TOWER_TOLERANCE = 2e-6
PROJECTOR_TOLERANCE = 1e-6
OTHER_SIDE = (peers, published, published_config, published_tensors, published_tokenizer, written_out)


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
            loaded[key] = load_published(place, dtype=torch.float32, **settings).eval()
        return loaded[key]

    return load


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.isfinite().all() and theirs.isfinite().all()
    return float((ours.double() - theirs.double()).abs().max())


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return difference(ours, theirs) / float(theirs.abs().max())


@pytest.mark.parametrize("module", OTHER_SIDE, ids=lambda module: module.__name__)
def test_what_we_compare_with_shares_no_code(module):
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert not [name for name in names if name.split(".")[0] in ("modeling_keye", "conversion")]


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
    model = load(layout)
    with torch.no_grad():
        logits = model(**batch).logits
        # 18: each row goes on after its own largest position.
        before = {**batch, "input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
        cache = model(**before, use_cache=True).past_key_values
        step = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": batch["attention_mask"]}
        last = model(**step, past_key_values=cache).logits
    assert difference(last[:, 0], logits[:, -1]) <= TOLERANCE
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
            angles = written.angles(positions, config["head_dim"], config["rope_theta"], [2, 6, 8]).repeat(1, 2)
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


@pytest.mark.parametrize("layout", GQA_LAYOUTS)
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
