"""Every key and type of a recipe is checked before anything is made; the sentence names the key."""

from pathlib import Path

import pytest
import yaml

from training.recipe import Recipe, RecipeError, load_recipe, make_recipe, training_arguments

ROOT = Path(__file__).resolve().parents[2]
LEAST = {"stage": "finetune", "model": "m", "output": "o", "data": {"train": "d"}}


def recipe(**changes) -> Recipe:
    return make_recipe({**LEAST, **changes})


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_of_this_repository_are_valid(file):
    made = load_recipe(file)
    assert file.stem.startswith(made.stage) and (ROOT / made.model).is_dir()
    training_arguments(made)
    command = f"python -m training.train recipes/{file.name}"
    assert command in file.read_text()


def test_every_stage_has_a_recipe():
    names = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert names == {"pretrain", "indexer-warmup", "sparse-adaptation", "finetune", "finetune-lora"}


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"stagee": "pretrain"}, "stagee", "stage"),
        ({"data": {"train": "d", "max_lenght": 5}}, "data.max_lenght", "data.max_length"),
        ({"trainer": {"lerning_rate": 1.0}}, "trainer.lerning_rate", "trainer.learning_rate"),
        ({"learning_rate": 1e-3}, "learning_rate", "trainer.learning_rate"),
        ({"lora": {"r": 4}}, "lora.r", "lora.rank"),
        ({"indexer": {"coef": 1}}, "indexer.coef", "indexer.loss_coef"),
        ({7: 1}, "7", None),
    ],
)
def test_a_key_that_does_not_exist(changes, key, nearest):
    with pytest.raises(RecipeError) as caught:
        recipe(**{str(name): value for name, value in changes.items()})
    message = str(caught.value)
    assert f"no key `{key}`" in message and (nearest is None or f"`{nearest}`" in message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "one"}, "`seed` is 'one' (str); it must be a whole number."),
        ({"data": {"train": ""}}, "`data.train` is empty text; it must be a path or a name."),
        ({"data": {"train": "d", "frame_cache": ""}}, "`data.frame_cache` is empty text"),
        ({"seed": True}, "`seed` is True (bool); it must be a whole number."),
        ({"stage": "fine-tune"}, "`stage` is 'fine-tune' (str); it must be one of pretrain, indexer-warmup"),
        ({"data": "clips"}, "`data` must hold keys and values, not 'clips' (str)."),
        ({"data": {"train": None}}, "`data.train` is nothing; it must be text."),
        ({"data": {"train": "d", "packed": "yes"}}, "`data.packed` is 'yes' (str); it must be true or false."),
        ({"data": {"train": "d", "max_length": -1}}, "`data.max_length` is -1; it must be above 0."),
        ({"trainer": {"learning_rate": "fast"}}, "`trainer.learning_rate` is 'fast' (str); it must be a number."),
        ({"trainer": {"max_steps": 2.5}}, "`trainer.max_steps` is 2.5 (float); it must be a whole number."),
        ({"trainer": {"optim": ["sgd"]}}, "`trainer.optim` is ['sgd'] (list); it must be text."),
        ({"trainer": {"output_dir": "x"}}, "`trainer.output_dir` cannot be set here: it is decided by `output`."),
        ({"trainer": [1]}, "`trainer` must hold keys and values, not [1] (list)."),
        ({"indexer": {"loss_coef": -1}}, "`indexer.loss_coef` is -1.0; it must be a number from 0 up."),
        ({"stage": "indexer-warmup", "indexer": {"loss_coef": 0}}, "`indexer.loss_coef` is 0, but the stage"),
        ({"stage": "pretrain", "indexer": {"loss_coef": 1}}, "must be 0 in `pretrain`"),
        ({"stage": "pretrain", "lora": {}}, "`lora` is for the stage `finetune`"),
        ({"lora": {"rank": 4}, "indexer": {"loss_coef": 1.0}}, "must be 0 with `lora`"),
        ({"lora": {"dropout": 0.1}}, "`lora.dropout` must be 0 with `lora.experts`"),
        ({"indexer": {"heads": 4}}, "are for `indexer-warmup`"),
        ({"seed": -1}, "`seed` is -1; it must be from 0 to 4294967295."),
        ({"trainer": {"learning_rate": -1}}, "`trainer.learning_rate` is -1.0; it must be at least 0."),
        ({"trainer": {"per_device_train_batch_size": 0}}, "`trainer.per_device_train_batch_size` is 0; it must be at"),
        ({"trainer": {"gradient_accumulation_steps": 0}}, "`trainer.gradient_accumulation_steps` is 0; it must be at"),
        ({"trainer": {"dataloader_num_workers": -1}}, "`trainer.dataloader_num_workers` is -1; it must be at least 0."),
        ({"trainer": {"max_steps": 0}}, "`trainer.max_steps` is 0; it must be above 0, or -1 with"),
        ({"trainer": {"num_train_epochs": 0}}, "`trainer.max_steps` is -1; it must be above 0, or -1 with"),
    ],
)
def test_values_that_are_wrong(changes, message):
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert message in str(caught.value)


