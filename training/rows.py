"""A data source as rows: chat messages whose videos and images are files on disk, checked, and read when asked for.

rows = load_rows("clips.jsonl")             # {video, question, answer} or {video, messages} a line
rows = load_rows("folder", media_root="videos", format="llava")
rows = load_rows("someone/videos-with-questions", split="train")    # a name on the Hub
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .arrow_rows import ArrowRecords, is_dataset, load_named, load_parquet, load_saved, pick_split
from .data_errors import DataError, MediaError, SkippableError, TooLongError
from .row_formats import COLUMNS, RowFormat, format_of, load_format
from .row_messages import KINDS, messages_of
from .row_sources import ListRecords, is_saved_dataset, looks_like_file, metadata_file, open_file


@dataclass(frozen=True)
class Row:
    """One training conversation.

    where: the row for messages, "clips.jsonl, row 7" (counted from 1; in a JSON lines file, the line).
    messages: system (optional), user, assistant, user, ...; every content is a list of {"type": "text", "text"} and, in
        user messages, {"type": "video" or "image", "path"} with an absolute path.
    id: the column "id", or `where`.
    kind: the column "kind", what sort of question this is; evaluation counts each by itself.
    """

    where: str
    messages: list[dict]
    id: str
    kind: str | None = None

    @property
    def media(self) -> list[tuple[str, str]]:
        """(kind, path) of every video and image, in order."""
        parts = [part for message in self.messages for part in message["content"]]
        return [(part["type"], part["path"]) for part in parts if part["type"] in KINDS]


class Rows(Sequence):
    """Rows that are read, mapped and checked one at a time. A slice is a view; pickling copies no row.

    Raises `DataError` at an access whose row cannot be used, `MediaError` when only its video or image is missing.
    """

    def __init__(self, records: Any, row_format: RowFormat | None, root: Path | None, confined: bool = False):
        self._records = records
        self._format = row_format
        self._root = root
        self._confined = confined
        self._places: Sequence[int] = range(len(records))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int | slice) -> "Row | Rows":
        if isinstance(index, slice):
            part = Rows(self._records, self._format, self._root, self._confined)
            part._places = self._places[index]
            return part
        place = self._places[index]
        where = f"{self._records.name}, row {self._records.label(place)}"
        record = self._mapped(self._records[place], where)
        messages = messages_of(record, where, partial(_find, where=where, root=self._root, confined=self._confined))
        identity, kind = record.get("id"), record.get("kind")
        return Row(where, messages, where if identity is None else str(identity), None if kind is None else str(kind))

    def check(self, on_missing: Callable[[int, MediaError], None] | None = None) -> None:
        """Read every row once, so that a bad one ends a run before it begins, and not after hours.

        `on_missing(index, error)` is told of missing files; without it they raise too. Data sets that hold their media
        as bytes are left alone: checking would unpack them all.
        """
        if getattr(self._records, "embedded", None):
            return
        for index in tqdm(range(len(self)), desc="checking rows", unit="row", delay=5, leave=False):
            try:
                self[index]
            except MediaError as error:
                if on_missing is None:
                    raise
                on_missing(index, error)

    def _mapped(self, record: dict, where: str) -> dict:
        row_format = self._format or format_of(name for name, value in record.items() if value is not None)
        try:
            mapped = row_format.to_row(record)
        except Exception as error:
            raise DataError(
                f"{where}: the mapping {row_format.name} failed with {type(error).__name__}: {error}; it got the "
                f"columns {', '.join(map(str, record))}."
            ) from error
        if not isinstance(mapped, dict):
            raise DataError(
                f"{where}: the mapping {row_format.name} returned a {type(mapped).__name__}; it must return a "
                f"dictionary with the columns {', '.join(COLUMNS)}."
            )
        format_of(()).check_columns(mapped, where)
        return mapped


def load_rows(
    source: Any,
    *,
    format: str = "auto",
    media_root: str | os.PathLike | None = None,
    split: str = "train",
) -> Rows:
    """The rows of a data source, as a sequence that reads each row when it is asked for.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; a folder with one (`{split}.*`, `metadata.*` or the only one),
            or written by `datasets`; a name on the Hub, or {"path": name, ...} with more arguments of
            `datasets.load_dataset`; a `datasets.Dataset` or `DatasetDict`; a list of dictionaries.
        format: "rows" ({video, question, answer} or {video, messages}; also id, kind, image), "llava", "sharegpt", a
            mapping of one's own as "module:function", or "auto": told by each row's columns.
        media_root: the folder that paths of media begin from and may not leave; without it, the folder of the file.
        split: which part of the data.

    Raises `DataError` for a source that cannot be read, malformed JSON or CSV, an unknown column or format. Everything
    else is checked when a row is read; `Rows.check` reads all.
    """
    row_format = load_format(format)
    root = None if media_root is None else Path(os.path.abspath(media_root))
    if root is not None and not root.is_dir():
        raise DataError(f"media_root={str(media_root)!r} is no folder; give the folder that holds the videos.")
    records, folder = _open(source, split, _column_check(row_format))
    if len(records) == 0:
        raise DataError(f"{records.name} holds no rows; give a source with at least one.")
    return Rows(records, row_format, root or folder, confined=root is not None)


def _column_check(row_format: RowFormat | None) -> Callable[[Iterable[str], str], None]:
    """Checks the columns of a record or table; every set of columns once."""
    seen = set()

    def check(columns: Iterable[str], where: str) -> None:
        names = frozenset(columns)
        if names not in seen:
            (row_format or format_of(names)).check_columns(names, where)
            seen.add(names)

    return check


def _open(source: Any, split: str, check: Callable) -> tuple[Any, Path | None]:
    """The records of a source, and the folder that its relative paths begin from."""
    if is_dataset(source):
        dataset = pick_split(source, split, "the data set")
        return ArrowRecords(dataset, "the data set", check), None
    if isinstance(source, dict):
        return _open_named({**source}, split, check)
    if isinstance(source, (list, tuple)):
        return ListRecords(source, check), None
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"a source of rows must be a path, a name on the Hub, a data set or a list, got {type(source).__name__}."
        )
    if source == "":
        raise DataError("a source of rows must be a path or a name on the Hub, got an empty text.")
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.is_dir():
        return _open_folder(path, split, check)
    if path.is_file():
        return _open_file(path, check)
    if isinstance(source, os.PathLike) or looks_like_file(source):
        raise DataError(f"there is no file or folder at {path}; check the path of the data.")
    return _open_named({"path": source}, split, check)


def _open_file(path: Path, check: Callable) -> tuple[Any, Path]:
    if path.suffix == ".parquet":
        return ArrowRecords(load_parquet(path), path.name, check), path.parent
    return open_file(path, check), path.parent


def _open_folder(folder: Path, split: str, check: Callable) -> tuple[Any, Path]:
    if is_saved_dataset(folder):
        return ArrowRecords(load_saved(folder, split), folder.name, check), folder
    table = metadata_file(folder, split)
    if table is not None:
        return _open_file(table, check)
    return ArrowRecords(load_named(str(folder), split), folder.name, check), folder


def _open_named(options: dict, split: str, check: Callable) -> tuple[Any, None]:
    name = options.pop("path", None)
    if not isinstance(name, str):
        raise DataError(
            f"a source given as a dictionary needs 'path', the name of a data set, got {sorted(options)}; its other "
            "entries are arguments of datasets.load_dataset."
        )
    split = options.pop("split", split)
    return ArrowRecords(load_named(name, split, **options), name, check), None


def _find(kind: str, value: Any, where: str, root: Path | None, confined: bool) -> str:
    """The absolute path of a video or image. Raises `DataError`, or `MediaError` when there is no such file."""
    if not isinstance(value, (str, os.PathLike)) or value == "":
        raise DataError(f"{where}: the {kind} {value!r} must be the path of a file; write it as text.")
    given = os.fspath(value).removeprefix("file://")
    if "://" in given:
        raise DataError(
            f"{where}: the {kind} {given} is an address; every epoch would load it again, so download it and give "
            "its path."
        )
    if not os.path.isabs(given) and root is None:
        raise DataError(
            f"{where}: the {kind} {given!r} is a relative path, and this source has no folder; give media_root."
        )
    path = os.path.abspath(given if root is None else root / given)
    outside = root is not None and os.path.commonpath([root, path]) != str(root)
    # Data hold text; a `Path` comes from the program, such as a file unpacked from a data set.
    if outside and not isinstance(value, Path) and (confined or not os.path.isabs(given)):
        raise DataError(
            f"{where}: the {kind} {given!r} lies outside of {root}; move it there, or give another media_root."
        )
    if os.path.isdir(path):
        raise DataError(f"{where}: the {kind} {path} is a folder; name one file.")
    if not os.path.isfile(path):
        raise MediaError(f"{where}: there is no {kind} file at {path}; check the path or give media_root.", path)
    return path


__all__ = [
    "COLUMNS",
    "DataError",
    "MediaError",
    "Row",
    "Rows",
    "SkippableError",
    "TooLongError",
    "load_rows",
]
