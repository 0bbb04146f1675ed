"""What the parts of the GPU benchmark share: the device, time by events, records, and inputs.

Without a device (`dry_run`) everything runs once, with tiny shapes, in Triton's interpreter on the CPU.
"""

import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parents[2]
# More than the L2 cache of any device: written between two runs so that neither finds its inputs there.
_FLUSH_BYTES = 256 * 2**20


def use_model_without_video() -> None:
    """Lets `modeling_keye.*` be imported without PyAV: the package's own `__init__` needs it, kernels do not."""
    if importlib.util.find_spec("av") is None and "modeling_keye" not in sys.modules:
        package = types.ModuleType("modeling_keye")
        package.__path__ = [str(ROOT / "modeling_keye")]
        sys.modules["modeling_keye"] = package


class Bench:
    """One part at work: `device`, `dtype`, and methods that measure and write records, one JSON line each."""

    def __init__(self, part: str, out: TextIO, dry_run: bool = False, peers: Path | None = None):
        self.part, self.out, self.dry_run, self.peers = part, out, dry_run, peers
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16
        self.generator = torch.Generator(self.device).manual_seed(0)
        self._flush = torch.empty(0 if dry_run else _FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def size(self, full: int, dry: int) -> int:
        return dry if self.dry_run else full

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.to(self.dtype if dtype is None else dtype)

    def record(self, kind: str, name: str, **values) -> dict:
        entry = {"part": self.part, "kind": kind, "name": name, **values}
        print(json.dumps(entry), file=self.out, flush=True)
        return entry

    def check(self, name: str, error: float, allowed: float, **values) -> None:
        """Whether a result is right; NaN never is."""
        self.record("check", name, error=error, allowed=allowed, ok=bool(error <= allowed), **values)

    def missing(self, peer: str, reason: object) -> None:
        self.record("peer missing", peer, reason=f"{type(reason).__name__}: {reason}"[:300])

    def goal(self, key: str, value: float, **values) -> None:
        """The measured value of a goal of `goals.py`."""
        self.record("goal", key, value=round(value, 4), **values)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], object], budget: float = 400.0, most: int = 30) -> list[float]:
        """[median, least, greatest] of repeated runs, by events; `budget` in milliseconds bounds the repeats."""
        if self.dry_run:
            start = time.perf_counter()
            function()
            return [(time.perf_counter() - start) * 1e3] * 3
        function()  # compiles
        first = self._one(function)
        repeats = max(3 if first < budget else 1, min(most, int(budget / max(first, 1e-3))))
        times = [self._one(function) for _ in range(repeats)]
        return [statistics.median(times), min(times), max(times)]

    def _one(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def graph_milliseconds(self, function: Callable[[], object]) -> list[float]:
        """The same for a call whose launches are captured in a CUDA graph: no launch costs the host anything."""
        if self.dry_run:
            return self.milliseconds(function)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self.milliseconds(graph.replay)

    def time(
        self,
        name: str,
        function: Callable[[], object],
        *,
        flops: float | None = None,
        moved: float | None = None,
        graph: bool = False,
        **values,
    ) -> float:
        """Times a call and records it with its operations and the fewest bytes it moves; returns milliseconds."""
        median, least, greatest = (self.graph_milliseconds if graph else self.milliseconds)(function)
        if flops is not None:
            values |= {"flops": flops, "tflops": round(flops / median / 1e9, 2)}
        if moved is not None:
            values |= {"bytes": moved, "gbps": round(moved / median / 1e6, 1)}
        spread = [round(least, 4), round(greatest, 4)]
        self.record("time", name, ms=round(median, 4), spread_ms=spread, graph=graph, **values)
        return median

    def peer(self, name: str, function: Callable[[], object], **values) -> float | None:
        """`time` of a peer, or a record of what kept it from running."""
        try:
            return self.time(name, function, **values)
        except Exception as error:  # whatever a peer raises is its result
            self.missing(name, error)
            self.release()
            return None

    def release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_bytes(self, function: Callable[[], object]) -> int | None:
        """Bytes that the call held at most above what was held before; None without a device."""
        if self.dry_run:
            function()
            return None
        function()
        self.release()
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`; NaN where `found` holds one."""
    difference = found.double() - exact
    return float(difference.norm() / exact.norm().clamp(min=1e-300))
