"""A YAML file and `key=value` overrides -> `Recipe`, with every key and type checked before anything is made.

    stage: finetune
    model: checkpoints/keye-tiny
    output: runs/finetune
    data: {train: clips, max_length: 2048}
    trainer: {max_steps: 100, learning_rate: 1.0e-4}

`trainer` takes the fields of `transformers.TrainingArguments`, but for those that other keys of the recipe set.
Overrides name the section: `trainer.max_steps=10`.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import TrainingArguments

Stage = Literal["pretrain", "indexer-warmup", "sparse-adaptation", "finetune"]


class RecipeError(ValueError):
    """What is wrong with a recipe, in one sentence that names the key."""


@dataclass(frozen=True)
class DataRecipe:
    """Where the rows come from and how they become examples; see `training.rows` and `training.video_dataset`.

    Attributes:
        train, eval: folders, metadata files or names for `datasets.load_dataset`.
        format: "auto", "llava", "sharegpt" or one's own function as "module:function".
        media_root: what relative video paths start from; the folder of the metadata when left out.
        max_length: most tokens of an example. An answer that it would cut is an error.
        packed: put the examples of a batch into one row without padding.
        on_bad_video: "raise", or "skip" to train on the next readable row and report the file.
        frame_cache: folder for decoded frames.
        video_options: settings of the video processor, such as {fps: 1} or {num_frames: 32}.
        chat_template: a Jinja file that marks what the assistant says, for a model whose own template does not and
            writes other prompts than Keye's; see `training.chat_template`.
    """

    train: str
    eval: str | None = None
    train_split: str = "train"
    eval_split: str = "train"
    format: str = "auto"
    media_root: str | None = None
    max_length: int | None = None
    packed: bool = False
    pad_to_multiple_of: int | None = None
    on_bad_video: Literal["raise", "skip"] = "raise"
    frame_cache: str | None = None
    video_options: dict | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class IndexerRecipe:
    """The indexer and its loss.

    Attributes:
        loss_coef: weight of the KL loss; left out, it is 1 where the stage trains the indexer and 0 elsewhere.
        topk: tokens that the indexer picks per query, from this stage on.
        heads, head_dim: size of the indexer that `indexer-warmup` gives to a model without one.
    """

    loss_coef: float | None = None
    topk: int | None = None
    heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters on the decoder, see `training.stages.lora_config`.

    Attributes:
        experts: whether routed experts get adapters as well.
        merge: whether `final` holds the model with the adapter merged into it; the adapter is always kept.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    experts: bool = True
    merge: bool = True


@dataclass(frozen=True)
class Recipe:
    """One run of one stage.

    Attributes:
        model: folder or Hub name that training starts from; published layouts are read as well.
        output: folder of the run: checkpoints, and `final` when it is done.
        resume: "auto" goes on from the last whole checkpoint in `output`, "never" refuses to, and a path goes on from
            that checkpoint, whose run may differ, but not in `model`, `stage`, `lora`, `indexer` or optimizer.
        dtype: of the weights while training; "auto" keeps what is stored.
        router_balance: step of the expert bias per optimizer step, see `training.router_balance`.
        lora: adapters in place of full training (`finetune` only).
        trainer: fields of `TrainingArguments`.
    """

    stage: Stage
    model: str
    output: str
    data: DataRecipe
    seed: int = 0
    resume: str = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    router_balance: float = 0.0
    indexer: IndexerRecipe = field(default_factory=IndexerRecipe)
    lora: LoraRecipe | None = None
    trainer: dict = field(default_factory=dict)

    @property
    def trains_indexer(self) -> bool:
        return self.loss_coef > 0

    @property
    def loss_coef(self) -> float:
        """Weight of the indexer's loss in this run."""
        if self.indexer.loss_coef is not None:
            return float(self.indexer.loss_coef)
        return 1.0 if self.stage in ("indexer-warmup", "sparse-adaptation") else 0.0


