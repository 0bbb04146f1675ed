"""What makes a run survive its end: whole checkpoints, signals, and a folder that belongs to one recipe."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .recipe import RecipeError

STATE = "trainer_state.json"
# May change between the parts of a run: what is trained stays the same.
FREE = ("resume", "output")
FREE_TRAINER = re.compile(
    r"dataloader_(?!drop_last)|log_|logging_|eval_|save_|disable_tqdm|report_to|run_name|skip_memory_metrics"
)
# May not change even where `resume` names the checkpoint: weights and optimizer are of these.
FIXED = re.compile(r"(stage|model|lora|indexer|trainer\.optim)(\.|$)")


def is_whole(checkpoint: Path) -> bool:
    """Whether saving it came to its end: the state of the trainer is what is written last."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(state, dict) and checkpoint.name == f"checkpoint-{state.get('global_step')}"


def last_checkpoint(output: Path) -> Path | None:
    """The latest whole checkpoint of a run; what a killed process left half-written does not count."""
    whole = [folder for folder in output.glob("checkpoint-*") if is_whole(folder)]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def find_start(output: Path, resume: str, recipe: dict) -> Path | None:
    """The checkpoint that a run in `output` goes on from, None for its beginning.

    `recipe` is that of the run as plain values. Raises `RecipeError` when `output` belongs to another recipe, or the
    checkpoint that `resume` names to a model that is trained otherwise.
    """
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            raise RecipeError(
                f"`resume` is {resume!r}, which is no whole checkpoint; give auto, never or a checkpoint-N."
            )
        for key, before, now in _changes(checkpoint.parent, recipe):
            if FIXED.match(key):
                raise RecipeError(
                    f"`resume` is {resume!r}, which does not fit this recipe: `{key}` was {before!r} there and is "
                    f"{now!r}. Set it as it was, or name another checkpoint."
                )
        return checkpoint
    found = last_checkpoint(output)
    if found is None:
        return None
    if resume == "never":
        raise RecipeError(
            f"{found} is there already and `resume` is never. Remove {output} or choose another `output`."
        )
    check_same_run(output, recipe)
    return found


def check_same_run(output: Path, recipe: dict) -> None:
    """Raises `RecipeError` naming the first key in which the recipe that `output` was made by differs."""
    changes = _changes(output, recipe)
    if changes:
        key, before, now = changes[0]
        fits = not any(FIXED.match(key) for key, _, _ in changes)
        going_on = "; to go on from this run under the new recipe, name its checkpoint in `resume`, too" if fits else ""
        raise RecipeError(
            f"{output} was made by another recipe: `{key}` was {before!r} and is {now!r}. Choose another `output`"
            f"{going_on}."
        )


def _changes(folder: Path, recipe: dict) -> list[tuple[str, Any, Any]]:
    """(key, before, now) of what may not differ from the recipe that the run in `folder` was made by."""
    file = folder / "recipe.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise RecipeError(
            f"{folder} holds checkpoints, but no recipe.json that says of what. Put it back, or begin in another "
            "`output`."
        ) from error
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} is damaged: it must hold a recipe as a JSON object. Put it back, or begin in another `output`."
        )
    before, now = _flat(values), _flat(recipe)
    keys = sorted(before.keys() | now.keys())
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _flat(recipe: dict) -> dict:
    flat = {}
    for name, value in recipe.items():
        if isinstance(value, dict) and name != "video_options":
            flat.update({f"{name}.{key}": part for key, part in _flat(value).items()})
        elif name not in FREE and not FREE_TRAINER.match(name):
            flat[name] = value
    return flat


def write_json(file: Path, value: dict) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)


class LogWithSave(TrainerCallback):
    """Ends the interval of a logged mean where a checkpoint ends, so that a resumed run logs the same numbers."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end the run behind the present step, with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.received = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.received = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # Processes hear the signal in different steps, and must save in the same.
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received:
            control.should_save = control.should_log = control.should_training_stop = True
