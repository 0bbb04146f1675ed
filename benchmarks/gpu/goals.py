"""What the kernels must reach on an H100 (sparse-attention goals: floor is a must, stretch was shown possible)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """`floor` and `stretch` in `unit`; `more` says that a larger value is better."""

    key: str
    text: str
    unit: str
    floor: float
    stretch: float
    more: bool = False

    def judge(self, value: float) -> str:
        reached = (lambda mark: value >= mark) if self.more else (lambda mark: value <= mark)
        return "stretch" if reached(self.stretch) else "floor" if reached(self.floor) else "missed"


GOALS = [
    Goal("mla_prefill", "Sparse MLA forward, 128 heads, 576/512, k 2048", "TFLOP/s", 300, 400, more=True),
    Goal("mla_backward", "Sparse MLA backward, 128 heads", "TFLOP/s", 115, 200, more=True),
    Goal("mla_decode", "Sparse MLA decode, batch 64, 128K cached", "us", 150, 90),
    Goal("indexer_128k", "16x64 indexer with exact top-k, prefill of 128K", "ms", 80, 50),
    Goal("indexer_workspace", "Its workspace", "MiB", 64, 64),
    Goal("gqa_union_128k", "Sparse GQA attention alone at 128K", "x dense", 0.15, 0.10),
    Goal("gqa_prefill_32k", "GQA prefill with selection at 32K", "x dense", 0.65, 0.52),
    Goal("gqa_prefill_128k", "GQA prefill with selection at 128K (Keye: 0.32)", "x dense", 0.32, 0.27),
    Goal("gqa_prefill_256k", "GQA prefill with selection at 256K", "x dense", 0.28, 0.24),
    Goal("gqa_decode_1", "GQA decode with selection, 128K cached, batch 1", "x dense", 0.35, 0.25),
    Goal("gqa_decode_64", "GQA decode with selection, 128K cached, batch 64 (Keye: 0.20)", "x dense", 0.20, 0.12),
    Goal("gqa_training_128k", "Sparse GQA forward and backward at 128K", "x dense", 0.40, 0.25),
    Goal("kl_forward", "Dense attention with warm-up KL, forward", "x flash forward", 1.8, 1.4),
    Goal("kl_backward", "Warm-up KL, gradients of the indexer", "x flash backward", 2.0, 1.3),
    Goal("prefill_memory", "128K prefill, 2 flagship layers: peak against the formula", "% off", 10, 5),
]


def judged(records: list[dict]) -> list[dict]:
    """Every goal with its value and what it reached, "not yet timed" where no record has one."""
    values = {entry["name"]: entry for entry in records if entry["kind"] == "goal"}
    rows = []
    for goal in GOALS:
        row = {"goal": goal.key, "text": goal.text, "unit": goal.unit, "floor": goal.floor, "stretch": goal.stretch}
        entry = values.get(goal.key)
        if entry is None:
            rows.append(row | {"value": None, "reached": "not yet timed"})
            continue
        rest = {key: value for key, value in entry.items() if key not in ("part", "kind", "name", "value")}
        rows.append(row | {"value": entry["value"], "reached": goal.judge(entry["value"]), **rest})
    return rows
