"""Commands that cannot do what they are asked to say why and what to do, and end with exit code 2."""

import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

KEYE_TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "keye-tiny"

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """Runs a module as a command in `tmp_path`; the last line that it prints on stderr."""

    def refusal(module: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(module, run_name="__main__")
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refusal


@pytest.mark.parametrize(
    "module, missing",
    [
        ("examples.ask_a_video", "video, question"),
        ("examples.export_kernels", "folder"),
    ],
)
def test_commands_without_arguments(refusal, module, missing):
    assert refusal(module).endswith(f"the following arguments are required: {missing}")


def test_ask_a_video(refusal, tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert "there is no video file at nope.mp4" in refusal("examples.ask_a_video", "nope.mp4", "What?")
    assert "empty.mp4 is empty" in refusal("examples.ask_a_video", "empty.mp4", "What?")
    assert "there is no folder nope;" in refusal("examples.ask_a_video", "empty.mp4", "What?", "nope")


def test_finetuning_shows_its_usage(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune_lora"])
    with pytest.raises(SystemExit, match=r"python -m examples.finetune_lora ROWS OUTPUT \[MODEL\]"):
        runpy.run_module("examples.finetune_lora", run_name="__main__")


def test_finetuning_with_trl(refusal):
    pytest.importorskip("trl")
    assert "the following arguments are required" in refusal("examples.finetune_trl")
    assert "there is no file or folder at" in refusal("examples.finetune_trl", "nope.jsonl", "out", KEYE_TINY)
    assert "there is no folder nope;" in refusal("examples.finetune_trl", "nope.jsonl", "out", "nope")


@pytest.mark.parametrize("path", ["missing/clip.mp4", "clip.txt", "clip.webm", "clip"])
def test_clips_that_cannot_be_written(refusal, tmp_path, path):
    refused = refusal("examples.make_demo_clip", path)
    assert f"{path} cannot be written (" in refused and "a file ending in .mp4 in a folder" in refused
    assert list(tmp_path.iterdir()) == []


def test_a_clip_needs_a_name(refusal, tmp_path):
    (tmp_path / "clips.mp4").mkdir()
    assert "clips.mp4 is a folder; give the file" in refusal("examples.make_demo_clip", "clips.mp4")
    assert list(tmp_path.iterdir()) == [tmp_path / "clips.mp4"]


def test_demo_rows(refusal, tmp_path):
    assert "--clips is 0, which leaves no rows" in refusal("examples.make_demo_rows", "rows", "--clips", 0)
    assert "--questions is -1, which leaves no rows" in refusal("examples.make_demo_rows", "rows", "--questions", -1)
    (tmp_path / "file").touch()
    assert "file cannot be written to" in refusal("examples.make_demo_rows", "file")
    assert not (tmp_path / "rows").exists()


def test_exported_kernels_replace_nothing(refusal, tmp_path):
    (tmp_path / "kernel" / "build").mkdir(parents=True)
    refused = refusal("examples.export_kernels", "kernel")
    assert "kernel/build exists; choose another folder or delete it first" in refused
    (tmp_path / "file").touch()
    assert "nothing was exported to file: " in refusal("examples.export_kernels", "file")


def test_pictures(refusal, tmp_path):
    refused = refusal("training.learning_curves", "nope", "curves.svg")
    assert "nope holds none of the stages" in refused and "name the --output of train_keye_tiny" in refused
    (tmp_path / "scores.json").write_text("no JSON")
    assert "nope.json holds no scores" in refusal("training.score_plot", "nope.json", "scores.svg")
    assert "scores.json holds no scores" in refusal("training.score_plot", "scores.json", "scores.svg")


def test_training_and_shipping_keye_tiny(refusal, tmp_path):
    refused = refusal("training.train_keye_tiny", "--output", "run", "--start", "nope")
    assert "--start nope cannot be read (" in refused and "give the safetensors of a keye-tiny" in refused
    (tmp_path / "text").write_text("no weights")
    assert "--start text cannot be read (" in refusal("training.train_keye_tiny", "--output", "run", "--start", "text")
    assert "there is no file nope/run.json;" in refusal("training.ship_keye_tiny", "--run", "nope", "--output", "out")
    (tmp_path / "run.json").write_text("{}")
    save_file({}, tmp_path / "weights.safetensors")
    refused = refusal("training.ship_keye_tiny", "--run", ".", "--output", "out", "--long", "long.json")
    assert "there is no file long.json;" in refused
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