# Set by other keys of the recipe, or fixed because resuming and saving depend on them.
OWNED = {
    "output_dir": "`output`",
    "seed": "`seed`",
    "data_seed": "`seed`",
    "resume_from_checkpoint": "`resume`",
    "bf16_full_eval": "`dtype`",
    "fp16_full_eval": "`dtype`",
    "remove_unused_columns": "the collator",
    "label_names": "the collator",
    "save_only_model": "resuming, which needs the optimizer",
    "ignore_data_skip": "resuming, which goes on in the data",
    "enable_jit_checkpoint": "this program, which saves on SIGTERM by itself",
    "push_to_hub": "`python -m conversion.publish`",
    "do_train": "the stage",
    "do_eval": "`data.eval`",
    "do_predict": "the stage",
    "use_cache": "the stage",
    "local_rank": "the launcher",
}
SECTIONS = {"data": DataRecipe, "indexer": IndexerRecipe, "lora": LoraRecipe}
# The least that makes sense, for what the library finds out late or not at all.
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
_HINTS = typing.get_type_hints(TrainingArguments)
_TRAINER_TYPES = {entry.name: _HINTS[entry.name] for entry in dataclasses.fields(TrainingArguments)}
# Stored as a string, but `True` is what switches it on.
_TRAINER_TYPES["fsdp"] = bool | str | None


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key=value` with values in YAML. Raises `RecipeError` naming file and key."""
    path, overrides = Path(path), list(overrides)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold keys and values, not {_shown(values)}.")
    for override in overrides:
        _override(values, override)
    try:
        return make_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"{_origin(path, overrides, str(error))}: {error}") from error


def _origin(path: Path, overrides: list[str], message: str) -> str:
    """Where the key was given that `message` is about, which is the first that it names."""
    named = re.search(r"`(.+?)`", message)[1]
    keys = [override.partition("=")[0] for override in overrides]
    given = any(f"{key}.".startswith(f"{named}.") or named.startswith(f"{key}.") for key in keys)
    return "the command line" if given else str(path)


def make_recipe(values: dict) -> Recipe:
    """The recipe of nested dictionaries. Raises `RecipeError`."""
    values = dict(values)
    for name, section in SECTIONS.items():
        if values.get(name) is not None:
            values[name] = _fill(section, values[name], f"{name}.")
    values["trainer"] = _trainer_fields(values.get("trainer"))
    # An empty section, `indexer:` with nothing behind it, stands for its defaults.
    recipe = _fill(Recipe, {k: v for k, v in values.items() if v is not None or k not in ("indexer", "lora")}, "")
    _check(recipe)
    return recipe


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The arguments of `Trainer` for this recipe. Raises `RecipeError` for values that contradict each other."""
    fields = {
        # Without it, several processes on a machine without an accelerator train apart from each other.
        "use_cpu": not torch.accelerator.is_available(),
        "save_total_limit": 2,
        "logging_steps": 10,
        **({"eval_strategy": "steps"} if recipe.data.eval else {}),
        **recipe.trainer,
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    try:
        arguments = TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"`trainer` is refused by TrainingArguments: {' '.join(str(error).split())}") from error
    if recipe.data.eval is None and (arguments.eval_strategy != "no" or arguments.eval_on_start):
        raise RecipeError("`trainer` asks for evaluation, but there is no `data.eval`.")
    return arguments


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which the last would win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise RecipeError(f"The key {twice[0]!r} stands there twice (line {node.start_mark.line + 1} and on).")
        return super().construct_mapping(node, deep=deep)


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise RecipeError(f"{override!r} is no override; write key=value, for example trainer.max_steps=10.")
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"The value of {override!r} is no YAML: {' '.join(str(error).split())}") from error
    *parents, last = key.split(".")
    place = values
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise RecipeError(f"{override!r}: {'.'.join(parents[: depth + 1])!r} holds {_shown(place)}, no keys.")
    place[last] = value


def _fill(kind: type, values: Any, prefix: str):
    """An instance of the dataclass `kind`, its keys and types checked."""
    if not isinstance(values, dict):
        raise RecipeError(f"`{prefix.removesuffix('.')}` must hold keys and values, not {_shown(values)}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise RecipeError(_unknown(f"{prefix}{name}"))
    missing = [f.name for f in fields.values() if f.name not in values and _required(f)]
    if missing:
        raise RecipeError(f"The key `{prefix}{missing[0]}` is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _typed(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


def _required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _trainer_fields(values: Any) -> dict:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"`trainer` must hold keys and values, not {_shown(values)}.")
    for name in values:
        if name not in _TRAINER_TYPES:
            raise RecipeError(_unknown(f"trainer.{name}"))
        if name in OWNED:
            raise RecipeError(f"`trainer.{name}` cannot be set here: it is decided by {OWNED[name]}.")
    return {name: _typed(value, _TRAINER_TYPES[name], f"trainer.{name}") for name, value in values.items()}


def _unknown(key: str) -> str:
    known = [f.name for f in dataclasses.fields(Recipe)]
    known += [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)]
    known += [f"trainer.{name}" for name in _TRAINER_TYPES if name not in OWNED]

    section, _, last = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_last = candidate.rpartition(".")
        # A right name in the wrong section is nearer than a similar name in the right one.
        return difflib.SequenceMatcher(None, last, its_last).ratio() + 0.2 * (section == its_section)

    return f"There is no key `{key}`; the nearest valid key is `{max(known, key=likeness)}`."


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` if it is of the type `hint`; numbers are taken for a float, also where YAML reads `1e-4` as a string."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    choices = typing.get_args(hint) if union else (hint,)
    for choice in choices:
        if _is_a(value, choice):
            return value
    if value is False and any("no" in _options(choice) for choice in choices):
        return "no"  # which YAML reads as false
    if float in choices and not isinstance(value, bool):
        if isinstance(value, int):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    wanted = " or ".join(dict.fromkeys(filter(None, map(_named, choices))))
    raise RecipeError(f"`{key}` is {_shown(value)}; it must be {wanted}.")


