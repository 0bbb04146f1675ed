"""Memory of one training step with gradient checkpointing, by length: at most linear from 8,192 to 32,768 tokens?

    python -m benchmarks.bench_training_memory [--lengths 8192 16384 32768] [--models mla gqa] [--repeats 3]
        [--output FILE]

A step is forward and backward (no optimizer, whose memory does not depend on the length) at batch 1 in fp32, in the two
stages that train the indexer: `adaptation` (language-model loss and the indexer's loss over the selected tokens,
everything trains) and `warmup` (dense attention, the indexer's loss over all tokens, nothing but the indexer trains).
The models are small: one dense layer, one with experts, and the window and the anchors that the configuration has by
default. Every number comes from a fresh process: its peak resident size above model and gradients. That holds what the
allocator did not give back, too, which differs from run to run: the median of `--repeats` processes counts. Growth is
the exponent between two lengths: 1 is linear, and a constant part lowers it. The last line is JSON.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from benchmarks.common import Measured, machine
from modeling_keye import KeyeConfig, KeyeForVideoQA
from training.indexer_training import freeze_all_but_indexer

STAGES = ("adaptation", "warmup")
# How far above 1 an exponent still counts as linear: a peak holds pages of the allocator, too.
NOISE = 0.02
# The first step also loads code and starts threads.
WARM_UP_TOKENS = 512

_SHARED = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 256,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 65536,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "indexer_loss_coef": 1.0,
}
SHAPES = {
    "mla": {
        **_SHARED,
        "attention_type": "mla",
        "indexer_type": "deepseek_v32",
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "gqa": {
        **_SHARED,
        "attention_type": "gqa",
        "indexer_type": "keye_vl_2",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "scoring_func": "softmax",
        "n_shared_experts": 0,
        "routed_scaling_factor": 1.0,
    },
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TOKEN_IDS = {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5}


def build_model(kind: str, stage: str) -> KeyeForVideoQA:
    torch.manual_seed(0)
    text = {**SHAPES[kind], "indexer_stage": stage}
    model = KeyeForVideoQA(KeyeConfig(text_config=text, vision_config=_VISION, **_TOKEN_IDS)).train()
    model.gradient_checkpointing_enable()
    if stage == "warmup":
        freeze_all_but_indexer(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model


def step(model: KeyeForVideoQA, tokens: torch.Tensor) -> float:
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def measure(kind: str, stage: str, num_tokens: int) -> dict:
    """Peak of one step in this process, which should be fresh."""
    model = build_model(kind, stage)
    tokens = torch.randint(8, SHAPES[kind]["vocab_size"], (1, num_tokens))
    step(model, tokens[:, :WARM_UP_TOKENS])
    measured = Measured(lambda: step(model, tokens))
    if not math.isfinite(measured.result):
        raise SystemExit(f"The loss of {kind}, {stage}, {num_tokens} tokens is {measured.result}; nothing is measured.")
    gradients = [p.grad for name, p in model.named_parameters() if ".indexer." in name]
    if not all(bool(grad.any()) for grad in gradients):
        raise SystemExit(f"The indexer of {kind}, {stage} got no gradient; nothing is measured.")
    return {"peak_bytes": measured.peak_bytes, "loss": round(measured.result, 4)}


def measure_in_a_fresh_process(kind: str, stage: str, num_tokens: int) -> dict:
    """`measure` in a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench_training_memory"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, kind, stage, num_tokens).result()


def read_journal(journal: Path | None) -> dict[tuple[str, str, int, int], dict]:
    """What an interrupted run has measured, by model, stage, tokens and repeat."""
    if journal is None or not journal.is_file():
        return {}
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return {(entry["model"], entry["stage"], entry["tokens"], entry["repeat"]): entry for entry in entries}


def growth(peaks: dict[int, int]) -> list[float]:
    """Exponents of the peak from each length to the next, and from the first to the last."""
    lengths = sorted(peaks)
    pairs = [*zip(lengths, lengths[1:]), (lengths[0], lengths[-1])]
    return [math.log(peaks[high] / peaks[low]) / math.log(high / low) for low, high in pairs]


def table(rows: list[dict], lengths: list[int]) -> str:
    """Markdown: peak in MiB by length, then the exponents and what they amount to."""
    steps = [f"{low:,} to {high:,}" for low, high in [*zip(lengths, lengths[1:]), (lengths[0], lengths[-1])]]
    names = ["model", "stage", *(f"{n:,} tokens, MiB" for n in lengths), *steps, "at most linear"]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        cells = [row["model"], row["stage"], *(f"{row['peak_bytes'][n] / 2**20:,.0f}" for n in lengths)]
        cells += [f"{value:.3f}" for value in row["exponents"]] + ["yes" if row["at_most_linear"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--repeats", type=int, default=3, help="processes per number; their median counts")
    parser.add_argument("--output", type=Path, help="write the JSON document here too; continues an interrupted run")
    arguments = parser.parse_args()
    lengths = sorted(set(arguments.lengths))
    if len(lengths) < 2 or lengths[0] <= WARM_UP_TOKENS:
        parser.error(f"--lengths {arguments.lengths}: growth needs two lengths or more, above {WARM_UP_TOKENS}.")
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: measure at least once.")

    journal = arguments.output and arguments.output.with_name(arguments.output.name + ".partial")
    found = read_journal(journal)
    rows = []
    runs = list(product(arguments.models, arguments.stages, lengths, range(arguments.repeats)))
    for kind, stage, n, repeat in tqdm(runs, desc="steps", file=sys.stderr):
        if (n, repeat) == (lengths[0], 0):
            rows.append({"model": kind, "stage": stage, "peaks": {}, "losses": {}})
        result = found.get((kind, stage, n, repeat))
        if result is None:
            result = measure_in_a_fresh_process(kind, stage, n)
            if journal is not None:
                with journal.open("a") as file:
                    entry = {"model": kind, "stage": stage, "tokens": n, "repeat": repeat, **result}
                    file.write(json.dumps(entry) + "\n")
        rows[-1]["peaks"].setdefault(n, []).append(result["peak_bytes"])
        rows[-1]["losses"][n] = result["loss"]
    for row in rows:
        row["peak_bytes"] = {n: round(median(peaks)) for n, peaks in row["peaks"].items()}
        row["exponents"] = [round(value, 3) for value in growth(row["peak_bytes"])]
        row["at_most_linear"] = row["exponents"][-1] <= 1 + NOISE

    print(table(rows, lengths))
    linear = all(row["at_most_linear"] for row in rows)
    print(f"\nGrowth from {lengths[0]:,} to {lengths[-1]:,} tokens is {'' if linear else 'NOT '}at most linear.")
    report = {
        "benchmark": "training_memory",
        **machine(),
        "shapes": {kind: SHAPES[kind] for kind in arguments.models},
        "lengths": lengths,
        "noise": NOISE,
        "rows": rows,
        "at_most_linear": linear,
    }
    if arguments.output:
        temporary = arguments.output.with_name(arguments.output.name + ".new")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temporary, arguments.output)
        journal.unlink(missing_ok=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
