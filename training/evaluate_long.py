"""Questions about long held-out clips: `python -m training.evaluate --model DIR --long --frames 10000 --json FILE`.

Every clip is written to an H.264 file, read by the checkpoint's own processor with all its frames, and prefilled once
per mode; each question is then answered greedily from that cache. Modes: `sparse` is the checkpoint as shipped, `dense`
attends to every token, `untrained` selects by an indexer that was initialised anew. With `--json` a run that was
stopped goes on where it was: what a mode has answered about a clip is not asked again.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows has none
    resource = None

from .exact_answers import is_right
from .long_plan import LongPlan, OptionError, checked_kinds, held_out_long
from .long_videos import LONG_KINDS, NO, YES
from .resuming import write_json
from .score_plot import check_picture, plot_scores
from .score_tables import accuracy, cell, grouped, markdown
from .synthetic_videos import Question, write_video
from .video_memory import (
    MODES,
    ReadVideo,
    VideoMemory,
    attention_mode,
    decoder_layers,
    prefill_share,
    question_ids,
    read_video,
)

# Options of `training.evaluate` that say nothing about short clips.
LONG_OPTIONS = ("clips", "shown", "distances", "modes", "topk", "json", "plot")


def evaluate_long(
    model, processor, plan: LongPlan, modes: tuple[str, ...] = MODES, topk: int | None = None, path: Path | None = None
) -> dict:
    """Ask all questions in all modes and return the record: "settings", "answers" with one entry per question and
    mode, and "readings" with one per clip and mode.

    `path`: JSON file that receives the record after every clip and mode, and from which an earlier one is taken up.

    Raises `OptionError`, before anything is read, for what the plan, the model or an earlier record does not allow.
    """
    plan.check()
    for mode in modes:
        try:
            with attention_mode(model, mode, topk):
                pass
        except ValueError as error:
            raise OptionError(str(error)) from error
    record = open_record(path, {**asdict(plan), "topk": topk, "weights": fingerprint(model)})
    with tempfile.TemporaryDirectory() as folder:
        for frames in plan.frames:
            for number, (clip, questions) in enumerate(held_out_long(plan, frames)):
                done = {r["mode"] for r in record["readings"] if (r["frames"], r["clip"]) == (frames, number)}
                missing = [mode for mode in modes if mode not in done]
                if not missing:
                    continue
                file = write_video(clip, Path(folder) / "clip.mp4", plan.size)
                video = read_video(model, processor, file, clip.times)
                for mode in missing:
                    about = {"frames": frames, "clip": number, "mode": mode}
                    with attention_mode(model, mode, topk):
                        answers, reading = ask_all(model, processor, plan, video, questions, about)
                    record["answers"] += answers
                    record["readings"].append(reading)
                    if path is not None:
                        write_json(path, record)
    for name in ("answers", "readings"):
        record[name].sort(key=lambda e: (plan.frames.index(e["frames"]), MODES.index(e["mode"]), e["clip"]))
    return record


def ask_all(
    model, processor, plan: LongPlan, video: ReadVideo, questions: list[Question], about: dict
) -> tuple[list[dict], dict]:
    """Answers to all questions about one clip in the current mode, and what reading the clip took."""
    started = time.perf_counter()
    memory = VideoMemory(model, video, progress=True)
    prefilled = time.perf_counter()
    answers = []
    title = f"{about['frames']} frames, clip {about['clip'] + 1} of {plan.clips}, {about['mode']}"
    for question in tqdm(questions, desc=title, unit="question"):
        reply = memory.ask(question_ids(processor, question.text))
        answer = processor.decode(reply.ids, skip_special_tokens=True)
        answers.append(
            {
                **about,
                "kind": question.kind,
                "distance": question.distance,
                "group": plan.group(question),
                "question": question.text,
                "about": list(question.about),
                "expected": question.answer,
                "answer": answer,
                "right": is_right(answer, question.answer),
                "attended": reply.attended,
                "attended_most": reply.attended_most,
            }
        )
    reading = {
        **about,
        "tokens": memory.length,
        "attended": prefill_share(model, memory.length),
        "seconds_reading": round(prefilled - started, 1),
        "seconds_asking": round(time.perf_counter() - prefilled, 1),
    }
    return answers, reading


def fingerprint(model) -> str:
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def open_record(path: Path | None, settings: dict) -> dict:
    """The record in a file, or an empty one; raises `OptionError` when the file is another, or of other settings."""
    settings = json.loads(json.dumps(settings))
    if path is None or not path.exists():
        return {"settings": settings, "answers": [], "readings": []}
    try:
        found = json.loads(path.read_text())
        found = {name: found[name] for name in ("settings", "answers", "readings")}
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"--json {path} is there and holds no record of an evaluation; name another file.") from error
    for name, value in settings.items():
        before = found["settings"].get(name)
        if before != value:
            raise OptionError(
                f"{path} holds the answers of a run with {name} = {before}, this one has {value}. Name another file "
                "with --json, or remove this one."
            )
    return found


def scores(record: dict) -> dict:
    """Accuracy by length, kind, distance and mode, the share of tokens attended, and verdicts."""
    answers = record["answers"]
    rows = []
    for frames, at_length in grouped(answers, lambda a: a["frames"]).items():
        groups = {("all", "all"): at_length}
        for kind, of_kind in sorted(grouped(at_length, lambda a: a["kind"]).items()):
            groups[kind, "all"] = of_kind
            by_distance = grouped(sorted(of_kind, key=lambda a: a["distance"]), lambda a: a["group"])
            groups.update({(kind, distance): entries for distance, entries in by_distance.items()})
        for (kind, distance), entries in groups.items():
            by_mode = {mode: accuracy(part) for mode, part in grouped(entries, lambda a: a["mode"]).items()}
            rows.append({"frames": frames, "kind": kind, "distance": distance, "modes": by_mode})
    return {"accuracy": rows, "attended": _attended(record), "verdicts": _verdicts(answers)}


def _attended(record: dict) -> list[dict]:
    """Per length and mode: share of tokens attended by the queries of questions and answers, and of the prefill."""
    rows = []
    answers = grouped(record["answers"], lambda a: (a["frames"], a["mode"]))
    for (frames, mode), readings in grouped(record["readings"], lambda r: (r["frames"], r["mode"])).items():
        asked = answers.get((frames, mode), [])
        rows.append(
            {
                "frames": frames,
                "mode": mode,
                "tokens": max(reading["tokens"] for reading in readings),
                "mean": sum(a["attended"] for a in asked) / max(1, len(asked)),
                "most": max((a["attended_most"] for a in asked), default=0.0),
                "prefill": sum(reading["attended"] for reading in readings) / len(readings),
                "seconds_reading": round(sum(reading["seconds_reading"] for reading in readings) / len(readings), 1),
                "seconds_per_question": round(
                    sum(reading["seconds_asking"] for reading in readings) / max(1, len(asked)), 3
                ),
            }
        )
    return rows


def _verdicts(answers: list[dict]) -> list[dict]:
    """Of questions whose answer ends in yes or no, per kind and mode, in percent: how often the last word is right,
    and the share of "yes" among the expected and the given answers, so that guessing shows."""
    asked = [answer for answer in answers if _last_word(answer["expected"]) in (YES, NO)]
    rows = []
    for (kind, mode), entries in grouped(asked, lambda a: (a["kind"], a["mode"])).items():
        pairs = [(_last_word(entry["expected"]), _last_word(entry["answer"])) for entry in entries]
        row = {"kind": kind, "mode": mode, "questions": len(pairs)}
        row["right"] = round(100 * sum(expected == given for expected, given in pairs) / len(pairs), 1)
        row["expected_yes"] = round(100 * sum(expected == YES for expected, _ in pairs) / len(pairs), 1)
        row["answered_yes"] = round(100 * sum(given == YES for _, given in pairs) / len(pairs), 1)
        rows.append(row)
    return rows


def _last_word(answer: str) -> str:
    return answer.lower().rpartition(" ")[2]


def tables(found: dict) -> str:
    """What `scores` gives as Markdown: accuracy in percent with its 95 % interval, then what was attended."""
    modes = [mode for mode in MODES if any(mode in row["modes"] for row in found["accuracy"])]
    rows = []
    for row in found["accuracy"]:
        number = max(score["questions"] for score in row["modes"].values())
        rows.append([f"{row['frames']:,}", row["kind"], row["distance"], number])
        rows[-1] += [cell(row["modes"].get(mode)) for mode in modes]
    parts = [markdown(["frames", "kind", "distance in frames", "questions", *modes], rows)]
    rows = [
        [
            f"{row['frames']:,}",
            row["mode"],
            f"{row['tokens']:,}",
            f"{100 * row['mean']:.2f}",
            f"{100 * row['most']:.2f}",
            f"{100 * row['prefill']:.2f}",
            row["seconds_reading"],
            row["seconds_per_question"],
        ]
        for row in found["attended"]
    ]
    header = [
        "frames",
        "mode",
        "tokens",
        "% attended, mean",
        "% at most",
        "% in prefill",
        "s to read",
        "s per question",
    ]
    parts.append(markdown(header, rows))
    if found["verdicts"]:
        header = ["kind", "mode", "questions", "% last word right", "% yes expected", "% yes answered"]
        parts.append(markdown(header, [list(row.values()) for row in found["verdicts"]]))
    return "\n\n".join(parts)


def modes_of(model) -> tuple[str, ...]:
    """The modes that a model has: all, or without an indexer those that need none."""
    has_indexer = any(layer.indexer is not None for layer in decoder_layers(model))
    return tuple(mode for mode in MODES if has_indexer or mode != "untrained")


def peak_memory() -> float | None:
    """The most memory that this process has held, in GiB; None on systems that do not say."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `training.evaluate` that need `--long`."""
    group = parser.add_argument_group("long clips")
    group.add_argument("--long", action="store_true", help="ask about long clips with shapes far apart")
    group.add_argument("--clips", type=int, help=f"clips per length ({LongPlan.clips})")
    group.add_argument("--shown", type=int, help=f"shapes per clip ({LongPlan.shown})")
    group.add_argument("--distances", type=int, nargs="+", help="frames between the shapes that a question compares")
    group.add_argument("--modes", nargs="+", choices=MODES, help="what queries attend to (all that the model has)")
    group.add_argument("--topk", type=int, help="tokens that the indexer chooses, in place of the checkpoint's")
    group.add_argument("--json", type=Path, metavar="FILE", help="record of all answers; goes on from an earlier one")
    group.add_argument("--plot", type=Path, metavar="FILE", help="accuracy by distance as .svg or .png (matplotlib)")


