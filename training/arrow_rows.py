"""Rows out of the `datasets` library: Hub names, saved data sets, parquet files, data sets in memory."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .data_errors import DataError
from .row_sources import CheckColumns

try:
    import datasets
except ImportError:  # an optional package: files of JSON and CSV do without it
    datasets = None


class ArrowRecords:
    """A `datasets.Dataset`; media that it holds as bytes are written to `media_folder` when their row is read."""

    def __init__(self, dataset: Any, name: str, check_columns: CheckColumns, media_folder: Path | None = None):
        self.name = name
        self._dataset = _undecoded(dataset.with_format(None))
        self._media_folder = media_folder
        self.embedded = [name for name, feature in self._dataset.features.items() if _is_media(feature)]
        check_columns(self._dataset.column_names, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        record = self._dataset[index]
        for name in self.embedded:
            value = record[name]
            record[name] = [self._file(v) for v in value] if isinstance(value, list) else self._file(value)
        return record

    def label(self, index: int) -> int:
        return index + 1

    def _file(self, value: dict | None) -> str | Path | None:
        """The path of {"path", "bytes"} as `datasets` gives media that it did not decode; a `Path` if written here."""
        if value is None or value.get("bytes") is None:
            return None if value is None else value.get("path")
        folder = self._media_folder or Path(datasets.config.HF_DATASETS_CACHE) / "keye_media"
        name = hashlib.sha256(value["bytes"]).hexdigest() + Path(value.get("path") or "").suffix
        target = folder / name[:2] / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
                file.write(value["bytes"])
            os.replace(file.name, target)
        return target


def is_dataset(source: Any) -> bool:
    """Whether `source` is an object of the `datasets` library."""
    kinds = () if datasets is None else (datasets.Dataset, datasets.DatasetDict)
    streams = () if datasets is None else (datasets.IterableDataset, datasets.IterableDatasetDict)
    if isinstance(source, streams):
        raise DataError(
            f"a {type(source).__name__} has no rows to count or to go back to; load it without streaming=True."
        )
    return isinstance(source, kinds)


def pick_split(dataset: Any, split: str, name: str) -> Any:
    """The split of a `DatasetDict`; a `Dataset` as it is. Raises `DataError` naming the splits there are."""
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(map(repr, dataset))}.")
    return dataset[split]


def load_saved(folder: Path, split: str) -> Any:
    """A folder written by `save_to_disk`."""
    _require(folder)
    with _naming(folder):
        loaded = datasets.load_from_disk(str(folder))
    return pick_split(loaded, split, str(folder))


def load_parquet(path: Path) -> Any:
    _require(path)
    with _naming(path):
        return datasets.Dataset.from_parquet(str(path))


def load_named(source: str, split: str, **options) -> Any:
    """A data set by its name on the Hub or by its folder. Code of a data set's repository is never run.

    Raises `DataError` when it cannot be loaded.
    """
    _require(source)
    if "trust_remote_code" in options:
        raise DataError(f"{source}: trust_remote_code is not supported; code of data sets is never run, so remove it.")
    with _naming(source):
        loaded = datasets.load_dataset(source, **options)
    is_dataset(loaded)
    return pick_split(loaded, split, source)


@contextlib.contextmanager
def _naming(source: Any) -> Iterator[None]:
    """What the library finds wrong with a source, said by its name."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        # That one says what the library did, and its cause what was wrong.
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())
        raise DataError(f"the data set {str(source)!r} cannot be loaded: {reason}") from error


def _require(source: Any) -> None:
    if datasets is None:
        raise DataError(f"{source} needs the package `datasets`; install it with `pip install datasets`.")


def _undecoded(dataset: Any) -> Any:
    """The data set with videos and images as {"path", "bytes"}."""
    for name, feature in dataset.features.items():
        if _is_media(feature):
            inner = feature.feature if hasattr(feature, "feature") else feature
            plain = type(inner)(decode=False)
            dataset = dataset.cast_column(name, datasets.List(plain) if inner is not feature else plain)
    return dataset


def _is_media(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), (datasets.Image, datasets.Video))
