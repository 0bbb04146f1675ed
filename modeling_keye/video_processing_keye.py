"""Videos to patches: which frames, how large, at what times. Pure torch and PyAV, no torchvision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import validate_kwargs
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .frame_budget_keye import (
    DEFAULT_FAMILY,
    FAST,
    SLOW,
    FrameBudget,
    SlowFastSorter,
    adaptive_total_tokens,
    check_pixel_limits,
    choose_frame_count,
    family_budget,
    frame_sizes,
    max_frame_count,
    refuse_unsupported,
    resize_pixels,
    smart_resize,
    spread_indices,
)
from .pixels_keye import frame_to_tensor, load_picture, normalize_pixels, to_patches, within_one
from .video_download_keye import FramePaths
from .video_reader_keye import VideoReader

PIXEL_DTYPES = ("float32", "bfloat16", "float16")


class KeyeVideosKwargs(VideosKwargs, total=False):
    """
    family (`str`): whose constants to use: "keye_vl_preview", "keye_vl_1_5", "keye_vl_671b" or "keye_vl_2".
    fps (`float` or one per video): frames per second to look at. For frames already decoded it is the rate of these
        frames, unless their metadata or timestamps tell it.
    num_frames (`int`): look at so many frames, evenly spread, instead of a rate.
    do_sample_frames (`bool`): False looks at every frame, or at `num_frames` of them where that is given.
    min_frames, max_frames (`int`): limits for the number of frames when sampling by rate.
    min_pixels, max_pixels (`int`): limits for the area of one frame.
    resize_again (`list[int]`): [min_pixels, max_pixels] by which a frame that has its size is sized once more: what
        the published processor of Keye-VL-8B-Preview does.
    max_video_tokens (`int`): tokens that a video ("keye_vl_2": all videos of a prompt together) aims to stay within.
    slow_fast (`bool`): give frames that resemble the one before fewer tokens.
    min_frame_similarity (`float`): from this similarity on a frame is a fast one.
    adaptive (`bool`): let a short video use only a part of max_video_tokens.
    timestamps (`list[float]` or one list per video): times in seconds of frames already decoded, none negative and none
        lower than the one before. None for a file, which says its times itself.
    video_metadata (`dict`, `VideoMetadata` or one per video): what is known about frames already decoded: `fps` of the
        video they come from, `frames_indices` in it, `total_num_frames`, `duration`. None for a file.
    videos_per_prompt (`list[int]`): for every video, how many videos its prompt holds.
    pixel_dtype (`str`): dtype of pixel_values_videos: "float32", "bfloat16" or "float16".
    patch_size, merge_size (`int`): side of a patch in pixels, side of a token in patches.
    progress (`Callable[[int, int], None]`): called with (frames read, frames wanted) while a file is read.
    """

    family: str | None
    fps: Any
    min_frames: int | None
    max_frames: int | None
    min_pixels: int | None
    max_pixels: int | None
    resize_again: Any
    max_video_tokens: int | None
    slow_fast: bool | None
    min_frame_similarity: float | None
    adaptive: bool | None
    timestamps: Any
    video_metadata: Any
    videos_per_prompt: Any
    pixel_dtype: str | None
    patch_size: int | None
    merge_size: int | None
    progress: Any


@dataclass
class KeyeVideoMetadata(VideoMetadata):
    """What was looked at; `frames_indices`, `timestamps`, `frame_grids` and `frame_types` have one entry per frame.

    frame_times: true start times in seconds, None if nothing is known about time.
    frame_grids: (height, width) of each frame in patches.
    frame_types: 0 for a slow frame, 1 for a fast one.
    """

    frame_times: list[float] | None = None
    frame_grids: list[tuple[int, int]] | None = None
    frame_types: list[int] | None = None
    source: str | None = None

    @property
    def timestamps(self) -> list[float] | None:
        return self.frame_times


class KeyeVideoProcessor(BaseVideoProcessor):
    """Turns videos (files, addresses, frames already decoded) into `pixel_values_videos` and `video_grid_thw`.

    pixel_values_videos: [n_patches, 3, patch_size, patch_size], frames in order of time, patches of a frame row by row.
    video_grid_thw: int64 rows (frames, height, width) in patches; neighbouring frames of one video with equal size
    share a row, different videos never do.
    """

    valid_kwargs = KeyeVideosKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    family = DEFAULT_FAMILY
    patch_size = 14
    merge_size = 2
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_sample_frames = True
    adaptive = False
    pixel_dtype = "float32"

    def preprocess(self, videos: Any, **kwargs) -> BatchFeature:
        validate_kwargs(
            captured_kwargs=kwargs.keys(),
            valid_processor_keys=[*self.valid_kwargs.__annotations__, "return_tensors"],
        )
        options = self._options(kwargs)
        videos, _ = flatten_videos(videos)
        if not videos:
            raise ValueError("the list of videos is empty; give at least one video or videos=None.")
        per_video = _spread_options(videos, kwargs)
        for video, own in zip(videos, per_video, strict=True):
            fps = own.get("fps", kwargs.get("fps"))
            if fps is not None and not options["do_sample_frames"] and isinstance(video, (str, PathLike)):
                raise ValueError(
                    f"do_sample_frames=False looks at every frame of {fspath(video)[:200]}, which leaves nothing for "
                    f"fps={fps!r} to choose; give only one of them."
                )
        clips = [self._load(video, {**options, **own}) for video, own in zip(videos, per_video, strict=True)]
        features = self._to_features(clips, options)
        if options["return_metadata"]:
            features["video_metadata"] = [metadata for _, metadata in clips]
        return BatchFeature(
            features, tensor_type=kwargs.get("return_tensors"), skip_tensor_conversion=["video_metadata"]
        )

    def budget(self, **overrides) -> FrameBudget:
        """The constants in force, after this processor's attributes and the given keyword arguments."""
        return self._budget(self._options(overrides))

    def frame_size(self, num_frames: int, height: int, width: int, **overrides) -> tuple[int, int]:
        """(height, width) in pixels of each frame of a video of `num_frames` chosen frames, all of them slow."""
        options = self._options(overrides)
        budget = self._budget(options)
        size = frame_sizes(budget, height, width, budget.total_tokens, num_frames, factor=_factor(options))[0]
        return _resized_again(size, options)

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        """Patches of a video of `num_frames` chosen frames, all of them slow."""
        options = self._options(videos_kwargs or {})
        new_height, new_width = self.frame_size(num_frames, height, width, **(videos_kwargs or {}))
        return num_frames * (new_height // options["patch_size"]) * (new_width // options["patch_size"])

    def sample_frames(self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs):
        """The frame indices that would be chosen from a video described by `metadata`."""
        call = {"num_frames": num_frames, "fps": fps, **kwargs}
        options = self._options({name: value for name, value in call.items() if value is not None})
        total_tokens = self._total_tokens(options, metadata.total_num_frames, metadata.fps)
        return np.array(self._choose(options, metadata.total_num_frames, metadata.fps, total_tokens))

    # -- options ---------------------------------------------------------------------------------------------------

    def _options(self, call: dict) -> dict:
        if call.get("fps") is not None and call.get("num_frames") is not None:
            raise ValueError("fps and num_frames are mutually exclusive; give only one of them.")
        options = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        if call.get("fps") is not None:
            options["num_frames"] = None
        options.update({name: value for name, value in call.items() if name in options and value is not None})
        refuse_unsupported(options)
        check_pixel_limits(options)
        for name in ("num_frames", "min_frames", "max_frames"):
            value = options[name]
            if value is not None and not (isinstance(value, Integral) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{name}={value!r} must be a positive whole number of frames.")
        if options["pixel_dtype"] not in PIXEL_DTYPES:
            raise ValueError(f"pixel_dtype={options['pixel_dtype']!r} must be one of {', '.join(PIXEL_DTYPES)}.")
        return options

    def _budget(self, options: dict) -> FrameBudget:
        token_pixels = _factor(options) ** 2
        fps = _checked_rate("fps", options["fps"])
        return family_budget(
            options["family"],
            fps=fps,
            min_frames=options["min_frames"],
            max_frames=options["max_frames"],
            frame_min_tokens=_tokens(options["min_pixels"], token_pixels),
            frame_max_tokens=_tokens(options["max_pixels"], token_pixels),
            total_tokens=options["max_video_tokens"],
            slow_fast=options["slow_fast"],
            min_similarity=options["min_frame_similarity"],
            video_resample=options["resample"],
        )

    def _total_tokens(self, options: dict, total_frames: int, fps: float | None) -> float:
        budget = self._budget(options)
        sharing = options["videos_per_prompt"] or 1
        if budget.share_total and sharing > 1:
            return budget.total_tokens / sharing
        if options["adaptive"] and fps:
            return adaptive_total_tokens(budget.total_tokens, total_frames / fps)
        return budget.total_tokens

    def _choose(self, options: dict, total_frames: int, fps: float | None, total_tokens: float) -> list[int]:
        if not options["do_sample_frames"] and options["num_frames"] is None:
            limit = max_frame_count(self._budget(options), total_tokens)
            if total_frames > limit:
                raise ValueError(
                    f"do_sample_frames=False keeps all {total_frames} frames, but max_video_tokens allows {limit}; let "
                    "the processor sample, or raise max_video_tokens or lower min_pixels."
                )
            return list(range(total_frames))
        count = choose_frame_count(self._budget(options), total_frames, fps, total_tokens, options["num_frames"])
        return spread_indices(total_frames, count)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _load(self, video: Any, options: dict) -> tuple[list[torch.Tensor], KeyeVideoMetadata]:
        """The chosen frames [3, H, W], not larger than their final size, and what is known about them."""
        if isinstance(video, (str, PathLike)):
            for name in ("timestamps", "video_metadata"):
                if options[name] is not None:
                    raise ValueError(
                        f"{name} was given for {fspath(video)[:200]}, but a file says its times itself; leave {name} "
                        "out (None in a list with one entry per video), or give the frames decoded."
                    )
            return self._load_file(fspath(video), options)
        return self._load_frames(video, options)

    def _load_file(self, source: str, options: dict) -> tuple[list[torch.Tensor], KeyeVideoMetadata]:
        with VideoReader(source) as reader:
            total_tokens = self._total_tokens(options, reader.total_num_frames, reader.fps)
            indices = self._choose(options, reader.total_num_frames, reader.fps, total_tokens)
            types = [SLOW] * len(indices)
            budget = self._budget(options)
            if budget.slow_fast:
                # The final sizes depend on every frame's type, so a first pass finds the types and keeps no frame.
                types = reader.read(indices, SlowFastSorter(budget.min_similarity, _factor(options)))
            metadata = KeyeVideoMetadata(
                total_num_frames=reader.total_num_frames,
                fps=reader.fps,
                width=reader.width,
                height=reader.height,
                duration=reader.duration,
                video_backend=reader.backend,
                frames_indices=indices,
                frame_times=[round(float(reader.times[index]), 6) for index in indices],
                frame_types=types,
                source=source,
            )
            sizes = self._sizes(metadata, options, total_tokens)
            by_index = dict(zip(indices, sizes, strict=True))
            resample, device = budget.video_resample, options["device"]
            order = iter(sorted(by_index))

            def shrink(frame: torch.Tensor) -> torch.Tensor:
                height, width = by_index[next(order)]
                frame = frame if device is None else frame.to(device)
                # Enlarging waits until the end: a kept frame is never larger than it has to be.
                if height * width < frame.shape[1] * frame.shape[2]:
                    return resize_pixels(frame[None], (height, width), resample)[0]
                return frame.contiguous()

            return reader.read(indices, shrink, options["progress"]), metadata

    def _load_frames(self, video: Any, options: dict) -> tuple[list[torch.Tensor], KeyeVideoMetadata]:
        given = [load_picture(frame) if isinstance(frame, (str, PathLike)) else frame for frame in video]
        white = self._budget(options).alpha_on_white
        form = {"scaled": not options["do_rescale"], "within_one": within_one(given)}
        frames = [frame_to_tensor(frame, options["input_data_format"], white, **form) for frame in given]
        if not frames:
            raise ValueError("a video without frames was given; give at least one frame.")
        height, width = frames[0].shape[1:]
        for number, frame in enumerate(frames):
            if frame.shape[1:] != (height, width):
                raise ValueError(
                    f"the frames of a video must have one size, but frame 0 has {height} x {width} pixels and frame "
                    f"{number} {frame.shape[1]} x {frame.shape[2]}; crop or resize them first, or give them as images."
                )
        known = dict(options["video_metadata"] or {})
        times, indices = options["timestamps"], known.get("frames_indices")
        if times is None:
            times = known.get("frame_times", known.get("timestamps"))
        source_fps = _checked_rate("video_metadata fps", known.get("fps"))
        sample = options["do_sample_frames"] and times is None and indices is None
        # Without their numbers, frames of a longer video do not tell its rate.
        complete = indices is not None or known.get("total_num_frames") in (None, len(frames))
        if times is not None:
            times = _checked_order("timestamps", times, len(frames))
        elif source_fps is None and options["fps"] is not None:
            # Nothing else says how fast these frames follow each other, so fps does.
            source_fps = float(_checked_rate("fps", options["fps"]))
            options = {**options, "fps": None}
            sample = sample and options["num_frames"] is not None
        if indices is None:
            indices = list(range(len(frames)))
        else:
            indices = [int(index) for index in _checked_order("frames_indices", indices, len(frames), whole=True)]
        if times is not None and source_fps is None and complete and times[0] < times[-1] and indices[0] < indices[-1]:
            source_fps = (indices[-1] - indices[0]) / (times[-1] - times[0])
        if times is None and source_fps:
            times = [index / source_fps for index in indices]
        total_tokens = self._total_tokens(options, len(frames), source_fps)
        if sample and (source_fps or options["num_frames"]):
            chosen = self._choose(options, len(frames), source_fps, total_tokens)
        elif options["num_frames"] is not None:
            chosen = spread_indices(len(frames), min(options["num_frames"], len(frames)))
        else:
            limit = max_frame_count(self._budget(options), total_tokens)
            chosen = spread_indices(len(frames), min(limit, len(frames)))
        frames = [frames[place] for place in chosen]
        device = options["device"]
        if device is not None:
            frames = [frame.to(device) for frame in frames]
        total = known.get("total_num_frames") or max(indices) + 1
        metadata = KeyeVideoMetadata(
            total_num_frames=total,
            fps=source_fps,
            height=height,
            width=width,
            duration=known.get("duration") or (total / source_fps if source_fps else None),
            video_backend=known.get("video_backend"),
            frames_indices=[indices[place] for place in chosen],
            frame_times=None if times is None else [float(times[place]) for place in chosen],
            frame_types=[SLOW] * len(frames),
        )
        budget = self._budget(options)
        if budget.slow_fast:
            sorter = SlowFastSorter(budget.min_similarity, _factor(options))
            metadata.frame_types = [sorter(frame) for frame in frames]
        self._sizes(metadata, options, total_tokens)
        return frames, metadata

    def _sizes(self, metadata: KeyeVideoMetadata, options: dict, total_tokens: float) -> list[tuple[int, int]]:
        """Final (height, width) of every chosen frame in pixels; noted in `metadata.frame_grids` in patches."""
        patch, factor = options["patch_size"], _factor(options)
        height, width = metadata.height, metadata.width
        if options["do_resize"]:
            fast = metadata.frame_types.count(FAST)
            slow = len(metadata.frame_types) - fast
            sizes = frame_sizes(self._budget(options), height, width, total_tokens, slow, fast, factor)
            sizes = [_resized_again(size, options) for size in sizes]
        elif height % factor or width % factor:
            raise ValueError(
                f"do_resize=False needs frames whose sides are multiples of {factor}, got {height} x {width}; resize "
                "them or leave do_resize on."
            )
        else:
            sizes = (height, width), (height, width)
        chosen = [sizes[kind] for kind in metadata.frame_types]
        metadata.frame_grids = [(high // patch, wide // patch) for high, wide in chosen]
        return chosen

    # -- patches ---------------------------------------------------------------------------------------------------

    def _to_features(self, clips: list[tuple[list[torch.Tensor], KeyeVideoMetadata]], options: dict) -> dict[str, Any]:
        budget = self._budget({**options, "fps": None})
        patch = options["patch_size"]
        resample = budget.video_resample
        rows: list[list[int]] = []
        for _, metadata in clips:
            start = len(rows)
            for grid in metadata.frame_grids:
                if len(rows) > start and tuple(rows[-1][1:]) == tuple(grid):
                    rows[-1][0] += 1
                else:
                    rows.append([1, *grid])
        total = sum(t * h * w for t, h, w in rows)
        pixels = torch.empty(
            (total, 3, patch, patch), dtype=getattr(torch, options["pixel_dtype"]), device=clips[0][0][0].device
        )
        place = 0
        for frames, metadata in clips:
            for number, (height, width) in enumerate(metadata.frame_grids):
                # Each frame is dropped as soon as its patches are written: the output is the only large tensor.
                frame, frames[number] = frames[number], None
                frame = resize_pixels(frame[None], (height * patch, width * patch), resample)
                pixels[place : place + height * width] = to_patches(normalize_pixels(frame, options), patch)
                place += height * width
        features = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(rows, dtype=torch.int64)}
        if budget.budget_rule == "per_frame":
            # Only the Preview model places frames on the time axis by their rate.
            seconds = [1.0 / _sampled_fps(metadata, budget.fps) for _, metadata in clips]
            features["second_per_grid_ts"] = torch.tensor(seconds)
        return features


def flatten_videos(videos: Any) -> tuple[list[Any], list[int] | None]:
    """(videos one after the other, videos per prompt). The counts are None unless `videos` is a list per prompt."""
    if videos is None:
        return [], None
    if _is_video(videos):
        return [videos], None
    if not isinstance(videos, (list, tuple)) and not (hasattr(videos, "ndim") and videos.ndim == 5):
        raise ValueError(
            f"a video of type {type(videos).__name__} is not understood; give a path, an address, a list of images, or "
            "an array of frames [T, H, W, 3] or [T, 3, H, W]."
        )
    if len(videos) and all(isinstance(item, (list, tuple)) and not _is_video(item) for item in videos):
        prompts = [flatten_videos(item)[0] for item in videos]
        return [video for prompt in prompts for video in prompt], [len(prompt) for prompt in prompts]
    flat = [video for item in videos for video in flatten_videos(item)[0]]
    return flat, None


def _factor(options: dict) -> int:
    return options["patch_size"] * options["merge_size"]


def _tokens(pixels: int | None, token_pixels: int) -> int | None:
    return None if pixels is None else max(1, pixels // token_pixels)


def _resized_again(size: tuple[int, int], options: dict) -> tuple[int, int]:
    limits = options["resize_again"]
    return size if limits is None else smart_resize(*size, *limits, _factor(options))


def _sampled_fps(metadata: KeyeVideoMetadata, default: float) -> float:
    if metadata.fps is None:
        return default
    return len(metadata.frames_indices) / metadata.total_num_frames * metadata.fps


def _is_frame(item: Any) -> bool:
    return isinstance(item, PIL.Image.Image) or (hasattr(item, "ndim") and item.ndim in (2, 3))


def _is_video(item: Any) -> bool:
    if isinstance(item, (str, PathLike, FramePaths)) or (hasattr(item, "ndim") and item.ndim == 4):
        return True
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(_is_frame(frame) for frame in item)


def _checked_rate(name: str, fps: Any) -> Any:
    fps = fps.item() if getattr(fps, "ndim", None) == 0 else fps
    if fps is not None and not (isinstance(fps, Real) and not isinstance(fps, bool) and 0 < fps < math.inf):
        raise ValueError(f"{name}={fps!r} must be a positive number of frames per second, or None.")
    return fps


def _checked_order(name: str, values: Any, count: int, whole: bool = False) -> list:
    """One number per frame, in the order of time."""
    values = _plain_list(name, values)
    if len(values) != count:
        raise ValueError(f"{count} frames were given, but {name} has {len(values)} entries.")
    previous = 0
    for place, value in enumerate(values):
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (whole and value != int(value)):
            kind = "a whole number" if whole else "a finite number"
            raise ValueError(f"{name} holds {value!r} for frame {place}, which must be {kind}.")
        if value < previous:
            raise ValueError(
                f"{name} holds {value} for frame {place}, which must be {previous} or more: none may be negative or "
                "lower than the one before; give the frames in the order of time."
            )
        previous = value
    return values


def _plain_list(name: str, values: Any) -> list:
    """A list of what a sequence, an array or a tensor holds, without arrays and tensors inside."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name}={values!r} must be a list with one number per frame.")
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _spread_options(videos: Sequence[Any], call: dict) -> list[dict]:
    """The options that differ from video to video, taken apart."""
    spread: list[dict] = [{} for _ in videos]

    def give(name: str, values: Sequence[Any]) -> None:
        if len(values) != len(videos):
            raise ValueError(
                f"{len(videos)} videos were given, but {name} has {len(values)} entries; give one per video."
            )
        for own, value in zip(spread, values, strict=True):
            own[name] = value

    if isinstance(call.get("fps"), (list, tuple)):
        give("fps", call["fps"])
    timestamps = call.get("timestamps")
    if timestamps is not None:
        timestamps = _plain_list("timestamps", timestamps)
        nested = bool(timestamps) and all(
            entry is None or (isinstance(entry, Sequence) and not isinstance(entry, str)) for entry in timestamps
        )
        give("timestamps", timestamps if nested else [timestamps])
    metadata = call.get("video_metadata")
    if metadata is not None:
        metadata = list(metadata) if isinstance(metadata, (list, tuple)) else [metadata]
        if metadata and isinstance(metadata[0], (list, tuple)):
            metadata = [entry for prompt in metadata for entry in prompt]
        give("video_metadata", metadata)
    if call.get("videos_per_prompt") is not None:
        give("videos_per_prompt", call["videos_per_prompt"])
    return spread


__all__ = ["KeyeVideoMetadata", "KeyeVideoProcessor"]
