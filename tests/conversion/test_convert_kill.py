"""`kill -9` at any moment of a conversion: the rerun gives the same bytes and reads nothing twice that was finished.

Every run is a process of its own, forked from one that has imported everything and computed nothing. A moment is a
number of calls that change the disk; the process kills itself there, before the call, after it, or, where the call
writes data, halfway.
"""

import builtins
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from conversion.convert import convert
from conversion.staging import JOURNAL, OUTPUT, Staging, partial_folder
from modeling_keye.checkpoint_keye import Checkpoint
from tests.conversion.folders import contents
from tests.conversion.published import write_published

KILLS = 20
# The calls at the end of a run: the last line of the journal, the rename, and tidying up.
LAST = 6
OPTIONS = {"max_shard_size": "400KB", "progress": False}


def run_and_die(source: str, dst: str, log: str, moment: int, halfway: bool) -> None:
    """Convert; die at the given call that changes the disk. `log` gets reads, finished tensors, and the call count."""
    import torch

    torch.set_num_threads(1)
    calls: list[str] = []
    real_write, real_open = os.write, builtins.open
    events = real_open(log, "a", buffering=1)

    def at_each_call(real: Callable, name: str) -> Callable:
        def call(*arguments, **options):
            if len(calls) == moment:
                if name == "write" and halfway:
                    real_write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif halfway:
                    real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return real(*arguments, **options)

        return call

    os.fsync = lambda descriptor: None  # slow, and of no effect on what a killed process leaves
    for name in ("write", "replace", "unlink", "rmdir", "mkdir", "ftruncate", "fsync"):
        setattr(os, name, at_each_call(getattr(os, name), name))
    shutil.copyfile = at_each_call(shutil.copyfile, "copyfile")
    opened = at_each_call(real_open, "open")
    builtins.open = lambda file, mode="r", *a, **o: (opened if "w" in mode else real_open)(file, mode, *a, **o)

    real_read, real_record, real_start = Checkpoint.read, Staging.record, Staging.open.__func__

    def read(self, name, start=None, stop=None):
        events.write(json.dumps({"read": [name, start, stop]}) + "\n")
        return real_read(self, name, start, stop)

    def record(self, entry, **options):
        real_record(self, entry, **options)
        events.write(json.dumps({"finished": entry.get("tensor")}) + "\n")

    def start(cls, *arguments):
        staging = real_start(cls, *arguments)
        events.write(json.dumps({"start": len(staging.entries)}) + "\n")
        return staging

    Checkpoint.read, Staging.record, Staging.open = read, record, classmethod(start)
    numbers = convert(source, dst, **OPTIONS)
    events.write(json.dumps({"calls": calls, "numbers": numbers}) + "\n")


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """fp8, so that there is a second kind of weight file; several shards on both sides."""
    folder = tmp_path_factory.mktemp("source") / "keye-671b"
    return write_published(folder, "keye_vl_671b", fp8=True, shards=3, num_hidden_layers=2)


