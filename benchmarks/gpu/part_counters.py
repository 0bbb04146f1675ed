"""Which resource binds each kernel: throughput of its units in percent of their peak, read by Nsight Compute."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys

import torch

from benchmarks.gpu.bench import ROOT, Bench, use_model_without_video

METRICS = {
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed": "L1 and shared memory",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "device memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
LIMIT = 90


def run(bench: Bench) -> None:
    if bench.dry_run or shutil.which("ncu") is None:
        if bench.dry_run:
            launch(bench)
        bench.missing("Nsight Compute", FileNotFoundError("there is no `ncu` on the PATH, or this is a dry run"))
        return
    command = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "benchmarks.gpu.part_counters"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        out, log = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # the profiled process as well, which would go on beside the next part
        process.communicate()
        bench.missing("Nsight Compute", error)
        return
    table = out[out.find('"ID"') :]
    if process.returncode or not table.startswith('"ID"'):
        bench.missing("Nsight Compute", RuntimeError((log or out)[-300:]))
        return
    for name, values in counters(table).items():
        bench.record("counters", name, **values)


def counters(table: str) -> dict[str, dict[str, float]]:
    """Kernel -> largest value of each metric, from the tool's table with one metric a row."""
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        label = METRICS.get(row.get("Metric Name", ""))
        if label is None:
            continue
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # n/a
            continue
        values = found.setdefault(row["Kernel Name"].split("(")[0], {})
        values[label] = max(values.get(label, 0.0), value)
    return found


def launch(bench: Bench) -> None:
    """Each kernel at a shape that fills the device: once to compile, once to be counted."""
    from benchmarks.gpu.lists import indexer, lists
    from benchmarks.gpu.part_gqa import SCALE, inputs
    from benchmarks.gpu.part_selection import select
    from modeling_keye.ops_keye import sparse_gqa, sparse_mla
    from modeling_keye.sparse_attention_keye import Selection

    num_queries, num_keys, places = bench.size(1024, 2), bench.size(32768, 40), bench.size(2048, 8)
    index = indexer(bench, num_queries, num_keys)
    chosen = lists(bench, num_queries, num_keys, places, "drift")
    latent = [
        x.requires_grad_()
        for x in (bench.randn(1, num_queries, bench.size(128, 2), 576), bench.randn(1, num_keys, 576))
    ]
    grouped = [x.requires_grad_() for x in inputs(bench, num_queries, num_keys)]

    def once():
        select(Selection(places), index, num_keys)
        for leaves, attend in (
            (latent, lambda *x: sparse_mla(*x, chosen, 0.07, 512)),
            (grouped, lambda *x: sparse_gqa(*x, chosen, SCALE)),
        ):
            out, _ = attend(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    once()
    if bench.dry_run:
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    once()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    use_model_without_video()
    launch(Bench("counters", sys.stderr))
