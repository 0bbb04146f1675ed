"""Runs of a few steps on keye-tiny, over clips of a second or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from examples.make_demo_rows import write_rows

ROOT = Path(__file__).resolve().parents[2]
KEYE_TINY = ROOT / "checkpoints" / "keye-tiny"


def make_rows(folder: Path, clips: int = 3, questions: int = 2, frames: tuple[int, int] = (3, 5)) -> Path:
    """A metadata file whose answers are those of other questions: keye-tiny has something to learn from them."""
    file = write_rows(folder, "train", clips, questions, seed=3, frames=frames)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    for row, answer in zip(rows, answers[1:] + answers[:1]):
        row["answer"] = answer
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def values(rows: Path, output: Path, stage: str, trainer: dict | None = None, **changes) -> dict:
    """A recipe of two steps as plain values, for `make_recipe` or a YAML file."""
    return {
        "stage": stage,
        "model": str(KEYE_TINY),
        "output": str(output),
        "data": {"train": str(rows)},
        "trainer": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **(trainer or {}),
        },
        **changes,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logged(folder: Path, *names: str) -> list[tuple]:
    """Those of the log's entries that hold all `names`, as (step, value, ...)."""
    log = json.loads((folder / "training.json").read_text())["log"]
    return [(entry["step"], *(entry[name] for name in names)) for entry in log if all(name in entry for name in names)]


def python(*arguments: str, cwd: Path = ROOT, timeout: int = 600, **environment) -> subprocess.CompletedProcess:
    """A process of its own with `environment` added, and as many threads as here: sums are rounded in their order."""
    threads = str(torch.get_num_threads())
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
