"""What reaches the device when Triton looks at the first launch of a row only: the same as when it looks at each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


class _Driver:
    """Of a device that takes launches and does nothing."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def launches_of_a_selection() -> None:
    """Prints the launches of selections in many chunks: with `Launches` as it is, and looking at every one."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from modeling_keye import triton_selection_keye

    class Compiled(CompiledKernel):
        """Stands where a compiled kernel would; Triton's own code launches it."""

        def __init__(self, name):
            self.name, self.function, self.packed_metadata, self.src = name, name, (), None

        def _init_handles(self):
            pass

        def run(self, grid_0, grid_1, grid_2, stream, function, *rest):
            seen.append([function, grid_0, grid_1, grid_2, [described(x) for x in rest[4:]]])

    def described(x):
        return [*x.shape, *x.stride(), x.storage_offset(), str(x.dtype)] if isinstance(x, torch.Tensor) else str(x)

    def compile_nothing(kernel, key, *rest):
        kernel.device_caches[0][0][key] = Compiled(kernel.__name__)
        return kernel.device_caches[0][0][key]

    class Looking(triton_selection_keye.Launches):
        def __call__(self, programs, *arguments):
            self._compiled = None
            super().__call__(programs, *arguments)

    driver.set_active(_Driver())
    JITFunction._do_compile = compile_nothing
    triton_selection_keye.SLAB_ELEMENTS = 2**14
    answer, looking_at_first = [], triton_selection_keye.Launches
    for kind in (looking_at_first, Looking):
        triton_selection_keye.Launches = kind
        seen = []
        for batch, queries, heads, padded in ((1, 300, 16, False), (3, 40, 5, True)):
            shapes = (batch, queries, heads, 9), (batch, 500, 9), (batch, queries, heads)
            mask = torch.ones(batch, 500, dtype=torch.bool) if padded else None
            triton_selection_keye.select_tokens(
                *(torch.empty(shape) for shape in shapes),
                topk=20,
                local_window=7,
                anchor_stride=64,
                batch_size=batch,
                num_queries=queries,
                query_offset=500 - queries,
                key_mask=mask,
                width=40,
                device=torch.device("cpu"),
            )
        answer.append(seen)
    print(json.dumps(answer))


def test_a_row_of_launches_brings_the_device_what_single_ones_would():
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop("TRITON_INTERPRET", None)
    code = "from tests.kernels.test_launches import launches_of_a_selection; launches_of_a_selection()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first_only, every = json.loads(done.stdout.splitlines()[-1])
    assert len(every) > 20 and len({launch[1] for launch in every}) > 2
    assert {launch[0] for launch in every} == {"_score_kernel", "_select_kernel"}
    assert first_only == every
