"""Fine-tuning as users do it: `Trainer`, a collator over the processor, checkpoints, adapters."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_keye import KeyeForVideoQA
from tests.model.checkpoints import small_model
from tests.training.conftest import collate

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.compat

KINDS = ("mla", "gqa")
# Every projection but the indexer's: the language-model loss does not reach those.
LORA_TARGETS = {
    "mla": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gqa": r".*language_model.*self_attn\.(q_proj|k_proj|v_proj|o_proj)",
}


def make_trainer(model, processor, records, output: Path, **options) -> Trainer:
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **arguments),
        train_dataset=records,
        eval_dataset=records,
        data_collator=functools.partial(collate, processor),
        processing_class=processor,
    )


def logits_of(model, inputs) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_labels_are_the_answers_alone(processor, records):
    batch = collate(processor, records)
    for row, record in zip(batch["labels"], records, strict=True):
        assert processor.decode(row[row != -100]) == f"{record['answer']}<|im_end|>"
    labelled = batch["input_ids"][batch["labels"] != -100]
    assert processor.video_token_id not in labelled
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_items", [None, 5])
def test_loss_is_the_mean_over_labelled_tokens(kind, processor, records, num_items):
    model, batch = small_model(kind), collate(processor, records)
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    loss = model(**batch, **extra).loss
    log_probabilities = logits_of(model, batch)[:, :-1].log_softmax(dim=-1)
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"][:, 1:]):
        for place, label in enumerate(labels.tolist()):
            if label != -100:
                total -= log_probabilities[row, place, label].item()
                count += 1
    assert count == (batch["labels"] != -100).sum()
    assert loss.item() == pytest.approx(total / (num_items or count), rel=1e-5)


def test_tokens_behind_the_answer_have_no_influence_on_the_loss(processor, records):
    model, batch = small_model().eval(), collate(processor, records)
    expected = model(**batch).loss
    assert (batch["labels"][:, -1] == -100).all()
    batch["input_ids"][:, -1] = 30
    torch.testing.assert_close(model(**batch).loss, expected)
    batch["labels"][:, -1] = 30
    assert model(**batch).loss != expected


@pytest.fixture(scope="module", params=KINDS)
def trained(request, processor, records, tmp_path_factory):
    """Two steps with a checkpoint after each, and the weights from before."""
    model = small_model(request.param)
    before = weights_of(model)
    output = tmp_path_factory.mktemp("trainer")
    trainer = make_trainer(model, processor, records, output, save_strategy="steps", save_steps=1)
    result = trainer.train()
    return {"kind": request.param, "trainer": trainer, "before": before, "output": output, "result": result}


def test_trainer_trains(trained):
    assert trained["result"].training_loss > 0
    after = trained["trainer"].model.state_dict()
    still = {name for name, tensor in trained["before"].items() if torch.equal(tensor, after[name])}
    frozen = {name for name in after if ".indexer." in name or name.endswith("e_score_correction_bias")}
    # An expert or an embedding of a token that was not there may stand still, but no whole tensor does.
    assert still == frozen


def test_trainer_logs_the_loss_of_the_model(trained, processor, records):
    steps = [entry for entry in trained["trainer"].state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(0 < entry["loss"] < 20 for entry in steps)


def test_trainer_evaluates(trained, processor, records):
    trainer = trained["trainer"]
    metrics = trainer.evaluate()
    # One label is a token: Trainer averages over batches, each a mean over its own tokens.
    batches = [collate(processor, records[i : i + 2]) for i in (0, 2)]
    with torch.no_grad():
        losses = [trainer.model.eval()(**batch).loss.item() for batch in batches]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_trainer_predicts_logits_and_nothing_else(trained, processor, records):
    """Caches, selections and router logits stay on the device: see `keys_to_ignore_at_inference`."""
    output = trained["trainer"].predict(records[:2])
    batch = collate(processor, records[:2])
    assert output.predictions.shape == (*batch["input_ids"].shape, len(processor.tokenizer))


def test_checkpoints_load_as_remote_code(trained, processor, records):
    trainer, folder = trained["trainer"], trained["output"] / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {"modeling_keye.py", "processing_keye.py", "video_processing_keye.py", "processor_config.json"} <= names
    remote = get_class_from_dynamic_module("modeling_keye.KeyeForVideoQA", str(folder))
    assert remote.__module__.startswith("transformers_modules.")
    batch = collate(processor, records)
    expected = logits_of(trainer.model, batch)
    remote_processor = get_class_from_dynamic_module("processing_keye.KeyeProcessor", str(folder))
    again = collate(remote_processor.from_pretrained(folder), records)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    for model_class in (remote, KeyeForVideoQA, AutoModelForImageTextToText):
        torch.testing.assert_close(
            logits_of(model_class.from_pretrained(folder), again), expected, rtol=1e-5, atol=1e-5
        )


def test_training_resumes_from_a_checkpoint(trained, processor, records, tmp_path):
    trainer = make_trainer(small_model(trained["kind"]), processor, records, tmp_path)
    trainer.train(resume_from_checkpoint=str(trained["output"] / "checkpoint-1"))
    expected = trained["trainer"].model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_equal_one_batch(kind, processor, records, tmp_path):
    """The loss is a sum over tokens divided by the tokens of the whole step, whatever the micro-batches are."""
    trained = []
    for size, steps in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(small_model(kind), processor, records, tmp_path, optim="sgd", **options)
        trainer.train()
        trained.append(trainer)
    assert trained[0].state.log_history[0]["loss"] == pytest.approx(trained[1].state.log_history[0]["loss"], rel=1e-4)
    other = trained[1].model.state_dict()
    for name, tensor in trained[0].model.state_dict().items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trainer_with_gradient_checkpointing(kind, processor, records, tmp_path, use_reentrant):
    losses = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        trainer = make_trainer(small_model(kind), processor, records, tmp_path, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bfloat16_training_keeps_the_router_bias_exact(processor, records, tmp_path):
    trainer = make_trainer(small_model(), processor, records, tmp_path, bf16=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def lora(model, kind: str, **options) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS[kind], **options)
    return peft.get_peft_model(model, config)


@torch.no_grad()
def move_adapters(model: nn.Module) -> None:
    """LoRA starts at no change at all; give both factors values that matter."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [False, True], ids=["projections", "experts"])
