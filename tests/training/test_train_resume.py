"""A run that was killed or stopped goes on as if nothing had happened: weights and losses are the same, bit for bit."""

import dataclasses
import json
import os
import signal

import pytest
import torch
import yaml

from tests.training.small_runs import logged, make_rows, python, values, weights
from training import train
from training.recipe import RecipeError, make_recipe
from training.resuming import LogWithSave, check_same_run, find_start, is_whole, last_checkpoint

# Five rows in batches of two: the steps of an epoch are no multiple of the steps between checkpoints.
STEPS = {"max_steps": 5, "save_steps": 2, "logging_steps": 5, "lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = make_rows(tmp_path_factory.mktemp("rows"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    return file


def recipe(rows, output, kind: str) -> dict:
    if kind == "lora":
        # Dropout draws random numbers, whose state has to come back as well.
        return values(rows, output, "finetune", STEPS, lora={"rank": 4, "experts": False, "dropout": 0.1})
    return values(rows, output, "sparse-adaptation", STEPS, indexer={"topk": 4}, router_balance=0.01)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """Folders of runs that nothing stopped."""
    folders = {}

    def run(kind: str):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            assert train.run(make_recipe(recipe(rows, folders[kind], kind))) == 0
        return folders[kind] / "final"

    return run


def check_same(final, expected):
    actual, wanted = weights(final), weights(expected)
    assert actual.keys() == wanted.keys()
    assert [name for name, tensor in actual.items() if not torch.equal(tensor, wanted[name])] == []
    names = ["loss", "grad_norm", "learning_rate"]
    assert logged(final, *names) == logged(expected, *names)
    assert logged(final, "indexer_loss", "indexer_recall") == logged(expected, "indexer_loss", "indexer_recall")


def test_killed_while_saving_and_resumed(rows, whole, tmp_path):
    """The checkpoint that was being written does not count."""
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(rows, tmp_path / "run", "adaptation")))
    killed = python("-m", "tests.training.killed_train", str(config), "4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    torn = tmp_path / "run" / "checkpoint-4"
    assert (torn / "model.safetensors").exists() and not is_whole(torn)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert train.main([str(config)]) == 0
    assert [step for step, _ in logged(tmp_path / "run" / "final", "loss")] == [2, 4, 5]
    check_same(tmp_path / "run" / "final", whole("adaptation"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_resumed(number, rows, whole, tmp_path, monkeypatch, capsys):
    class Stopping(LogWithSave):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    made = make_recipe(recipe(rows, tmp_path, "lora"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "LogWithSave", Stopping)
        assert train.run(made) == 128 + number
    assert f"{number.name}: stopped behind step 3" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert not (tmp_path / "final").exists() and last_checkpoint(tmp_path).name == "checkpoint-3"
    assert train.run(made) == 0
    assert "going on from" in capsys.readouterr().out
    expected, actual = (weights(folder) for folder in (whole("lora"), tmp_path / "final"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())

    # What is finished is not trained again, and belongs to its recipe.
    assert train.run(made) == 0
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="`seed` was 0 and is 1"):
        train.run(make_recipe({**recipe(rows, tmp_path, "lora"), "seed": 1}))


def test_a_folder_belongs_to_one_recipe(rows, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    values_now = recipe(rows, tmp_path, "lora")
    with pytest.raises(RecipeError, match="no recipe.json"):
        train.run(make_recipe(values_now))
    (tmp_path / "recipe.json").write_text(json.dumps({**values_now, "trainer": {**STEPS, "save_steps": 1}}))
    with pytest.raises(RecipeError, match="was made by another recipe: `data"):
        train.run(make_recipe(values_now))
    with pytest.raises(RecipeError, match="`resume` is never"):
        train.run(make_recipe({**values_now, "resume": "never"}))
    with pytest.raises(RecipeError, match="no whole checkpoint"):
        train.run(make_recipe({**values_now, "resume": str(tmp_path / "checkpoint-9")}))


def test_a_named_checkpoint_must_fit(rows, tmp_path):
    """Steps may change, what the weights and the optimizer are of may not; nothing is written before."""
    before = tmp_path / "before"
    (before / "checkpoint-2").mkdir(parents=True)
    (before / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    lora = make_recipe(recipe(rows, before, "lora"))
    (before / "recipe.json").write_text(json.dumps(dataclasses.asdict(lora)))
    resume, output = str(before / "checkpoint-2"), tmp_path / "after"
    whole = make_recipe({**values(rows, output, "finetune", STEPS), "resume": resume})
    with pytest.raises(RecipeError, match="does not fit this recipe: `lora.alpha` was 32.0 there and is None"):
        train.run(whole)
    assert not output.exists()
    with pytest.raises(RecipeError, match=r"`lora.alpha` was 32.0 and is None. Choose another `output`.$"):
        check_same_run(before, dataclasses.asdict(whole))
    longer = dataclasses.replace(lora, trainer={**lora.trainer, "max_steps": 9})
    with pytest.raises(RecipeError, match="`trainer.max_steps` was 5 and is 9.* name its checkpoint in `resume`, too"):
        check_same_run(before, dataclasses.asdict(longer))
    assert find_start(output, resume, dataclasses.asdict(longer)) == before / "checkpoint-2"


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_recipe_is_said(content, tmp_path):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(RecipeError, match="recipe.json is damaged"):
        check_same_run(tmp_path, {"seed": 1})


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="file', which is no whole checkpoint"):
        find_start(tmp_path, str(tmp_path / "file"), {})


def test_how_often_is_logged_and_saved_may_change(tmp_path):
    before = {"seed": 1, "resume": "auto", "trainer": {"save_steps": 1, "max_steps": 4}}
    (tmp_path / "recipe.json").write_text(json.dumps(before))
    check_same_run(tmp_path, {"seed": 1, "resume": "never", "trainer": {"logging_steps": 3, "max_steps": 4}})
    with pytest.raises(RecipeError, match="`trainer.max_steps` was 4 and is 5"):
        check_same_run(tmp_path, {"seed": 1, "trainer": {"max_steps": 5}})
    with pytest.raises(RecipeError, match="`trainer.dataloader_drop_last` was None and is True"):
        check_same_run(tmp_path, {"seed": 1, "trainer": {"max_steps": 4, "dataloader_drop_last": True}})


def test_only_whole_checkpoints_count(tmp_path):
    for name, state in (
        ("2", '{"global_step": 2}'),
        ("10", '{"global_step": 10}'),
        ("30", '{"global_st'),
        ("40", None),
        ("50", "{}"),
        ("60", "[]"),
    ):
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None
