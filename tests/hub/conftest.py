"""Checkpoint folders as the Hub would hold them, and processes that know nothing but them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_keye
from tests.model.checkpoints import encode, save_checkpoint, small_model, small_processor
from tests.processing.conftest import write_clip

PACKAGE = Path(modeling_keye.__file__).parent
OURS = ("modeling_keye", "conversion", "training", "tests")


def code_files(*entries: str) -> set[str]:
    """Names of the files that the given entry files need, themselves included."""
    files = set()
    for entry in entries:
        files |= {f"{entry}.py", *(Path(name).name for name in get_relative_import_files(PACKAGE / f"{entry}.py"))}
    return files


ALL_CODE = code_files("modeling_keye", "processing_keye")
DATA_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", count=20, size=(56, 56))


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory) -> Path:
    """Saved by the package's classes, nothing added."""
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "keye-saved")


@pytest.fixture(scope="session")
def bare_folder(saved_folder, tmp_path_factory) -> Path:
    """Data files, and the code copied by hand from the source tree."""
    folder = tmp_path_factory.mktemp("bare") / "keye-1.5-bare"
    folder.mkdir()
    for name in DATA_FILES:
        shutil.copy(saved_folder / name, folder)
    for name in ALL_CODE:
        shutil.copy(PACKAGE / name, folder)
    return folder


def answer_of_the_package(clip: Path) -> list[int]:
    """What the package's own model answers, without any folder."""
    inputs = encode(small_processor(), clip)
    output = small_model().generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="session")
def expected_tokens(clip) -> list[int]:
    return answer_of_the_package(clip)


@pytest.fixture(scope="session")
def probe(tmp_path_factory) -> Callable[..., list]:
    """Run steps of `remote_probe.py` in a clean process: another folder, empty caches, none of our packages."""

    def run(*steps: tuple[str, dict], absent: tuple[str, ...] = OURS) -> list:
        home = tmp_path_factory.mktemp("home")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
        script = shutil.copy(Path(__file__).with_name("remote_probe.py"), home)
        request = json.dumps({"steps": steps, "absent": absent}, default=str)
        done = subprocess.run(
            [sys.executable, script, request], cwd=home, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
