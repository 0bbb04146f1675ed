"""Prompts for published checkpoints as a processor would make them, and the raw checkpoints that they are for."""

import json
from dataclasses import dataclass, field

import torch

from tests.conversion.published import dequantised, published_checkpoint

VISUAL = ("keye_vl_preview", "keye_vl_1_5", "keye_vl_671b", "keye_vl_2")
MLA = ("deepseek_v3", "deepseek_v32")
# Largest difference of logits measured: 4.0e-5, of logits up to 9.5.
TOLERANCE = 1e-4


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
