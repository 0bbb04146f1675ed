"""The `keye` command: what it prints, and one clear sentence with exit code 2 for each kind of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_keye import cli_keye
from modeling_keye.cli_keye import main
from tests.conversion.published import VISION_LAYOUTS, write_published

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is shown at 1.0 seconds?"


@pytest.fixture
def refused(capsys):
    """Run the command, expect a refusal, and return its sentence."""

    def run(*argv: object) -> str:
        assert main([str(argument) for argument in argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"keye: [^\n]+\.\n", err), err
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def ask(capsys):
    """Run `keye ask`, expect success, and return what went to stdout and stderr."""

    def run(*argv: object) -> tuple[str, str]:
        code = main(["ask", *(str(argument) for argument in argv)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def copy_of(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


# ---- answers ----


def test_answer_then_times(ask, clip, tiny_checkpoint):
    out, err = ask(clip, QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 3)
    _, times = out.splitlines()
    assert times == "frames at (seconds): 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5"
    assert err == ""


def test_json(ask, clip, tiny_checkpoint):
    out, _ = ask(clip, QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 3, "--json")
    answer = json.loads(out)
    assert answer["question"] == QUESTION and answer["video"] == str(clip)
    assert answer["frames"] == [{"index": index, "time": index / 2} for index in range(8)]
    assert 1 <= answer["new_tokens"] <= 3 and answer["prompt_tokens"] > 8 * 4
    assert answer["device"] == "cpu" and answer["dtype"] == "float32"
    assert set(answer["seconds"]) == {"reading frames", "loading the model", "answering"}


@pytest.mark.parametrize(
    ("option", "times"), [(("--num-frames", 3), [0.0, 2.0, 3.5]), (("--fps", 1), [0.0, 1.0, 2.5, 3.5])]
)
def test_sampling(ask, clip, tiny_checkpoint, option, times):
    out, _ = ask(clip, QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 1, "--json", *option)
    assert [frame["time"] for frame in json.loads(out)["frames"]] == times


def test_the_same_answer_twice(ask, clip, tiny_checkpoint):
    runs = [ask(clip, QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 8)[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_dtype(ask, clip, tiny_checkpoint):
    options = ("--model", tiny_checkpoint, "--max-new-tokens", 1, "--json", "--dtype")
    assert json.loads(ask(clip, QUESTION, *options, "bfloat16")[0])["dtype"] == "bfloat16"


def test_answer_stays_within_the_context_unless_told(ask, clip, copy_of):
    out, _ = ask(clip, QUESTION, "--model", copy_of, "--max-new-tokens", 1, "--json")
    prompt = json.loads(out)["prompt_tokens"]
    set_text_config(copy_of, max_position_embeddings=prompt + 2)
    assert json.loads(ask(clip, QUESTION, "--model", copy_of, "--json")[0])["new_tokens"] <= 2


def test_model_from_environment(ask, clip, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    out, _ = ask(clip, QUESTION, "--max-new-tokens", 1, "--json")
    assert json.loads(out)["model"] == str(tiny_checkpoint)


def test_progress_goes_to_stderr(ask, clip, tiny_checkpoint):
    out, err = ask(clip, QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 2, "--progress")
    assert len(out.splitlines()) == 2
    assert all(stage in err for stage in ("reading frames", "loading the model", "answering"))


def test_as_a_command(clip, tiny_checkpoint):
    command = [sys.executable, "-m", "modeling_keye", "ask", clip, QUESTION, "--model", tiny_checkpoint]
    done = subprocess.run([*command, "--max-new-tokens", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frames at (seconds): 0.0, 0.5" in done.stdout and done.stderr == ""


def test_a_terminal_that_shows_ascii_only(clip, tiny_checkpoint, tmp_path):
    named = shutil.copy(clip, tmp_path / "vidéo.mp4")
    command = [sys.executable, "-m", "modeling_keye", "ask", named, QUESTION, "--model", tiny_checkpoint, "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "1"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii"))["video"] == str(named)


def test_a_question_that_is_no_text_is_refused(refused, clip):
    assert "not UTF-8 text" in refused("ask", clip, "what \udcff")


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("python", f"torch {torch.__version__}", "transformers", "attention on cpu", "default model"):
        assert word in re.sub(r" +", " ", out)


# ---- the video ----


def test_missing_file(refused, tmp_path):
    assert "there is no video file at" in refused("ask", tmp_path / "absent.mp4", QUESTION)


def test_file_uri(ask, refused, clip, tmp_path, tiny_checkpoint):
    copy = shutil.copy(clip, tmp_path / "my clip.mp4")
    ask(copy.as_uri(), QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 1)
    assert "there is no video file at" in refused("ask", (tmp_path / "no clip.mp4").as_uri(), QUESTION)


def test_address_in_capitals(refused, tiny_checkpoint):
    address = "HTTP://127.0.0.1:port/clip.mp4"
    assert "cannot download the video" in refused("ask", address, QUESTION, "--model", tiny_checkpoint)


def test_folder_instead_of_file(refused, tmp_path):
    assert "is not a file" in refused("ask", tmp_path, QUESTION)


@pytest.mark.parametrize("content", [b"", b"These are words, not pictures.\n" * 99, bytes(range(256)) * 99])
def test_not_a_video(refused, tmp_path, tiny_checkpoint, content):
    path = tmp_path / "notes.mp4"
    path.write_bytes(content)
    assert re.search(r"not a video", refused("ask", path, QUESTION, "--model", tiny_checkpoint))


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_truncated_file(refused, tmp_path, clip, tiny_checkpoint, share):
    path = tmp_path / "cut.mp4"
    content = clip.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    sentence = refused("ask", path, QUESTION, "--model", tiny_checkpoint)
    assert re.search(r"truncated.* \d+ (of \d+ )?frames \(\d+\.\d s.*\) could be read", sentence)


def test_no_video_stream(refused, sound_only, tiny_checkpoint):
    assert "no video stream" in refused("ask", sound_only, QUESTION, "--model", tiny_checkpoint)


def test_zero_frames(refused, no_frames, tiny_checkpoint):
    sentence = refused("ask", no_frames, QUESTION, "--model", tiny_checkpoint)
    assert re.search(r"without a single frame|before its first frame", sentence)


# ---- the question and the options ----


@pytest.mark.parametrize("question", ["", "   \n"])
def test_empty_question(refused, clip, question):
    assert "the question is empty" in refused("ask", clip, question)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|im_end|>", "<｜end▁of▁sentence｜>"])
def test_control_token_in_question(refused, clip, token):
    assert token in refused("ask", clip, f"What is {token} here?")


def test_prompt_longer_than_the_context(refused, clip, copy_of):
    set_text_config(copy_of, max_position_embeddings=40)
    sentence = refused("ask", clip, QUESTION, "--model", copy_of)
    assert re.search(r"the prompt has \d{2,} tokens \(8 frames\)", sentence)
    assert "context of this model is 40 tokens" in sentence and "lower --num-frames or --fps" in sentence


def test_answer_longer_than_the_context(refused, clip, tiny_checkpoint):
    sentence = refused("ask", clip, QUESTION, "--model", tiny_checkpoint, "--max-new-tokens", 100000)
    assert "100000 more" in sentence and "--max-new-tokens" in sentence


@pytest.mark.parametrize("dtype", ["float64", "int8", "half precision"])
def test_wrong_dtype(refused, clip, dtype):
    sentence = refused("ask", clip, QUESTION, "--dtype", dtype)
    assert dtype in sentence and "float32" in sentence


@pytest.mark.parametrize("device", ["toaster", "cuda:x", "meta"])
def test_wrong_device(refused, clip, tiny_checkpoint, device):
    assert f"--device {device}" in refused("ask", clip, QUESTION, "--model", tiny_checkpoint, "--device", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_absent(refused, clip, tiny_checkpoint):
    sentence = refused("ask", clip, QUESTION, "--model", tiny_checkpoint, "--device", "cuda")
    assert "needs a CUDA device" in sentence and "--device cpu" in sentence


@pytest.mark.parametrize("option", ["--fps", "--num-frames", "--max-new-tokens"])
@pytest.mark.parametrize("value", ["0", "-2", "nan", "inf", "many"])
def test_numbers_that_make_no_sense(refused, clip, option, value):
    assert value in refused("ask", clip, QUESTION, f"{option}={value}")


def test_fps_and_num_frames_together(refused, clip):
    assert "not allowed with" in refused("ask", clip, QUESTION, "--fps", 1, "--num-frames", 2)


def test_more_frames_than_the_budget_allows(refused, clip, tiny_checkpoint):
    sentence = refused("ask", clip, QUESTION, "--model", tiny_checkpoint, "--num-frames", 10**6)
    assert "1000000" in sentence


@pytest.mark.parametrize("argv", [[], ["ask"], ["ask", "clip.mp4"], ["answer"]])
def test_wrong_arguments(refused, argv):
    assert "--help" in refused(*argv)


def test_wrong_option_points_to_its_command(refused, clip):
    for argv in (("ask", clip, QUESTION, "--nope"), ("ask", clip, QUESTION, "--fps", 0), ("ask", clip)):
        assert "see `keye ask --help`" in refused(*argv)
    assert "unrecognized arguments: --nope; see `keye info --help`" in refused("info", "--nope")


# ---- the checkpoint ----


def test_missing_checkpoint(refused, clip, tmp_path):
    assert "there is no checkpoint folder" in refused("ask", clip, QUESTION, "--model", tmp_path / "absent")


def test_missing_default_checkpoint(refused, clip, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_keye, "DEFAULT_MODEL", tmp_path / "keye-tiny")
    assert "KEYE_MODEL" in refused("ask", clip, QUESTION)


def test_repository_that_cannot_be_reached(refused, clip):
    assert "neither a folder nor a Hub repository" in refused("ask", clip, QUESTION, "--model", "nobody/nothing")


def test_checkpoint_is_a_file(refused, clip, tiny_checkpoint):
    weights = tiny_checkpoint / "model.safetensors"
    assert "is not a folder" in refused("ask", clip, QUESTION, "--model", weights)


def test_no_configuration(refused, clip, copy_of):
    (copy_of / "config.json").unlink()
    assert "has no config.json" in refused("ask", clip, QUESTION, "--model", copy_of)


@pytest.mark.parametrize("content", ["{", "", "[1, 2]"])
def test_broken_configuration(refused, clip, copy_of, content):
    (copy_of / "config.json").write_text(content)
    assert "config.json" in refused("ask", clip, QUESTION, "--model", copy_of)


def test_contradictory_configuration(refused, clip, copy_of):
    set_text_config(copy_of, attention_type="sliding")
    assert "`attention_type` is 'sliding'" in refused("ask", clip, QUESTION, "--model", copy_of)


def test_checkpoint_of_another_model(refused, clip, copy_of):
    (copy_of / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    sentence = refused("ask", clip, QUESTION, "--model", copy_of)
    assert str(copy_of) in sentence and "model_type 'bert', which is no checkpoint that Keye can load" in sentence


def test_checkpoint_of_a_part(refused, clip, copy_of):
    (copy_of / "config.json").write_text(json.dumps({"model_type": "keye_text"}))
    assert "of type 'keye_text', a part of Keye" in refused("ask", clip, QUESTION, "--model", copy_of)


@pytest.mark.parametrize("layout", VISION_LAYOUTS)
def test_published_checkpoint(ask, clip, tmp_path, layout):
    out, _ = ask(clip, QUESTION, "--model", write_published(tmp_path / layout, layout), "--max-new-tokens", 2, "--json")
    answer = json.loads(out)
    assert answer["new_tokens"] >= 1 and [frame["time"] for frame in answer["frames"]] == [n / 2 for n in range(8)]


def test_text_checkpoint(refused, clip, tmp_path, copy_of):
    folder = write_published(tmp_path / "published", "deepseek_v3")
    sentence = refused("ask", clip, QUESTION, "--model", folder)
    assert "is a text checkpoint (deepseek_v3)" in sentence and "`python -m conversion.compose`" in sentence
    (copy_of / "processor_config.json").unlink()  # as in a converted one
    sentence = refused("ask", clip, QUESTION, "--model", copy_of)
    assert "holds a model but no processor_config.json" in sentence and "`python -m conversion.compose`" in sentence


def test_no_weights(refused, clip, copy_of):
    (copy_of / "model.safetensors").unlink()
    assert "holds no weights" in refused("ask", clip, QUESTION, "--model", copy_of)


def test_only_pickled_weights(refused, clip, copy_of):
    (copy_of / "model.safetensors").rename(copy_of / "pytorch_model.bin")
    sentence = refused("ask", clip, QUESTION, "--model", copy_of)
    assert "pickle" in sentence and "safetensors" in sentence


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_damaged_weights(refused, clip, copy_of, keep):
    path = copy_of / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "are damaged" in refused("ask", clip, QUESTION, "--model", copy_of)


def test_absent_shard(refused, clip, copy_of):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copy_of / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002-of-00002.safetensors" in refused("ask", clip, QUESTION, "--model", copy_of)


def test_absent_weight(refused, clip, copy_of):
    path = copy_of / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    sentence = refused("ask", clip, QUESTION, "--model", copy_of)
    assert "lacks 1 weights" in sentence and "lm_head.weight" in sentence


def test_weight_of_another_shape(refused, clip, copy_of):
    path = copy_of / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    assert "cannot be loaded" in refused("ask", clip, QUESTION, "--model", copy_of)


def test_no_processor(refused, clip, copy_of):
    for path in copy_of.glob("*"):
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    assert "the processor in" in refused("ask", clip, QUESTION, "--model", copy_of)


# ---- the command itself ----


def test_interrupted(monkeypatch, capsys, clip, tiny_checkpoint):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_keye, "_answer", interrupt)
    assert main(["ask", str(clip), QUESTION, "--model", str(tiny_checkpoint)]) == 130
    assert capsys.readouterr().err == "keye: interrupted.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c(clip, tiny_checkpoint):
    command = [sys.executable, "-m", "modeling_keye", "ask", clip, QUESTION, "--model", tiny_checkpoint, "--progress"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stderr.read(1)  # the progress line has begun, so the command's own code runs
    assert first
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # The tiny model may be done before the signal arrives.
    assert process.returncode in (0, 130)
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_nobody_reads_the_output():
    """As behind `| true`: the command ends as other tools do, without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "modeling_keye", "info"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk():
    command = [sys.executable, "-m", "modeling_keye", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "keye: the output cannot be written: No space left on device.\n")


def test_no_standard_output(refused, monkeypatch):
    """As behind `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert "standard output is closed" in refused("info")


def set_text_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"].update(changes)
    path.write_text(json.dumps(config))
