"""Rows -> model inputs of one example: videos are decoded when their row is asked for, in the worker that asks."""

import json
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from .chat_template import marks_answers
from .data_errors import DataError, MediaError, SkippableError, TooLongError, suggestion
from .frame_cache import with_frame_cache
from .rows import Row, Rows

logger = logging.get_logger(__name__)

IGNORE = -100
MEDIA_TENSORS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# Arguments of the video processor that belong to one video, or to the caller of the processor.
NOT_OPTIONS = {
    "device",
    "input_data_format",
    "progress",
    "return_metadata",
    "return_tensors",
    "timestamps",
    "video_metadata",
    "videos_per_prompt",
}


class VideoQADataset(Dataset):
    """Model inputs with labels, one row at a time; nothing of a row outlives the access to it.

    Args:
        rows: what `load_rows` gives, or any sequence of `Row`.
        processor: a `KeyeProcessor`; its chat template marks what the assistant says (`{% generation %}`).
        max_length: the most tokens of an example; None for no limit. Nothing is ever cut from an answer.
        on_bad_video: "raise" ends with the first row whose video or image is missing or unreadable, or whose answer
            `max_length` would cut; "skip" takes the next good row in its place, the same one each time, and reports it.
        frame_cache: a folder for decoded frames; see `frame_cache.py`.
        video_options: arguments of the video processor: `num_frames`, `fps`, `max_frames`, `max_pixels`, ...
        skipped_file: a JSON lines file to which "skip" adds one line per file it passes over.
        check_rows: read all rows (not their videos) at the start, so that a bad one is found before training.

    Raises `DataError` for arguments and rows, here or at an access.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Any,
        *,
        max_length: int | None,
        on_bad_video: str = "raise",
        frame_cache: str | os.PathLike | None = None,
        video_options: dict | None = None,
        skipped_file: str | os.PathLike | None = None,
        check_rows: bool = True,
    ):
        if on_bad_video not in ("raise", "skip"):
            raise DataError(f"on_bad_video={on_bad_video!r} must be 'raise' or 'skip'.")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise DataError(f"max_length={max_length!r} must be a positive number of tokens, or None for no limit.")
        if len(rows) == 0:
            raise DataError("there are no rows to train on; give at least one.")
        if not marks_answers(processor.chat_template):
            raise DataError(
                "the processor's chat template does not mark what the assistant says, so nobody knows which tokens to "
                "learn; `training.chat_template.mark_answers(processor)` gives it one that does."
            )
        self.rows = rows
        self.processor = processor if frame_cache is None else with_frame_cache(processor, frame_cache)
        self.max_length = max_length
        self.on_bad_video = on_bad_video
        self.video_options = _checked_options(processor, video_options or {})
        self.skipped_file = None if skipped_file is None else Path(os.path.abspath(skipped_file))
        self._bad: set[int] = set()
        self._reported: set[str] = set()
        if check_rows and isinstance(rows, Rows):
            rows.check(self._skip if on_bad_video == "skip" else None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """See `encode`; with "skip" of the first row from `index` on (and around) that can be used."""
        count = len(self.rows)
        index = operator.index(index)
        if not -count <= index < count:
            raise IndexError(f"row {index} was asked for, but there are {count}.")
        for step in range(count):
            place = (index + step) % count
            if place in self._bad:
                continue
            try:
                return self.encode(self.rows[place])
            except SkippableError as error:
                if self.on_bad_video == "raise":
                    raise
                self._skip(place, error)
        raise DataError(f"none of the {count} rows can be used; the warnings above say why.")

    def encode(self, row: Row) -> dict[str, torch.Tensor]:
        """Inputs of one row.

        input_ids, labels, mm_token_type_ids: int64 [S]; labels are -100 but on what the assistant says, each answer
        with the token that ends it. pixel_values_videos [patches, 3, P, P] with video_grid_thw [rows, 3], pixel_values
        with image_grid_thw, and second_per_grid_ts [videos], where the row has such media.
        """
        features = self._features(row)
        input_ids = features["input_ids"][0]
        spoken = torch.as_tensor(features["assistant_masks"])[0].bool()
        for placeholder in (self.processor.image_token_id, self.processor.video_token_id):
            spoken &= input_ids != placeholder
        example = {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(~spoken, IGNORE),
            "mm_token_type_ids": features["mm_token_type_ids"][0],
        }
        length = self._length(row, example, spoken)
        example = {name: value[:length] for name, value in example.items()}
        example.update({name: features[name] for name in MEDIA_TENSORS if name in features})
        return example

    def _features(self, row: Row) -> dict[str, Any]:
        try:
            return self.processor.apply_chat_template(
                [{**message, "content": [dict(part) for part in message["content"]]} for message in row.messages],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
                processor_kwargs={"videos_kwargs": dict(self.video_options)},
            )
        except Exception as error:
            if _is_unreadable(error):
                path = _culprit(row, error)
                named = "" if path in str(error) else f"{path} cannot be read: "
                hint = "; mend the file or drop the row"
                hint += "." if self.on_bad_video == "skip" else ", or pass over such rows with on_bad_video='skip'."
                raise MediaError(f"{row.where}: {named}{str(error).rstrip('.')}{hint}", path) from error
            if isinstance(error, ValueError):
                raise DataError(f"{row.where}: {error}") from error
            raise

    def _length(self, row: Row, example: dict[str, torch.Tensor], spoken: torch.Tensor) -> int:
        """How many tokens to keep: all, or without those behind the last answer where only these are too many."""
        places = spoken.nonzero()
        if len(places) == 0:
            raise DataError(
                f"{row.where}: no token is marked as an answer; put the chat template's generation marks around what "
                "the assistant says."
            )
        length, needed = len(spoken), int(places[-1]) + 1
        if self.max_length is None or length <= self.max_length:
            return length
        if needed > self.max_length:
            seen = int((example["mm_token_type_ids"] > 0).sum())
            raise TooLongError(
                f"{row.where}: max_length={self.max_length} would cut an answer, which ends at token {needed} ({seen} "
                "tokens are of videos and images); raise max_length, or look at fewer or smaller frames (video_options "
                "max_frames, max_pixels).",
            )
        return self.max_length

    def _skip(self, place: int, error: SkippableError) -> None:
        """Remember a row that cannot be used, and report its file once."""
        self._bad.add(place)
        subject = error.path or str(error)
        if subject in self._reported:
            return
        self._reported.add(subject)
        if self.skipped_file is None or self._note(error):
            logger.warning(f"skipped: {error}")

    def _note(self, error: SkippableError) -> bool:
        """Add a line to `skipped_file`; False where another worker or an earlier epoch did."""
        line = json.dumps({"file": error.path, "reason": str(error)}, ensure_ascii=False)
        self.skipped_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.skipped_file, "a+", encoding="utf-8") as file:
            file.seek(0)
            known = [json.loads(before) for before in file]
            if any((before["file"] or before["reason"]) == (error.path or str(error)) for before in known):
                return False
            file.write(line + "\n")
        return True


def _checked_options(processor: Any, options: dict) -> dict:
    known = sorted(set(processor.video_processor.valid_kwargs.__annotations__) - NOT_OPTIONS)
    for name in options:
        if name not in known:
            raise DataError(
                f"video_options has no {name!r}{suggestion(name, known) or ';'} the options are {', '.join(known)}."
            )
    try:
        processor.video_processor.budget(**options)
    except ValueError as error:
        raise DataError(f"video_options: {error}") from error
    return dict(options)


def _is_unreadable(error: Exception) -> bool:
    """Whether a file is at fault, and not an option, the disk or the program."""
    # Loading a processor from a checkpoint folder makes a second copy of every class, so the class has to go by name.
    if any(kind.__name__ == "VideoReadError" for kind in type(error).__mro__):
        return True
    if isinstance(error, (PIL.UnidentifiedImageError, FileNotFoundError)):
        return True
    # Pillow says so about a truncated image; what the system reports has a number.
    return isinstance(error, OSError) and error.errno is None


def _culprit(row: Row, error: Exception) -> str:
    """The file that an error is about."""
    named = [path for _, path in row.media if path in str(error)]
    # One path can begin like another; the longest is meant.
    return max(named, key=len) if named else next(path for kind, path in row.media if _is_broken(kind, path))


def _is_broken(kind: str, path: str) -> bool:
    if kind != "image":
        return False
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except OSError:
        return True
    return False
