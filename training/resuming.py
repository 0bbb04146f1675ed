"""What makes a run survive its end: whole checkpoints, signals, and a folder that belongs to one recipe."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback

from .recipe import RecipeError

STATE = "trainer_state.json"
# May change between the parts of a run: what is trained stays the same.
FREE = ("resume", "output")
FREE_TRAINER = re.compile(
    r"dataloader_(?!drop_last)|log_|logging_|eval_|save_|disable_tqdm|report_to|run_name|skip_memory_metrics"
)


def is_whole(checkpoint: Path) -> bool:
    """Whether saving it came to its end: the state of the trainer is what is written last."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return checkpoint.name == f"checkpoint-{state['global_step']}"


def last_checkpoint(output: Path) -> Path | None:
    """The latest whole checkpoint of a run; what a killed process left half-written does not count."""
    whole = [folder for folder in output.glob("checkpoint-*") if is_whole(folder)]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def find_start(output: Path, resume: str, recipe: dict) -> Path | None:
    """The checkpoint that a run in `output` goes on from, None for its beginning.

    `recipe` is that of the run as plain values. Raises `RecipeError` when `output` belongs to another recipe.
    """
    if resume not in ("auto", "never"):
        if not is_whole(Path(resume)):
            raise RecipeError(
                f"`resume` is {resume!r}, which is no whole checkpoint; give auto, never or a checkpoint-N."
            )
        return Path(resume)
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
    file = output / "recipe.json"
    if not file.exists():
        raise RecipeError(f"{output} holds checkpoints, but no recipe.json that says of what. Choose another `output`.")
    before, now = _flat(json.loads(file.read_text())), _flat(recipe)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise RecipeError(
                f"{output} was made by another recipe: `{key}` was {before.get(key)!r} and is {now.get(key)!r}. Choose "
                "another `output`, or name the checkpoint to go on from in `resume`."
            )


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
