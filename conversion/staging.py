"""DST.partial: where a checkpoint is made until it is whole. Its journal lets a killed run go on where it stopped.

    DST.partial/journal.jsonl    what is finished, one JSON object a line; locked while a run is at work
    DST.partial/output/          the files; renamed to DST when the last of them is written and checked

The first line of the journal is the fingerprint of sources and options. A line counts when its newline is there, so a
kill between any two instructions leaves a journal that says too little, never too much.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

JOURNAL = "journal.jsonl"
OUTPUT = "output"
# Files up to this size (configuration, tokenizer) are known by their content, larger ones by size, time and header.
HASHED_BYTES = 64 * 2**20
_DIFFERENCES_LISTED = 5


def partial_folder(dst: Path) -> Path:
    """The folder beside `dst` where it is made."""
    return dst.with_name(dst.name + ".partial")


class Staging:
    """The folder DST.partial, held by one run at a time; made by `Staging.open`, used as a context manager.

    output: where the files of DST are written until `finish`. entries: what the journal held when it was opened, in
    order.
    """

    def __init__(self, dst: Path, journal: int):
        self.dst = dst
        self.partial = partial_folder(dst)
        self.output = self.partial / OUTPUT
        self.entries: list[dict] = []
        self._journal = journal

    @classmethod
    def open(cls, dst: str | Path, fingerprint: dict[str, str]) -> "Staging":
        """Take DST.partial, made new or as an interrupted run left it.

        Args:
            dst: the folder to make; must be absent or empty.
            fingerprint: what the output depends on, such as files of the source and options, each in words.

        Raises `ValueError` when `dst` holds files, another run is at work, or the interrupted run had another
        fingerprint; the message names the difference.
        """
        dst = Path(os.path.abspath(dst))
        refuse_unmovable(dst)
        partial = partial_folder(dst)
        if not partial.exists():
            refuse_occupied(dst)
        _refuse_foreign(partial)
        partial.mkdir(parents=True, exist_ok=True)
        journal = os.open(partial / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(journal, partial)
            staging = cls(dst, journal)
            staging._start(fingerprint)
        except BaseException:
            os.close(journal)
            raise
        return staging

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *exception) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def record(self, entry: dict, *, durable: bool = False) -> None:
        """Append to the journal; `durable` survives a power cut as well as a kill."""
        write_all(self._journal, json.dumps(entry).encode() + b"\n")
        if durable:
            os.fsync(self._journal)

    @property
    def finished(self) -> bool:
        """Whether an earlier run renamed the output to DST and was stopped before it could tidy up."""
        return {"done": True} in self.entries and not self.output.exists()

    def finish(self) -> None:
        """Make the output DST, in one step, once everything has reached the disk."""
        if not self.finished:
            for folder, _, files in os.walk(self.output):
                for name in files:
                    _sync(Path(folder) / name)
                _sync(Path(folder))
            self.record({"done": True}, durable=True)
            os.replace(self.output, self.dst)
            _sync(self.dst.parent)
        os.unlink(self.partial / JOURNAL)
        os.rmdir(self.partial)

    def _start(self, fingerprint: dict[str, str]) -> None:
        lines = _whole_lines(self._journal)
        if lines:
            _refuse_other(lines[0].get("fingerprint", {}), fingerprint, self.dst)
            self.entries = lines[1:]
            if self.finished:
                return
        refuse_occupied(self.dst)
        if not lines:
            self.record({"fingerprint": fingerprint}, durable=True)
        self.output.mkdir(exist_ok=True)


def refuse_unmovable(dst: Path) -> None:
    """Raise `ValueError` for a `dst` that the finished folder cannot be renamed to."""
    if dst.is_symlink():
        raise ValueError(f"{dst} is a link, which the finished folder would replace; give the folder itself as DST.")
    if os.path.ismount(dst):
        raise ValueError(f"{dst} is the root of a file system, which cannot be renamed to; give a folder in it as DST.")


def refuse_other_run(dst: Path, fingerprint: dict[str, str]) -> None:
    """Raise `ValueError` when DST.partial is no run with this fingerprint; for a run that will not open it."""
    _refuse_foreign(partial_folder(dst))
    if has_begun(dst):
        with open(partial_folder(dst) / JOURNAL, "rb") as journal:
            _refuse_other((_entry(journal.readline()) or {}).get("fingerprint", {}), fingerprint, dst)


def refuse_occupied(dst: Path) -> None:
    """Raise `ValueError` unless `dst` is absent or an empty folder."""
    if os.path.lexists(dst) and not (dst.is_dir() and not any(dst.iterdir())):
        raise ValueError(f"{dst} exists and is not an empty folder; choose another DST or remove it.")


def has_begun(dst: str | Path) -> bool:
    """Whether a run has begun to make `dst`; its checks of the sources have passed then."""
    journal = partial_folder(Path(os.path.abspath(dst))) / JOURNAL
    return journal.is_file() and b"\n" in journal.read_bytes()


def fingerprint_files(files: Iterable[Path], label: str) -> dict[str, str]:
    """`label/name` -> size, time of change, and hash of the header (safetensors) or of the content (other files)."""
    fingerprint = {}
    for file in files:
        stat = file.stat()
        with open(file, "rb") as stream:
            if file.suffix == ".safetensors":
                length = stream.read(8)
                hashed = length + stream.read(min(int.from_bytes(length, "little"), HASHED_BYTES))
            else:
                hashed = stream.read(HASHED_BYTES)
        digest = hashlib.sha256(hashed).hexdigest()[:16]
        fingerprint[f"{label}/{file.name}"] = f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}, hash {digest}"
    return fingerprint


def check_space(dst: str | Path, needed: int) -> None:
    """Raise `OSError` when the disk of `dst` has not `needed` bytes left beside what an interrupted run wrote."""
    dst = Path(os.path.abspath(dst))
    written = sum(file.stat().st_size for file in (partial_folder(dst) / OUTPUT).rglob("*") if file.is_file())
    existing = next(parent for parent in dst.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free + written < needed:
        raise OSError(
            f"{dst} needs {needed:,} bytes, of which {written:,} are written, but its disk has {free:,} left. Free "
            f"{needed - written - free:,} bytes or choose another disk."
        )


def write_all(descriptor: int, data) -> None:
    """`os.write` until every byte is written."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _refuse_foreign(partial: Path) -> None:
    if partial.exists():
        foreign = sorted({path.name for path in partial.iterdir()} - {JOURNAL, OUTPUT}) if partial.is_dir() else ["it"]
        if foreign or ((partial / OUTPUT).exists() and not (partial / JOURNAL).exists()):
            raise ValueError(
                f"{partial} is in the way: it is no unfinished conversion ({', '.join(foreign) or 'no journal'}). Move "
                "it away or choose another DST."
            )


