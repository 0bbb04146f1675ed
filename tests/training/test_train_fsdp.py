"""Two processes that share the weights (FSDP2 over gloo) train as one process does on the same batches."""

import json

import pytest
import torch
import yaml

from tests.training.small_runs import ROOT, logged, make_rows, python, values, weights
from training import train
from training.recipe import make_recipe

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples" / "fsdp2.yaml")]

# Where this repository cannot be imported.
LOAD = """
import sys
from transformers import AutoModel
sys.path = [entry for entry in sys.path if entry]
for folder in sys.argv[1:]:
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert "modeling_keye" not in sys.modules
    print(type(model).__name__, sorted(info["missing_keys"] | info["unexpected_keys"]))
"""


def compare(folder, steps: int):
    """One process takes the two batches of a step in turn, two processes one each."""
    # Eight rows: batches that do not fill a step would be filled up by repeating rows, which one process need not do.
    rows = make_rows(folder, clips=4, questions=2, frames=(12, 12))
    trainer = {"max_steps": steps, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-4}
    indexer = {"topk": 4, "loss_coef": 0.5}
    recipes = {
        processes: values(rows, folder / str(processes), "sparse-adaptation", trainer, indexer=indexer)
        for processes in (1, 2)
    }
    recipes[1]["trainer"]["gradient_accumulation_steps"] = 2
    recipes[2]["trainer"] |= {"save_strategy": "steps", "save_steps": steps}
    assert train.run(make_recipe(recipes[1])) == 0
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipes[2]))
    # A port of its own, or two launches on one machine would meet.
    launched = python(*LAUNCH, "--main_process_port", "0", "-m", "training.train", str(config))
    assert launched.returncode == 0, launched.stderr[-3000:]

    one, two = folder / "1" / "final", folder / "2" / "final"
    assert json.loads((two / "training.json").read_text())["processes"] == 2
    names = ("loss", "indexer_loss", "indexer_recall")
    expected, actual = (torch.tensor(logged(final, *names), dtype=torch.float64) for final in (one, two))
    assert actual.shape == (steps, 1 + len(names)) and (expected[:, 1] > 0.5).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    saved = weights(two)
    assert saved.keys() == weights(one).keys()
    for name, tensor in weights(one).items():
        # Adam turns the rounding of a small gradient into a step of either sign.
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2 * steps * 1e-4, msg=name)
    return two.parent


def test_two_processes_are_one(tmp_path):
    output = compare(tmp_path, steps=3)
    folders = [output / "final", output / "checkpoint-3"]
    for folder in folders:
        assert not list(folder.glob("_*.py"))  # torch's own, in which FSDP2 makes the class of the model
    loaded = python("-c", LOAD, *map(str, folders), cwd=tmp_path, PYTHONPATH="", HF_HUB_OFFLINE="1")
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.splitlines() == ["KeyeForVideoQA []"] * 2


@pytest.mark.slow
def test_two_processes_are_one_for_twenty_steps(tmp_path):
    compare(tmp_path, steps=20)
