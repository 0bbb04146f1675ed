"""What `autotune` finds for the kernels of two published shapes, beside the blocks that they choose by themselves.

Those that serve come first, those that train when there is time left.
"""

import tempfile
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.part_prefill import GROUPED, TINY
from modeling_keye.autotune_keye import Workload, tuned
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.presets_keye import PRESETS

SMALL = {"index_topk": 16, "local_window": 2, "anchor_stride": 16}
LEARNING = {"indexer_loss_coef": 1.0, "indexer_stage": "adaptation"}


def configurations(dry_run: bool) -> dict[str, KeyeTextConfig]:
    if dry_run:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        return {
            "mla": KeyeTextConfig(**TINY | SMALL | LEARNING | rope, num_hidden_layers=1),
            "gqa": KeyeTextConfig(**TINY | SMALL | GROUPED | LEARNING | rope, num_hidden_layers=1),
        }
    names = {"mla": "flagship", "gqa": "keye-vl-2.0-30b-a3b"}
    return {kind: KeyeTextConfig(**PRESETS[name].get("text_config", {}) | LEARNING) for kind, name in names.items()}


def run(bench: Bench) -> None:
    load = Workload(keys=40, queries=2, run=2, sequences=2) if bench.dry_run else Workload()
    known = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"workload": load, "file": Path(folder) / "blocks.json"}
        for training in (False, True):
            for config in configurations(bench.dry_run).values():
                for found in tuned(config, bench.device, bench.dtype, training=training, **options):
                    if found in known:
                        continue
                    known.append(found)
                    values = {name: found[name] for name in ("sizes", "blocks", "ms", "own", "own_ms")}
                    bench.record("tuning", found["kernel"], **values, gain=round(found["own_ms"] / found["ms"], 3))
                bench.release()
