"""Checks every kernel on a CUDA device, times it beside its peers, and writes one JSON file.

    python -m benchmarks.gpu.run_all [--peers FOLDER] [--commit HASH] [--output FOLDER] [--only PART ...]
    python -m benchmarks.gpu.run_all --dry-run      # every part with tiny shapes on the CPU, in Triton's interpreter

Under ten minutes on an H100. Each part runs in a process of its own with a time limit, so that a crash costs that part
alone; the file is rewritten after each. Checks run side by side and compile what the timed parts need. The exit code
is 1 when a check failed or a part did not end well, 2 where there is no CUDA device. Missing peers are recorded, see
`benchmarks/gpu/peers.py`.
"""

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.goals import judged

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Parts of one stage run side by side; seconds each may take.
STAGES = [
    {"device": 60},
    {"check_selection": 150, "check_mla": 200, "check_gqa": 200, "check_losses": 150, "repeats": 150},
    {"mla": 110},
    {"gqa": 140},
    {"selection": 90},
    {"losses": 80},
    {"prefill": 100},
    {"flash_mla": 60},
    {"counters": 100},
    {"tuning": 240},
]
PARTS = [name for stage in STAGES for name in stage]
DEADLINE = 570
LOG_TAIL = 600


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, all parts in this process")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="of the code that runs; git is asked when it is not given")
    parser.add_argument("--peers", type=Path, help="folder with wheels of peers")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds; what has not begun by then is left")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process")
    parser.add_argument("--records", type=Path, help="with --part: file for its records, one JSON line each")
    return parser.parse_args(arguments)


def run_part(name: str, records: Path, dry_run: bool, peers: Path | None) -> None:
    """One part, in this process."""
    from benchmarks.gpu.bench import Bench, use_model_without_video

    use_model_without_video()
    module = importlib.import_module(f"benchmarks.gpu.part_{name}")
    with records.open("w") as out:
        module.run(Bench(name, out, dry_run, peers))


class Process:
    """A command in a process group of its own, with a time limit."""

    def __init__(self, command: list[str], limit: float, log: Path):
        self.started, self.limit, self.log = time.monotonic(), limit, log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> dict:
        """State, seconds, and the end of the output where it did not end well."""
        left = max(0.1, self.started + self.limit - time.monotonic())
        try:
            code = self.process.wait(left)
            state = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            state = f"stopped after {self.limit:.0f} s"
        result = {"state": state, "seconds": round(time.monotonic() - self.started, 1)}
        return result if state == "done" else result | {"log": self.log.read_text()[-LOG_TAIL:]}


def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def said(*command: str) -> str:
    """What a command prints, "unknown" where it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def environment(dry_run: bool, commit: str | None) -> dict:
    """Device, versions and commit, as every result records them. No driver means that there was no CUDA device."""
    import torch

    device, driver = platform.processor() or platform.machine(), None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = said(*asked)
    if commit is None:
        commit = said("git", "rev-parse", "HEAD")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": driver}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"benchmark": "gpu", "dry_run": dry_run, "device": device, "versions": versions, "commit": commit}


def read_records(folder: Path) -> list[dict]:
    """All records so far; a line that a killed process left half-written is dropped."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text().splitlines(keepends=True)
        found += [json.loads(line) for line in lines if line.endswith("\n")]
    return found


def add_floors(records: list[dict]) -> list[dict]:
    """Each timed call with its floor: operations and bytes at the rates that the device itself reached in this run."""
    rates = {entry["name"]: entry for entry in records if entry["part"] == "device" and entry["kind"] == "time"}
    product, copy = rates.get("matrix product"), rates.get("copy")
    if product is None or copy is None:
        return records
    full = []
    for entry in records:
        times = {}
        if entry["kind"] == "time" and entry["part"] != "device":
            if "flops" in entry:
                times["compute"] = entry["flops"] * product["ms"] / product["flops"]
            if "bytes" in entry:
                times["memory"] = entry["bytes"] * copy["ms"] / copy["bytes"]
        if times:
            bound = max(times, key=times.get)
            floor = times[bound]
            entry = entry | {"floor_ms": round(floor, 4), "bound": bound, "of_floor": round(floor / entry["ms"], 3)}
        full.append(entry)
    return full


