"""`kill -9` at any moment of a conversion: the rerun gives the same bytes and reads nothing twice that was finished.

Every run is a process of its own (`killed_runs.py`).
"""

import json
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conversion.staging import JOURNAL, OUTPUT, partial_folder
from tests.conversion.folders import contents
from tests.conversion.killed_runs import assert_looks_unfinished
from tests.conversion.published import write_published

KILLS = 20
# The calls at the end of a run: the last line of the journal, the rename, and tidying up.
LAST = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """fp8, so that there is a second kind of weight file; several shards on both sides."""
    folder = tmp_path_factory.mktemp("source") / "keye-671b"
    return write_published(folder, "keye_vl_671b", fp8=True, shards=3, num_hidden_layers=2)


@pytest.fixture(scope="module")
def run(convert_and_die, source) -> Callable[..., tuple[int, list[dict]]]:
    return partial(convert_and_die, source, max_shard_size="400KB")


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> tuple[dict[str, str], list[str]]:
    """The files of a conversion that nothing stopped, and the calls it made."""
    folder = tmp_path_factory.mktemp("whole") / "ours"
    code, events = run(folder)
    assert code == 0
    return contents(folder), events[-1]["calls"]


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
    opened = [number for number, name in enumerate(calls) if name == "open"]
    # A hundred files of remote code are copied in one way; the first and the last copy stand for all.
    copied = [number for number in opened if calls[number - 1] == "copyfile"]
    opened = [(number, False) for number in opened if number not in copied[1:-1]]
    assert len(copied) > 2 and len(opened) > 6
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
