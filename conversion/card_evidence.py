"""What reports of other commands prove about a checkpoint folder: the evidence of its model card.

A report counts only if it is about the weights that the folder holds now, and if it says that everything was right.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult

from modeling_keye.checkpoint_keye import Checkpoint

from .publish_upload import LocalFile

PIPELINE_TAG = "video-text-to-text"
# What a reader may take for granted unless the card says that nobody checked it. A report covers some of it.
CLAIMS = {
    "weights": "that the weights equal their source, value for value: `python -m conversion.verify SOURCE FOLDER`",
    "loading": "that it loads and generates in a clean process: `python -m conversion.publish FOLDER REPO --dry-run`",
    "hub": "that a download of the published files gives the same logits: `python -m conversion.publish FOLDER REPO`",
    "quality": "the quality of its answers, on any data set",
    "gpu": "running on a GPU",
    "context": "prompts near the {context:,} tokens that the configuration allows",
}


class CardError(ValueError):
    """A fact is missing, or contradicts the folder. The message says which and what to do."""


@dataclass(frozen=True)
class Row:
    """A line of the table of what was verified."""

    what: str
    result: str
    command: str


@dataclass
class Evidence:
    """What a report proves."""

    rows: list[Row]
    covers: set[str]
    results: list[EvalResult] = field(default_factory=list)


def read_evidence(path: Path, folder: Path, stored: Checkpoint) -> Evidence:
    """What a report file proves about `folder`.

    Raises `CardError` for a report that is not about these weights, that says something failed, or of unknown make.
    """
    report = _read_report(path)
    if report.get("kind") == "publish":
        return _publish_evidence(report, path, folder, stored)
    if {"equal", "a", "b"} <= report.keys():
        return _verify_evidence(report, path, folder, stored)
    if {"exact_match", "questions"} <= report.keys():
        return _evaluate_evidence(report)
    if {"what", "result", "command"} <= report.keys():
        unknown = sorted(set(report.get("covers", ())) - set(CLAIMS))
        if unknown:
            raise CardError(f"{path} covers {', '.join(unknown)}; known: {', '.join(CLAIMS)}")
        row = Row(str(report["what"]), str(report["result"]), f"`{report['command']}`")
        return Evidence([row], set(report.get("covers", ())))
    raise CardError(
        f"{path} is no report that is known here; expected one of conversion.verify, conversion.publish, "
        "training.evaluate, or an object with what, result and command"
    )


def _publish_evidence(report: dict, path: Path, folder: Path, stored: Checkpoint) -> Evidence:
    if not report.get("passed"):
        raise CardError(f"{path} says that a check failed, so it verifies nothing; repair that and run it again")
    files = report.get("files") or {}
    for file in stored.files:
        if files.get(file.name, {}).get("sha256") != LocalFile.read(file.parent, file.name).sha256:
            raise CardError(
                f"{path} is about another {file.name} than the one in {folder}; run conversion.publish again"
            )
    command = f"`{report['command']}`"
    machine = ", ".join(f"{name} {version}" for name, version in report.get("environment", {}).items())
    rows, covers = [], set()
    if report.get("generated"):
        rows.append(Row("Loads and generates in a clean process", machine, command))
        covers.add("loading")
    uploaded = report.get("uploaded")
    if uploaded and report.get("verified"):
        result = f"every file and all logits equal, at commit {uploaded['commit'][:12]}"
        rows.append(Row(f"Download of {uploaded['repository']} against the local folder", result, command))
        covers.add("hub")
    if str(report.get("environment", {}).get("device", "")).startswith("cuda"):
        covers.add("gpu")
    return Evidence(rows, covers)


def _verify_evidence(report: dict, path: Path, folder: Path, stored: Checkpoint) -> Evidence:
    if not report["equal"]:
        raise CardError(f"{path} says {report.get('verdict', 'DIFFERENT')}; that verifies nothing")
    size = sum(tensor.nbytes for tensor in stored.values())
    sides = {label: report[label] for label in ("a", "b")}
    here = [label for label, side in sides.items() if Path(side["folder"]).resolve() == folder.resolve()]
    if not here:
        raise CardError(f"{path} compares {sides['a']['folder']} with {sides['b']['folder']}, and neither is {folder}")
    if any((sides[label]["tensors"], sides[label]["bytes"]) != (len(stored), size) for label in here):
        raise CardError(f"{path} is about other weights than those in {folder} now; run conversion.verify again")
    other = sides["b" if here[0] == "a" else "a"]
    name, own = Path(other["folder"]).name, folder.resolve().name
    what = f"Weights equal those of {name} (layout {other['layout']}), value for value"
    names = (own, name) if here[0] == "a" else (name, own)
    return Evidence([Row(what, report["verdict"], f"`python -m conversion.verify {' '.join(names)}`")], {"weights"})


def _evaluate_evidence(report: dict) -> Evidence:
    questions, value = report["questions"], report["exact_match"]
    kinds = ", ".join(report.get("by_kind", ()))
    command = f"`{report['command']}`" if "command" in report else "`python -m training.evaluate`"
    settings = (
        f"{questions} questions ({kinds}), seed {report['seed']}" if "seed" in report else f"{questions} questions"
    )
    result = EvalResult(
        task_type=PIPELINE_TAG,
        dataset_type="synthetic",
        dataset_name="clips drawn by training.synthetic_videos",
        metric_type="exact_match",
        metric_value=value,
        metric_name=f"exact match in percent, {settings}",
    )
    return Evidence(
        [Row(f"Answers about synthetic clips, {settings}", f"{value} % exact match", command)], {"quality"}, [result]
    )


def _read_report(path: Path) -> dict:
    """The JSON object in a file, or in its last line: commands print it behind other output."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CardError(f"the report {path} cannot be read ({error})") from error
    for part in (text, text.splitlines()[-1] if text else ""):
        try:
            report = json.loads(part)
        except ValueError:
            continue
        if isinstance(report, dict):
            return report
    raise CardError(f"{path} holds no JSON object; give the file that a command wrote its report to")