def write(path: Path, facts: dict, parts: dict, records: list[dict]) -> None:
    """The file as it stands, whole at any moment."""
    result = facts | {"parts": parts, "goals": judged(records), "records": add_floors(records)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def show(records: list[dict], parts: dict) -> None:
    """Failures first, then times, ratios and goals."""
    checks = [entry for entry in records if entry["kind"] == "check"]
    wrong = [entry for entry in checks if not entry["ok"]]
    for entry in add_floors(records):
        if entry["kind"] == "time":
            shape = {k: entry[k] for k in ("heads", "batch", "tokens", "queries", "lists", "rho") if k in entry}
            rate = f"{entry['tflops']:8.1f} TFLOP/s" if "tflops" in entry else " " * 16
            floor = f"{entry['of_floor']:6.1%} of floor ({entry['bound']})" if "of_floor" in entry else ""
            print(f"{entry['ms']:10.3f} ms {rate} {entry['name']} {shape} {floor}")
        elif entry["kind"] in ("memory", "ratio", "counters", "tuning", "peer missing"):
            print({key: value for key, value in entry.items() if key not in ("part",)})
    for row in judged(records):
        value = "" if row["value"] is None else f"{row['value']} {row['unit']}: "
        print(f"goal {row['text']} ({row['floor']} / {row['stretch']} {row['unit']}): {value}{row['reached']}")
    for entry in wrong:
        print("WRONG", entry)
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed;", {n: p["state"] for n, p in parts.items()})


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    if options.part:
        run_part(options.part, options.records, options.dry_run, options.peers)
        return 0
    if not (options.dry_run or cuda_is_there()):
        print(
            "PyTorch finds no CUDA device, so nothing was run; use --dry-run to walk every part on the CPU.",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    facts = environment(options.dry_run, options.commit)
    now = datetime.datetime.now(datetime.timezone.utc)
    facts["started"] = now.isoformat(timespec="seconds")
    name = "dry_run" if options.dry_run else facts["device"].lower().replace(" ", "-")
    path = options.output / f"gpu_{name}_{now:%Y%m%d-%H%M%S}.json"
    parts: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for stage in STAGES:
            names = [part for part in stage if part in options.only]
            left = math.inf if options.dry_run else options.deadline - (time.monotonic() - began)
            if left < 5:
                parts |= {part: {"state": "not run, out of time"} for part in names}
            elif options.dry_run:
                for part in names:
                    start = time.monotonic()
                    run_part(part, folder / f"{part}.jsonl", True, options.peers)
                    parts[part] = {"state": "done", "seconds": round(time.monotonic() - start, 1)}
            else:
                parts |= run_stage(names, stage, left, folder, options.peers)
            write(path, facts, parts, read_records(folder))
        records = read_records(folder)
    show(records, parts)
    print(path)
    failed = [entry for entry in records if entry["kind"] == "check" and not entry["ok"]]
    return int(bool(failed) or any(part["state"] != "done" for part in parts.values()))


def run_stage(names: list[str], limits: dict[str, float], left: float, folder: Path, peers: Path | None) -> dict:
    """Parts side by side, each in its own process; name -> how it ended."""
    running = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--part", name]
        command += ["--records", str(folder / f"{name}.jsonl")]
        command += ["--peers", str(peers.resolve())] if peers else []
        running[name] = Process(command, min(limits[name], left), folder / f"{name}.log")
    ended = {name: process.wait() for name, process in running.items()}
    for name, end in ended.items():
        print(f"{name}: {end['state']} in {end['seconds']} s", flush=True)
    return ended


if __name__ == "__main__":
    sys.exit(main())
