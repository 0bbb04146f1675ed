"""The GPU table of README.md, made of the files in benchmarks/results/ and of nothing else.

    python -m benchmarks.readme_table            # rewrites what stands between the markers
    python -m benchmarks.readme_table --check    # exit code 1 when README says something else

The latest run of each device counts; dry runs, runs without CUDA and runs of which no part was finished never do.
Without a run the table says "not yet timed".
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.gpu.goals import judged

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- gpu table: begin, made by `python -m benchmarks.readme_table` -->", "<!-- gpu table: end -->"


def latest_runs(folder: Path) -> list[dict]:
    """The latest whole run of each device, by device name."""
    runs: dict[str, dict] = {}
    for path in sorted(folder.glob("gpu_*.json")):
        run = json.loads(path.read_text())
        known = runs.get(run["device"])
        if _on_a_device(run) and (known is None or known["started"] < run["started"]):
            runs[run["device"]] = run | {"file": path.name}
    return [runs[name] for name in sorted(runs)]


def _on_a_device(run: dict) -> bool:
    """Whether something was measured, on CUDA."""
    done = any(part["state"] == "done" for part in run["parts"].values())
    return done and not run["dry_run"] and run["versions"]["driver"] is not None


def table(runs: list[dict]) -> str:
    """Markdown: one row per goal, one column per device, and where the numbers come from."""
    names = [run["device"] for run in runs] or ["H100"]
    lines = ["| | Goal (floor / stretch) | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    columns = [{row["goal"]: row for row in run["goals"]} for run in runs] or [{}]
    for goal in judged([]):
        cells = [_cell(column.get(goal["goal"], goal)) for column in columns]
        mark = f"{goal['floor']:g} / {goal['stretch']:g} {goal['unit']}"
        lines.append(f"| {goal['text']} | {mark} | " + " | ".join(cells) + " |")
    lines.append("")
    for run in runs:
        checks = [entry for entry in run["records"] if entry["kind"] == "check"]
        passed = sum(entry["ok"] for entry in checks)
        versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if v)
        lines.append(
            f"{run['device']}: {passed} of {len(checks)} checks against float64 passed, {versions}, commit "
            f"{run['commit'][:12]}; full record `benchmarks/results/{run['file']}`."
        )
    if not runs:
        lines.append("No run on a GPU has been recorded: not yet timed.")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    if row["value"] is None:
        return "not yet timed"
    return f"{row['value']:g} ({row['reached']})"


def replaced(text: str, content: str) -> str:
    """`text` with what stands between the markers exchanged. Raises `ValueError` when a marker is missing."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}, in this order, around the GPU table.")
    return f"{text[: begin + len(BEGIN)]}\n{content}\n{text[end:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, tell by the exit code")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    before = options.readme.read_text()
    after = replaced(before, table(latest_runs(options.results)))
    if options.check:
        if before != after:
            print(f"{options.readme} differs from the results; run `python -m benchmarks.readme_table`.")
        return int(before != after)
    temporary = options.readme.with_suffix(".tmp")
    temporary.write_text(after)
    temporary.replace(options.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
