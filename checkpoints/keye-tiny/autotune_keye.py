"""Finds out on a device which blocks of the kernels are fastest for a model, and keeps the answer in a file.

Each kernel begins with the blocks that its file chooses by arithmetic. One field after the other takes its other
values; blocks that are faster, by more than times scatter, and give the same result stay. What does not fit the device,
or does not compile there, is passed over.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from .ops_keye import dense_kl, select_tokens, sparse_gqa, sparse_kl, sparse_mla
from .sparse_reference_keye import forced_count
from .triton_common_keye import on_device, triton
from .triton_tuning_keye import OPTIONS, asked_by, own_choice, trial, use
from .warm_up_keye import scored_heads, selection_rule

# Other blocks must take less than this share of the time to be taken.
_MARGIN = 0.97
# Relative distance of results that differ in the order of their sums: some roundings of bfloat16.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Workload:
    """What is timed: `queries` in a prompt of `keys` tokens, runs of `run` neighbours sharing their keys, and one token
    of each of `sequences`, so many that launching them takes the host less time than the device."""

    keys: int = 32768
    queries: int = 1024
    run: int = 16
    sequences: int = 128


def autotune(
    config,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = False,
    file: str | os.PathLike | None = None,
    workload: Workload = Workload(),
) -> list[dict]:
    """See `sparse_attention_keye.autotune`."""
    return list(tuned(config, device, dtype, training=training, file=file, workload=workload))


def tuned(
    config,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = False,
    file: str | os.PathLike | None = None,
    workload: Workload = Workload(),
) -> Iterator[dict]:
    """The records of `autotune`, each as soon as its kernel is done."""
    config = getattr(config, "text_config", None) or config
    device = torch.device(device)
    path = None if file is None else Path(file)
    place = {"device": _name(device), "triton": triton.__version__}
    records = _read(path)
    ours = {(r["kernel"], _sizes(r)): r for r in records if place.items() <= r.items()}
    for (kernel, sizes), record in ours.items():
        use(kernel, sizes, _blocks(record))
    calls = _calls(config, device, dtype, training, workload)
    bar = logging.tqdm(calls, desc="Tuning kernels", unit="kernel")
    done = set()
    with bar:
        for kernel, build in bar:
            bar.set_postfix_str(kernel)
            with on_device(device), torch.inference_mode(False):
                step = build()
                expected, sizes = asked_by(kernel, step)
                if sizes is None or (kernel, sizes) in done:
                    continue  # where the rule keeps all tokens nothing is scored; forms of a loss share kernels
                done.add((kernel, sizes))
                if (kernel, sizes) not in ours:
                    written = [str(size) if isinstance(size, torch.dtype) else size for size in sizes]
                    found = _search(kernel, sizes, step, expected, device)
                    ours[kernel, sizes] = {**place, "kernel": kernel, "sizes": written, **found}
                    use(kernel, sizes, _blocks(ours[kernel, sizes]))
                    records.append(ours[kernel, sizes])
                    _write(path, records)  # after each kernel: an interrupted call goes on from here
            yield ours[kernel, sizes]


def _search(kernel: str, sizes: tuple, step: Callable, expected: tuple, device: torch.device) -> dict:
    """The fastest blocks with their milliseconds, and those of the kernel's own choice."""
    own = best = own_choice(kernel, sizes)
    with trial(kernel, sizes, own):
        own_ms = best_ms = _milliseconds(step, device)
    tried = {own}
    for field, values in OPTIONS[kernel].items():
        for blocks in [replace(best, **{field: value}) for value in values]:
            if blocks in tried:
                continue
            tried.add(blocks)
            with trial(kernel, sizes, blocks):
                try:
                    spent = _milliseconds(step, device) if _same(step(), expected) else float("inf")
                except triton.TritonError:
                    continue  # too much shared memory or too many registers, or more than the compiler can do
                except RuntimeError as error:
                    if "PassManager" not in str(error):
                        raise
                    continue
            if spent < _MARGIN * best_ms:
                best, best_ms = blocks, spent
    return {"blocks": asdict(best), "ms": round(best_ms, 4), "own": asdict(own), "own_ms": round(own_ms, 4)}


