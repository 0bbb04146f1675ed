"""Compiles the kernels of a model before it serves, so that no request waits for the compiler.

Blocks are chosen by head sizes, dtype and shared memory alone; what remains are a few ways through the host code (split
or whole lists, masks, long rows, a slot on the device). Each step takes one of them with the smallest input that does.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from .ops_keye import dense_kl, select_tokens, sparse_gqa, sparse_kl, sparse_mla
from .sparse_reference_keye import forced_count
from .triton_common_keye import multiprocessors
from .triton_union_keye import MAX_UNIT

# Places of a list that is cut into parts when there is room, and of one that never is.
_WIDE, _NARROW = 1024, 16


def warm_up(
    config, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, training: bool = False
) -> dict[str, float]:
    """Launches every kernel that a decoder of this configuration needs, once.

    Args:
        config: a text configuration, or one that has a `text_config`. device, dtype: the model's.
        training: the backward kernels too, in the mode that `torch.use_deterministic_algorithms` asks for now, and with
            an `indexer_loss_coef` the losses of its `indexer_stage`.

    Returns:
        Seconds of each step, nearly all compilation; later ones find what earlier ones compiled. Raises `ValueError`
        with one sentence where the kernels cannot take these head sizes.
    """
    config = getattr(config, "text_config", None) or config
    device = torch.device(device)
    seconds = {}
    for name, step in _steps(config, device, dtype, training):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] = time.perf_counter() - start
    return seconds


def selection_rule(config) -> dict[str, int | None] | None:
    """What a sparse layer of a text configuration keeps; None when it has dense layers only."""
    topk = config.index_topk if config.indexer_type else None
    rule = {"topk": topk, "local_window": config.local_window, "anchor_stride": config.anchor_stride}
    return None if all(value is None for value in rule.values()) else rule


def scored_heads(config) -> dict[str, tuple[int, int, int]]:
    """Heads, groups of keys and head size of the attention that the indexer's losses look at; lists use the last."""
    heads = config.num_attention_heads
    if config.attention_type == "mla":
        absorbed = (heads, 1, config.kv_lora_rank + config.qk_rope_head_dim)
        return {"": (heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim), ", absorbed": absorbed}
    return {"": (heads, config.num_key_value_heads, config.head_dim)}


def _steps(config, device, dtype, training) -> list[tuple[str, Callable[[], None]]]:
    rule = selection_rule(config)
    if rule is None:
        return []
    steps = []
    processors = multiprocessors(device)
    calls = {"whole": (1, 4)}  # fewer tokens than any rule keeps
    if rule["topk"] is not None:
        selective = _selective_length(**rule)
        calls |= {"few": (1, selective), "many": (processors + 1, selective)}  # rows of `select_tile`
    for name, (batch, num_keys) in calls.items():
        for padded, at_slot in product((False, True), repeat=2):
            label = f"select, {name}{', padded' if padded else ''}{', in a graph' if at_slot else ''}"
            steps.append((label, partial(_select, config, rule, batch, num_keys, padded, at_slot, device, dtype)))
    attend = {"mla": _attend_latent, "gqa": _attend_grouped}[config.attention_type]
    for name, batch, num_queries, places in (
        ("decode", 1, 1, _WIDE),
        ("decode, batch", processors, 1, _NARROW),
        ("prefill", 1, processors * MAX_UNIT, _NARROW),
        ("prefill, last queries", 1, MAX_UNIT, _WIDE),
    ):
        steps.append((name, partial(attend, config, batch, num_queries, places, device, dtype, training)))
    if training and rule["topk"] is not None and config.indexer_loss_coef:
        steps += _loss_steps(config, device, dtype)
    return steps


def _loss_steps(config, device, dtype) -> list[tuple[str, Callable[[], None]]]:
    """Losses of queries that attend to all they see, and in the adaptation stage to lists, few queries and many."""
    steps, forms = [], scored_heads(config)
    for form, scored in forms.items():
        for padded in (False, True):
            name = f"loss{form}{', padded' if padded else ''}"
            steps.append((name, partial(_learn_dense, config, scored, padded, device, dtype)))
    if config.indexer_stage == "adaptation":
        scored = list(forms.values())[-1]
        for name, num_queries in (("few", 1), ("many", MAX_UNIT)):
            steps.append((f"loss of lists, {name}", partial(_learn_lists, config, scored, num_queries, device, dtype)))
    return steps


