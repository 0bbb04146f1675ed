"""Compile for a GPU, without one, exactly the kernels that the host code launches.

`compile_launches` starts a process without the interpreter, calls functions of a test module there, and replaces every
launch by a compilation: types, alignments and compile-time constants are those of the real call. Registers, stack
(spills), shared memory and the instructions come out of the binary. Nothing runs, so results stay unwritten.
"""

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Bytes that one program may use on an A100, on consumer cards and on an H100.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Report:
    """One compiled kernel: `registers` and `stack` bytes per thread, `shared` bytes per program, opcodes by count."""

    kernel: str
    constants: dict
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]

    def __str__(self) -> str:
        mma = {name: n for name, n in self.instructions.items() if "MMA" in name or name in ("LDGSTS", "UTMALDG")}
        return (
            f"{self.kernel} warps {self.num_warps} stages {self.num_stages}: {self.registers} registers, "
            f"{self.stack} stack, {self.shared / 1024:.1f} KiB shared, {mma}, {self.constants}"
        )


@functools.cache
def _compile(module: str, functions: tuple[str, ...], arch: int) -> dict[str, list[Report]]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "reports.json"
        command = [sys.executable, "-m", "tests.kernels.aot", module, str(arch), str(answer), *functions]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        found = json.loads(answer.read_text())
    return {name: [Report(**report) for report in reports] for name, reports in found.items()}


def compile_launches(module: str, functions: list[str], arch: int) -> dict[str, list[Report]]:
    """Reports of the launches of each function of `module` (a dotted name), in order, for compute capability `arch`.

    The functions take no argument and pass CPU tensors to the host code. Compiled once per process and argument.
    """
    return _compile(module, tuple(functions), arch)


class _Recorder:
    """Stands in for `JITFunction.run`; equal launches are compiled once."""

    def __init__(self, arch: int):
        self.arch = arch
        self.known: dict[str, Report] = {}
        self.reports: list[Report] = []

    def run(self, kernel, *args, grid, warmup, **kwargs):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = [parameter.name for parameter in kernel.params]
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        values = dict(zip(names, args), **kwargs)
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values.get(parameter.name, parameter.default)
            kind, aligned = _describe(parameter, value)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = value
            elif aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        identity = repr((kernel.__name__, signature, constants, attributes, options))
        if identity not in self.known:
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
            compiled = compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
            self.known[identity] = _report(kernel.__name__, compiled, constants)
        self.reports.append(self.known[identity])


def _describe(parameter, value) -> tuple[str, bool]:
    """Triton type of one argument and whether a launch would tell the compiler that 16 divides it."""
    import torch

    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        short = {"float": "fp", "bfloat": "bf", "int": "i", "uint": "u"}
        letters, digits = re.fullmatch(r"torch\.([a-z]+)(\d*)", str(value.dtype)).groups()
        kind = "*i1" if letters == "bool" else f"*{short[letters]}{digits}"
        return kind, value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    unspecialized = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
    return kind, value % 16 == 0 and not unspecialized


def _report(name: str, compiled, constants: dict) -> Report:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    return Report(
        kernel=name,
        constants={
            key: value if isinstance(value, (int, float, bool)) else str(value) for key, value in constants.items()
        },
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        shared=compiled.metadata.shared,
        instructions=dict(Counter(opcodes)),
    )


def _main(module: str, arch: str, answer: str, *functions: str) -> None:
    from triton.runtime.jit import JITFunction

    from modeling_keye import triton_common_keye

    triton_common_keye.SHARED_MEMORY_OFF_DEVICE = SHARED_LIMIT[int(arch)]
    recorder = _Recorder(int(arch))
    JITFunction.run = lambda kernel, *args, **kwargs: recorder.run(kernel, *args, **kwargs)
    found = {}
    for name in functions:
        recorder.reports = []
        getattr(importlib.import_module(module), name)()
        found[name] = [dataclasses.asdict(report) for report in recorder.reports]
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
