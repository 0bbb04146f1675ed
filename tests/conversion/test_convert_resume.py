"""Conversions that are stopped by errors: what is said, and what the next run accepts and does with the remains."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from conversion import shard_writer, staging
from conversion.convert import convert, main
from conversion.staging import Staging, partial_folder
from tests.conversion.folders import contents, copied, refusal


def failing_writes(monkeypatch, after: int, error: BaseException) -> None:
    """Writing raises `error` once `after` pieces of data are written."""
    left = [after]
    real = staging.write_all

    def write_all(descriptor: int, data) -> None:
        left[0] -= 1
        if left[0] < 0:
            real(descriptor, memoryview(data)[: len(data) // 2])
            raise error
        real(descriptor, data)

    for module in (staging, shard_writer):
        monkeypatch.setattr(module, "write_all", write_all)


@pytest.mark.parametrize("after", [1, 40])
def test_a_full_disk_is_told_and_the_same_command_goes_on(after, source, ours, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        failing_writes(patch, after, OSError(errno.ENOSPC, "No space left on device"))
        message = refusal(capsys, source, tmp_path / "x", "--max-shard-size=300KB")
    assert "No space left on device" in message and "goes on where this one stopped" in message
    assert not (tmp_path / "x").exists()
    numbers = convert(source, tmp_path / "x", max_shard_size="300KB")
    assert numbers["resumed_tensors"] == max(0, (after - 2) // 2)
    assert contents(tmp_path / "x") == contents(ours) and not partial_folder(tmp_path / "x").exists()


def test_ctrl_c_is_told_and_the_same_command_goes_on(source, ours, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        failing_writes(patch, 50, KeyboardInterrupt())
        assert main([str(source), str(tmp_path / "x"), "--max-shard-size=300KB"]) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err
    assert convert(source, tmp_path / "x", max_shard_size="300KB")["resumed_tensors"] > 0
    assert contents(tmp_path / "x") == contents(ours)


@pytest.fixture
def stopped(source, tmp_path, monkeypatch) -> Path:
    """The DST of a run over a copy of the source, stopped halfway."""
    copied(source, tmp_path / "source")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        failing_writes(patch, 130, KeyboardInterrupt())
        convert(tmp_path / "source", tmp_path / "x", max_shard_size="300KB")
    return tmp_path / "x"


def test_other_options_or_sources_do_not_continue_a_run(stopped, tmp_path, capsys):
    source = tmp_path / "source"
    before = contents(partial_folder(stopped))
    for options, wanted in (
        (["--max-shard-size=200KB"], "--max-shard-size: was 300000, is 200000"),
        (["--max-shard-size=300KB", "--dtype=float32"], "--dtype: was None, is float32"),
    ):
        for dry_run in ([], ["--dry-run"]):
            message = refusal(capsys, source, stopped, *options, *dry_run)
        assert wanted in message and f"Delete {partial_folder(stopped)}" in message
    shard = source / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    message = refusal(capsys, source, stopped, "--max-shard-size=300KB")
    assert "source/model-00002-of-00002.safetensors: was" in message and "source/config.json" not in message
    assert contents(partial_folder(stopped)) == before
    shutil.rmtree(partial_folder(stopped))
    convert(source, stopped, max_shard_size="200KB")


def test_what_an_older_run_left_besides_weights_is_not_kept(stopped, ours, tmp_path):
    output = partial_folder(stopped) / "output"
    (output / "old_keye.py").write_text("x = 1")
    (output / "templates").mkdir()
    (output / "templates" / "old.jinja").write_text("x")
    convert(tmp_path / "source", stopped, max_shard_size="300KB")
    assert contents(stopped).keys() == contents(ours).keys()


def test_a_second_run_on_the_same_folder_is_refused(stopped, tmp_path, capsys):
    journal = (partial_folder(stopped) / "journal.jsonl").read_text().splitlines()
    with Staging.open(stopped, json.loads(journal[0])["fingerprint"]):
        message = refusal(capsys, tmp_path / "source", stopped, "--max-shard-size=300KB")
        assert "another run is at work" in message
    convert(tmp_path / "source", stopped, max_shard_size="300KB")


def test_what_a_power_cut_lost_is_written_again(stopped, ours, tmp_path):
    """The journal may have reached the disk when the data had not: checksums tell."""
    shards = sorted((partial_folder(stopped) / "output").glob("*.safetensors"))
    data = bytearray(shards[-1].read_bytes())
    data[-100:] = bytes(100)
    shards[-1].write_bytes(data[:-7])
    convert(tmp_path / "source", stopped, max_shard_size="300KB")
    names = [name for name in contents(ours) if name.startswith("model")]
    assert {name: contents(stopped)[name] for name in names} == {name: contents(ours)[name] for name in names}


def test_a_line_of_the_journal_that_is_no_entry_ends_it(stopped, ours, tmp_path):
    journal = partial_folder(stopped) / "journal.jsonl"
    first = journal.read_text().splitlines(keepends=True)[0]
    journal.write_text(first + "[]\n")
    convert(tmp_path / "source", stopped, max_shard_size="300KB")
    assert contents(stopped).keys() == contents(ours).keys()


def test_a_finished_file_that_was_changed_is_not_trusted(stopped, tmp_path, capsys):
    shard = min((partial_folder(stopped) / "output").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    message = refusal(capsys, tmp_path / "source", stopped, "--max-shard-size=300KB")
    assert shard.name in message and "has been changed or removed" in message
