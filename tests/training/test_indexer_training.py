"""`Trainer`, TRL and a plain loop train the indexer alike; its loss is logged; several processes agree."""

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_keye import KeyeForVideoQA
from tests.model.checkpoints import small_model
from tests.training.conftest import collate
from training.indexer_training import IndexerTrainer, IndexerTrainerMixin, freeze_all_but_indexer

pytestmark = pytest.mark.compat

KINDS = ("mla", "gqa")
STAGES = ("warmup", "adaptation")
# A step of plain gradient descent writes the gradient into the weights, where every trainer can be read.
RATE = 1.0


def learner(kind: str, stage: str = "adaptation", coefficient: float = 0.5) -> KeyeForVideoQA:
    return small_model(kind, indexer_loss_coef=coefficient, indexer_stage=stage)


def options(output: Path, **changes) -> dict:
    return {
        "output_dir": str(output),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def make_trainer(trainer_class, model, processor, records, output: Path, *, arguments=None, extra=None, **changes):
    return trainer_class(
        model=model,
        args=(arguments or TrainingArguments)(**options(output, **changes)),
        train_dataset=records,
        data_collator=functools.partial(collate, processor),
        processing_class=processor,
        **(extra or {}),
    )


def steps_of_indexer(model, before: dict) -> dict[str, torch.Tensor]:
    """The gradients that one step of plain descent was made with."""
    return {name: (before[name] - tensor) / RATE for name, tensor in model.state_dict().items() if ".indexer." in name}


def plain_gradients(model, batch) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    model(**batch, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if ".indexer." in name}


def check_same(actual: dict, expected: dict, factor: float = 1.0):
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        # What is read off the weights carries their rounding.
        torch.testing.assert_close(actual[name], factor * gradient, rtol=1e-3, atol=2e-6, msg=name)


@pytest.fixture
def same_length(processor, records):
    """Records of one length, with answers of one length: every batch of two weighs half of a batch of four."""
    questions = ("which colour", "what object?", "is it there?", "who was that")
    same = [{**records[0], "question": question, "answer": "red"} for question in questions]
    assert collate(processor, same)["attention_mask"].all()
    return same


def smoothed(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, made of the logits."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return loss / (num_items_in_batch or (labels != -100).sum())


LOSSES = {
    "model": (Trainer, {}, {}),
    "model, mixin": (IndexerTrainer, {}, {}),
    "own, mixin": (IndexerTrainer, {}, {"compute_loss_func": smoothed}),
    "label smoothing, mixin": (IndexerTrainer, {"label_smoothing_factor": 0.1}, {}),
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_trainer_and_a_plain_loop_give_the_same_gradient(loss, steps, processor, same_length, tmp_path):
    """Whoever computes the loss, in one batch or in two that are accumulated."""
    trainer_class, changes, extra = LOSSES[loss]
    model = learner("mla")
    before = copy.deepcopy(model.state_dict())
    expected = plain_gradients(model, collate(processor, same_length))
    changes = {**changes, "per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    trainer = make_trainer(trainer_class, model, processor, same_length, tmp_path, extra=extra, **changes)
    trainer.train()
    check_same(steps_of_indexer(model, before), expected)


def test_label_smoothing_is_of_the_next_token(processor, records, tmp_path):
    """With next to no smoothing the loss is the model's own, where labels are shifted."""
    model = learner("gqa", coefficient=0.0)
    batch = collate(processor, records)
    trainer = make_trainer(IndexerTrainer, model, processor, records, tmp_path, label_smoothing_factor=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_logs_the_loss(kind, stage, processor, records, tmp_path):
    model = learner(kind, stage)
    with torch.enable_grad():
        outputs = copy.deepcopy(model).train()(**collate(processor, records), use_cache=False)
    trainer = make_trainer(IndexerTrainer, model, processor, records, tmp_path, max_steps=2, learning_rate=1e-3)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "indexer_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2] and all("loss" in entry for entry in logged)
    # The loss is that of the output with the batch in the sampler's order.
    assert logged[0]["indexer_loss"] == pytest.approx(outputs.indexer_loss.item(), rel=1e-4)
    assert logged[0]["indexer_recall"] == pytest.approx(outputs.indexer_recall.item(), rel=1e-4)
    assert logged[1]["indexer_loss"] != logged[0]["indexer_loss"]


def test_nothing_is_logged_without_the_objective(processor, records, tmp_path):
    trainer = make_trainer(IndexerTrainer, learner("gqa", coefficient=0.0), processor, records, tmp_path)
    trainer.train()
    assert "loss" in trainer.state.log_history[0]
    assert not any("indexer_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_and_resume(kind, processor, records, tmp_path):
    """The warm-up moves the indexer alone, saves, and goes on where it stopped."""
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2}
    models = []
    for resume in (False, True):
        model = learner(kind, "warmup", 1.0)
        before = copy.deepcopy(model.state_dict())
        freeze_all_but_indexer(model)
        saving = {} if resume else {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(IndexerTrainer, model, processor, records, tmp_path, **changes, **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name in before if ".indexer." in name}
        models.append(model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    loaded = KeyeForVideoQA.from_pretrained(tmp_path / "checkpoint-4")
    assert loaded.config.text_config.indexer_stage == "warmup"
    # The stage is one of training: what is loaded for answers reads its selection.
    words = torch.arange(10, 20).repeat(4)[None]
    loaded(words)
    assert {entry["ran"] for entry in loaded.attention_backend_report()} == {"torch"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("followed", [False, True], ids=["plain", "mixin"])
def test_trl(followed, kind, processor, same_length, tmp_path):
    """SFTTrainer computes its loss behind a head of its own, with checkpointing on."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

    class Followed(IndexerTrainerMixin, trl.SFTTrainer):
        pass

    model = learner(kind)
    before = copy.deepcopy(model.state_dict())
    expected = plain_gradients(model, collate(processor, same_length))
    trainer = make_trainer(
        Followed if followed else trl.SFTTrainer,
        model,
        processor,
        datasets.Dataset.from_list(same_length),
        tmp_path,
        arguments=trl.SFTConfig,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    # Without the mixin nothing tells the model of the accumulation, and each batch counts in full.
    check_same(steps_of_indexer(trainer.model, before), expected, factor=1.0 if followed else 2.0)
    assert ("indexer_loss" in trainer.state.log_history[0]) == followed


def test_two_processes_equal_one(tmp_path):
    """DDP and FSDP2 over gloo, each process with half of the batch: no parameter is missed, and the mean gradient is
    that of the whole batch."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.training.indexer_ranks"]
    file = tmp_path / "result.json"
    process = subprocess.run(
        [sys.executable, *run, str(file)], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(file.read_text())
    assert len(results) == 8
    for result in results:
        assert result["indexer"] == 15 and result["error"] < 2e-6, result