def _lock(journal: int, partial: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held it may have finished and removed the file in the meantime.
        if os.fstat(journal).st_nlink:
            return
    except BlockingIOError:
        pass
    raise ValueError(f"another run is at work in {partial}; wait until it has ended or choose another DST.")


def _entry(line: bytes) -> dict | None:
    """A line of the journal, None for what is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _whole_lines(journal: int) -> list[dict]:
    """The entries of the journal; what follows the last one that can be read is cut off."""
    data = os.pread(journal, os.fstat(journal).st_size, 0)
    entries, end = [], 0
    while (newline := data.find(b"\n", end)) >= 0:
        if (entry := _entry(data[end:newline])) is None:
            break
        entries.append(entry)
        end = newline + 1
    os.ftruncate(journal, end)
    return entries


def _refuse_other(before: dict[str, str], now: dict[str, str], dst: Path) -> None:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        listed = [f"{name}: was {before.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names]
        more = len(listed) - _DIFFERENCES_LISTED
        raise ValueError(
            f"{partial_folder(dst)} was begun with something else:\n  "
            + "\n  ".join(listed[:_DIFFERENCES_LISTED] + [f"and {more} more"] * (more > 0))
            + f"\nDelete {partial_folder(dst)} to begin anew, or choose another DST."
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