def _same(found: tuple, expected: tuple) -> bool:
    """Whether selections are equal and numbers differ by rounding; NaN is never the same."""
    for ours, theirs in zip(found, expected):
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return False
        elif not (ours.double() - theirs.double()).norm() <= _TOLERANCE * theirs.double().norm():
            return False
    return True


def _milliseconds(step: Callable, device: torch.device) -> float:
    """Median of some runs behind one that compiles, each of several calls, so that the device need not wait for the
    host; one call in the interpreter, whose times mean nothing."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    step()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 4)
    return statistics.median(times)


def _calls(config, device, dtype, training: bool, load: Workload) -> list[tuple[str, Callable[[], Callable]]]:
    """Each kernel with what builds a call of it, whose result is a tuple of tensors."""
    rule = selection_rule(config)
    if rule is None:
        return []
    topk = rule["topk"]
    forced = forced_count(load.keys, config.local_window, config.anchor_stride)
    places = min(load.keys, -(-(forced + (topk or 0)) // 16) * 16)
    calls = [("selection_scores", partial(_selection, config, rule, places, load, device, dtype))] if topk else []
    attend = partial(_attention, config, places, load, device, dtype)
    if config.attention_type == "mla":
        calls.append(("mla_forward", attend))
        backward = ["mla_backward_scores", "mla_backward_rows"]
    else:
        calls += [("gqa_unions", attend), ("gqa_lists", partial(_decoding, config, places, load, device, dtype))]
        backward = ["gqa_backward"]
    if training:
        calls += [(kernel, partial(attend, backward=True)) for kernel in backward]
    if training and topk and config.indexer_loss_coef:
        forms = list(scored_heads(config).values())
        for scored in forms:
            loss = partial(_dense_loss, config, scored, load, device, dtype)
            calls += [(f"kl_{name}", loss) for name in ("attention_lse", "index_lse", "divergence", "gradients")]
        if config.indexer_stage == "adaptation":
            loss = partial(_loss_of_lists, config, forms[-1], places, load, device, dtype)
            calls += [("kl_unions", loss)] * (config.attention_type == "gqa") + [("kl_lists", loss)]
    return calls


def _selection(config, rule, places, load, device, dtype) -> Callable:
    heads, dim = config.index_n_heads, config.index_head_dim
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    q, k = draw(1, load.queries, heads, dim).to(dtype), draw(1, load.keys, dim).to(dtype)
    weights = draw(1, load.queries, heads)
    place = {"batch_size": 1, "num_queries": load.queries, "query_offset": load.keys - load.queries, "key_mask": None}
    return lambda: (select_tokens(q, k, weights, **rule, **place, width=places, device=device),)


def _attention(config, places, load, device, dtype, backward: bool = False) -> Callable:
    queries, keys = load.queries, load.keys
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    indices = _lists(places, load, generator)
    if config.attention_type == "mla":
        width = config.kv_lora_rank + config.qk_rope_head_dim
        inputs = [draw(1, queries, config.num_attention_heads, width), draw(1, keys, width)]
        attend = partial(sparse_mla, indices=indices, scaling=width**-0.5, value_dim=config.kv_lora_rank)
    else:
        shape = (1, config.num_key_value_heads, keys, config.head_dim)
        inputs = [draw(1, queries, config.num_attention_heads, config.head_dim), draw(*shape), draw(*shape)]
        attend = partial(sparse_gqa, indices=indices, scaling=config.head_dim**-0.5)
    inputs = [x.to(dtype).requires_grad_(backward) for x in inputs]
    if not backward:
        return lambda: attend(*inputs)
    with torch.enable_grad():
        out, _ = attend(*inputs)
    grad = draw(*out.shape).to(dtype)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _decoding(config, places, load, device, dtype) -> Callable:
    """One query of each sequence, whose cache holds twice as many tokens as it reads."""
    batch, keys, dim = load.sequences, min(load.keys, 2 * places), config.head_dim
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    chosen = torch.rand(batch, 1, keys, generator=generator, device=device).topk(places).indices
    indices = chosen.sort().values.to(torch.int32)
    shape = (batch, config.num_key_value_heads, keys, dim)
    inputs = draw(batch, 1, config.num_attention_heads, dim), draw(*shape), draw(*shape)
    return lambda: sparse_gqa(*inputs, indices, dim**-0.5)


def _dense_loss(config, scored, load, device, dtype) -> Callable:
    inputs, fresh, _ = _learner(config, scored, load, device, dtype)
    first_slot = load.keys - load.queries

    def step() -> tuple:
        grads = fresh()
        return dense_kl(*inputs, scored[2] ** -0.5, first_slot=first_slot, grads=grads), *grads

    return step


def _loss_of_lists(config, scored, places, load, device, dtype) -> Callable:
    inputs, fresh, generator = _learner(config, scored, load, device, dtype)
    indices = _lists(places, load, generator)
    # About the log-sum-exp of products of normal numbers, so that the target is about a distribution.
    lse = torch.full((1, load.queries, scored[0]), math.log(places) + 0.5, device=device)

    def step() -> tuple:
        grads = fresh()
        return sparse_kl(*inputs, lse, indices, scored[2] ** -0.5, grads=grads), *grads

    return step


def _learner(config, scored, load, device, dtype) -> tuple[tuple, Callable[[], tuple], torch.Generator]:
    """What the losses take, up to the keys of the attention; what makes new gradients; and the source of the numbers.

    `scored`: heads, groups and head size of the attention.
    """
    heads, groups, dim = scored
    shape = (1, load.queries, config.index_n_heads, config.index_head_dim)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    learned = draw(*shape, dtype=dtype), draw(1, load.keys, shape[3], dtype=dtype)
    gates = draw(*shape[:3]) * (shape[2] * shape[3]) ** -0.5
    weights = torch.full(shape[:2], 1 / load.queries, device=device)
    attention = draw(1, load.queries, heads, dim, dtype=dtype), draw(1, groups, load.keys, dim, dtype=dtype)
    wide = torch.float32 if dtype == torch.float16 else dtype

    def fresh() -> tuple:
        zeros = partial(torch.zeros, device=device)
        return zeros(shape, dtype=wide), zeros(1, load.keys, shape[3]), zeros(shape[:3])

    return (*learned, gates, weights, *attention), fresh, generator


def _lists(places: int, load: Workload, generator: torch.Generator) -> torch.Tensor:
    """int32 [1, queries, places], ascending; a run of queries has the same."""
    runs = torch.rand(1, -(-load.queries // load.run), load.keys, generator=generator, device=generator.device)
    chosen = runs.topk(places).indices.sort().values.to(torch.int32)
    return chosen.repeat_interleave(load.run, dim=1)[:, : load.queries].contiguous()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def _sizes(record: dict) -> tuple:
    """The sizes of a record as `own_choice` takes them."""
    return tuple(
        getattr(torch, size.removeprefix("torch.")) if isinstance(size, str) else size for size in record["sizes"]
    )


def _blocks(record: dict):
    """The blocks of a record. Raises `ValueError` where it holds what its kernel does not allow."""
    own = own_choice(record["kernel"], _sizes(record))
    if set(record["blocks"]) != set(asdict(own)):
        raise ValueError(f"{record['kernel']} has blocks of {', '.join(asdict(own))}")
    for field, value in record["blocks"].items():
        chosen = getattr(own, field, None)
        allowed = (chosen, *OPTIONS[record["kernel"]].get(field, ()))
        if type(value) is not type(chosen) or value not in allowed:
            raise ValueError(f"{record['kernel']} cannot take {field} = {value!r}")
    return replace(own, **record["blocks"])


def _read(path: Path | None) -> list[dict]:
    """The records of a file, [] when there is none. Raises `ValueError` when it is no tuning file."""
    if path is None or not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        if not isinstance(records, list):
            raise ValueError("it holds no list")
        for record in records:
            if record["kernel"] not in OPTIONS or not {"device", "triton"} <= set(record):
                raise ValueError(f"unknown record {record!r}")
            _blocks(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no tuning file of this version ({error}). Delete it and tune again.") from error
    return records


def _write(path: Path | None, records: list[dict]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each of several processes that start together has a file of its own; the last one stays.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(records, indent=1) + "\n")
        temporary.replace(path)
