"""Prefill of 128K tokens through two flagship layers: time, peak memory against the formula of docs/kernels.md, and the
same call on Transformers' DeepseekV32, where running out of memory is a result."""

from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from modeling_keye.configuration_keye import KeyeTextConfig

LAYERS = 2
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "prefill_chunk_tokens": 32,
}
GROUPED = {"attention_type": "gqa", "indexer_type": "keye_vl_2", "num_key_value_heads": 1, "head_dim": 16}


def configuration(dry_run: bool) -> KeyeTextConfig:
    """The flagship's decoder, cut to two layers without experts."""
    changes = {"num_hidden_layers": LAYERS, "mlp_layer_types": ["dense"] * LAYERS, "max_position_embeddings": 2**18}
    changes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return KeyeTextConfig(**changes, **(TINY if dry_run else {}))


def expected_peak(config: KeyeTextConfig, tokens: int, weight_bytes: int, element_size: int) -> int:
    """Bytes at the peak of a prefill without gradients (docs/kernels.md, "Memory of a prefill").

    The peak is in the last chunk, when the cache is full. Nothing grows with the square of the tokens.
    """
    if config.attention_type == "mla":
        row = config.kv_lora_rank + config.qk_rope_head_dim
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        absorbed = row + config.kv_lora_rank
    else:
        row = 2 * config.num_key_value_heads * config.head_dim
        widths, absorbed = 2 * config.head_dim, 0
    if config.indexer_type:
        row += config.index_head_dim
    chunk = min(tokens, config.prefill_chunk_tokens)
    cache = config.num_hidden_layers * (tokens + max(256, chunk // 4)) * row
    states = chunk * (2 * config.hidden_size + config.num_attention_heads * widths)
    step = min(chunk, 512) * config.num_attention_heads * absorbed
    return weight_bytes + element_size * (2 * tokens * config.hidden_size + cache + states + step)


def run(bench: Bench) -> None:
    config = configuration(bench.dry_run)
    tokens = bench.size(131072, 96)
    inputs = torch.randint(0, config.vocab_size, (1, tokens), device=bench.device)
    _ours(bench, config, inputs)
    bench.release()
    _peer(bench, config, inputs)


def _ours(bench: Bench, config: KeyeTextConfig, inputs: torch.Tensor) -> None:
    from modeling_keye.modeling_keye import KeyeTextModel

    torch.manual_seed(0)
    model = _on_device(bench, lambda: KeyeTextModel(config))
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    shape = {"tokens": inputs.shape[1], "layers": LAYERS}

    prefill = partial(_prefill, model, inputs)
    bench.time("prefill, ours", prefill, **shape)
    ran = sorted({str(layer.self_attn.backend_ran) for layer in model.layers})
    expected = expected_peak(config, inputs.shape[1], weights, bench.dtype.itemsize)
    peak = bench.peak_bytes(prefill)
    values = {"expected_gib": round(expected / 2**30, 3), "backend": ran, **shape}
    if peak is not None:
        values["peak_gib"] = round((peak + weights) / 2**30, 3)
        bench.check("prefill ran the kernels", float(ran != ["triton"]), 0.0)
        bench.goal("prefill_memory", abs(peak + weights - expected) / expected * 100, **values)
    bench.record("memory", "prefill, ours", **values)


def _on_device(bench: Bench, build):
    torch.set_default_dtype(bench.dtype)
    with torch.device(bench.device):
        model = build().eval()
    torch.set_default_dtype(torch.float32)
    return model


def _peer(bench: Bench, config: KeyeTextConfig, inputs: torch.Tensor) -> None:
    try:
        from transformers import DeepseekV32Config, DeepseekV32Model
    except ImportError as error:
        bench.missing("DeepseekV32", error)
        return
    values = {name: getattr(config, name) for name in TINY if name != "prefill_chunk_tokens"}
    values |= {"num_hidden_layers": LAYERS, "first_k_dense_replace": LAYERS, "rope_parameters": config.rope_parameters}
    model = _on_device(bench, lambda: DeepseekV32Model(DeepseekV32Config(**values)))
    for tokens in (bench.size(4096, 32), inputs.shape[1]):
        shape = {"tokens": tokens, "layers": LAYERS}
        prefill = partial(_prefill, model, inputs[:, :tokens])
        try:
            peak = bench.peak_bytes(prefill)
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error)[:200]
            bench.record("memory", "prefill, DeepseekV32", peak_gib=None, out_of_memory=reason, **shape)
            bench.release()
            continue
        except Exception as error:  # whatever the peer cannot do, ours was measured
            bench.missing(f"DeepseekV32, {tokens} tokens", error)
            bench.release()
            continue
        gib = None if peak is None else round(peak / 2**30, 3)
        bench.record("memory", "prefill, DeepseekV32", peak_gib=gib, above="weights", **shape)
        bench.time("prefill, DeepseekV32", prefill, **shape)


@torch.no_grad()
def _prefill(model, inputs):
    return model(inputs, use_cache=False).last_hidden_state
