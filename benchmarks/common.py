"""What the benchmarks share: the toy models of `bench_prefill`, time, and peak memory above a baseline."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable

import torch
import transformers

# The shape at which Transformers' DeepseekV32 was measured first: two dense layers, small MLA, selective indexer.
TOY = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 128,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 256,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def machine() -> dict:
    """Device, library versions and thread count, as every result records them."""
    return {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _release_memory() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Measured:
    """Result, seconds and bytes of peak resident memory above the start of one call."""

    def __init__(self, function: Callable[[], object], repeats: int = 1):
        self.seconds, self.peak_bytes = float("inf"), 0
        for _ in range(repeats):
            self.result = None
            _release_memory()
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")  # resets the high-water mark of this process (Linux)
            before = _status("VmRSS")
            start = time.perf_counter()
            self.result = function()
            self.seconds = min(self.seconds, time.perf_counter() - start)
            self.peak_bytes = max(self.peak_bytes, _status("VmHWM") - before)

    @property
    def gib(self) -> float:
        return self.peak_bytes / 2**30
