"""`python -m training.train`: every stage trains what it says and leaves a checkpoint that anybody can load."""

import json
import re
import shutil

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model

from examples.ask_a_video import ask
from modeling_keye import KeyeForVideoQA, KeyeProcessor
from tests.conversion.published import write_published
from tests.model.checkpoints import small_model
from tests.training.small_runs import KEYE_TINY, logged, make_rows, python, values, weights
from training import train
from training.exact_answers import is_right, last_question
from training.recipe import make_recipe
from training.rows import load_rows
from training.stages import lora_config
from training.video_dataset import VideoQADataset

# Without the package: whatever the folder does not bring along is missed.
REMOTE = """
import json, sys
from transformers import AutoModel, AutoProcessor
folder, video = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "video", "path": video}, {"type": "text", "text": "What is shown at 1.0 seconds?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs)
text = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
ours = [name for name in sys.modules if name.split(".")[0] in ("modeling_keye", "training")]
print(json.dumps({"answer": text, "ours": ours, "stops": model.generation_config.eos_token_id}))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"))


def run(rows, output, stage, trainer=None, **changes):
    once = {"max_steps": 1, "save_strategy": "no", **(trainer or {})}
    assert train.run(make_recipe(values(rows, output, stage, once, **changes))) == 0
    return output / "final"


@pytest.fixture(scope="module")
def adapted(rows, tmp_path_factory):
    """`final` of LoRA."""
    output = tmp_path_factory.mktemp("lora")
    return run(rows, output, "finetune", {"max_steps": 2, "learning_rate": 1e-2}, lora={"rank": 4, "alpha": 8})


@pytest.mark.parametrize(
    ("stage", "changes", "trains", "learns"),
    [
        ("pretrain", {}, "trunk", False),
        ("indexer-warmup", {"indexer": {"topk": 4}}, "indexer", True),
        ("sparse-adaptation", {"indexer": {"topk": 4}, "router_balance": 0.01}, "all", True),
        ("finetune", {"data": {"packed": True}}, "trunk", False),
        # Mixed precision: weights stay in float32.
        ("sparse-adaptation", {"indexer": {"topk": 4}, "trainer": {"bf16": True}}, "all", True),
    ],
)
def test_a_stage_trains_its_part(stage, changes, trains, learns, rows, tmp_path):
    changes = {**changes, "data": {"train": str(rows), **changes.get("data", {})}}
    final = run(rows, tmp_path, stage, **changes)
    before, after = weights(KEYE_TINY), weights(final)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    indexer = {name for name in before if ".indexer." in name}
    if trains == "indexer":
        assert moved == indexer
    else:
        assert moved - indexer and (moved & indexer == (indexer if trains == "all" else set()))
    assert any("e_score_correction_bias" in name for name in moved) == bool(changes.get("router_balance"))
    assert bool(logged(final, "indexer_loss", "indexer_recall")) == learns
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    config = json.loads((final / "config.json").read_text())["text_config"]
    source = json.loads((KEYE_TINY / "config.json").read_text())["text_config"]
    assert config["index_topk"] == changes.get("indexer", {}).get("topk", source["index_topk"])
    # Whoever loads the result and trains it says by which losses.
    assert not config.get("indexer_loss_coef") and config.get("indexer_stage", "adaptation") == "adaptation"


def test_the_warmup_gives_an_indexer_to_a_model_without_one(rows, tmp_path):
    small_model("mla_dense").save_pretrained(tmp_path / "dense")
    recipe = values(rows, tmp_path, "indexer-warmup", model=str(tmp_path / "dense"))
    made = train.load_model(make_recipe({**recipe, "indexer": {"topk": 4, "heads": 2, "head_dim": 32}}))
    text = made.config.text_config
    assert (text.index_topk, text.index_n_heads, text.index_head_dim) == (4, 2, 32)
    with pytest.raises(train.RecipeError, match="`indexer-warmup` comes first"):
        train.load_model(make_recipe({**recipe, "stage": "sparse-adaptation"}))


def test_adapters_are_merged_into_what_they_answer(adapted, rows):
    before, after = weights(KEYE_TINY), weights(adapted)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and not any(".indexer." in name or ".visual." in name for name in moved)
    for part in ("q_proj", "o_proj", "mlp.down_proj", "shared_experts.up_proj", "experts.gate_up_proj"):
        assert any(part in name for name in moved), part
    batch = VideoQADataset(load_rows(rows), KeyeProcessor.from_pretrained(adapted), max_length=None)[0]
    batch = last_question(batch)[0]
    base = KeyeForVideoQA.from_pretrained(KEYE_TINY)
    with torch.no_grad():
        plain = base(**batch).logits
        with_adapter = PeftModel.from_pretrained(base, adapted / "adapter").eval()(**batch).logits
        merged = KeyeForVideoQA.from_pretrained(adapted)(**batch).logits
    assert (with_adapter - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, with_adapter, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_the_target_list_has_every_projection_but_those_of_the_indexer(kind):
    model = small_model(kind)
    layers = model.model.language_model.named_modules()
    linear = {name for name, module in layers if isinstance(module, torch.nn.Linear)}
    model = get_peft_model(model, lora_config(model, rank=2))
    hit = {
        name.split(".language_model.")[1]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), torch.nn.Linear)
    }
    assert hit == {name for name in linear if ".indexer." not in name}
    assert any("experts" in name for name, parameter in model.named_parameters() if "lora_A" in name)


def test_an_adapter_alone_finds_its_base(rows, tmp_path, monkeypatch):
    model = shutil.copytree(KEYE_TINY, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    final = run(rows, tmp_path / "out", "finetune", lora={"rank": 2, "merge": False}, model="model")
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    assert not (final / "README.md").exists()


def test_a_finished_run_loads_as_remote_code(adapted, rows, tmp_path):
    """In a process that has the folder and nothing else of ours."""
    video = json.loads(rows.read_text().splitlines()[0])["video"]
    video = str(rows.parent / video)
    done = python("-c", REMOTE, str(adapted), video, cwd=tmp_path, PYTHONPATH="", PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    stops = json.loads((KEYE_TINY / "generation_config.json").read_text())["eos_token_id"]
    assert result == {"answer": ask(video, "What is shown at 1.0 seconds?", str(adapted)), "ours": [], "stops": stops}
    assert not list(adapted.rglob("*.bin"))
    record = json.loads((adapted / "training.json").read_text())
    assert record["seed"] == 0 and record["steps"] == 2 and record["recipe"]["lora"]["rank"] == 4
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["transformers"]


def test_exact_answers_are_counted_by_kind(rows, tmp_path):
    """Rows that expect what the model says before training, and one that expects something else."""
    video = str(rows.parent / json.loads(rows.read_text().splitlines()[0])["video"])
    questions = [
        "What shape is shown at 1.0 seconds?",
        "How many circles appear?",
        "What color is shown at 0.0 seconds?",
    ]
    answers = [ask(video, question) for question in questions]
    assert all(answers)
    answers[2] = "purple" if answers[2] != "purple" else "green"
    columns = zip(questions, answers, ("what", "count", "what"))
    lines = [json.dumps({"video": video, "question": q, "answer": a, "kind": kind}) for q, a, kind in columns]
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("\n".join(lines))
    data = {"train": str(rows), "eval": str(held_out)}
    first = {"eval_on_start": True, "eval_strategy": "no"}
    final = run(rows, tmp_path, "finetune", first, data=data)
    names = ("eval_exact_match", "eval_exact_match_what", "eval_exact_match_count")
    assert logged(final, *names) == [(0, pytest.approx(200 / 3), 50.0, 100.0)]
    assert logged(final, "eval_loss")


def test_the_last_question_of_a_conversation():
    ids = torch.arange(10, 22)
    labels = torch.full_like(ids, -100)
    labels[3:5], labels[8:11] = ids[3:5], ids[8:11]
    example = {"input_ids": ids, "labels": labels, "mm_token_type_ids": ids % 2, "video_grid_thw": torch.ones(1, 3)}
    prompt, answer = last_question(example)
    assert prompt["input_ids"].tolist() == [ids[:8].tolist()] and answer.tolist() == ids[8:11].tolist()
    assert prompt["mm_token_type_ids"].shape == (1, 8) and prompt["video_grid_thw"].shape == (1, 3)
    with pytest.raises(ValueError, match="without a labelled answer"):
        last_question({**example, "labels": torch.full_like(ids, -100)})
    assert is_right(" Red Circle", "red circle") and not is_right("red", "red circle")


@pytest.mark.parametrize(
    ("row", "changes", "sentence"),
    [
        ({"video": "none.mp4"}, {}, "train.jsonl, row 2"),
        ({"answer": ""}, {}, "train.jsonl, row 2"),
        ({"qestion": "x"}, {}, "qestion"),
        ({}, {"data": {"max_lenght": 5}}, "the nearest valid key is `data.max_length`"),
        ({}, {"model": "no/such/folder/here"}, "`model` is 'no/such/folder/here'"),
        ({}, {"model": "README.md"}, "'README.md' is no folder, and no repository of the Hub"),
        ({}, {"output": str(KEYE_TINY / "config.json")}, "where no folder can be made: "),
        ({}, {"trainer": {"eval_strategy": "epoch"}}, "there is no `data.eval`"),
        ({}, {"trainer": {"deepspeed": "none.json"}}, "`trainer` is refused by TrainingArguments"),
        ({}, {"trainer": {"report_to": "not_there"}}, "cannot be had here: not_there is not supported"),
        ({}, {"trainer": {"optim": "lomo"}}, "cannot be had here: You need to install `lomo_optim`"),
        (
            {},
            {"trainer": {"adam_beta1": 2.0}},
            "`trainer.optim` cannot be had with the options it is given: Invalid beta",
        ),
        ({}, {"trainer": {"lr_scheduler_kwargs": {"foo": 1}, "lr_scheduler_type": "linear"}}, "keyword argument 'foo'"),
        ({}, {"trainer": {"lr_scheduler_type": "cosine_with_min_lr"}}, "`trainer.lr_scheduler_type` cannot be had"),
        (
            {},
            {"trainer": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}}},
            "`trainer.gradient_checkpointing_kwargs` cannot be had with the options it is given: Unexpected keyword",
        ),
        ({}, {"data": {"frame_cache": "README.md"}}, "frame_cache='README.md' is where no folder can be made"),
        ({}, {"data": {"chat_template": "no.jinja"}}, "the chat template 'no.jinja' cannot be read"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(row, changes, sentence, rows, tmp_path, capsys):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        line["video"] = str(rows.parent / line["video"])
    lines[1].update(row)
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    recipe = values(file, tmp_path / "out", "finetune")
    recipe.update({k: {**recipe[k], **v} if isinstance(v, dict) else v for k, v in changes.items()})
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    assert train.main([str(config)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "trainer",
    [
        {
            "optim": "adafactor",
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 1},
        },
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
)
def test_options_that_are_right_are_not_refused(trainer, rows, tmp_path):
    run(rows, tmp_path, "finetune", trainer)


def test_a_run_without_a_step_is_no_success(rows, tmp_path):
    recipe = values(rows, tmp_path, "finetune", {"per_device_train_batch_size": 7, "dataloader_drop_last": True})
    with pytest.raises(train.RecipeError, match="Nothing was trained: 6 rows .*`trainer.dataloader_drop_last`"):
        train.run(make_recipe(recipe))
    assert not (tmp_path / "final").exists()


def test_what_a_worker_finds_out_is_one_sentence(rows, tmp_path, capsys):
    """An unreadable video shows when its row is needed, in a process that only hands its traceback over."""
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video\n" * 100)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"video": str(broken), "question": "What is it?", "answer": "nothing"}))
    recipe = values(file, tmp_path / "out", "finetune", {"dataloader_num_workers": 1})
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    assert train.main([str(config)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(r"error: rows\.jsonl, row 1: .*broken\.mp4 .*on_bad_video='skip'\.$", error.strip(), re.MULTILINE)


def test_a_metric_that_no_evaluation_has(rows, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "foo"}
    recipe = values(rows, tmp_path, "finetune", best, data={"train": str(rows), "eval": str(rows)})
    with pytest.raises(train.RecipeError, match="'eval_foo', which is not found.*eval_exact_match"):
        train.run(make_recipe(recipe))


def test_a_published_folder_trains_and_keeps_the_marks(rows, tmp_path):
    write_published(tmp_path / "published", "keye_vl_1_5")
    data = {"train": str(rows), "video_options": {"num_frames": 2}}
    indexer = {"topk": 8}
    final = run(rows, tmp_path, "indexer-warmup", data=data, model=str(tmp_path / "published"), indexer=indexer)
    assert json.loads((final / "config.json").read_text())["text_config"]["index_topk"] == 8
    assert "{%- generation -%}" in (final / "chat_template.jinja").read_text()
    balanced = values(rows, tmp_path, "sparse-adaptation", data=data, model=str(final), router_balance=0.1)
    with pytest.raises(train.RecipeError, match="no router of .* has a bias to move; set `router_balance` to 0"):
        train.run(make_recipe({**balanced, "output": str(tmp_path / "next")}))


def test_damaged_weights_are_the_models_fault(rows, tmp_path):
    folder = shutil.copytree(KEYE_TINY, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(train.RecipeError, match=r"`model` is '.*', which cannot be read: .*(?i:incomplete|file)"):
        train.run(make_recipe(values(rows, tmp_path / "out", "finetune", model=str(folder))))


def test_a_text_checkpoint_is_sent_to_compose(rows, tmp_path):
    folder = tmp_path / "text"
    small_model().save_pretrained(folder)
    with pytest.raises(train.RecipeError, match="no processor_config.json.*conversion.compose"):
        train.run(make_recipe(values(rows, tmp_path / "out", "finetune", model=str(folder))))
