"""The correction bias of the routers follows the load of their experts."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.model.checkpoints import small_model
from tests.model.factories import text_ids, tiny_model
from tests.training.conftest import collate
from training.router_balance import RouterBalance

SPEED = 0.01


def routers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]


def loads(model, inputs) -> list[torch.Tensor]:
    """Tokens per expert and router in one call, padding left out."""
    counts, handles = [], []
    for router in routers(model):

        def count(module, arguments, outputs):
            chosen = outputs[2][inputs["attention_mask"].flatten().bool()]
            counts.append(torch.stack([(chosen == expert).sum() for expert in range(module.weight.shape[0])]).float())

        handles.append(router.register_forward_hook(count))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


def padded(rows: int = 3, tokens: int = 30) -> dict[str, torch.Tensor]:
    ids = text_ids(rows, tokens)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def begin(model, speed: float = SPEED) -> RouterBalance:
    balance = RouterBalance(speed)
    balance.on_train_begin(None, None, None, model=model)
    return balance


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_moves_towards_the_mean_load(checkpointing):
    model, inputs = tiny_model("mla").train(), padded()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    expected = [
        bias + SPEED * torch.sign(load.mean() - load) for bias, load in zip(before, loads(model, inputs), strict=True)
    ]
    balance = begin(model)
    for rows in (slice(0, 2), slice(2, 3)):  # two batches of one step
        half = {name: tensor[rows] for name, tensor in inputs.items()}
        model(**half, use_cache=False).logits.sum().backward()
    balance.on_step_end(None, None, None)
    for router, bias in zip(routers(model), expected, strict=True):
        torch.testing.assert_close(router.e_score_correction_bias, bias, rtol=0, atol=1e-7)
    # The count starts anew: without a token every load is the mean.
    balance.on_step_end(None, None, None)
    for router, bias in zip(routers(model), expected, strict=True):
        torch.testing.assert_close(router.e_score_correction_bias, bias, rtol=0, atol=1e-7)


def test_evaluation_does_not_count_and_hooks_go():
    model, inputs = tiny_model("mla"), padded()
    before = copy.deepcopy(model.state_dict())
    balance = begin(model)
    model.eval()(**inputs)
    balance.on_step_end(None, None, None)
    balance.on_train_end(None, None, None)
    model.train()(**inputs)
    assert not balance.loads and all(not router._forward_hooks for router in routers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_steps_balance_the_load():
    """Unbalanced by a bias of our own; the callback takes it back."""
    model, inputs = tiny_model("mla").train(), padded(rows=3, tokens=60)
    for router in routers(model):
        router.e_score_correction_bias[0] += 0.2
    spread = [(load.max() / load.mean()).item() for load in loads(model, inputs)]
    balance = begin(model)
    with torch.no_grad():
        for _ in range(40):
            model(**inputs, use_cache=False)
            balance.on_step_end(None, None, None)
    after = [(load.max() / load.mean()).item() for load in loads(model, inputs)]
    print(f"largest over mean load: {spread} -> {after}")
    assert max(after) < 1.25 < min(spread)


def test_the_load_of_all_processes_counts(monkeypatch):
    model, inputs = tiny_model("mla").train(), padded()
    other = [torch.zeros_like(router.e_score_correction_bias) for router in routers(model)]
    for load in other:
        load[3] = 1e6  # all tokens of the other process went to one expert
    reduced = iter(other)
    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, all_reduce=lambda load: load.add_(next(reduced))
    )
    monkeypatch.setattr(torch, "distributed", group)
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    balance = begin(model)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    balance.on_step_end(None, None, None)
    for router, bias in zip(routers(model), before, strict=True):
        change = torch.full_like(bias, SPEED)
        change[3] = -SPEED
        torch.testing.assert_close(router.e_score_correction_bias, bias + change, rtol=0, atol=1e-7)


def train(model, processor, records, output, speed, **changes):
    arguments = TrainingArguments(
        output_dir=str(output),
        **{"max_steps": 2, "per_device_train_batch_size": 2, "remove_unused_columns": False, **changes},
        learning_rate=0.0,
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=records,
        data_collator=functools.partial(collate, processor),
        callbacks=[RouterBalance(speed)],
    ).train(resume_from_checkpoint=changes.pop("resume", None))


def test_the_trainer_saves_the_bias(processor, records, tmp_path):
    model = small_model("mla")
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    train(model, processor, records, tmp_path, SPEED, save_steps=1)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    for router, again, bias in zip(routers(model), routers(saved), before, strict=True):
        change = (router.e_score_correction_bias - bias).abs()
        assert change.max() > 0 and change.max() < 2.001 * SPEED
        assert torch.equal(again.e_score_correction_bias, router.e_score_correction_bias)


def test_no_speed_changes_nothing(processor, records, tmp_path):
    model = small_model("mla")
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    train(model, processor, records, tmp_path, 0.0, save_strategy="no")
    assert all(torch.equal(router.e_score_correction_bias, bias) for router, bias in zip(routers(model), before))


def test_refusals():
    with pytest.raises(ValueError, match="`speed` is -1; it must be a number from 0 up"):
        RouterBalance(-1)
    with pytest.raises(ValueError, match="no router of the model has a correction bias"):
        begin(tiny_model("gqa"))
    RouterBalance(0).on_train_begin(None, None, None, model=tiny_model("gqa"))
