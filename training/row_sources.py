"""Where rows come from: files read again at each access, and data sets of the `datasets` library. Nothing is kept.

A source is a sequence of records (dictionaries) with `name` for messages and `label(i)`, the number a reader would give
record i. It calls `check_columns(columns, where)` once for a table, or for each record that has columns of its own.
"""

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .data_errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
# Cells of a table that hold a list are written as JSON.
LIST_COLUMNS = ("video", "image", "videos", "images", "messages", "conversations")

CheckColumns = Callable[[Sequence[str], str], None]


class ListRecords:
    """Records in memory."""

    def __init__(self, records: Sequence[dict], check_columns: CheckColumns):
        self.name = "the list of rows"
        self._records = records
        for index, record in enumerate(records):
            where = f"{self.name}, row {index + 1}"
            check_columns(_object(record, where), where)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return dict(self._records[index])

    def label(self, index: int) -> int:
        return index + 1


class FileRecords:
    """Records of a file, known by where they begin and end; each access reads one of them."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        # Three numbers per record, outside of Python's objects, so that forked workers share them.
        self._starts, self._ends, self._labels = array("Q"), array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def label(self, index: int) -> int:
        return self._labels[index]

    def _add(self, start: int, end: int, label: int) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._labels.append(label)

    def _read(self, index: int) -> str:
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            return file.read(self._ends[index] - self._starts[index]).decode()

    def _where(self, label: int) -> str:
        return f"{self.name}, row {label}"


class JsonRecords(FileRecords):
    """A file with one object a line (rows are numbered as lines), or with one list of objects."""

    def __init__(self, path: Path, check_columns: CheckColumns):
        super().__init__(path)
        with open(path, "rb") as file:
            start = _skip_bom(file)
            first = next((line.lstrip()[:1] for line in file if line.strip()), b"")
            file.seek(start)
            scan = self._scan_list if first == b"[" and path.suffix == ".json" else self._scan_lines
            for text, begin, end, label in scan(file, start):
                self._add(begin, end, label)
                where = self._where(label)
                check_columns(_object(_parse(text, where), where), where)

    def __getitem__(self, index: int) -> dict:
        return _parse(self._read(index), self._where(self.label(index)))

    def _scan_lines(self, file: BinaryIO, position: int) -> Iterator[tuple[str, int, int, int]]:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _decode(line, self._where(number)), position, position + len(line), number
            position += len(line)

    def _scan_list(self, file: BinaryIO, position: int) -> Iterator[tuple[str, int, int, int]]:
        """Objects of a list one after the other, so that no more than the text of the file is held."""
        text = _decode(file.read(), self.name)
        decoder = json.JSONDecoder()
        place = _after_space(text, 0) + 1
        done = number = 0
        while True:
            place = _after_space(text, place)
            if text[place : place + 1] == "]" and number == 0:
                return
            number += 1
            try:
                _, end = decoder.raw_decode(text, place)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _malformed(error, self._where(number)) from error
            begin = position + len(text[done:place].encode())
            position = begin + len(text[place:end].encode())
            done = end
            yield text[place:end], begin, position, number
            place = _after_space(text, end)
            if text[place : place + 1] == "]":
                return
            if text[place : place + 1] != ",":
                raise DataError(
                    f"{self._where(number)}: after this object the list needs ',' or ']', found "
                    f"{text[place : place + 20]!r}; mend the file."
                )
            place += 1


class CsvRecords(FileRecords):
    """A table with a header line; every cell is text, and a cell of a list column may hold a JSON list."""

    def __init__(self, path: Path, check_columns: CheckColumns):
        super().__init__(path)
        with open(path, "rb") as file:
            lines = _CountedLines(file, _skip_bom(file), self.name)
            reader = csv.reader(lines, strict=True)
            self.columns = next(self._records(reader, lines), (None, []))[1]
            check_columns(self.columns, self.name)
            for number, (begin, cells) in enumerate(self._records(reader, lines), start=1):
                if len(cells) != len(self.columns):
                    raise DataError(
                        f"{self._where(number)}: has {len(cells)} cells, but the header names {len(self.columns)} "
                        "columns; put text with commas in double quotes."
                    )
                self._add(begin, lines.position, number)

    def __getitem__(self, index: int) -> dict:
        cells = next(csv.reader(self._read(index).splitlines(keepends=True), strict=True))
        record = dict(zip(self.columns, cells, strict=True))
        where = self._where(self.label(index))
        for name in LIST_COLUMNS:
            if record.get(name, "").lstrip().startswith("["):
                record[name] = _parse(record[name], f"{where}, column {name!r}")
        # An empty cell is all that a table has for "nothing here".
        return {name: value or None for name, value in record.items()}

    def _records(self, reader: Iterator[list[str]], lines: "_CountedLines") -> Iterator[tuple[int, list[str]]]:
        while True:
            begin = lines.position
            try:
                cells = next(reader, None)
            except csv.Error as error:
                where = f"{self.name}, line {reader.line_num}"
                raise DataError(f"{where}: malformed CSV ({error}); mend the file.") from error
            if cells is None:
                return
            if cells:
                yield begin, cells


class _CountedLines:
    """Lines of a file as text, and how far the file was read."""

    def __init__(self, file: BinaryIO, position: int, name: str):
        self.position = position
        self._file = file
        self._name = name
        self._number = 0

    def __iter__(self) -> "_CountedLines":
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self._number += 1
        self.position += len(line)
        return _decode(line, f"{self._name}, line {self._number}")


def open_file(path: Path, check_columns: CheckColumns) -> Any:
    """The records of one metadata file. Raises `DataError` for a kind of file that is not understood."""
    if path.suffix == ".csv":
        return CsvRecords(path, check_columns)
    if path.suffix in (".json", ".jsonl"):
        return JsonRecords(path, check_columns)
    raise DataError(f"{path} is no table of rows; give a folder or a file that ends in {', '.join(SUFFIXES)}.")


def metadata_file(folder: Path, split: str) -> Path | None:
    """The file that lists a folder's rows: `{split}.*`, `metadata.*`, or the only table in it; None without any.

    Raises `DataError` when several could be meant.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    for stem in (split, "metadata"):
        named = [path for path in files if path.stem == stem]
        if named:
            files = named
            break
    if len(files) > 1:
        raise DataError(
            f"{folder} holds several tables ({', '.join(path.name for path in files)}); name the one to read, or call "
            f"it {split}{files[0].suffix}."
        )
    return files[0] if files else None


def _skip_bom(file: BinaryIO) -> int:
    if file.read(len(BOM)) == BOM:
        return len(BOM)
    file.seek(0)
    return 0


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text (byte {error.start}); save the file as UTF-8.") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _malformed(error, where) from error


def _malformed(error: Exception, where: str) -> DataError:
    return DataError(f"{where}: malformed JSON ({error}); mend it, one object per row.")


def _object(record: Any, where: str) -> dict:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object with named columns, got a {type(record).__name__}.")
    return record


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def looks_like_file(source: str) -> bool:
    """Whether a source that does not exist was meant as a path rather than as a name on the Hub."""
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or Path(source).suffix in SUFFIXES
