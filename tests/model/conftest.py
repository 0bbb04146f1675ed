"""Models and inputs that the checklist of the library's own model tests runs over."""

import copy

import pytest
import torch

from modeling_keye.modeling_keye import KeyeForVideoQA
from tests.model.factories import FIRST_SPECIAL, tiny_model

KINDS = ("mla", "gqa")
MODALITIES = ("image", "video", "both")


def media_inputs(config, modality: str = "video", batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts with an image, a video, both or neither ("text"), of different lengths, padded on the left.

    Prompt b has an image of 4 x (4 + 2b) patches and a video of 2 + b frames of 4 x 4 patches.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(5, FIRST_SPECIAL, (count,), generator=generator).tolist()

    prompts, images, videos = [], [], []
    for b in range(batch):
        ids = words(4 + b)
        if modality in ("image", "both"):
            images.append((1, 4, 4 + 2 * b))
            ids += [config.vision_start_token_id, *[config.image_token_id] * (4 + 2 * b), config.vision_end_token_id]
        if modality in ("video", "both"):
            videos.append((2 + b, 4, 4))
            ids += [config.vision_start_token_id]
            for _ in range(2 + b):
                ids += words(2) + [config.video_token_id] * 4
            ids += [config.vision_end_token_id]
        prompts.append(ids + words(12 + 5 * b if modality == "text" else 5))
    width = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        "mm_token_type_ids": (input_ids == config.image_token_id) + 2 * (input_ids == config.video_token_id),
    }
    side = config.vision_config.patch_size
    for pixels, grid, rows in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", videos),
    ):
        if rows:
            patches = sum(t * h * w for t, h, w in rows)
            inputs[pixels] = torch.randn(patches, 3, side, side, generator=generator)
            inputs[grid] = torch.tensor(rows)
    return inputs


def without_padding(inputs: dict[str, torch.Tensor], row: int, batch_of_one: dict[str, torch.Tensor]) -> dict:
    """Prompt `row` of `inputs` alone; its media come from `batch_of_one`, which counts patches per prompt."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return {**alone, **batch_of_one}


def media_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Pixels and grid rows of prompt `row`, for inputs with one row of each kind per prompt."""
    media = {}
    for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if pixels in inputs:
            counts = inputs[grid].prod(dim=-1).tolist()
            media[pixels] = inputs[pixels].split(counts)[row]
            media[grid] = inputs[grid][row : row + 1]
    return media


_models: dict[tuple, KeyeForVideoQA] = {}


def fresh_model(kind: str = "mla", attn_implementation: str | None = None, **text_overrides) -> KeyeForVideoQA:
    """A copy of a tiny model with fixed weights, for tests that change it."""
    key = (kind, attn_implementation, *sorted((name, repr(value)) for name, value in text_overrides.items()))
    if key not in _models:
        _models[key] = tiny_model(kind, attn_implementation=attn_implementation, **text_overrides)
    return copy.deepcopy(_models[key])


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=MODALITIES)
def modality(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> KeyeForVideoQA:
    return fresh_model(kind)
