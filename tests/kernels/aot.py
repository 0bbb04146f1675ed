"""Compile for a GPU, without one, exactly the kernels that the host code launches.

`compile_launches` starts a process without the interpreter, calls functions of a test module there, and replaces every
launch by a compilation: types, alignments and compile-time constants are those of the real call. Registers, stack
(spills), shared memory and the instructions come out of the binary. Nothing runs, so results stay unwritten.

The disassembler takes far longer to start than to read a kernel, so it reads all kernels of an architecture at once.
"""

import bisect
import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Bytes that one program may use on an A100, on consumer cards, on an H100 and on a B200.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Where blocks are chosen by these limits; a B200 gets those of an A100.
CHOOSING = (80, 89, 90)


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
def compile_launches(module: str) -> dict[int, dict[str, list[Report]]]:
    """Compute capability -> name of a function of `module` -> reports of its launches, in order.

    `module` is a dotted name, and its `NAMES` says which functions are called for which capability. They take no
    argument and pass CPU tensors to the host code. Compiled once per process.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "reports.json"
        command = [sys.executable, "-m", "tests.kernels.aot", module, str(answer)]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        found = json.loads(answer.read_text())
    return {
        int(arch): {name: [Report(**report) for report in reports] for name, reports in of_arch.items()}
        for arch, of_arch in found.items()
    }


class _Recorder:
    """Stands in for `JITFunction.run`; equal launches are compiled once. `launches` are places in `kernels`."""

    def __init__(self, arch: int):
        self.arch = arch
        self.known: dict[str, int] = {}
        self.kernels: list[tuple] = []
        self.launches: list[int] = []

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
            self.known[identity] = len(self.kernels)
            self.kernels.append((kernel.__name__, compiled, constants))
        self.launches.append(self.known[identity])

    def reports(self) -> list[Report]:
        """Of `kernels`, in their order."""
        listings = _instructions([compiled.asm["cubin"] for _, compiled, _ in self.kernels], self.arch)
        return [_report(*kernel, listing) for kernel, listing in zip(self.kernels, listings, strict=True)]


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


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _machine_code(cubin: bytes) -> bytes:
    """The instructions of its one kernel: the section `.text.NAME` of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + number * size) for number in range(count)]
    start_of_names = sections[names][4]
    (code,) = (
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", start_of_names + name)
    )
    return code


def _instructions(cubins: list[bytes], arch: int) -> list[Counter]:
    """Opcodes of each kernel, by count."""
    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        sass = _tool("nvdisasm", "--binary", f"SM{arch}" + "a" * (arch >= 90), file.name)
    found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    ends = list(itertools.accumulate(map(len, codes)))
    listings = [Counter() for _ in codes]
    for address, opcode in found:
        listings[bisect.bisect(ends, int(address, 16))][opcode] += 1
    return listings


def _report(name: str, compiled, constants: dict, instructions: Counter) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
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
        instructions=dict(instructions),
    )


def _main(module: str, answer: str) -> None:
    from triton.runtime.jit import JITFunction

    from modeling_keye import triton_common_keye

    functions = importlib.import_module(module)
    found = {}
    for arch, names in functions.NAMES.items():
        memory = triton_common_keye.memory_of_blocks(arch // 10, SHARED_LIMIT[arch])
        triton_common_keye.SHARED_MEMORY_OFF_DEVICE = memory
        recorder = _Recorder(arch)
        JITFunction.run = lambda kernel, *args, recorder=recorder, **kwargs: recorder.run(kernel, *args, **kwargs)
        launches = {}
        for name in names:
            recorder.launches = []
            getattr(functions, name)()
            launches[name] = recorder.launches
        reports = [dataclasses.asdict(report) for report in recorder.reports()]
        found[arch] = {name: [reports[place] for place in places] for name, places in launches.items()}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