def test_a_key_that_is_missing():
    with pytest.raises(RecipeError, match="`data.train` is missing"):
        recipe(data={})
    with pytest.raises(RecipeError, match="`model` is missing"):
        make_recipe({name: value for name, value in LEAST.items() if name != "model"})


def test_what_contradicts_itself_is_refused_by_the_arguments():
    with pytest.raises(RecipeError, match="`trainer` is refused"):
        training_arguments(recipe(trainer={"load_best_model_at_end": True, "eval_strategy": "epoch"}))


def test_numbers_as_yaml_reads_them(tmp_path):
    """`1e-4` is text in YAML, `no` is false, and whole numbers stand for numbers."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "{stage: finetune, model: m, output: o, data: {train: d}, "
        "trainer: {learning_rate: 1e-4, save_strategy: no, weight_decay: 0}}"
    )
    trainer = load_recipe(file).trainer
    assert trainer == {"learning_rate": 1e-4, "save_strategy": "no", "weight_decay": 0.0}
    assert type(trainer["weight_decay"]) is float


def test_overrides(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    changed = ["trainer.max_steps=3", "data.train=other", "lora.rank=4", "data.video_options={fps: 2}", "seed=5"]
    made = load_recipe(file, changed)
    assert made.trainer == {"max_steps": 3} and made.data.train == "other" and made.seed == 5
    assert made.lora.rank == 4 and made.data.video_options == {"fps": 2}
    for override, message in (
        ("max_steps", "'max_steps' is no override"),
        ("model.x=1", "'model' holds 'm'"),
        ("trainer.max_step=1", "the nearest valid key is `trainer.max_steps`"),
        ("seed=[", "is no YAML"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(file, [override])
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "at_fault", "key"),
    [
        (["seed=2", "trainer.max_steps=1.5"], "the command line", "trainer.max_steps"),
        (["trainer={max_steps: 1.5}"], "the command line", "trainer.max_steps"),
        (["lora.rank=4", "stage=pretrain"], "the command line", "lora"),
        (["trainer.max_steps=1", "data.trainn=x"], "the command line", "data.trainn"),
        (["data.train=x", "trainer.max_steps=1"], "file", "data.max_lenght"),
    ],
)
def test_an_error_names_where_its_key_was_given(overrides, at_fault, key, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**LEAST, "data": {"train": "d", "max_lenght": 1}} if at_fault == "file" else LEAST))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    message = str(caught.value)
    assert message.startswith(f"{file if at_fault == 'file' else at_fault}: ") and f"`{key}`" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands there twice"),
        ("data: [", "is no YAML"),
        ("- 1", "must hold keys and values"),
        ("", "must hold keys and values, not nothing"),
    ],
)
def test_files_that_are_no_recipes(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
