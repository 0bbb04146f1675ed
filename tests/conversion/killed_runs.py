"""A conversion that kills itself, in a process forked from one that has imported everything and computed nothing.

A moment is a number of calls that change the disk; the process kills itself there, before the call, after it, or, where
the call writes data, halfway.
"""

import builtins
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from conversion.convert import convert
from conversion.staging import OUTPUT, Staging, partial_folder
from modeling_keye.checkpoint_keye import Checkpoint
from tests.conversion.folders import contents


def run_and_die(source: str, dst: str, log: str, moment: int, halfway: bool, options: dict) -> None:
    """Convert; die at the given call that changes the disk. `log` gets reads, finished tensors, and the call count."""
    import torch

    torch.set_num_threads(1)
    calls: list[str] = []
    real_write, real_open = os.write, builtins.open
    events = real_open(log, "a", buffering=1)

    def at_each_call(real: Callable, name: str) -> Callable:
        def call(*arguments, **options):
            if len(calls) == moment:
                if name == "write" and halfway:
                    real_write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif halfway:
                    real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return real(*arguments, **options)

        return call

    os.fsync = lambda descriptor: None  # slow, and of no effect on what a killed process leaves
    for name in ("write", "replace", "unlink", "rmdir", "mkdir", "ftruncate", "fsync"):
        setattr(os, name, at_each_call(getattr(os, name), name))
    shutil.copyfile = at_each_call(shutil.copyfile, "copyfile")
    opened = at_each_call(real_open, "open")
    builtins.open = lambda file, mode="r", *a, **o: (opened if "w" in mode else real_open)(file, mode, *a, **o)

    real_read, real_record, real_start = Checkpoint.read, Staging.record, Staging.open.__func__

    def read(self, name, start=None, stop=None, part=None):
        events.write(json.dumps({"read": [name, start, stop, part]}) + "\n")
        return real_read(self, name, start, stop, part)

    def record(self, entry, **options):
        real_record(self, entry, **options)
        events.write(json.dumps({"finished": entry.get("tensor")}) + "\n")

    def start(cls, *arguments):
        staging = real_start(cls, *arguments)
        events.write(json.dumps({"start": len(staging.entries)}) + "\n")
        return staging

    Checkpoint.read, Staging.record, Staging.open = read, record, classmethod(start)
    numbers = convert(source, dst, progress=False, **options)
    events.write(json.dumps({"calls": calls, "numbers": numbers}) + "\n")


def assert_looks_unfinished(dst: Path, expected: dict[str, str]) -> None:
    """What a killed run leaves: no DST, or the whole of it; config.json never beside half of the weights."""
    if dst.exists():
        assert contents(dst) == expected
    output = partial_folder(dst) / OUTPUT
    if (output / "config.json").exists():
        weights = {name for name in expected if name.endswith(".safetensors")}
        assert {name: contents(output)[name] for name in weights} == {name: expected[name] for name in weights}
