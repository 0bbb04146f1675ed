"""How many frames of a video to look at and how large each one may be: sampling, resizing rules and token budgets.

One token stands for a square of `factor` x `factor` pixels, `factor = patch_size * merge_size` (28 for each Keye).
Nothing here touches pixels, except the similarity of two frames at the end, which decides between slow and fast frames.
"""

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
import torch.nn.functional as F

SLOW, FAST = 0, 1

# PIL's resampling codes, which is what `resample` holds everywhere in Transformers.
BILINEAR, BICUBIC = 2, 3

MAX_ASPECT_RATIO = 200

# A fast frame gets this share of a slow frame's tokens.
FAST_TOKEN_RATIO = 0.3

# A patch of two frames counts as similar above this cosine; black patches (norm below the floor) say nothing.
PATCH_SIMILARITY = 0.7
BLACK_PATCH_NORM = 1e-2
SIMILARITY_MIN_TOKENS, SIMILARITY_MAX_TOKENS = 48, 256

# Share of the total budget that a single video of at most so many seconds may use when `adaptive` is on.
ADAPTIVE_SHARES = ((259.0, 0.09), (518.0, 0.18), (1036.0, 0.36), (2016.0, 0.7))


@dataclass(frozen=True)
class FrameBudget:
    """Preprocessing constants of one model family, in tokens.

    `image_rule` / `video_rule`: "processor" enlarges a too small side first and keeps the ratio, "utils" clamps it.
    `budget_rule`: "per_frame" divides the total evenly over frames, "bisection" searches the tokens of a slow frame.
    `max_frames=None`: as many frames as fit into the total at the smallest frame size.
    """

    image_min_tokens: int
    image_max_tokens: int
    frame_min_tokens: int
    frame_max_tokens: int
    total_tokens: int
    fps: float = 2.0
    min_frames: int = 1
    max_frames: int | None = None
    frame_multiple: int = 1
    slow_fast: bool = False
    min_similarity: float = 0.9
    timestamps: bool = True
    share_total: bool = False
    budget_rule: str = "bisection"
    image_rule: str = "utils"
    video_resample: int = BILINEAR
    image_resample: int = BICUBIC
    alpha_on_white: bool = False


_KEYE_VL_1_5 = FrameBudget(
    image_min_tokens=4,
    image_max_tokens=20480,
    frame_min_tokens=48,
    frame_max_tokens=768,
    total_tokens=65536,
    slow_fast=True,
)

FAMILIES: dict[str, FrameBudget] = {
    "keye_vl_preview": FrameBudget(
        image_min_tokens=4,
        image_max_tokens=1280,
        frame_min_tokens=128,
        frame_max_tokens=768,
        total_tokens=115200,
        min_frames=4,
        max_frames=768,
        frame_multiple=2,
        timestamps=False,
        budget_rule="per_frame",
        image_rule="processor",
        video_resample=BICUBIC,
        alpha_on_white=True,
    ),
    "keye_vl_1_5": _KEYE_VL_1_5,
    "keye_vl_671b": _KEYE_VL_1_5,
    "keye_vl_2": FrameBudget(
        image_min_tokens=4,
        image_max_tokens=20480,
        frame_min_tokens=64,
        frame_max_tokens=256,
        total_tokens=184320,
        min_frames=2,
        share_total=True,
    ),
}

DEFAULT_FAMILY = "keye_vl_2"

# Options of Transformers' processors that would contradict the budget.
UNSUPPORTED_OPTIONS = ("size", "crop_size", "do_center_crop", "do_pad")


def family_budget(family: str | None, **overrides) -> FrameBudget:
    """The constants of `family`, with every override that is not None put in its place."""
    family = family or DEFAULT_FAMILY
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    budget = replace(FAMILIES[family], **{name: value for name, value in overrides.items() if value is not None})
    for low, high in (("frame_min_tokens", "frame_max_tokens"), ("image_min_tokens", "image_max_tokens")):
        if not 1 <= getattr(budget, low) <= getattr(budget, high):
            raise ValueError(
                f"min_pixels and max_pixels give {getattr(budget, low)} to {getattr(budget, high)} tokens; "
                "the minimum must be at least one token and at most the maximum."
            )
    if budget.total_tokens < budget.frame_min_tokens:
        raise ValueError(
            f"max_video_tokens={budget.total_tokens} is less than the {budget.frame_min_tokens} tokens of one frame at "
            "its smallest; raise max_video_tokens or lower min_pixels."
        )
    return budget


