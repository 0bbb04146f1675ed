"""The examples train, and what they write loads."""

import json
import runpy
import sys

import pytest
import torch

from examples.ask_a_video import ask
from examples.finetune_lora import finetune
from modeling_keye import KeyeConfig
from tests.training.small_runs import KEYE_TINY, ROOT, make_rows, weights

FEW = {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"), clips=2, questions=1)


def test_lora_on_ones_own_videos(rows, tmp_path):
    merged = finetune(str(rows), str(tmp_path), str(KEYE_TINY), **FEW)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    before = weights(KEYE_TINY)
    moved = {name for name, tensor in weights(merged).items() if not torch.equal(tensor, before[name])}
    assert moved and not any(".indexer." in name for name in moved)
    video = rows.parent / json.loads(rows.read_text().splitlines()[0])["video"]
    assert isinstance(ask(str(video), "What is shown at 1.0 seconds?", str(merged)), str)
    assert len((ROOT / "examples" / "finetune_lora.py").read_text().splitlines()) <= 40


def test_trl_with_the_indexer_learning_along(rows, tmp_path):
    pytest.importorskip("trl")
    from examples.finetune_trl import finetune as finetune_with_trl

    trainer = finetune_with_trl(str(rows), str(tmp_path), str(KEYE_TINY), **FEW)
    # TRL's default, bf16, is refused without a GPU unless `use_cpu` is set as it is here.
    assert not trainer.args.bf16
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2 and all(entry["indexer_loss"] > 0 for entry in entries)
    before, after = weights(KEYE_TINY), weights(tmp_path / "final")
    indexer = [name for name in before if ".indexer." in name]
    assert indexer and not any(torch.equal(after[name], before[name]) for name in indexer)
    text = KeyeConfig.from_pretrained(tmp_path / "final").text_config
    assert (text.indexer_loss_coef, text.indexer_stage) == (0.0, "adaptation")


def test_without_trl_the_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="pip install trl"):
        runpy.run_path(str(ROOT / "examples" / "finetune_trl.py"))
