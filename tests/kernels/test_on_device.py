"""What only a CUDA device can show: captured graphs, compiled steps, warm-up, several devices' limits."""

import pytest
import torch

from modeling_keye import ops_keye, sparse_attention_keye, sparse_reference_keye
from modeling_keye.configuration_keye import KeyeTextConfig
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
