"""Decoding steps over a static cache, compiled: one graph for every position, and the logits of the eager model."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from modeling_keye.cache_keye import cached_length
from tests.model import factories
from tests.model.factories import TEXT_CONFIGS, text_ids, video_inputs

PROMPT, ROOM = 40, 96
TOLERANCE = 1e-4  # as in `test_equalities`: logits are about 1.5 in size


def tiny_model(kind: str):
    """Of two layers: each is traced anew."""
    dense = {"mlp_layer_types": ["dense"] * 2} if kind == "gqa_dense" else {}
    return factories.tiny_model(kind, num_hidden_layers=2, **dense)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def continued(model, prompt, tokens, lengths, cache, step) -> torch.Tensor:
    """Logits of `tokens` behind the prompt, in steps of the given lengths."""
    model(**prompt, past_key_values=cache)
    return torch.cat([step(part, cache).clone() for part in tokens.split(lengths, dim=1)], dim=1)


@torch.no_grad()
def compare(model, prompt, lengths, whole_mask=None, turns: int = 1, backend: str = "eager") -> None:
    """Compiled steps over one static cache against eager steps over a growing one: one graph, equal logits."""
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(tokens, cache):
        return model(tokens, attention_mask=whole_mask, past_key_values=cache).logits

    def plain(tokens, cache):
        seen = cache.get_seq_length() + tokens.shape[1]
        mask = None if whole_mask is None else whole_mask[:, :seen]
        return model(tokens, attention_mask=mask, past_key_values=cache).logits

    batch, length = prompt["input_ids"].shape
    static = StaticCache(config=model.config, max_cache_len=ROOM)
    for turn in range(turns):
        static.reset()
        tokens = text_ids(batch, sum(lengths), seed=20 + turn)
        growing = DynamicCache(config=model.config)
        wanted = continued(model, prompt, tokens, lengths, growing, plain)
        found = continued(model, prompt, tokens, lengths, static, compiled)
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        assert int(static.get_seq_length()) == growing.get_seq_length() == length + sum(lengths)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", TEXT_CONFIGS)
def test_one_graph_for_every_position(kind):
    """From the first slot on: while everything fits the budget, and when window, anchors and indexer choose."""
    compare(tiny_model(kind), {"input_ids": text_ids(2, 8)}, [1] * 40, backend="aot_eager")


@pytest.mark.parametrize("kind", ["mla", "gqa", "gqa_dense"])
def test_left_padding(kind):
    """A mask over the whole cache is one shape for all steps; what lies behind the tokens counts as real."""
    mask = torch.ones(2, ROOM, dtype=torch.long)
    mask[1, :17] = 0
    prompt = {"input_ids": text_ids(2, PROMPT), "attention_mask": mask[:, :PROMPT]}
    compare(tiny_model(kind), prompt, [1] * 12, whole_mask=mask)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_several_tokens_in_a_step(kind):
    compare(tiny_model(kind), {"input_ids": text_ids(2, PROMPT)}, [3] * 4)


@pytest.mark.parametrize("kind", ["gqa", "gqa_dense"])
def test_positions_behind_a_video(kind):
    """Where text goes on is a matter of the prompt; the same graph serves a second prompt in the same cache."""
    model = tiny_model(kind)
    inputs = video_inputs(model.config, ((3, 4, 6), (2, 6, 4)))
    assert inputs["input_ids"].shape[1] + 12 <= ROOM
    compare(model, {key: value for key, value in inputs.items() if key != "attention_mask"}, [1] * 12, turns=2)


@torch.no_grad()
def test_text_behind_the_reset_of_a_video():
    """What text adds to its slot went with the prompt that said so: a reset cache is a new one."""
    model = tiny_model("gqa")
    inputs = video_inputs(model.config, ((3, 4, 6), (2, 6, 4)))
    step = torch.compile(lambda tokens, cache: model(tokens, past_key_values=cache).logits, backend="eager")
    reused = StaticCache(config=model.config, max_cache_len=ROOM)
    for length in (1, PROMPT):
        reused.reset()
        continued(model, inputs, text_ids(1, 4), [1] * 4, reused, step)
        assert int(reused.rope_deltas) != 0
        reused.reset()
        prompt, tokens = {"input_ids": text_ids(1, length)}, text_ids(1, 6, seed=9)
        new = StaticCache(config=model.config, max_cache_len=ROOM)
        wanted = continued(model, prompt, tokens, [1] * 6, new, step)
        assert torch.equal(continued(model, prompt, tokens, [1] * 6, reused, step), wanted)


def test_only_a_compiled_step_without_gradients_leaves_its_slot_on_the_device():
    model = tiny_model("mla")
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(text_ids(1, PROMPT), past_key_values=cache)

    @torch.compile(backend="eager")
    def on_device(cache, num_queries):
        length = cached_length(cache, num_queries)
        return torch.zeros(()), isinstance(length, torch.Tensor)

    with torch.no_grad():
        assert cached_length(None, 1) == 0 and cached_length(cache, 1) == PROMPT
        assert type(cached_length(cache, 1)) is int
        assert on_device(cache, 1)[1] and on_device(cache, 16)[1]
        assert not on_device(cache, 17)[1]
        assert not on_device(DynamicCache(), 1)[1]
    assert not on_device(cache, 1)[1]
