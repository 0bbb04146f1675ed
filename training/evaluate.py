"""Ask a checkpoint questions about held-out clips: `python -m training.evaluate --model DIR --questions 500 --seed S`.

Every clip is written to an H.264 file, read by the checkpoint's own processor and answered by greedy `generate`. An
answer counts when it equals the expected one, letter case and outer spaces aside. The last line is one JSON document.
With `--long` the clips are those of `evaluate_long`.

Exit codes: 0 done, 2 an option cannot be used (one sentence on stderr says why).
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from modeling_keye import KeyeForVideoQA, KeyeProcessor

from . import evaluate_long
from .exact_answers import is_right
from .long_plan import OptionError, checked_kinds
from .long_videos import LONG_KINDS
from .model_source import LOADING_ERRORS, check_source
from .synthetic_videos import FRAME_SIZE, KINDS, TWO_WORD_KINDS, Clip, Question, make_clip, make_questions, write_video

# Mixed into every seed, so that no seed of the training stream gives the same clips.
HELD_OUT = 77_001
SHORT_KINDS = (*KINDS, *TWO_WORD_KINDS)


def held_out(
    number: int, seed: int, frames: tuple[int, int] = (4, 12), kinds: tuple[str, ...] = KINDS
) -> Iterator[tuple[Clip, Question]]:
    """`number` clips with one question each; the kinds take turns."""
    rng = np.random.default_rng([HELD_OUT, seed])
    done = 0
    while done < number:
        clip = make_clip(rng, frames)
        for question in make_questions(clip, rng, 1, (kinds[done % len(kinds)],)):
            done += 1
            yield clip, question


@torch.no_grad()
def ask(model, processor, paths: list[Path], questions: list[str]) -> list[str]:
    """Greedy answers to one question per video file."""
    conversations = [
        [{"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": question}]}]
        for path, question in zip(paths, questions)
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    answers = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answers, skip_special_tokens=True)


def score(results: list[tuple[Clip, Question, str]]) -> dict[str, object]:
    """Exact match overall, per kind of question and per number of frames, in percent."""
    groups: dict[str, dict[str, list[bool]]] = {"kind": defaultdict(list), "frames": defaultdict(list)}
    groups["background"] = defaultdict(list)
    for clip, question, answer in results:
        right = is_right(answer, question.answer)
        groups["kind"][question.kind].append(right)
        groups["frames"][f"{len(clip.things):02d}"].append(right)
        groups["background"][clip.background].append(right)
    everything = [right for rights in groups["kind"].values() for right in rights]
    return {
        "questions": len(everything),
        "exact_match": round(100 * sum(everything) / len(everything), 1),
        **{
            f"by_{name}": {key: round(100 * sum(rights) / len(rights), 1) for key, rights in sorted(group.items())}
            for name, group in groups.items()
        },
    }


def evaluate(
    model,
    processor,
    questions: int,
    seed: int,
    frames: tuple[int, int] = (4, 12),
    size: int = FRAME_SIZE,
    kinds: tuple[str, ...] = KINDS,
    batch: int = 20,
) -> tuple[dict[str, object], list[tuple[Clip, Question, str]]]:
    """Scores and every (clip, question, answer) of a held-out set."""
    results = []
    pending = list(held_out(questions, seed, frames, kinds))
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(pending), batch):
            group = pending[start : start + batch]
            paths = [write_video(clip, Path(folder) / f"{place}.mp4", size) for place, (clip, _) in enumerate(group)]
            answers = ask(model, processor, paths, [question.text for _, question in group])
            results += [(clip, question, answer) for (clip, question), answer in zip(group, answers)]
            print(f"{len(results)} of {questions} questions", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return score(results), results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Score a checkpoint on held-out clips read from H.264 files."
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub name")
    parser.add_argument(
        "--questions", type=int, help="questions (500); with --long per kind or, where it compares, per distance (50)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--frames", type=int, nargs="+", help="shortest and longest clip (4 12); with --long all lengths (10000)"
    )
    parser.add_argument("--size", type=int, default=FRAME_SIZE, help="side of the written files in pixels")
    parser.add_argument("--kinds", nargs="+", help=f"of {', '.join(SHORT_KINDS)}; with --long {', '.join(LONG_KINDS)}")
    parser.add_argument("--show-errors", type=int, default=0, metavar="N", help="print the first N wrong answers")
    evaluate_long.add_options(parser)
    arguments = parser.parse_args()
    try:
        check_drawing(arguments)
        run = evaluate_long.prepare(arguments) if arguments.long else prepare(arguments)
        model, processor = load(arguments.model)
        started = time.perf_counter()
        scores = run(model, processor)
    except OptionError as problem:
        parser.exit(2, f"evaluate: {problem}\n")
    seconds = round(time.perf_counter() - started, 1)
    command = " ".join(["python -m training.evaluate", *sys.argv[1:]])
    print(json.dumps({**scores, "seed": arguments.seed, "seconds": seconds, "command": command}))


def check_drawing(arguments: argparse.Namespace) -> None:
    """Raise `OptionError` for a seed or a size that no clip can be drawn with."""
    if arguments.seed < 0:
        raise OptionError(f"--seed {arguments.seed} must be at least 0.")
    if arguments.size < 1 or arguments.size % FRAME_SIZE:
        raise OptionError(f"--size {arguments.size} must be a multiple of {FRAME_SIZE}.")


def load(name: str) -> tuple[KeyeForVideoQA, KeyeProcessor]:
    """Model and processor of a checkpoint folder or a Hub repository. Raises `OptionError`."""
    try:
        check_source(name)
        processor = KeyeProcessor.from_pretrained(name)
        return KeyeForVideoQA.from_pretrained(name).eval(), processor
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OptionError(f"--model {name} cannot be read: {reason}.") from error


def prepare(arguments: argparse.Namespace) -> Callable:
    """Check the options of short clips; the result runs the evaluation for (model, processor) and returns its scores.

    Raises `OptionError` for what does not fit together.
    """
    long = [f"--{name}" for name in evaluate_long.LONG_OPTIONS if getattr(arguments, name) is not None]
    if long:
        raise OptionError(f"{', '.join(long)}: only for long clips; add --long or leave this out.")
    kinds = checked_kinds(arguments.kinds, SHORT_KINDS) or KINDS
    frames = tuple(arguments.frames or (4, 12))
    if len(frames) != 2 or not 1 <= frames[0] <= frames[1]:
        raise OptionError(f"--frames {' '.join(map(str, frames))}: give the shortest and the longest clip (or --long).")
    questions = 500 if arguments.questions is None else arguments.questions
    if questions < 1:
        raise OptionError(f"--questions {questions} must be at least 1.")

    def run(model, processor) -> dict:
        scores, results = evaluate(model, processor, questions, arguments.seed, frames, arguments.size, kinds)
        wrong = [entry for entry in results if not is_right(entry[2], entry[1].answer)]
        for clip, question, answer in wrong[: arguments.show_errors]:
            print(f"{len(clip.things)} frames: {question.text} expected {question.answer!r}, got {answer!r}")
        return scores

    return run


if __name__ == "__main__":
    main()
