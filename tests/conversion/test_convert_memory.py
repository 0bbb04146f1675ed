"""Peak memory of a conversion: under twice the largest tensor plus 500 MB, whatever the checkpoint's size.

The sources are sparse files of zeros with the shapes of published checkpoints, so they take no disk. The peak is what
the kernel has counted for the process (VmHWM): imports, configuration and everything else included. Imports alone take
400 MB with a CPU build of torch and 780 MB with a CUDA build, so the conversion itself has 100 MB.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.folder import expected_shapes, meta_model
from modeling_keye import KeyeConfig
from modeling_keye.checkpoint_keye import DTYPES, StoredTensor
from modeling_keye.layouts_keye import detect_layout
from modeling_keye.published_config_keye import our_config
from modeling_keye.weights_keye import plan_publishing
from tests.conversion.full_size import KEYE_2_0, KEYE_671B, VISION

ROOT = Path(__file__).resolve().parents[2]
ALLOWED, ALLOWED_BESIDE_IMPORTS = 500 * 10**6, 100 * 10**6
# Runs the command and prints the peak of its own process, before and after: nothing of the parent's memory adds to it.
MEASURE = """
import sys
from conversion.convert import main
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
imports = peak()
code = main(sys.argv[1:])
print(imports, peak())
sys.exit(code)
"""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TOKENS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
_SMALL = {"vision_config": {**VISION, "num_hidden_layers": 2}, "vocab_size": 32000, "hidden_size": 1024, **_TOKENS}
# 400 MB in fp8; the largest tensor, experts.gate_up_proj, has 67 MB.
SMALL = {
    **KEYE_671B,
    **_SMALL,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 16,
}

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


def sparse_source(folder: Path, raw: dict, quantised: bool = False) -> tuple[int, int]:
    """A checkpoint of zeros with the shapes of `raw`, which takes no disk; bytes of it and of our largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    layout = detect_layout(raw)
    ours = expected_shapes(meta_model(KeyeConfig(**our_config(raw))))
    entries = {name: StoredTensor(name, torch.bfloat16, shape, folder, 0, 0) for name, shape in ours.items()}
    header, end = {}, 0
    for name, recipe in plan_publishing(layout, entries).items():
        tensors = {name: (recipe.dtype, recipe.shape)}
        if quantised and name.startswith("model.layers.") and name.endswith("_proj.weight"):
            grid = tuple(math.ceil(size / 128) for size in recipe.shape)
            tensors = {name: (torch.float8_e4m3fn, recipe.shape), f"{name}_scale_inv": (torch.float32, grid)}
        for key, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    assert file.stat().st_blocks * 512 < 10**7, "this disk stores zeros; the test would not fit"
    return file.stat().st_size, max(2 * math.prod(shape) for shape in ours.values())


def peak_memory(*arguments) -> tuple[int, int]:
    """Bytes that `python -m conversion.convert` takes at most: its imports, and all of it."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imports, whole = map(int, done.stdout.splitlines()[-1].split())
    return imports, whole


def convert_there_and_back(tmp_path: Path, raw: dict, quantised: bool = False) -> tuple[int, int]:
    """Bytes of the source and of our largest tensor; the promise is kept in both directions."""
    size, largest = sparse_source(tmp_path / "source", copy.deepcopy(raw), quantised)
    peaks = {
        "to ours": peak_memory(tmp_path / "source", tmp_path / "ours", "--max-shard-size=1GB"),
        "to published": peak_memory(tmp_path / "ours", tmp_path / "back", "--to=published"),
    }
    shutil.rmtree(tmp_path / "ours")
    shutil.rmtree(tmp_path / "back")
    print(json.dumps({"source": size, "largest tensor": largest, **peaks}))
    for imports, whole in peaks.values():
        assert whole - imports < 2 * largest + ALLOWED_BESIDE_IMPORTS
        assert torch.version.cuda or whole < 2 * largest + ALLOWED
    return size, largest


def test_peak_memory_of_a_small_checkpoint(tmp_path):
    size, largest = convert_there_and_back(tmp_path, SMALL, quantised=True)
    # With the whole source in memory, the promise would be broken.
    assert size > 4 * 10**8 > largest + 10**8


@pytest.mark.slow
def test_peak_memory_of_a_checkpoint_of_8_gb(tmp_path):
    """Keye-VL-2.0 in its published sizes, with as many of its layers as make 8 GB. Needs 18 GB of disk."""
    size, _ = convert_there_and_back(tmp_path, {**KEYE_2_0, "num_hidden_layers": 6})
    assert size > 8 * 10**9
