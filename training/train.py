"""Train one stage: `python -m training.train CONFIG.yaml [key=value ...]`, in one process or under `accelerate launch`.

The run lives in the recipe's `output`: checkpoints while it trains, and at its end `final`, which loads with
`AutoModel.from_pretrained("OUTPUT/final", trust_remote_code=True)`. The same command goes on where the last one was
killed, interrupted (Ctrl-C saves first) or switched off, and on the CPU its weights and losses are those of a run that
never stopped, bit for bit.
"""

import argparse
import contextlib
import dataclasses
import gc
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from modeling_keye import KeyeProcessor

from .chat_template import mark_answers
from .collator import VideoQACollator
from .data_errors import sentence
from .exact_answers import ExactAnswersMixin
from .indexer_training import IndexerTrainer, decoder_of
from .model_source import LOADING_ERRORS, check_source
from .recipe import Recipe, RecipeError, load_recipe, training_arguments
from .resuming import LogWithSave, StopOnSignal, check_same_run, find_start, write_json
from .router_balance import RouterBalance
from .rows import DataError, load_rows
from .sharding import ShardsOnCpuMixin
from .stages import load_config, load_model, prepare
from .video_dataset import VideoQADataset

RECORD = "training.json"
PACKAGES = ("transformers", "accelerate", "peft", "datasets", "keye-video-qa")


class KeyeTrainer(ExactAnswersMixin, ShardsOnCpuMixin, IndexerTrainer):
    """`Trainer` with the indexer's loss in its log and exact answers in its evaluation."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 2 bad input, 128 + signal after a stop that can be resumed."""
    parser = argparse.ArgumentParser(description="Train one stage of a recipe.")
    parser.add_argument("config", help="the recipe, a YAML file; see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example trainer.max_steps=10")
    options = parser.parse_args(arguments)
    try:
        return run(load_recipe(options.config, options.overrides))
    except (RecipeError, DataError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted outside of a step; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model that outlives its group can hang the end of the process
            dist.destroy_process_group()


def run(recipe: Recipe) -> int:
    """Train `recipe` to its end, or until a signal comes. Returns as `main`; raises `RecipeError` and `DataError`."""
    output = Path(recipe.output)
    final, values = output / "final", dataclasses.asdict(recipe)
    if (final / RECORD).exists():
        check_same_run(output, values)
        print(f"{final} is finished already.")
        return 0
    start = find_start(output, recipe.resume, values)
    # Everything that can be refused is looked at before the first file is written.
    arguments = training_arguments(recipe)
    set_seed(recipe.seed)
    processor = load_processor(recipe)
    datasets = {name: make_dataset(recipe, processor, name) for name in ("train", "eval")}
    with naming_model(recipe):
        model = load_model(recipe)
    model = prepare(model, recipe)

    stop = StopOnSignal()
    trainer = make_trainer(recipe, arguments, model, processor, datasets, stop)
    if trainer.is_fsdp_enabled:
        # All processes gather a layer's weights together, so none may run it once more than another.
        decoder_of(model).config.prefill_chunk_tokens = sys.maxsize
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "recipe.json", values)
        print(f"{recipe.stage}: {trainable(model)}; {f'going on from {start}' if start else 'from the beginning'}")
    with stop.listening():
        fit(trainer, start)
    if stop.received and trainer.state.global_step < trainer.state.max_steps:
        if trainer.is_world_process_zero():
            name = signal.Signals(stop.received).name
            print(f"{name}: stopped behind step {trainer.state.global_step} and saved. The same command goes on.")
        return 128 + stop.received
    if trainer.state.global_step == 0:
        raise RecipeError(
            f"Nothing was trained: {len(datasets['train'])} rows of `data.train` do not fill one batch per process, "
            "and `trainer.dataloader_drop_last` leaves out what is not full. Set it to false, or lower "
            "`trainer.per_device_train_batch_size`."
        )
    save_final(trainer, recipe, final)
    if trainer.is_world_process_zero():
        print(f"{final} is finished.")
    return 0


def load_processor(recipe: Recipe) -> KeyeProcessor:
    """The processor of the model; its chat template marks the answers."""
    with naming_model(recipe):
        check_source(recipe.model)
        processor = KeyeProcessor.from_pretrained(recipe.model)
    mark_answers(processor, recipe.data.chat_template)
    return processor


@contextlib.contextmanager
def naming_model(recipe: Recipe) -> Iterator[None]:
    """What is wrong with the folder of `model`, said by the name of that key."""
    try:
        yield
    except RecipeError:
        raise
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"`model` is {recipe.model!r}, which cannot be read: {reason}") from error


def make_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: torch.nn.Module,
    processor: KeyeProcessor,
    datasets: dict[str, VideoQADataset | None],
    stop: StopOnSignal,
) -> KeyeTrainer:
    """Raises `RecipeError` where `output` cannot be made or the arguments ask for what is not installed."""
    collator = VideoQACollator(
        processor,
        packed=recipe.data.packed,
        pad_to_multiple_of=recipe.data.pad_to_multiple_of,
        config=model.config,
    )
    try:
        check_options(arguments, model)
        return KeyeTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets["train"],
            eval_dataset=datasets["eval"],
            data_collator=collator,
            processing_class=processor,
            callbacks=[RouterBalance(recipe.router_balance), LogWithSave(), stop],
        )
    except OSError as error:
        raise RecipeError(f"`output` is {recipe.output!r}, where no folder can be made: {error}") from error
    except RecipeError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        raise lacking(error) from error


