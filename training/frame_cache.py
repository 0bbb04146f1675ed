"""Decoded frames kept on disk, so that later epochs read pictures instead of decoding video again.

An entry holds the chosen frames of one file as the reader gives them, uint8 and already shrunk: a quarter of the size
of the pixels that the model sees, which are made from it, bit for bit as without the cache.
"""

import copy
import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from modeling_keye.video_processing_keye import KeyeVideoMetadata, KeyeVideoProcessor

from .data_errors import DataError

logger = logging.get_logger(__name__)

# Raised when what an entry holds changes.
FORMAT = 1
# Options that only matter once the frames are there; every other option is part of an entry's name.
AFTER_READING = frozenset(
    {
        "device",
        "do_normalize",
        "do_rescale",
        "image_mean",
        "image_std",
        "pixel_dtype",
        "progress",
        "rescale_factor",
        "return_metadata",
        "return_tensors",
    }
)


class CachingVideoProcessor(KeyeVideoProcessor):
    """A `KeyeVideoProcessor` that looks for a file's frames in `cache_folder` before it decodes them.

    Entries are named after the file's path, size and time of change and after the options that choose and size frames,
    so a changed file or option never meets an old entry. Nothing is ever deleted; the folder may be, at any time.
    """

    cache_folder: Path

    def _load_file(self, source: str, options: dict) -> tuple[list[torch.Tensor], KeyeVideoMetadata]:
        if not os.path.isfile(source):
            return super()._load_file(source, options)
        entry = self.entry(source, options)
        if entry.is_file():
            try:
                return _load(entry)
            except SafetensorError as error:
                # A machine that lost power can leave a file behind whose content never reached the disk.
                logger.warning(f"the cached frames {entry} are damaged ({error}); {source} is decoded again.")
        frames, metadata = super()._load_file(source, options)
        _save(entry, frames, metadata)
        # The entry is mapped from the disk, so the decoded frames need not stay in memory.
        del frames
        return _load(entry)

    def entry(self, source: str, options: dict) -> Path:
        """The file that holds, or would hold, the frames of `source` under these options."""
        status = os.stat(source)
        chosen = {name: value for name, value in options.items() if name not in AFTER_READING and value is not None}
        identity = [FORMAT, os.path.abspath(source), status.st_size, status.st_mtime_ns, sorted(chosen.items())]
        name = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()
        return self.cache_folder / name[:2] / f"{name}.safetensors"


def with_frame_cache(processor: Any, folder: str | os.PathLike) -> Any:
    """A copy of a processor whose videos go through a cache in `folder`; the original stays as it is.

    Raises `DataError` where there can be no such folder.
    """
    caching = CachingVideoProcessor.from_dict(processor.video_processor.to_dict())
    caching.cache_folder = Path(os.path.abspath(folder))
    try:
        caching.cache_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"frame_cache={str(folder)!r} is where no folder can be made; choose another: {error}"
        ) from error
    processor = copy.copy(processor)
    processor.video_processor = caching
    return processor


def _save(entry: Path, frames: list[torch.Tensor], metadata: KeyeVideoMetadata) -> None:
    tensors = {
        "frames": torch.cat([frame.reshape(-1) for frame in frames]),  # uint8, [3, H, W] of one frame after the other
        "sizes": torch.tensor([frame.shape[1:] for frame in frames], dtype=torch.int32),  # [frames, 2]
    }
    entry.parent.mkdir(parents=True, exist_ok=True)
    # Several workers may decode one file at a time: each writes its own, and the last one's stays.
    handle, temporary = tempfile.mkstemp(dir=entry.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"video": json.dumps(asdict(metadata))})
        os.replace(temporary, entry)
    except BaseException:
        os.remove(temporary)
        raise


def _load(entry: Path) -> tuple[list[torch.Tensor], KeyeVideoMetadata]:
    with safe_open(entry, framework="pt") as file:
        known = json.loads(file.metadata()["video"])
        sizes = file.get_tensor("sizes").tolist()
        pixels = file.get_tensor("frames")
    known["frame_grids"] = [tuple(grid) for grid in known["frame_grids"]]
    parts = pixels.split([3 * height * width for height, width in sizes])
    frames = [part.view(3, height, width) for part, (height, width) in zip(parts, sizes, strict=True)]
    return frames, KeyeVideoMetadata(**known)
