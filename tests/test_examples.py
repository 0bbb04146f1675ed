"""The examples and README's ten lines run as they are written, on the embedded checkpoint."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is shown at 3.0 seconds?"
ANSWER = "green star"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "clip.mp4"
    subprocess.run([sys.executable, "-m", "examples.make_demo_clip", str(path)], cwd=ROOT, check=True, timeout=120)
    return path


def test_the_ten_lines_of_the_readme(clip, tmp_path):
    first, again = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    shutil.copytree(ROOT / "checkpoints" / "keye-tiny", tmp_path / "checkpoints" / "keye-tiny")
    shutil.copy(clip, tmp_path / "clip.mp4")
    run = subprocess.run(
        [sys.executable, "-c", first + again], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.strip().splitlines()[-4:] == [ANSWER, ANSWER, "yellow triangle", "white cross"]


def test_ask_a_video(clip):
    command = [sys.executable, str(ROOT / "examples" / "ask_a_video.py"), str(clip), QUESTION]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.strip().splitlines()[-1] == ANSWER


def test_the_command_of_the_demo(clip):
    command = [sys.executable, "-m", "modeling_keye", "ask", str(clip), QUESTION]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.splitlines()[0] == ANSWER
