"""Prefill and decode against Transformers' DeepSeek-V3.2: time and peak memory on the CPU.

    python -m benchmarks.bench_prefill [--lengths 1024 ...] [--peer-lengths 1024 ...] [--decode-length 32768]

Both models hold the same random weights in one process (fp32, batch 1, no cache; shapes in `common.TOY`). Three ways
are timed: ours; the peer under its default SDPA attention, which builds the full score tensor and mask; and honest
dense attention, our model without a selection (flash SDPA over padded values). Outputs are compared first, at a length
where the selection is selective. Memory is the peak resident size above the loaded models. The last line is JSON.
"""

import argparse
import json
import math

import torch
from transformers import DeepseekV32Config, DeepseekV32Model

from benchmarks.common import TOY, Measured, machine
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.modeling_keye import KeyeTextModel

CHECK_LENGTH = 1024


def build_models() -> dict[str, torch.nn.Module]:
    """Ours, the peer and the dense model with equal weights."""
    torch.manual_seed(0)
    ours = KeyeTextModel(KeyeTextConfig(**TOY, local_window=None, anchor_stride=None)).eval()
    # One causal flash call per layer: in chunks the dense model would be slower than it has to be.
    whole = {"indexer_type": None, "local_window": None, "anchor_stride": None, "prefill_chunk_tokens": 2**30}
    dense = KeyeTextModel(KeyeTextConfig(**TOY, **whole)).eval()
    peer = DeepseekV32Model(DeepseekV32Config(**TOY)).eval()
    weights = ours.state_dict()
    peer.load_state_dict(weights)
    dense.load_state_dict({name: value for name, value in weights.items() if ".indexer." not in name})
    return {"ours": ours, "peer": peer, "dense": dense}


@torch.no_grad()
def prefill(model: torch.nn.Module, tokens: torch.Tensor, use_cache: bool = False):
    return model(tokens, use_cache=use_cache)


@torch.no_grad()
def check(models: dict[str, torch.nn.Module], tokens: torch.Tensor) -> dict:
    """Median row difference of the final hidden states, and the share of rows beyond 1e-4.

    Where rounding flips the last selected token of a row, that row and rows that read it differ visibly, every other
    row does not. With the same selection all rows agree to 1e-4: tests/model/test_oracles.py.
    """
    ours = prefill(models["ours"], tokens).last_hidden_state
    peer = prefill(models["peer"], tokens).last_hidden_state
    rows = (ours - peer).abs().amax(dim=-1).flatten()
    median, beyond = float(rows.median()), float((rows > 1e-4).float().mean())
    if median > 1e-5 or beyond > 0.1:
        raise SystemExit(f"Rows differ from the peer by {median:.1e} (median), {beyond:.1%} beyond 1e-4; no timing.")
    return {"length": tokens.shape[1], "median_difference": median, "rows_beyond_1e-4": round(beyond, 4)}


@torch.no_grad()
def decode_seconds(model: torch.nn.Module, tokens: torch.Tensor, past, steps: int) -> float:
    """Best time of one cached step after `tokens`."""
    best = math.inf
    for step in range(steps):
        token = tokens[:, step : step + 1]
        best = min(best, Measured(lambda token=token: model(token, past_key_values=past, use_cache=True)).seconds)
    return best


def peer_cache(models: dict[str, torch.nn.Module], past):
    """The peer's cache holding what ours holds: its own prefill cannot reach this length."""
    from transformers import DynamicCache

    cache = DynamicCache(config=models["peer"].config)
    rank = TOY["kv_lora_rank"]
    for i, layer in enumerate(past.layers):
        cache.update_indexer(layer.indexer_keys.clone(), i)
        cache.update(layer.keys[..., :rank].clone(), layer.keys[..., rank:].clone(), i)
    return cache


def exponent(results: dict[int, Measured], value: str, low: int, high: int) -> float:
    return math.log(getattr(results[high], value) / getattr(results[low], value)) / math.log(high / low)


def crossover(ours: dict[int, Measured], dense: dict[int, Measured]) -> int | None:
    """Shortest measured length from which sparse stays faster than dense."""
    lengths = sorted(set(ours) & set(dense))
    slower = [n for n in lengths if ours[n].seconds >= dense[n].seconds]
    faster = [n for n in lengths if not slower or n > slower[-1]]
    return faster[0] if faster else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--peer-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dense-lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--decode-length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=2, help="best time of this many runs, up to 8,192 tokens")
    arguments = parser.parse_args()

    models = build_models()
    tokens = torch.randint(0, TOY["vocab_size"], (1, max(*arguments.lengths, arguments.decode_length) + 64))
    report = {"benchmark": "prefill", **machine(), "shape": TOY, "check": check(models, tokens[:, :CHECK_LENGTH])}
    print(json.dumps(report["check"]))

    lengths = {"ours": arguments.lengths, "dense": arguments.dense_lengths, "peer": arguments.peer_lengths}
    measured: dict[str, dict[int, Measured]] = {name: {} for name in lengths}
    print(f"{'tokens':>7} {'model':>6} {'seconds':>9} {'GiB':>7}")
    for name, chosen in lengths.items():
        for n in chosen:
            repeats = arguments.repeats if n <= 8192 else 1
            measured[name][n] = Measured(lambda name=name, n=n: prefill(models[name], tokens[:, :n]), repeats)
            measured[name][n].result = None
            print(f"{n:7d} {name:>6} {measured[name][n].seconds:9.2f} {measured[name][n].gib:7.3f}", flush=True)
    for name, results in measured.items():
        report[name] = {n: {"seconds": round(m.seconds, 3), "gib": round(m.gib, 4)} for n, m in results.items()}

    ours, peer = measured["ours"], measured["peer"]
    report["against_peer"] = {
        n: {
            "times_faster": round(peer[n].seconds / ours[n].seconds, 2),
            "times_less_memory": round(peer[n].peak_bytes / ours[n].peak_bytes, 1),
        }
        for n in peer
    }
    report["sparse_faster_than_dense_from"] = crossover(ours, measured["dense"])
    if {8192, 65536} <= set(ours):
        report["exponents_8k_64k"] = {
            "time": round(exponent(ours, "seconds", 8192, 65536), 3),
            "memory": round(exponent(ours, "peak_bytes", 8192, 65536), 3),
        }
    if arguments.decode_length:
        n = arguments.decode_length
        past = prefill(models["ours"], tokens[:, :n], use_cache=True).past_key_values
        buffers = [(layer.keys.data_ptr(), layer.indexer_keys.data_ptr()) for layer in past.layers]
        past_of_peer = peer_cache(models, past)
        ours_step = decode_seconds(models["ours"], tokens[:, n:], past, steps=8)
        copied = buffers != [(layer.keys.data_ptr(), layer.indexer_keys.data_ptr()) for layer in past.layers]
        peer_step = decode_seconds(models["peer"], tokens[:, n:], past_of_peer, steps=3)
        report["decode"] = {
            "length": n,
            "ours_ms": round(ours_step * 1e3, 2),
            "peer_ms": round(peer_step * 1e3, 2),
            "times_faster": round(peer_step / ours_step, 1),
            "cache_copied": copied,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