def _is_a(value: Any, choice: Any) -> bool:
    origin = typing.get_origin(choice)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in typing.get_args(choice))
    if choice is Any:
        return True
    kind = origin or choice
    if kind is int or kind is float:
        return type(value) is kind
    return isinstance(value, kind)


def _options(choice: Any) -> list:
    return [option.value for option in choice] if isinstance(choice, enum.EnumMeta) else []


def _named(choice: Any) -> str:
    origin = typing.get_origin(choice)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(choice))
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "keys and values",
        list: "a list",
        types.NoneType: "null",
    }
    # What is left are enumerations of the library, all of which are given as text.
    return names.get(origin or choice, "")


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _check(recipe: Recipe) -> None:
    """Values that each are right, but not together or not in size."""
    texts = {"model": recipe.model, "output": recipe.output}
    texts |= {f"data.{name}": getattr(recipe.data, name) for name in ("train", "eval", "media_root", "frame_cache")}
    for name, value in texts.items():
        if value == "":
            raise RecipeError(f"`{name}` is empty text; it must be a path or a name.")
    numbers = {
        "data.max_length": recipe.data.max_length,
        "data.pad_to_multiple_of": recipe.data.pad_to_multiple_of,
        "indexer.topk": recipe.indexer.topk,
        "indexer.heads": recipe.indexer.heads,
        "indexer.head_dim": recipe.indexer.head_dim,
        "lora.rank": recipe.lora and recipe.lora.rank,
        "lora.alpha": recipe.lora and recipe.lora.alpha,
    }
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise RecipeError(f"`{name}` is {value}; it must be above 0.")
    for name, value in {"indexer.loss_coef": recipe.loss_coef, "router_balance": recipe.router_balance}.items():
        if not 0 <= value < math.inf:
            raise RecipeError(f"`{name}` is {value}; it must be a number from 0 up.")
    if not 0 <= recipe.seed < 2**32:
        raise RecipeError(f"`seed` is {recipe.seed}; it must be from 0 to {2**32 - 1}.")
    for name, least in LEAST.items():
        value = recipe.trainer.get(name)
        if value is not None and not least <= value < math.inf:
            raise RecipeError(f"`trainer.{name}` is {value}; it must be at least {least}.")
    steps, epochs = recipe.trainer.get("max_steps", -1), recipe.trainer.get("num_train_epochs", 1)
    if steps < 1 and not (steps == -1 and 0 < epochs < math.inf):
        raise RecipeError(
            f"`trainer.max_steps` is {steps}; it must be above 0, or -1 with `trainer.num_train_epochs` above 0."
        )
    learns = recipe.stage in ("indexer-warmup", "sparse-adaptation")
    if learns and not recipe.trains_indexer:
        raise RecipeError(f"`indexer.loss_coef` is 0, but the stage `{recipe.stage}` trains the indexer by that loss.")
    if recipe.stage == "pretrain" and recipe.trains_indexer:
        raise RecipeError("`indexer.loss_coef` must be 0 in `pretrain`, which is dense; `indexer-warmup` comes next.")
    if (recipe.indexer.heads or recipe.indexer.head_dim) and recipe.stage != "indexer-warmup":
        raise RecipeError("`indexer.heads` and `indexer.head_dim` are for `indexer-warmup`, which adds the indexer.")
    if recipe.lora is None:
        return
    if recipe.stage != "finetune":
        raise RecipeError(f"`lora` is for the stage `finetune`; `{recipe.stage}` trains whole weights.")
    if recipe.trains_indexer:
        raise RecipeError("`indexer.loss_coef` must be 0 with `lora`: its targets leave the indexer as it is.")
    if not 0 <= recipe.lora.dropout < 1:
        raise RecipeError(f"`lora.dropout` is {recipe.lora.dropout}; it must be from 0 to below 1.")
    if recipe.lora.dropout and recipe.lora.experts:
        raise RecipeError("`lora.dropout` must be 0 with `lora.experts`: adapters of expert weights have no dropout.")
