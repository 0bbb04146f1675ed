"""The GPU benchmark without a GPU: parts in the interpreter, its bookkeeping, README's table, the exported kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import readme_table
from benchmarks.gpu import goals, part_counters, part_prefill, run_all
from examples import export_kernels
from modeling_keye import triton_common_keye
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.modeling_keye import KeyeTextModel
from modeling_keye.triton_tuning_keye import OPTIONS
from tests.core.test_memory import Watch

ROOT = Path(__file__).resolve().parents[2]
interpreted = pytest.mark.skipif(not triton_common_keye.INTERPRETED, reason="runs in the interpreter")


@interpreted
def test_dry_run_walks_every_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton_common_keye, "MULTIPROCESSORS_OFF_DEVICE", 4)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # restored afterwards
    for kernel, options in OPTIONS.items():
        # Warps and stages are nothing to the interpreter, which would try each of them twice.
        options = {field: values for field, values in options.items() if field not in ("num_warps", "num_stages")}
        monkeypatch.setitem(OPTIONS, kernel, options)
    assert run_all.main(["--dry-run", "--output", str(tmp_path), "--commit", "abc"]) == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("gpu_dry_run_*.json")
    result = json.loads(path.read_text())
    assert set(result["parts"]) == set(run_all.PARTS) and result["commit"] == "abc" and result["dry_run"]
    records = result["records"]
    assert {entry["part"] for entry in records if entry["kind"] == "check"} == {
        "check_selection",
        "check_mla",
        "check_gqa",
        "check_losses",
        "repeats",
    }
    assert all(entry["ok"] for entry in records if entry["kind"] == "check")
    # Peers are absent here and said to be; what PyTorch itself offers ran.
    missing = {entry["name"] for entry in records if entry["kind"] == "peer missing"}
    assert {"FlashMLA sparse prefill", "attention-gym indexer", "dense gqa, FlashAttention-3"} <= missing
    # Every goal has its measurement, but for memory, which only a device counts.
    open_goals = {row["goal"] for row in result["goals"] if row["value"] is None}
    assert open_goals == {"indexer_workspace", "prefill_memory"}
    assert any("of_floor" in entry for entry in records)


def test_without_a_device_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_all.main(["--output", str(tmp_path), "--commit", "abc"]) == 2
    assert "no CUDA device" in (said := capsys.readouterr().err) and "--dry-run" in said
    assert list(tmp_path.iterdir()) == []
    assert run_all.environment(False, "abc")["versions"]["driver"] is None


def test_tools_that_are_not_there_leave_their_facts_unknown():
    assert run_all.said("keye-no-such-tool", "--version") == "unknown"
    assert run_all.said(sys.executable, "-c", "raise SystemExit(3)") == "unknown"
    assert run_all.said(sys.executable, "-c", "print(580)") == "580"


def test_a_part_that_crashes_or_hangs_costs_itself_only(tmp_path):
    crash = run_all.Process([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], 60, tmp_path / "a.log")
    ended = crash.wait()
    assert ended["state"] == "failed with 3" and "the reason" in ended["log"]
    hang = run_all.Process(["sleep", "600"], 0.2, tmp_path / "b.log")
    assert hang.wait()["state"].startswith("stopped after")
    assert hang.process.poll() is not None
    good = run_all.Process(["true"], 60, tmp_path / "c.log")
    assert good.wait()["state"] == "done"


def test_records_of_a_killed_part_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"part": "a", "kind": "time", "name": "x", "ms": 1.0}\n{"part": "a", "ki')
    assert run_all.read_records(tmp_path) == [{"part": "a", "kind": "time", "name": "x", "ms": 1.0}]


def test_floors_come_from_the_rates_of_the_same_run():
    device = {"part": "device", "kind": "time"}
    records = [
        device | {"name": "matrix product", "ms": 1.0, "flops": 8e11},
        device | {"name": "copy", "ms": 1.0, "bytes": 3e9},
        {"part": "mla", "kind": "time", "name": "x", "ms": 4.0, "flops": 16e11, "bytes": 3e9},
        {"part": "mla", "kind": "time", "name": "y", "ms": 4.0, "bytes": 6e9},
    ]
    *_, x, y = run_all.add_floors(records)
    assert (x["floor_ms"], x["bound"], x["of_floor"]) == (2.0, "compute", 0.5)
    assert (y["floor_ms"], y["bound"], y["of_floor"]) == (2.0, "memory", 0.5)


def test_goals_are_judged_in_their_direction():
    records = [
        {"kind": "goal", "name": "mla_prefill", "value": 350.0},
        {"kind": "goal", "name": "gqa_prefill_128k", "value": 0.26, "rho": 1.8},
        {"kind": "goal", "name": "mla_decode", "value": 151.0},
    ]
    rows = {row["goal"]: row for row in goals.judged(records)}
    assert rows["mla_prefill"]["reached"] == "floor"
    assert rows["gqa_prefill_128k"]["reached"] == "stretch" and rows["gqa_prefill_128k"]["rho"] == 1.8
    assert rows["mla_decode"]["reached"] == "missed"
    assert rows["mla_backward"]["reached"] == "not yet timed"


def test_counters_are_read_from_the_table_of_the_profiler():
    table = '"ID","Kernel Name","Metric Name","Metric Value"\n'
    for value, metric in (("1,050.5", "sm__throughput"), ("20", "lts__throughput"), ("30.5", "lts__throughput")):
        table += f'"0","_kernel(float*)","{metric}.avg.pct_of_peak_sustained_elapsed","{value}"\n'
    table += '"0","_kernel(float*)","something else","5"\n'
    table += '"1","_kernel(float*)","sm__throughput.avg.pct_of_peak_sustained_elapsed","n/a"\n'
    assert part_counters.counters(table) == {"_kernel": {"compute": 1050.5, "L2": 30.5}}


def run_of(device: str, started: str, value: float | None, dry_run: bool = False) -> dict:
    records = [] if value is None else [{"kind": "goal", "part": "mla", "name": "mla_prefill", "value": value}]
    records.append({"kind": "check", "part": "a", "name": "b", "error": 0.0, "allowed": 0.0, "ok": True})
    return {
        "device": device,
        "started": started,
        "dry_run": dry_run,
        "versions": {"torch": "2.11.0", "cuda": "13.0", "driver": "580.1"},
        "commit": "0123456789abcdef",
        "parts": {"mla": {"state": "done"}, "gqa": {"state": "failed with 1"}},
        "goals": goals.judged(records),
        "records": records,
    }


def test_table_of_the_readme(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(f"# Title\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nrest\n")
    options = ["--readme", str(readme), "--results", str(results)]
    assert readme_table.main([*options, "--check"]) == 1
    assert readme_table.main(options) == 0 and readme_table.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert "not yet timed" in text and text.startswith("# Title") and text.endswith("rest\n") and "old" not in text
    for name, run in (
        ("a", run_of("NVIDIA H100", "2026-01-01", 200.0)),
        ("b", run_of("NVIDIA H100", "2026-01-02", 350.0)),
        ("c", run_of("CPU", "2026-01-03", 1.0, dry_run=True)),
    ):
        (results / f"gpu_{name}.json").write_text(json.dumps(run))
    assert readme_table.main([*options, "--check"]) == 1
    # Neither a run that found no device, not even with a CUDA build of PyTorch, nor one that got nowhere.
    without = run_of("x86_64", "2026-01-04", None)
    without["versions"]["driver"] = None
    nowhere = run_of("NVIDIA H100", "2026-01-05", None) | {"parts": {"mla": {"state": "failed with 1"}}}
    (results / "gpu_d.json").write_text(json.dumps(without))
    (results / "gpu_e.json").write_text(json.dumps(nowhere))
    readme_table.main(options)
    text = readme.read_text()
    assert "x86_64" not in text
    assert "| 350 (floor) |" in text and "| 200 (" not in text and "CPU" not in text
    assert "1 of 1 checks" in text and "commit 0123456789ab;" in text and "gpu_b.json" in text


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="gpu table: begin"):
        readme_table.replaced("# Title\n", "table")


@pytest.mark.skipif(readme_table.BEGIN not in readme_table.README.read_text(), reason="README has no GPU table")
def test_readme_says_what_the_results_say():
    assert readme_table.main(["--check"]) == 0


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_formula_of_the_prefill_memory(kind):
    """docs/kernels.md: within 10 % of what a model allocates whose prompt is far longer than its chunks."""
    changes = {"hidden_size": 4096, "prefill_chunk_tokens": 128, "local_window": 4, "anchor_stride": 512}
    changes |= {"num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    changes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = KeyeTextConfig(**part_prefill.TINY | changes | (part_prefill.GROUPED if kind == "gqa" else {}))
    model = KeyeTextModel(config).eval()
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    tokens = torch.randint(0, config.vocab_size, (1, 8192))
    with torch.no_grad(), Watch(model) as watch:
        model(tokens, use_cache=False)
    ratio = (weights + watch.peak) / part_prefill.expected_peak(config, tokens.shape[1], weights, 4)
    assert abs(ratio - 1) < 0.1, ratio


def test_exported_kernel_runs_without_this_repository(tmp_path):
    """As the `kernels` library loads it: from a path, under the metadata's id, without transformers."""
    variant = export_kernels.export(tmp_path / "kernel")
    metadata = json.loads((variant / "metadata.json").read_text())
    code = f"""
import importlib.util, sys, torch
def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
kernel = load({str(variant / "__init__.py")!r}, {metadata["id"]!r})
assert "transformers" not in sys.modules and "modeling_keye" not in sys.modules
q, kv = torch.randn(1, 1, 2, 32), torch.randn(1, 5, 32)
indices = torch.tensor([[[0, 3]]], dtype=torch.int32)
out, lse = kernel.sparse_mla(q, kv, indices, 0.2, 16)
scores = torch.einsum("hd,td->ht", q[0, 0], kv[0, [0, 3]]) * 0.2
torch.testing.assert_close(out[0, 0], scores.softmax(-1) @ kv[0, [0, 3], :16])
older = load({str(variant / "keye_sparse_attention" / "__init__.py")!r}, "keye_sparse_attention")
assert older.__all__ == kernel.__all__ == sorted(kernel.__all__) and older.sparse_mla
namespace = sys.modules[{metadata["id"]!r} + ".ops_keye"].NAMESPACE
assert hasattr(torch.ops, namespace)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copied = {path.name for path in variant.glob("*_keye.py")}
    assert copied == {path.name for path in export_kernels.needed_files(list(export_kernels.PUBLIC))}
    assert all((variant / name).read_bytes() == (export_kernels.SOURCE / name).read_bytes() for name in copied)
    with pytest.raises(FileExistsError, match="choose another folder"):
        export_kernels.export(tmp_path / "kernel")


def test_shared_code_of_the_benchmark_needs_no_video_decoder():
    """A GPU machine may have no PyAV: the model's files load without the package's own `__init__`."""
    code = """
import sys
sys.modules["av"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "av" else found(name, *rest)
from benchmarks.gpu.bench import use_model_without_video
use_model_without_video()
import benchmarks.gpu.part_prefill, benchmarks.gpu.part_gqa, modeling_keye.modeling_keye
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