def refuse_unsupported(options: dict) -> None:
    """Sizes follow from the budget; an option that would set them otherwise must not be ignored."""
    for name in UNSUPPORTED_OPTIONS:
        if options.get(name):
            raise ValueError(f"{name} is not supported; limit the area with min_pixels and max_pixels instead.")


def check_pixel_limits(options: dict) -> None:
    for name in ("min_pixels", "max_pixels"):
        value = options[name]
        if value is not None and not (isinstance(value, Real) and not isinstance(value, bool) and value > 0):
            raise ValueError(f"{name}={value!r} must be a positive number of pixels, or None.")


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28, rule: str = "utils"
) -> tuple[int, int]:
    """The size, in multiples of `factor`, nearest to (height, width) with an area between the two limits.

    Python's `round` is meant: a side of exactly 1.5 factors becomes 2, of 2.5 factors becomes 2 as well.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"cannot resize a frame of {height} x {width} pixels; both sides must be positive.")
    if rule == "processor":
        if height < factor:
            height, width = factor, round(width * factor / height)
        if width < factor:
            height, width = round(height * factor / width), factor
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"a frame of {height} x {width} pixels is too elongated; the sides may differ by at most a factor of "
            f"{MAX_ASPECT_RATIO}. Crop or pad it first."
        )
    new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height, new_width = (math.floor(side / scale / factor) * factor for side in (height, width))
        if new_height * new_width < min_pixels:
            # Where the limits leave one size only, rounding errors of the division must not miss it.
            new_height, new_width = (math.floor(side / scale / factor + 1e-6) * factor for side in (height, width))
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return max(factor, new_height), max(factor, new_width)


def adaptive_total_tokens(total_tokens: int, duration: float) -> float:
    """The part of the total that one video of `duration` seconds may use."""
    for seconds, share in ADAPTIVE_SHARES:
        if duration <= seconds:
            return total_tokens * share
    return total_tokens


def max_frame_count(budget: FrameBudget, total_tokens: float) -> int:
    """The most frames that fit at the smallest frame size (and below the family's own limit)."""
    by_tokens = max(1, int(total_tokens / budget.frame_min_tokens))
    return by_tokens if budget.max_frames is None else min(budget.max_frames, by_tokens)


def choose_frame_count(
    budget: FrameBudget,
    total_frames: int,
    video_fps: float | None,
    total_tokens: float,
    num_frames: int | None = None,
) -> int:
    """How many frames to take from a video of `total_frames` frames; never zero and never more than there are."""
    limit = max_frame_count(budget, total_tokens)
    if num_frames is not None:
        if num_frames * budget.frame_min_tokens > total_tokens:
            raise ValueError(
                f"num_frames={num_frames} needs at least {num_frames * budget.frame_min_tokens} tokens "
                f"({budget.frame_min_tokens} per frame), but the video may use {int(total_tokens)}; lower num_frames "
                "or min_pixels, or raise max_video_tokens."
            )
        count = num_frames
        if budget.frame_multiple > 1:
            count = max(budget.frame_multiple, round(count / budget.frame_multiple) * budget.frame_multiple)
        return min(count, total_frames)
    if video_fps is None:
        return min(total_frames, limit)
    count = total_frames / video_fps * min(budget.fps, video_fps)
    multiple = budget.frame_multiple
    if multiple > 1:
        low = math.ceil(budget.min_frames / multiple) * multiple
        high = max(multiple, min(limit, total_frames) // multiple * multiple)
        count = min(min(max(count, low), high), total_frames)
        return min(max(multiple, int(count) // multiple * multiple), total_frames)
    return min(max(int(count), budget.min_frames, 1), limit, total_frames)


def spread_indices(total_frames: int, count: int) -> list[int]:
    """`count` frame indices from first to last, evenly spread, halves rounded to even."""
    return torch.linspace(0, total_frames - 1, count).round().long().tolist()


def frame_sizes(
    budget: FrameBudget,
    height: int,
    width: int,
    total_tokens: float,
    slow: int,
    fast: int = 0,
    factor: int = 28,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (height, width) of slow and of fast frames, so that the video stays within its total."""
    token_pixels = factor * factor
    min_pixels = budget.frame_min_tokens * token_pixels
    if budget.budget_rule == "per_frame":
        max_pixels = max(
            min(budget.frame_max_tokens * token_pixels, total_tokens * token_pixels / slow * budget.frame_multiple),
            int(min_pixels * 1.05),
        )
        size = smart_resize(height, width, min_pixels, max_pixels, factor)
        return size, size
    # The search ends on the first value that does *not* fit, which may be one token per frame too many. The published
    # models were trained with these sizes, so the value is kept.
    low, high = budget.frame_min_tokens, budget.frame_max_tokens
    while low < high:
        middle = (low + high) // 2
        fast_tokens = max(int(FAST_TOKEN_RATIO * middle), budget.frame_min_tokens)
        if slow * middle + fast * fast_tokens > total_tokens:
            high = middle
        else:
            low = middle + 1
    slow_size = smart_resize(height, width, min_pixels, low * token_pixels, factor)
    if not budget.slow_fast:
        return slow_size, slow_size
    slow_tokens = slow_size[0] * slow_size[1] // token_pixels
    fast_pixels = max(int(FAST_TOKEN_RATIO * slow_tokens), budget.frame_min_tokens) * token_pixels
    return slow_size, smart_resize(height, width, min_pixels, fast_pixels, factor)


def resize_pixels(frames: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Resize [T, 3, H, W] with antialiasing. On the CPU uint8 stays uint8 all the way, as torchvision does it."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    modes = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
    if int(resample) not in modes:
        raise ValueError(f"resample={resample} is not supported; use {BILINEAR} (bilinear) or {BICUBIC} (bicubic).")
    mode = modes[int(resample)]
    if frames.dtype == torch.uint8 and frames.device.type != "cpu":
        resized = F.interpolate(frames.float(), size=size, mode=mode, antialias=True)
        return resized.clamp_(0, 255).round_().to(torch.uint8)
    return F.interpolate(frames, size=size, mode=mode, antialias=True)


def rgb_to_hsv(frame: torch.Tensor) -> torch.Tensor:
    """uint8 [3, H, W] RGB to float HSV in OpenCV's 8-bit ranges: hue 0..179, saturation and value 0..255."""
    red, green, blue = frame.float()
    value, _ = frame.float().max(dim=0)
    spread = value - frame.float().min(dim=0).values
    safe = spread.clamp(min=1)
    hue = torch.where(
        value == red,
        60 * (green - blue) / safe,
        torch.where(value == green, 120 + 60 * (blue - red) / safe, 240 + 60 * (red - green) / safe),
    )
    hue = torch.where(spread == 0, torch.zeros_like(hue), hue) % 360
    saturation = torch.where(value == 0, torch.zeros_like(value), 255 * spread / value.clamp(min=1))
    return torch.stack([(hue / 2).round() % 180, saturation.round(), value])


def frame_similarity(first: torch.Tensor, second: torch.Tensor, patch: int = 28) -> float:
    """Share of patches that look alike in two HSV frames [3, H, W] whose sides are multiples of `patch`."""

    def patches(frame: torch.Tensor) -> torch.Tensor:
        channels, height, width = frame.shape
        grid = frame.reshape(channels, height // patch, patch, width // patch, patch)
        return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)

    first, second = patches(first), patches(second)
    first_norm, second_norm = first.norm(dim=-1), second.norm(dim=-1)
    cosine = (first * second).sum(-1) / ((first_norm + 1e-8) * (second_norm + 1e-8))
    visible = (first_norm > BLACK_PATCH_NORM) | (second_norm > BLACK_PATCH_NORM)
    if not visible.any():
        return 1.0
    return (cosine[visible] > PATCH_SIMILARITY).float().mean().item()


class SlowFastSorter:
    """Calls each frame, given in order, slow or fast: slow when it differs from the latest slow frame."""

    def __init__(self, min_similarity: float, factor: int = 28):
        self.min_similarity = min_similarity
        self.factor = factor
        self._reference: torch.Tensor | None = None

    def __call__(self, frame: torch.Tensor) -> int:
        token_pixels = self.factor * self.factor
        size = smart_resize(
            *frame.shape[-2:], SIMILARITY_MIN_TOKENS * token_pixels, SIMILARITY_MAX_TOKENS * token_pixels, self.factor
        )
        hsv = rgb_to_hsv(resize_pixels(frame[None], size, BILINEAR)[0])
        same_size = self._reference is not None and self._reference.shape == hsv.shape
        if same_size and frame_similarity(self._reference, hsv, self.factor) >= self.min_similarity:
            return FAST
        self._reference = hsv
        return SLOW
