"""What only a CUDA device can show: captured graphs, compiled steps, warm-up, several devices' limits."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from benchmarks.gpu.part_prefill import GROUPED, TINY
from modeling_keye import ops_keye, sparse_attention_keye, sparse_reference_keye
from modeling_keye.configuration_keye import KeyeTextConfig
from modeling_keye.modeling_keye import KeyeTextModel
from modeling_keye.presets_keye import PRESETS
from modeling_keye.sparse_attention_keye import Selection

pytestmark = pytest.mark.gpu
SCALE, KEYS, PLACES = 0.0722, 6000, 256


@pytest.fixture(autouse=True)
def poisoned():
    """In the place of the folder's fixture: filling memory inside a capture would be captured as well."""


def inputs(num_queries: int, batch: int = 1):
    index = (
        torch.randn(batch, num_queries, 16, 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(batch, KEYS, 64, device="cuda", dtype=torch.bfloat16),
        torch.randn(batch, num_queries, 16, device="cuda"),
    )
    q = torch.randn(batch, num_queries, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 4, KEYS, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    latent = torch.randn(batch, num_queries, 16, 576, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(batch, KEYS, 576, device="cuda", dtype=torch.bfloat16)
    return index, (q, k, v), (latent, rows)


def step(index, grouped, latent, key_mask=None):
    batch, num_queries = index[0].shape[:2]
    place = {"batch_size": batch, "num_queries": num_queries, "query_offset": KEYS - num_queries}
    indices = sparse_attention_keye.select_tokens(Selection(PLACES), *index, **place, key_mask=key_mask)
    out, _ = sparse_attention_keye.sparse_gqa(*grouped, indices, SCALE)
    other, _ = sparse_attention_keye.sparse_mla(*latent, indices, SCALE, 512)
    return indices, out, other


@pytest.mark.parametrize(("num_queries", "batch"), [(1, 1), (1, 8), (64, 1)])
@torch.no_grad()
def test_a_captured_graph_follows_its_inputs(num_queries, batch):
    """Replays with other contents, a longer static cache among them, equal calls outside of the graph."""
    parts = inputs(num_queries, batch)
    length = torch.full((batch, 1), KEYS - 1000, device="cuda")
    slots = torch.arange(KEYS, device="cuda")

    def masked():
        return step(*parts, key_mask=slots <= length if num_queries == 1 else None)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        masked()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = masked()
    for seed in range(3):
        torch.manual_seed(seed)
        for part in parts:
            for tensor in part:
                tensor.normal_()
        length += 100
        graph.replay()
        found = [x.clone() for x in captured]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, masked()))


@torch.no_grad()
def test_a_captured_graph_follows_its_slot():
    """One graph over a static cache, with window and anchors, at slots that change between its replays."""
    index, grouped, latent = inputs(1)

    def at(query_offset):
        place = {"batch_size": 1, "num_queries": 1, "query_offset": query_offset}
        indices = sparse_attention_keye.select_tokens(Selection(PLACES, 128, 64), *index, **place)
        out, _ = sparse_attention_keye.sparse_gqa(*grouped, indices, SCALE)
        other, _ = sparse_attention_keye.sparse_mla(*latent, indices, SCALE, 512)
        return indices, out, other

    slot = torch.tensor(KEYS - 1, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        at(slot)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = at(slot)
    for position in (0, 100, 3000, KEYS - 1):
        slot.fill_(position)
        graph.replay()
        found, wanted = [x.clone() for x in captured], at(position)
        assert found[0][found[0] >= 0].tolist() == wanted[0][wanted[0] >= 0].tolist()
        for ours, theirs in zip(found[1:], wanted[1:]):
            assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < 1e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled_step_equals_eager(mode):
    torch._dynamo.reset()
    compiled = torch.compile(step, mode=mode, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        parts = inputs(1)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled(*parts), step(*parts)))
    torch._dynamo.reset()


@pytest.mark.parametrize("deterministically", [False, True])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_captured_gradients_follow_their_inputs(kind, deterministically):
    torch.use_deterministic_algorithms(deterministically)
    try:
        index, grouped, latent = inputs(64)
        place = {"batch_size": 1, "num_queries": 64, "query_offset": KEYS - 64}
        indices = sparse_attention_keye.select_tokens(Selection(PLACES), *index, **place)
        leaves = [x.requires_grad_() for x in (latent if kind == "mla" else grouped)]
        if kind == "mla":
            attend = partial(sparse_attention_keye.sparse_mla, indices=indices, scaling=SCALE, value_dim=512)
        else:
            attend = partial(sparse_attention_keye.sparse_gqa, indices=indices, scaling=SCALE)

        def gradients():
            out, _ = attend(*leaves)
            return torch.autograd.grad(out.float().square().sum(), leaves)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.no_grad():
                for leaf in leaves:
                    leaf.normal_()
            graph.replay()
            found = [x.clone() for x in captured]
            for ours, theirs in zip(found, gradients()):
                if deterministically:
                    assert torch.equal(ours, theirs)
                assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < 1e-2
    finally:
        torch.use_deterministic_algorithms(False)


def captured_step(model, token, cache):
    """A step of the model in a CUDA graph, which takes its token and its slot from memory."""
    sparse_attention_keye.warm_up(model.config, token.device, model.dtype)
    held = torch.empty_like(token)

    def run():
        return model(held, past_key_values=cache).last_hidden_state

    held.copy_(token)
    before = cache.layers[0].cumulative_length.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what the libraries set up on a first call is no part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    for layer in cache.layers:
        layer.cumulative_length.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def step(token):
        held.copy_(token)
        graph.replay()
        return out.clone()

    return step


def compiled_step(model, token, cache):
    step = torch.compile(lambda token: model(token, past_key_values=cache).last_hidden_state, mode="reduce-overhead")
    return lambda token: step(token).clone()


@pytest.mark.parametrize("make_step", [captured_step, compiled_step])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
@torch.no_grad()
def test_decoding_steps_of_a_model_in_a_graph(kind, make_step):
    """One graph for every slot of a static cache gives the hidden states of eager steps over a growing cache.

    In float32: the compiler rounds in places of its own, and in 16 bits other tokens are selected now and then.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    rules = {"local_window": 8, "anchor_stride": 16, "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    rules |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = KeyeTextConfig(**TINY | rules | (GROUPED if kind == "gqa" else {}))
    model = KeyeTextModel(config).eval().to("cuda")
    tokens = torch.randint(0, config.vocab_size, (2, 160), device="cuda")
    growing, static = DynamicCache(config=config), StaticCache(config=config, max_cache_len=200)
    for cache in (growing, static):
        model(tokens[:, :100], past_key_values=cache)
    step = make_step(model, tokens[:, 100:101], static)
    for place in range(100, 160):
        token = tokens[:, place : place + 1]
        wanted = model(token, past_key_values=growing).last_hidden_state.double()
        assert float((step(token).double() - wanted).norm() / wanted.norm()) < 1e-4, place
    assert int(static.get_seq_length()) == 160
    assert {layer.self_attn.backend_ran for layer in model.layers} == {"triton"}
    torch._dynamo.reset()


@pytest.mark.parametrize("num_queries", [1, 64, KEYS])
@torch.no_grad()
def test_dense_attention_makes_no_mask_and_repeats_no_head(num_queries, monkeypatch):
    monkeypatch.setattr(sparse_reference_keye, "_causal_mask", None)
    q, k, v = inputs(num_queries)[1]
    place = {"scaling": SCALE, "query_offset": KEYS - num_queries, "key_mask": None}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sparse_reference_keye.dense_attention(q.transpose(1, 2), k, v, **place)
    assert torch.cuda.max_memory_allocated() - before < 2 * out.nbytes + 4 * k.nbytes
    rows = slice(-64, None)
    keys, values = (x.repeat_interleave(8, dim=1).double() for x in (k, v))
    scores = torch.einsum("bshd,bhtd->bhst", q[:, rows].double(), keys) * SCALE
    slots = torch.arange(KEYS, device="cuda")
    scores = scores.masked_fill(slots > slots[rows, None][-q[:, rows].shape[1] :], -torch.inf)
    exact = torch.einsum("bhst,bhtd->bshd", scores.softmax(dim=-1), values)
    assert float((out[:, rows].double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("num_queries", [64, KEYS])
@torch.no_grad()
def test_dense_attention_tells_its_log_sum_exp(num_queries):
    """By FlashAttention, cuDNN or PyTorch's flash kernel: as many queries as keys, and the last of them."""
    q, k, v = inputs(num_queries)[1]
    place = {"scaling": SCALE, "query_offset": KEYS - num_queries}
    out, lse = sparse_attention_keye.dense_attention_with_lse(q.transpose(1, 2), k, v, **place)
    expected = sparse_attention_keye.dense_attention(q.transpose(1, 2), k, v, **place)
    assert float((out.double() - expected.double()).norm() / expected.double().norm()) < 1e-2
    rows = slice(-64, None)
    scores = torch.einsum("bshd,bhtd->bsht", q[:, rows].double(), k.repeat_interleave(8, dim=1).double()) * SCALE
    slots = torch.arange(KEYS, device="cuda")
    scores = scores.masked_fill((slots > slots[-64:, None])[:, None], -torch.inf)
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    assert float((lse[:, rows].double() - scores.logsumexp(dim=-1)).abs().max()) < 1e-2


def test_auto_takes_the_kernels_and_agrees_with_pytorch():
    index, grouped, latent = inputs(40)
    indices, out, other = step(index, grouped, latent)
    assert sparse_attention_keye.gqa_backend(*grouped) == sparse_attention_keye.mla_backend(*latent, 512) == "triton"
    exact, _ = sparse_reference_keye.sparse_gqa(*(x.double() for x in grouped), indices, SCALE)
    assert float((out.double() - exact).norm() / exact.norm()) < 1e-2
    exact, _ = sparse_reference_keye.sparse_mla(*(x.double() for x in latent), indices, SCALE, 512)
    assert float((other.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("name", ["flagship", "keye-vl-2.0-30b-a3b"])
def test_warm_up_compiles_once(name):
    config = KeyeTextConfig(**PRESETS[name].get("text_config", {}))
    sparse_attention_keye.warm_up(config, "cuda", training=True)
    again = sparse_attention_keye.warm_up(config, "cuda", training=True)
    assert again and sum(again.values()) < 2.0, again


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_operators_are_correct_on_the_device(kind):
    _, grouped, latent = inputs(2)
    indices = torch.arange(64, device="cuda", dtype=torch.int32).expand(1, 2, 64).contiguous()
    arguments = (*latent, indices, SCALE, 512) if kind == "mla" else (*grouped, indices, SCALE)
    operator = ops_keye._sparse_mla if kind == "mla" else ops_keye._sparse_gqa
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_measured_blocks_are_used_and_kept(kind, tmp_path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = KeyeTextConfig(
        **TINY | {"kv_lora_rank": 64} | rope | (GROUPED | {"head_dim": 64} if kind == "gqa" else {})
    )
    arguments = {"training": True, "file": tmp_path / "blocks.json"}
    records = sparse_attention_keye.autotune(config, "cuda", torch.float16, **arguments)
    assert records and all(record["ms"] <= record["own_ms"] for record in records)
    assert sparse_attention_keye.autotune(config, "cuda", torch.float16, **arguments) == records