def _selective_length(topk: int, local_window: int | None, anchor_stride: int | None) -> int:
    """A number of tokens of which not all are kept."""
    num_keys = 16
    while num_keys - forced_count(num_keys, local_window, anchor_stride) <= topk:
        num_keys *= 2
    return num_keys


def _select(config, rule, batch, num_keys, padded, at_slot, device, dtype) -> None:
    heads, dim = config.index_n_heads, config.index_head_dim
    scored = rule["topk"] is not None
    mask = torch.ones(batch, num_keys, dtype=torch.bool, device=device) if padded else None
    select_tokens(
        torch.zeros(batch, 1, heads, dim, dtype=dtype, device=device) if scored else None,
        torch.zeros(batch, num_keys, dim, dtype=dtype, device=device) if scored else None,
        torch.zeros(batch, 1, heads, device=device) if scored else None,
        **rule,
        batch_size=batch,
        num_queries=1,
        query_offset=num_keys - 1,
        key_mask=mask,
        width=num_keys,
        device=device,
        slot=torch.full((), num_keys - 1, device=device) if at_slot else None,
    )


def _attend_latent(config, batch, num_queries, places, device, dtype, training) -> None:
    num_queries = min(num_queries, multiprocessors(device))  # a query is a program of its own here
    width = config.kv_lora_rank + config.qk_rope_head_dim
    shapes = (batch, num_queries, config.num_attention_heads, width), (batch, places, width)
    indices = _indices(batch, num_queries, places, device)
    _run(lambda q, kv: sparse_mla(q, kv, indices, 1.0, config.kv_lora_rank), shapes, device, dtype, training)


def _attend_grouped(config, batch, num_queries, places, device, dtype, training) -> None:
    keys = (batch, config.num_key_value_heads, places, config.head_dim)
    shapes = (batch, num_queries, config.num_attention_heads, config.head_dim), keys, keys
    indices = _indices(batch, num_queries, places, device)
    _run(lambda q, k, v: sparse_gqa(q, k, v, indices, 1.0), shapes, device, dtype, training)


def _learn_dense(config, scored, padded: bool, device, dtype) -> None:
    inputs, grads = _learner(config, scored, _NARROW, device, dtype)
    mask = torch.ones(1, _NARROW, dtype=torch.bool, device=device) if padded else None
    dense_kl(*inputs, 1.0, key_mask=mask, grads=grads)


def _learn_lists(config, scored, num_queries, device, dtype) -> None:
    inputs, grads = _learner(config, scored, num_queries, device, dtype)
    lse = torch.zeros(1, num_queries, scored[0], device=device)
    sparse_kl(*inputs, lse, _indices(1, num_queries, _NARROW, device), 1.0, grads=grads)


def _learner(config, scored, num_tokens, device, dtype):
    """What the losses take: q, k, gates and weights of the indexer, queries and keys of an attention with the heads,
    groups and head size `scored`; and the gradients of q, k and gates as `IndexerLoss` keeps them."""
    heads, groups, dim = scored
    zeros = partial(torch.zeros, device=device)
    shape = (1, num_tokens, config.index_n_heads, config.index_head_dim)
    index = zeros(shape, dtype=dtype), zeros(1, num_tokens, shape[3], dtype=dtype), zeros(shape[:3])
    attention = zeros(1, num_tokens, heads, dim, dtype=dtype), zeros(1, groups, num_tokens, dim, dtype=dtype)
    wide = torch.float32 if dtype == torch.float16 else dtype
    grads = zeros(shape, dtype=wide), zeros(1, num_tokens, shape[3]), zeros(shape[:3])
    return (*index, zeros(1, num_tokens), *attention), grads


def _indices(batch: int, num_queries: int, places: int, device: torch.device) -> torch.Tensor:
    """Every query reads the first key."""
    indices = torch.full((batch, num_queries, places), -1, dtype=torch.int32, device=device)
    indices[..., 0] = 0
    return indices


def _run(attend, shapes, device, dtype, training: bool) -> None:
    inputs = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=training) for shape in shapes]
    with torch.set_grad_enabled(training):
        out, _ = attend(*inputs)
    if training:
        torch.autograd.grad(out, inputs, torch.zeros_like(out))