def prepare(arguments: argparse.Namespace) -> Callable:
    """Check the options; the result runs the evaluation for (model, processor), prints tables and returns the scores.

    Raises `OptionError` for what does not fit together, and so does the result for what the model lacks.
    """
    numbers = {name: getattr(arguments, name) for name in ("clips", "shown", "questions")}
    plan = LongPlan(
        frames=tuple(dict.fromkeys(arguments.frames or LongPlan.frames)),
        distances=tuple(dict.fromkeys(arguments.distances or LongPlan.distances)),
        kinds=checked_kinds(arguments.kinds, LONG_KINDS) or LONG_KINDS,
        seed=arguments.seed,
        size=arguments.size,
        **{name: number for name, number in numbers.items() if number is not None},
    )
    plan.check()
    if arguments.topk is not None and arguments.topk < 1:
        raise OptionError(f"--topk {arguments.topk} must be at least 1.")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise OptionError(f"--{name} {path} cannot be written, because there is no folder {path.parent}; make it.")
    if arguments.plot is not None:
        try:
            check_picture(arguments.plot)
        except (ValueError, ImportError) as error:
            raise OptionError(f"--plot: {error}") from error

    def run(model, processor) -> dict:
        modes = tuple(arguments.modes or modes_of(model))
        if left_out := [mode for mode in MODES if arguments.modes is None and mode not in modes]:
            print(f"This model has no indexer: the mode {', '.join(left_out)} is left out.", file=sys.stderr)
        record = evaluate_long(model, processor, plan, modes, arguments.topk, arguments.json)
        found = {**scores(record), "peak_memory_gib": peak_memory()}
        wrong = [answer for answer in record["answers"] if not answer["right"]]
        for answer in wrong[: arguments.show_errors]:
            print("{frames} frames, {mode}: {question} expected {expected!r}, got {answer!r}".format(**answer))
        print(f"{tables(found)}\n\nPeak memory: {found['peak_memory_gib']} GiB.")
        if arguments.json is not None:
            write_json(arguments.json, {**found, **record})
        if arguments.plot is not None:
            plot_scores(found, arguments.plot)
        return {**found, "settings": record["settings"]}

    return run
