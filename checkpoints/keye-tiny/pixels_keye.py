"""Pictures to numbers: one frame of any form as uint8 [3, H, W], values normalised, patches cut out."""

import base64
import binascii
import io
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from .video_download_keye import DownloadError, download, is_address, local_path


def load_picture(source: str | os.PathLike) -> PIL.Image.Image:
    """The picture at a path, a file:// URI or an address, or in base64 text, rotated as its file asks for.

    Raises `FileNotFoundError` where there is nothing and `PIL.UnidentifiedImageError` where it is no picture.
    """
    source = os.fspath(source)
    if is_address(source):
        try:
            path = download(source)
        except DownloadError as error:
            raise FileNotFoundError(f"cannot download the image {source[:200]}: {error}.") from error
        try:
            return _open_picture(path, source)
        finally:
            os.remove(path)
    path = local_path(source)
    if os.path.isfile(path):
        return _open_picture(path, path)
    is_data = source[:5].lower() == "data:"
    try:
        content = base64.decodebytes((source.partition(",")[2] if is_data else source).encode())
    except binascii.Error:
        content = b""
    try:
        return _open_picture(io.BytesIO(content), source)
    except PIL.UnidentifiedImageError as error:
        if is_data:
            raise
        raise FileNotFoundError(f"there is no image at {source[:200]}; check the path.") from error


def _open_picture(file: Any, name: str) -> PIL.Image.Image:
    try:
        with PIL.Image.open(file) as picture:
            return PIL.ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # The disk is at fault, not the picture, and the text names the file.
        detail = "" if isinstance(error, PIL.UnidentifiedImageError) else f" ({error})"
        raise PIL.UnidentifiedImageError(
            f"{name[:200]} holds no image that can be read{detail}; check what it is."
        ) from error


def frame_to_tensor(
    frame: Any,
    input_data_format: str | None = None,
    alpha_on_white: bool = False,
    scaled: bool = False,
    within_one: bool | None = None,
) -> torch.Tensor:
    """A PIL image, array or tensor (any channel order, grey, RGB or RGBA) as [3, H, W].

    The result is uint8; floats within [0, 1] are taken as already scaled, unless `within_one` says of all frames of a
    video that they are or are not. With `scaled` floats stay what they are. A PIL image of 16 bits is scaled to 8, and
    False and True are black and white.

    Raises `ValueError` for other types, and for values that are neither 0..255 nor (floats) 0..1.
    """
    if isinstance(frame, PIL.Image.Image):
        input_data_format = "channels_last"
        if frame.mode.startswith("I;16"):
            # White is 65535, as in the PNG such an image comes from; `convert` would make everything above 255 white.
            frame = (np.asarray(frame).astype(np.float32) / 257).round().astype(np.uint8)
        elif frame.mode in ("I", "F"):
            # No mode of these says which number is white, so they are checked as an array is.
            frame = np.array(frame)
        else:
            alpha = "A" in frame.getbands() or "transparency" in frame.info
            frame = np.array(frame.convert("RGBA" if alpha else "RGB"))
    if isinstance(frame, np.ndarray):
        frame = torch.from_numpy(np.ascontiguousarray(frame))
    if not isinstance(frame, torch.Tensor):
        raise ValueError(
            f"a picture of type {type(frame).__name__} is not understood; give a path or an address as text, a PIL "
            "image, or an array or tensor [H, W, 3] or [3, H, W]."
        )
    if frame.ndim == 2:
        frame, input_data_format = frame[None], "channels_first"
    if frame.ndim != 3:
        raise ValueError(f"a frame must have 2 or 3 dimensions, got {frame.ndim} (shape {tuple(frame.shape)}).")
    if input_data_format is None:
        input_data_format = "channels_first" if frame.shape[0] in (1, 3, 4) else "channels_last"
    if getattr(input_data_format, "value", input_data_format) == "channels_last":
        frame = frame.permute(2, 0, 1)
    if frame.shape[0] not in (1, 3, 4):
        raise ValueError(f"a frame must have 1, 3 or 4 channels, got shape {tuple(frame.shape)}.")
    if frame.numel() == 0:
        raise ValueError(f"a frame must have at least one pixel, got shape {tuple(frame.shape)}.")
    if frame.dtype == torch.bool:
        frame = frame.to(torch.uint8) * 255
    if frame.dtype != torch.uint8:
        high = _checked_maximum(frame, scaled)
        if not frame.is_floating_point():
            frame = frame.to(torch.uint8)
        elif not scaled:
            within_one = high <= 1.0 if within_one is None else within_one
            frame = (frame * 255 if within_one else frame).round().to(torch.uint8)
    if frame.shape[0] == 1:
        return frame.expand(3, -1, -1)
    if frame.shape[0] == 4:
        colour, alpha = frame[:3], frame[3:]
        if not alpha_on_white:
            return colour
        full = 255.0 if frame.dtype == torch.uint8 else 1.0
        blended = colour * (alpha / full) + full * (1 - alpha / full)
        return blended.round().to(torch.uint8) if frame.dtype == torch.uint8 else blended
    return frame


def within_one(frames: Iterable[Any]) -> bool:
    """Whether no float of any frame is above 1: a dark frame alone does not show what white is."""
    for frame in frames:
        if isinstance(frame, PIL.Image.Image) and frame.mode == "F":
            frame = np.asarray(frame)
        is_float = isinstance(frame, torch.Tensor) and frame.is_floating_point()
        if is_float or (isinstance(frame, np.ndarray) and np.issubdtype(frame.dtype, np.floating)):
            if bool((frame > 1).any()):
                return False
    return True


def _checked_maximum(frame: torch.Tensor, scaled: bool) -> float:
    """The highest value of a frame that is not uint8; values that would wrap, or be cut off, are refused."""
    if frame.is_floating_point():
        # Any NaN makes both of them NaN, which no comparison lets through.
        low, high = (value.item() for value in frame.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"the floats of a frame must be finite, but the lowest and highest of this one are {low} and {high}; "
                "mend what made them."
            )
        if not scaled and (low < 0 or high > 255):
            raise ValueError(
                f"the floats of a frame must lie within 0 to 1 or 0 to 255, but this one holds {low:g} to {high:g}; "
                "scale or clip it first."
            )
        return high
    # The wider unsigned types of torch know no maximum.
    low, high = (value.item() for value in frame.to(torch.int64).aminmax())
    if low < 0 or high > 255:
        raise ValueError(
            f"the integers of a frame must lie within 0 to 255, but this one ({frame.dtype}) holds {low} to {high}; "
            "scale it to uint8 first, 16 bits with `frame // 257`."
        )
    return high


def normalize_pixels(frames: torch.Tensor, options: dict) -> torch.Tensor:
    """Rescale and normalise [T, 3, H, W] in one step, as Transformers' own backends do."""
    frames = frames.float()
    scale = options["rescale_factor"] if options["do_rescale"] else 1.0
    if not options["do_normalize"]:
        return frames * scale
    mean, std = (
        torch.tensor(values, device=frames.device).expand(3).view(3, 1, 1) / scale
        for values in (options["image_mean"], options["image_std"])
    )
    return (frames - mean) / std


def to_patches(frames: torch.Tensor, patch: int) -> torch.Tensor:
    """[T, 3, H, W] to [T * H/patch * W/patch, 3, patch, patch], row by row within each frame."""
    count, channels, height, width = frames.shape
    grid = frames.reshape(count, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, patch, patch)
