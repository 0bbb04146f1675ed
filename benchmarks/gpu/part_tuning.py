"""What `autotune` finds for the kernels of two published shapes, beside the blocks that they choose by themselves."""

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.part_prefill import GROUPED, TINY
from modeling_keye.autotune_keye import Workload, autotune
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.presets_keye import PRESETS

SMALL = {"index_topk": 16, "local_window": 2, "anchor_stride": 16}


def configurations(dry_run: bool) -> dict[str, KeyeTextConfig]:
    if dry_run:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        return {
            "mla": KeyeTextConfig(**TINY | SMALL | rope, num_hidden_layers=1),
            "gqa": KeyeTextConfig(**TINY | SMALL | GROUPED | rope, num_hidden_layers=1),
        }
    names = {"mla": "flagship", "gqa": "keye-vl-2.0-30b-a3b"}
    return {kind: KeyeTextConfig(**PRESETS[name].get("text_config", {})) for kind, name in names.items()}


def run(bench: Bench) -> None:
    load = Workload(keys=40, queries=2, run=2) if bench.dry_run else Workload()
    for config in configurations(bench.dry_run).values():
        for found in autotune(config, bench.device, bench.dtype, training=True, workload=load):
            values = {name: found[name] for name in ("sizes", "blocks", "ms", "own", "own_ms")}
            bench.record("tuning", found["kernel"], **values, gain=round(found["own_ms"] / found["ms"], 3))
        bench.release()