@pytest.fixture
def run(processes, source, tmp_path) -> Callable[..., tuple[int, list[dict]]]:
    """Run a conversion to its end or to `moment`; exit code, and what happened in order."""

    def run(dst: Path, moment: int = -1, halfway: bool = False) -> tuple[int, list[dict]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = processes.Process(target=run_and_die, args=(str(source), str(dst), str(log), moment, halfway))
        process.start()
        process.join()
        return process.exitcode, [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def whole(processes, source, tmp_path_factory) -> tuple[dict[str, str], list[str]]:
    """The files of a conversion that nothing stopped, and the calls it made."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "log"
    process = processes.Process(target=run_and_die, args=(str(source), str(folder / "ours"), str(log), -1, False))
    process.start()
    process.join()
    assert process.exitcode == 0
    return contents(folder / "ours"), json.loads(log.read_text().splitlines()[-1])["calls"]


def finished_reads(events: list[dict]) -> set[tuple]:
    """What was read for tensors that were finished afterwards, once writing had begun."""
    finished, pending, begun = set(), [], False
    for event in events:
        if "start" in event:
            begun = True
        elif "read" in event and begun:
            pending.append(tuple(event["read"]))
        elif event.get("finished"):
            finished.update(pending)
            pending = []
    return finished


def all_reads(events: list[dict]) -> set[tuple]:
    return {tuple(event["read"]) for event in events if "read" in event}


def assert_looks_unfinished(dst: Path, expected: dict[str, str]) -> None:
    """What a killed run leaves: no DST, or the whole of it; config.json never beside half of the weights."""
    if dst.exists():
        assert contents(dst) == expected
    output = partial_folder(dst) / OUTPUT
    if (output / "config.json").exists():
        weights = {name for name in expected if name.endswith(".safetensors")}
        assert {name: contents(output)[name] for name in weights} == {name: expected[name] for name in weights}


def test_20_random_moments(run, whole, tmp_path):
    expected, calls = whole
    generator = random.Random(20)
    moments = generator.sample(range(len(calls)), KILLS)
    resumed = []
    for moment in moments:
        dst = tmp_path / f"ours-{moment}"
        code, before = run(dst, moment, generator.random() < 0.5)
        assert code == -signal.SIGKILL
        assert_looks_unfinished(dst, expected)
        code, after = run(dst)
        assert code == 0, moment
        assert contents(dst) == expected, moment
        assert not partial_folder(dst).exists(), moment
        assert finished_reads(before) & all_reads(after) == set(), moment
        resumed.append(after[-1]["numbers"]["resumed_tensors"])
        shutil.rmtree(dst)
    # The moments fall into the weights, not only before and after them.
    assert len(set(resumed)) > KILLS // 2


def test_each_moment_of_the_end(run, whole, tmp_path):
    """Opening index and configuration, the rename, tidying up: a folder that looks complete is complete."""
    expected, calls = whole
    opened = [(number, False) for number, name in enumerate(calls) if name == "open"]
    assert len(opened) > 4
    last = [(number, halfway) for number in range(len(calls) - LAST, len(calls)) for halfway in (False, True)]
    for moment, halfway in opened + last:
        dst = tmp_path / f"ours-{moment}-{halfway}"
        code, _ = run(dst, moment, halfway)
        assert code == -signal.SIGKILL
        assert_looks_unfinished(dst, expected)
        if not partial_folder(dst).exists() or not any(partial_folder(dst).iterdir()):
            # DST is whole and an empty folder was left at most: there is nothing to go on with.
            assert contents(dst) == expected and moment >= len(calls) - 2
            continue
        code, after = run(dst)
        assert code == 0 and contents(dst) == expected and not partial_folder(dst).exists(), (moment, halfway)
        assert all_reads(after) == set()
        assert after[-1]["numbers"]["resumed_tensors"] == after[-1]["numbers"]["tensors"]


def test_a_run_killed_again_and_again_comes_to_an_end(run, whole, tmp_path):
    """Each run gets a little further; nothing that any of them finished is read again."""
    expected, _ = whole
    dst, finished = tmp_path / "ours", set()
    generator = random.Random(7)
    for _ in range(6):
        code, events = run(dst, generator.randrange(20, 50), halfway=True)
        assert code == -signal.SIGKILL
        assert finished & all_reads(events) == set()
        assert finished_reads(events)
        finished |= finished_reads(events)
    code, events = run(dst)
    assert code == 0 and finished & all_reads(events) == set()
    assert contents(dst) == expected


def test_the_journal_says_what_was_finished(run, source, tmp_path):
    """Its lines are tensors and files in the order of the plan, behind the fingerprint."""
    run(tmp_path / "ours", 120, halfway=True)
    lines = (partial_folder(tmp_path / "ours") / JOURNAL).read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    assert "plan" in entries[0]["fingerprint"] and "source/config.json" in entries[0]["fingerprint"]
    assert {frozenset(entry) for entry in entries[1:]} == {frozenset({"tensor", "crc32"}), frozenset({"file", "bytes"})}
    first = next(entry for entry in entries if "file" in entry)
    assert first["file"].startswith("model-00001-of-")
    assert first["bytes"] == (partial_folder(tmp_path / "ours") / OUTPUT / first["file"]).stat().st_size