def test_lora_trains_saves_reloads_and_merges(kind, experts, processor, records, tmp_path):
    base = small_model(kind)
    before = weights_of(base)
    options = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if experts else {}
    model = lora(copy.deepcopy(base), kind, **options)
    trainer = make_trainer(model, processor, records, tmp_path / "run", learning_rate=1e-2)
    trainer.train()
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    moved = [name for name, parameter in adapters.items() if "lora_B" in name and parameter.any()]
    assert len(moved) == sum("lora_B" in name for name in adapters)
    assert any("experts" in name for name in moved) == experts
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    batch = collate(processor, records)
    expected = logits_of(model, batch)
    assert not torch.allclose(expected, logits_of(base, batch), atol=1e-4)
    trainer.save_model(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert type(merged) is KeyeForVideoQA
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = KeyeForVideoQA.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again, batch), expected, rtol=1e-3, atol=1e-4)


def test_an_adapter_folder_loads_through_its_base(processor, records, tmp_path):
    base = small_model()
    base.save_pretrained(tmp_path / "base")
    model = lora(KeyeForVideoQA.from_pretrained(tmp_path / "base"), "mla")
    move_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    batch = collate(processor, records)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
def test_lora_on_the_absorbed_projection_counts(attention, processor, records):
    """`kv_b_proj` is folded into queries and outputs; an adapter on it must change both and equal its merged self."""
    base = small_model("mla")
    base.set_attn_implementation(attention)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["kv_b_proj"]))
    batch = collate(processor, records)
    torch.testing.assert_close(logits_of(model, batch), logits_of(base, batch), rtol=1e-4, atol=1e-4)
    move_adapters(model)
    adapted = logits_of(model, batch)
    assert (adapted - logits_of(base, batch)).abs().max() > 0.01
    model.train()
    model(**batch).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_an_adapter(kind, processor, records):
    model = lora(small_model(kind), kind)
    move_adapters(model)
    batch = {name: value for name, value in collate(processor, records).items() if name != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**batch, **options), expected)
    assert torch.equal(model.merge_and_unload().generate(**batch, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_peft_gradient_checkpointing_enable_disable(kind, processor, records, use_reentrant):
    batch = collate(processor, records)
    gradients = []
    for checkpointing in (False, True):
        model = lora(small_model(kind), kind)
        move_adapters(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name})
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_indexer_gets_no_gradient_from_an_adapter(processor, records):
    """Why target lists leave the indexer out: `all-linear` reaches it, and its adapters would stay as they are."""
    model = peft.get_peft_model(small_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    model.train()
    model(**collate(processor, records)).loss.backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert missing and all(".indexer." in name for name in missing)