def check_options(arguments: TrainingArguments, model: torch.nn.Module) -> None:
    """Make for one number what `Trainer` makes with its first step only: optimizer, schedule and checkpointing."""
    kind, options = KeyeTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    number = torch.zeros(1, device=arguments.device, requires_grad=True)
    # Others, such as Muon and GaLore, are made of the whole model, which is left to the first step.
    simple = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    simple = simple and not options.keys() & {"params", "model", "optimizer_dict"}
    with naming_options("optim"):
        optimizer = kind([number], **options) if simple else torch.optim.SGD([number], lr=arguments.learning_rate)
    steps = max(arguments.max_steps, 1)
    with naming_options("lr_scheduler_type"):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    if arguments.gradient_checkpointing and arguments.gradient_checkpointing_kwargs:
        with naming_options("gradient_checkpointing_kwargs"):
            options = dict(arguments.gradient_checkpointing_kwargs)
            for name in ("every_n_layers", "offload"):  # for the library; the rest is for PyTorch
                options.pop(name, None)
            checkpoint(torch.nn.Identity(), number, **options)


@contextlib.contextmanager
def naming_options(key: str) -> Iterator[None]:
    """What is refused of `trainer.KEY` and the options that go with it, said by that name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"`trainer.{key}` cannot be had with the options it is given: {reason}") from error


def fit(trainer: Trainer, start: Path | None) -> None:
    """Train from `start` on; raises `RecipeError` for arguments whose fault shows only then."""
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except ImportError as error:
        raise lacking(error) from error
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        # Which kinds of questions are scored shows with the first evaluation.
        raise RecipeError(str(error.args[0])) from error


def lacking(error: Exception) -> RecipeError:
    """`trainer` asks for a package that is missing, or for what this machine cannot do."""
    return RecipeError(f"`trainer` asks for what cannot be had here: {' '.join(str(error).split())}")


def make_dataset(recipe: Recipe, processor: KeyeProcessor, part: str) -> VideoQADataset | None:
    """The `train` or `eval` examples of the recipe, None where it names no source."""
    data = recipe.data
    source = getattr(data, part)
    if source is None:
        return None
    media_root = None if data.media_root is None else Path(data.media_root)
    rows = load_rows(source, format=data.format, media_root=media_root, split=getattr(data, f"{part}_split"))
    return VideoQADataset(
        rows,
        processor,
        max_length=data.max_length,
        on_bad_video=data.on_bad_video,
        frame_cache=None if data.frame_cache is None else Path(data.frame_cache),
        video_options=data.video_options,
        skipped_file=Path(recipe.output) / "skipped.jsonl",
    )


def trainable(model) -> str:
    """How much of a model trains, in words."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    part = sum(size for size, trains in sizes if trains)
    return f"{part:,} of {sum(size for size, _ in sizes):,} parameters train"


def save_final(trainer: Trainer, recipe: Recipe, final: Path) -> None:
    """Write `final` under another name and rename it when it is whole. Sharded weights need all processes."""
    temporary = final.with_name("final.tmp")
    main_process, lora = trainer.is_world_process_zero(), recipe.lora
    if main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    text = decoder_of(trainer.model).config
    text.prefill_chunk_tokens = load_config(recipe).text_config.prefill_chunk_tokens
    # The losses belong to the run; whoever trains this model next says which ones.
    text.indexer_loss_coef, text.indexer_stage = 0.0, "adaptation"
    merges = lora is not None and lora.merge
    trainer.save_model(str(temporary / "adapter" if merges else temporary))
    trainer.accelerator.wait_for_everyone()
    if not main_process:
        return
    if merges:
        merge(recipe, temporary / "adapter", temporary)
        trainer.processing_class.save_pretrained(temporary)
    for name in (TRAINING_ARGS_NAME, "README.md"):
        for file in temporary.rglob(name):
            file.unlink()  # a pickle that says less than the recipe, and PEFT's card without a word in it
    write_json(temporary / RECORD, record(trainer, recipe))
    os.replace(temporary, final)


def merge(recipe: Recipe, adapter: Path, folder: Path) -> None:
    """Save the model of the recipe with `adapter` merged into it. Both are read from disk: what was saved counts."""
    model = PeftModel.from_pretrained(load_model(recipe), adapter).merge_and_unload()
    model.save_pretrained(folder)


def record(trainer: Trainer, recipe: Recipe) -> dict:
    """How the weights came to be: recipe, versions, and the log with all losses and scores."""
    return {
        "stage": recipe.stage,
        "seed": recipe.seed,
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "recipe": dataclasses.asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the build, which the package's own version may lack
            **{name: _version(name) for name in PACKAGES},
        },
        # The library divides what it summed since the last resume by all steps.
        "log": [{k: v for k, v in entry.items() if k != "train_loss"} for entry in trainer.state.log_history],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # this repository, run from its folder
        return None


if __name__ == "__main__":
    sys.exit(main())
