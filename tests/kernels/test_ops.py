"""The kernels as operators: shapes, gradients, `torch.compile`, names of their own, warm-up; and which backend runs."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_keye import (
    ops_keye,
    sparse_attention_keye,
    sparse_reference_keye,
    triton_common_keye,
    triton_selection_keye,
    warm_up_keye,
)
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.indexer_objective_keye import IndexerLoss
from modeling_keye.sparse_attention_keye import Selection, gqa_backend, mla_backend, resolve_backend, selection_backend
from tests.kernels import aot

SCALE = 0.3125
PACKAGE = Path(ops_keye.__file__).parent
DTYPE = torch.float64 if triton_common_keye.INTERPRETED else torch.float32


@pytest.fixture(autouse=True)
def whole_lists(monkeypatch):
    """As if the device were full, so that no list is split."""
    monkeypatch.setattr(triton_common_keye, "MULTIPROCESSORS_OFF_DEVICE", 1)


@pytest.fixture
def graphs():
    """A list, and a backend for `torch.compile` that appends what it is given to compile."""
    from torch._dynamo.backends.debugging import aot_eager

    found = []

    def backend(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    yield found, backend
    torch._dynamo.reset()


def index_inputs(num_queries, num_keys, device, heads=2, dim=16):
    return (
        torch.randn(1, num_queries, heads, dim, device=device),
        torch.randn(1, num_keys, dim, device=device),
        torch.randn(1, num_queries, heads, device=device),
    )


def attention_inputs(kind, num_queries, num_keys, device, dtype=DTYPE):
    shapes = {
        "mla": [(1, num_queries, 3, 48), (1, num_keys, 48)],
        "gqa": [(1, num_queries, 4, 16), (1, 2, num_keys, 16), (1, 2, num_keys, 16)],
    }[kind]
    inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    slots = torch.arange(num_keys - num_queries, num_keys, device=device)
    indices = (slots[:, None] - torch.tensor([7, 3, 1, 0], device=device)).clamp(min=-1)[None].to(torch.int32)
    return inputs, indices


def constants(kind):
    return (SCALE, 32) if kind == "mla" else (SCALE,)


OPERATORS = {"mla": ops_keye._sparse_mla, "gqa": ops_keye._sparse_gqa}
GRADIENTS = {"mla": ops_keye._sparse_mla_backward, "gqa": ops_keye._sparse_gqa_backward}
REFERENCES = {"mla": sparse_reference_keye.sparse_mla, "gqa": sparse_reference_keye.sparse_gqa}
PUBLIC = {"mla": sparse_attention_keye.sparse_mla, "gqa": sparse_attention_keye.sparse_gqa}


@pytest.mark.parametrize("kind", OPERATORS)
def test_attention_is_a_correct_operator(kind, device):
    inputs, indices = attention_inputs(kind, 2, 9, device)
    torch.library.opcheck(OPERATORS[kind], (*inputs, indices, *constants(kind)))
    out, lse = (x.detach() for x in OPERATORS[kind](*inputs, indices, *constants(kind)))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(GRADIENTS[kind], (*inputs, indices, out, lse, torch.randn_like(out), SCALE))


@pytest.mark.parametrize(
    ("topk", "window", "stride", "padded"), [(3, 2, 4, True), (3, None, None, False), (None, 2, 4, False)]
)
def test_selection_is_a_correct_operator(topk, window, stride, padded, device):
    q, k, weights = index_inputs(2, 20, device) if topk else (torch.empty(0, device=device), None, None)
    mask = torch.arange(20, device=device)[None] >= 3 if padded else None
    rule = Selection(topk, window, stride)
    arguments = (q, k, weights, mask, topk, window, stride, 1, 2, 18, rule.width(20))
    torch.library.opcheck(ops_keye._select_tokens, arguments)
    torch.library.opcheck(ops_keye._select_tokens, (*arguments, torch.tensor(11, device=device)))


def loss_inputs(num_queries, num_keys, device):
    """Indexer queries, keys, gates; weights; queries and keys of a grouped attention; its lists and log-sum-exps."""
    q, k, gates = index_inputs(num_queries, num_keys, device)
    (queries, keys, values), indices = attention_inputs("gqa", num_queries, num_keys, device, torch.float32)
    queries, keys, values = (x.detach() for x in (queries, keys, values))
    _, lse = sparse_reference_keye.sparse_gqa(queries, keys, values, indices, SCALE)
    weights = torch.ones(1, num_queries, device=device)
    return (q, k, gates, weights, queries, keys), indices, lse


def zeros_like(*tensors):
    return [torch.zeros_like(x) for x in tensors]


@pytest.mark.parametrize("with_gradients", [True, False])
def test_losses_are_correct_operators(with_gradients, device):
    """Their gradients are written in place, into tensors that the schema names."""
    inputs, indices, lse = loss_inputs(2, 9, device)
    grads = zeros_like(*inputs[:3]) if with_gradients else [None] * 3
    torch.library.opcheck(ops_keye._dense_kl, (*inputs, SCALE, 7, None, None, *grads))
    torch.library.opcheck(ops_keye._sparse_kl, (*inputs, lse, indices, SCALE, *grads))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_loss_of_the_indexer_is_one_graph(kind, device, graphs):
    def step(inputs, indices, lse):
        q, k, gates, _, queries, keys = inputs
        loss = IndexerLoss(q, k, gates, query_offset=keys.shape[2] - queries.shape[1], backend="triton")
        half = queries.shape[1] // 2
        for begin, part in ((0, slice(0, half)), (half, slice(half, None))):
            if kind == "dense":
                loss.add_dense(begin, queries[:, part], keys, SCALE)
            else:
                loss.add_sparse(begin, queries[:, part], keys, lse[:, part], indices[:, part], SCALE)
        return loss.result()

    found_graphs, backend = graphs
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    inputs, indices, lse = loss_inputs(6, 20, device)
    learned = [x.requires_grad_() for x in inputs[:3]]
    found, expected = (run(inputs, indices, lse) for run in (compiled, step))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned)):
        assert bool(theirs.any())
        torch.testing.assert_close(ours, theirs)
    assert len(found_graphs) == 1


def test_rows_of_a_selection_keep_one_alignment(device):
    """Triton compiles a kernel for each divisibility of its strides, and widths grow with the sequence."""
    q, k, weights = index_inputs(2, 21, device)
    for num_keys in (19, 20, 21):
        rule = Selection(topk=4, local_window=2, anchor_stride=3)
        arguments = {"batch_size": 1, "num_queries": 2, "query_offset": num_keys - 2}
        found = sparse_attention_keye.select_tokens(rule, q, k, weights, **arguments, backend="triton")
        expected = sparse_attention_keye.select_tokens(rule, q, k, weights, **arguments, backend="torch")
        assert found.shape == (1, 2, rule.width(num_keys)) and torch.equal(found, expected)
        assert [stride % 16 for stride in found.stride()] == [0, 0, 1]


@pytest.mark.parametrize("kind", OPERATORS)
def test_gradients_pass_the_operator_and_the_statistics_have_none(kind, device):
    inputs, indices = attention_inputs(kind, 3, 12, device)
    out, lse = PUBLIC[kind](*inputs, indices, *constants(kind), backend="triton")
    assert out.requires_grad and not lse.requires_grad
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, upstream)
    expected_out, expected_lse = REFERENCES[kind](*inputs, indices, *constants(kind))
    expected = torch.autograd.grad(expected_out, inputs, upstream)
    for ours, theirs in zip((out, lse, *found), (expected_out, expected_lse, *expected)):
        torch.testing.assert_close(ours, theirs, atol=1e-12 if DTYPE == torch.float64 else 1e-4, rtol=0)


@pytest.mark.parametrize("kind", OPERATORS)
def test_one_graph_for_all_lengths(kind, device, graphs):
    """Selection and attention compile without a break: once, and once more when lengths turn out to change."""
    rule = Selection(topk=3, local_window=1)

    def step(inputs, index, num_queries, num_keys):
        indices = sparse_attention_keye.select_tokens(
            rule, *index, batch_size=1, num_queries=num_queries, query_offset=num_keys - num_queries, backend="triton"
        )
        return PUBLIC[kind](*inputs, indices, *constants(kind), backend="triton")[0].square().sum()

    found_graphs, backend = graphs
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for num_queries, num_keys in ((2, 17), (3, 23), (4, 40)):
        inputs, _ = attention_inputs(kind, num_queries, num_keys, device)
        index = index_inputs(num_queries, num_keys, device)
        found = torch.autograd.grad(compiled(inputs, index, num_queries, num_keys), inputs)
        expected = torch.autograd.grad(step(inputs, index, num_queries, num_keys), inputs)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs)
    assert len(found_graphs) == 2


@pytest.mark.parametrize("kind", OPERATORS)
@torch.no_grad()
def test_one_graph_for_all_slots(kind, device, graphs):
    """A decoding step over a static cache, with window and anchors, compiles once for every slot of its query."""
    room, rule = 40, Selection(topk=3, local_window=1, anchor_stride=8)
    inputs, _ = attention_inputs(kind, 1, room, device)
    index = index_inputs(1, room, device)

    def step(slot):
        indices = sparse_attention_keye.select_tokens(
            rule, *index, batch_size=1, num_queries=1, query_offset=slot, backend="triton"
        )
        return indices, PUBLIC[kind](*inputs, indices, *constants(kind), backend="triton")[0]

    found_graphs, compiler = graphs
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for slot in (0, 1, 5, 12, 13, 39):
        indices, out = compiled(torch.tensor(slot, device=device))
        expected_indices, expected = step(slot)
        assert indices.shape[-1] == rule.width(room)
        assert indices[indices >= 0].tolist() == expected_indices[expected_indices >= 0].tolist()
        torch.testing.assert_close(out, expected)
    assert len(found_graphs) == 1


def test_static_buffers_longer_than_the_sequence(device):
    """What lies behind the last token of a static cache is neither selected nor read."""
    num_keys, room = 30, 48
    q, k, weights = index_inputs(1, room, device)
    (queries, rows), _ = attention_inputs("mla", 1, room, device)
    k[:, num_keys:], rows = math.nan, rows.detach()
    rows[:, num_keys:] = math.nan
    arguments = {"batch_size": 1, "num_queries": 1, "query_offset": num_keys - 1, "backend": "triton"}
    rule = Selection(topk=6)
    found = sparse_attention_keye.select_tokens(rule, q, k, weights, **arguments)
    assert torch.equal(found, sparse_attention_keye.select_tokens(rule, q, k[:, :num_keys], weights, **arguments))
    # The whole buffer with a mask, as a captured graph sees it, selects the same.
    mask = torch.arange(room, device=device)[None] < num_keys
    arguments |= {"query_offset": room - 1, "key_mask": mask}
    masked = sparse_attention_keye.select_tokens(rule, q, k.nan_to_num(), weights, **arguments)
    assert torch.equal(masked, found)
    out, _ = PUBLIC["mla"](queries, rows, masked, SCALE, 32, backend="triton")
    assert bool(out.isfinite().all())


def copy_of(name: str):
    """`ops_keye` and its siblings once more, as package `name`."""
    spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(PACKAGE)]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.ops_keye")


def test_copies_register_operators_of_their_own(device):
    first = copy_of("another_revision_of_keye")
    try:
        assert first.NAMESPACE != ops_keye.NAMESPACE and first.NAMESPACE.isidentifier()
        (q, kv), indices = attention_inputs("mla", 2, 9, device)
        ours, theirs = (module.sparse_mla(q, kv, indices, SCALE, 32)[0] for module in (ops_keye, first))
        assert torch.equal(ours, theirs)
        names = {str(ops_keye._sparse_mla._opoverload), str(first._sparse_mla._opoverload)}
        assert len(names) == 2
    finally:
        for module in [module for module in sys.modules if module.startswith("another_revision_of_keye")]:
            del sys.modules[module]


TINY = {
    "mla": {
        "num_attention_heads": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "gqa": {
        "attention_type": "gqa",
        "indexer_type": "keye_vl_2",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
COMMON = {"hidden_size": 32, "vocab_size": 8, "num_hidden_layers": 1, "mlp_layer_types": ["dense"]}


@pytest.mark.parametrize("kind", TINY)
def test_warm_up_runs(kind, device, monkeypatch):
    """In the interpreter nothing is compiled, but every step of the warm-up is a valid call."""
    for file in (warm_up_keye, triton_selection_keye):
        monkeypatch.setattr(file, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(warm_up_keye, "_WIDE", 48)
    monkeypatch.setattr(warm_up_keye, "MAX_UNIT", 4)
    rule = {"index_topk": 4, "local_window": 2, "anchor_stride": 8}
    config = KeyeTextConfig(**COMMON, **TINY[kind], **rule, indexer_loss_coef=1.0)
    seconds = warm_up_keye.warm_up(config, device, torch.float32, training=True)
    steps = {"select, few", "select, many, padded", "decode", "prefill", "loss, padded", "loss of lists, many"}
    assert steps <= set(seconds)
    assert all(value > 0 for value in seconds.values())


def test_warm_up_has_nothing_to_do_for_dense_layers_and_for_the_pytorch_backend(device):
    dense = KeyeTextConfig(
        **COMMON, **TINY["mla"] | {"indexer_type": None, "local_window": None, "anchor_stride": None}
    )
    assert warm_up_keye.warm_up(dense, device) == {}
    assert sparse_attention_keye.warm_up(KeyeTextConfig(**COMMON, **TINY["mla"]), "cpu") == {}


SERVED = {
    "flagship": {"indexer_loss_coef": 1.0},
    "keye-vl-2.0-30b-a3b": {"indexer_loss_coef": 1.0},
    "window only": {"indexer_type": None},
}


def record_launches() -> None:
    """Prints, for each configuration, launches of a serving and training run that its warm-up did not have.

    A launch is what Triton compiles by: kernel, types, alignments and compile-time constants. Nothing runs.
    """
    from triton.runtime.jit import JITFunction

    from modeling_keye.presets_keye import PRESETS

    seen = set()

    def run(kernel, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in kernel.params]
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        values = dict(zip(names, args), **kwargs)
        described = [aot._describe(parameter, values.get(parameter.name)) for parameter in kernel.params]
        fixed = [str(values[p.name]) if d[0] == "constexpr" else "" for p, d in zip(kernel.params, described)]
        seen.add(repr((kernel.__name__, described, fixed, sorted(options.items()))))

    JITFunction.run = run
    answer = {}
    for name, changes in SERVED.items():
        config = KeyeTextConfig(**PRESETS.get(name, {}).get("text_config", {}) | changes)
        seen.clear()
        warm_up_keye.warm_up(config, "cpu", torch.bfloat16, training=True)
        warm = set(seen)
        for batch, num_queries, offset, padded, at_slot in RUNS:
            seen.clear()
            serve(config, batch, num_queries, offset, padded, at_slot)
            missing = seen - warm
            if missing:
                answer[f"{name}: {batch} x {num_queries} at {offset}"] = sorted(missing)
        for run_of_learning in LEARNED if config.indexer_loss_coef else ():
            seen.clear()
            learn(config, *run_of_learning)
            missing = seen - warm
            if missing:
                answer[f"{name}: loss of {run_of_learning}"] = sorted(missing)
        answer[name] = len(warm)
    print(json.dumps(answer))


RUNS = [  # sequences, queries, cached tokens, padding, whether the slot is on the device
    (1, 1, 5000, False, False),
    (1, 1, 49999, False, False),
    (3, 1, 2701, True, False),
    (64, 1, 40001, False, False),
    (200, 1, 3333, True, False),
    (1, 512, 3000, False, False),
    (1, 512, 60001, False, False),
    (1, 100, 2999, True, False),
    (2, 77, 33001, True, False),
    (1, 2048, 4097, False, False),
    (1, 1, 4999, False, True),
    (3, 1, 41001, True, True),
    (1, 5, 99, True, True),
]


def serve(config, batch, num_queries, offset, padded, at_slot) -> None:
    """Selection and attention over slices of longer buffers, as the decoder calls them."""
    num_keys, room = offset + num_queries, offset + num_queries + 300
    topk = config.index_topk if config.indexer_type else None
    rule = Selection(topk, config.local_window, config.anchor_stride)
    mask = torch.ones(batch, room, dtype=torch.bool)[:, :num_keys] if padded else None
    index = (None, None, None)
    if topk is not None:
        heads, dim = config.index_n_heads, config.index_head_dim
        index = (
            torch.empty(batch, num_queries + 5, heads, dim, dtype=torch.bfloat16)[:, 5:],
            torch.empty(batch, room, dim, dtype=torch.bfloat16)[:, :num_keys],
            torch.empty(batch, num_queries + 5, heads)[:, 5:],
        )
    indices = ops_keye.select_tokens(
        *index,
        topk=rule.topk,
        local_window=rule.local_window,
        anchor_stride=rule.anchor_stride,
        batch_size=batch,
        num_queries=num_queries,
        query_offset=offset,
        key_mask=mask,
        width=rule.width(num_keys),
        device=torch.device("cpu"),
        slot=torch.tensor([0, offset])[1] if at_slot else None,
    )
    heads, options = config.num_attention_heads, {"dtype": torch.bfloat16, "requires_grad": num_queries > 1}
    if config.attention_type == "mla":
        width = config.kv_lora_rank + config.qk_rope_head_dim
        q = torch.empty(batch, num_queries, heads, width, **options)
        kv = torch.empty(batch, 1, room, width, **options)
        out, _ = ops_keye.sparse_mla(q, kv[:, :, :num_keys].squeeze(1), indices, SCALE, config.kv_lora_rank)
        inputs = [q, kv]
    else:
        q = torch.empty(batch, num_queries, heads, config.head_dim, **options)
        k, v = (torch.empty(batch, config.num_key_value_heads, room, config.head_dim, **options) for _ in range(2))
        out, _ = ops_keye.sparse_gqa(q, k[:, :, :num_keys], v[:, :, :num_keys], indices, SCALE)
        inputs = [q, k, v]
    if out.requires_grad:
        torch.autograd.grad(out, inputs, torch.empty_like(out))


LEARNED = [  # sequences, tokens, padding, whether the attention gives its log-sum-exp
    (1, 100, False, False),
    (1, 2049, False, True),
    (2, 4097, True, False),
    (3, 5003, False, True),
]


def learn(config, batch, tokens, padded, given) -> None:
    """The losses as the decoder collects them, for queries that see less than a selection keeps and for the others."""
    heads, dim = config.index_n_heads, config.index_head_dim
    options = {"dtype": torch.bfloat16, "requires_grad": True}
    q, k = torch.empty(batch, tokens, heads, dim, **options), torch.empty(batch, tokens, dim, **options)
    mask = torch.ones(batch, tokens, dtype=torch.bool) if padded else None
    rule = Selection(config.index_topk, config.local_window, config.anchor_stride)
    num_dense = min(rule.dense_length(tokens), tokens)
    heads, step = config.num_attention_heads, 512
    if config.attention_type == "mla":
        nope, rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
        forms = [(heads, nope + rotary), (1, config.kv_lora_rank + rotary)]
    else:
        forms, step = [(config.num_key_value_heads, config.head_dim)], 4096
    for groups, width in forms:
        loss = IndexerLoss(q, k, torch.empty(batch, tokens, q.shape[2]), key_mask=mask)
        loss._chosen = lambda *arguments: "triton"
        queries = torch.empty(batch, tokens, heads, width, dtype=torch.bfloat16)
        keys = torch.empty(batch, groups, tokens, width, dtype=torch.bfloat16)
        lse = torch.empty(batch, heads, num_dense).transpose(1, 2) if given else None
        loss.add_dense(0, queries[:, :num_dense], keys[:, :, :num_dense], SCALE, lse)
        for begin in range(num_dense, tokens if (groups, width) == forms[-1] else 0, step):
            part = queries[:, begin : begin + step]
            width = rule.width(tokens)
            selected = torch.zeros(*part.shape[:2], ops_keye._padded(width), dtype=torch.int32)[..., :width]
            loss.add_sparse(begin, part, keys, torch.empty(part.shape[:3]), selected, SCALE)


def test_warm_up_leaves_nothing_to_compile_for_any_length():
    environment = dict(os.environ, PYTHONPATH=str(PACKAGE.parent))
    environment.pop("TRITON_INTERPRET", None)
    code = "from tests.kernels.test_ops import record_launches; record_launches()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert set(answer) == set(SERVED), "\n".join(f"{name}: {launches}" for name, launches in answer.items())


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def says(sentence: str, *words: str) -> bool:
    """One sentence that names these and the backend to choose."""
    assert sentence.count("\n") == 0 and sentence.endswith('choose the backend "torch".'), sentence
    return all(word in sentence for word in words)


@pytest.fixture
def fresh_answers():
    def forget():
        sparse_attention_keye._driver_problem.cache_clear()
        sparse_attention_keye._known_size_problem.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_answers")
def test_a_device_without_driver_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError) as refused:
        resolve_backend("triton", CUDA)
    assert says(str(refused.value), "CUDA 13.0", "driver")
    assert resolve_backend("auto", CUDA) == "torch"


@pytest.mark.usefixtures("fresh_answers")
def test_a_driver_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    monkeypatch.setattr(sparse_attention_keye, "_driver_version", lambda: (11, 8))
    with pytest.raises(ValueError) as refused:
        resolve_backend("triton", CUDA)
    assert says(str(refused.value), "CUDA 11.8", "12.0")
    assert resolve_backend("auto", CUDA) == "torch"


@pytest.mark.usefixtures("fresh_answers")
@pytest.mark.parametrize(("answer", "version"), [((0, 13010), (13, 1)), ((3, 0), None), (None, None)])
def test_the_driver_is_asked_by_its_own_library(answer, version, monkeypatch):
    """PyTorch's own name for this comes and goes with its releases. A driver that does not answer is no complaint."""

    class Library:
        def __init__(self, name):
            if answer is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuDriverGetVersion(self, pointer):
            code, pointer._obj.value = answer
            return code

    monkeypatch.setattr(sparse_attention_keye.ctypes, "CDLL", Library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sparse_attention_keye._driver_version() == version
    assert sparse_attention_keye._driver_problem() is None


@pytest.mark.usefixtures("fresh_answers")
def test_other_devices_and_dtypes_are_named():
    with pytest.raises(ValueError) as refused:
        resolve_backend("triton", torch.device("mps"), torch.float32)
    assert says(str(refused.value), "'mps'")
    with pytest.raises(ValueError) as refused:
        resolve_backend("triton", CPU, torch.int32)
    assert says(str(refused.value), "torch.int32")
    with pytest.raises(ValueError, match="no sparse attention backend 'cuda'; choose one of auto, torch, triton"):
        resolve_backend("cuda", CPU)


@pytest.mark.usefixtures("fresh_answers")
@pytest.mark.skipif(not triton_common_keye.INTERPRETED, reason="asks about inputs on the CPU")
def test_head_sizes_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", aot.SHARED_LIMIT[89])
    with pytest.raises(ValueError) as refused:
        mla_backend(torch.empty(1, 1, 200, 64), torch.empty(1, 4, 64), 48, "triton")
    assert says(str(refused.value), "200")
    with pytest.raises(ValueError) as refused:
        mla_backend(torch.empty(1, 1, 16, 4096), torch.empty(1, 4, 4096), 4032, "triton")
    assert says(str(refused.value), "99 KiB")
    keys = torch.empty(1, 1, 4, 4096)
    with pytest.raises(ValueError) as refused:
        gqa_backend(torch.empty(1, 1, 8, 4096), keys, keys, "triton")
    assert says(str(refused.value), "99 KiB")
    queries = torch.empty(1, 1, 256, 512)
    with pytest.raises(ValueError) as refused:
        selection_backend(queries, CPU, "triton", torch.float32, torch.float32, torch.float32)
    assert says(str(refused.value), "256 heads of 512")
    assert selection_backend(queries, CPU, "auto", torch.float32, torch.float32, torch.float32) == "torch"


def test_heads_far_apart_are_brought_together():
    """128 heads of 512 laid out over 32K queries: the last one lies 2^31 numbers behind the first."""
    queries, heads, dim = 2**15, 128, 512
    far = torch.empty_strided((1, queries, heads, dim), (1, dim, queries * dim, 1), device="meta")
    near = triton_common_keye.within_32_bits(far)
    assert near.shape == far.shape and near.stride(2) == dim
    for kept in (far[:, :, :-1], torch.empty(1, 8, heads, dim, device="meta")):
        assert triton_common_keye.within_32_bits(kept) is kept
