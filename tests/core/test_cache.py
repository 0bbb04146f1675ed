"""Growing cache layers: what a step costs, and every operation the library performs on a cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_keye.cache_keye import KeyeCacheLayer
from tests.model.factories import text_ids, tiny_model

KINDS = ["mla", "mla_dense", "gqa", "gqa_dense"]
HEADS, DIM, VALUE_DIM, INDEX_DIM = 3, 5, 4, 6


def states(length: int, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, HEADS, length, DIM, generator=generator),
        torch.randn(batch, HEADS, length, VALUE_DIM, generator=generator),
        torch.randn(batch, length, INDEX_DIM, generator=generator),
    )


def append(layer: KeyeCacheLayer, begin: int, end: int, everything) -> None:
    keys, values, index = everything
    layer.update(keys[:, :, begin:end], values[:, :, begin:end])
    layer.update_indexer(index[:, begin:end])


def assert_holds(layer: KeyeCacheLayer, expected) -> None:
    assert layer.get_seq_length() == expected[0].shape[2]
    for found, wanted in zip((layer.keys, layer.values, layer.indexer_keys), expected, strict=True):
        assert torch.equal(found, wanted)


def cut(everything, length: int):
    return everything[0][:, :, :length], everything[1][:, :, :length], everything[2][:, :length]


def filled(length: int = 40, batch: int = 2):
    layer, everything = KeyeCacheLayer(), states(length, batch)
    append(layer, 0, length, everything)
    return layer, everything


def forward(model, ids, cache=None, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs)


@torch.no_grad()
def test_a_step_does_not_copy():
    """600 tokens one by one: the buffers move a few times only, and a reserved buffer never."""
    layer, everything = KeyeCacheLayer(), states(600)
    moves = [0, 0, 0]
    last = [None, None, None]
    for t in range(600):
        append(layer, t, t + 1, everything)
        for i, tensor in enumerate((layer.keys, layer.values, layer.indexer_keys)):
            moves[i] += tensor.data_ptr() != last[i]
            last[i] = tensor.data_ptr()
    assert_holds(layer, everything)
    assert max(moves) <= 3, moves

    layer = KeyeCacheLayer(expected_tokens=600)
    append(layer, 0, 1, everything)
    first = layer.keys.data_ptr(), layer.values.data_ptr(), layer.indexer_keys.data_ptr()
    for t in range(1, 600):
        append(layer, t, t + 1, everything)
    assert (layer.keys.data_ptr(), layer.values.data_ptr(), layer.indexer_keys.data_ptr()) == first
    assert_holds(layer, everything)


@pytest.mark.parametrize("kind", KINDS)
def test_generating_does_not_copy(kind):
    model = tiny_model(kind)
    ids = text_ids(1, 340)
    cache = forward(model, ids[:, :40]).past_key_values
    moves = {}
    for t in range(40, 340):
        forward(model, ids[:, t : t + 1], cache)
        for i, layer in enumerate(cache.layers):
            assert isinstance(layer, KeyeCacheLayer)
            for name in ("keys", "indexer_keys"):
                tensor = getattr(layer, name)
                if tensor is not None:
                    moves.setdefault((i, name), set()).add(tensor.data_ptr())
    assert len(moves) == 3 if kind.endswith("dense") else 6
    assert max(len(places) for places in moves.values()) <= 2


@torch.no_grad()
def test_prefill_in_chunks_reserves_once():
    model = tiny_model("mla", prefill_chunk_tokens=32)
    pointers = []
    model.model.language_model.layers[0].register_forward_hook(
        lambda module, args, kwargs, output: pointers.append(kwargs["past_key_values"].layers[0].keys.data_ptr()),
        with_kwargs=True,
    )
    forward(model, text_ids(1, 1500))
    assert len(pointers) == 47 and len(set(pointers)) == 1


def test_mla_caches_the_latent_only():
    model = tiny_model("mla")
    text = model.config.text_config
    cache = forward(model, text_ids(2, 30)).past_key_values
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, 30, text.kv_lora_rank + text.qk_rope_head_dim)
        assert layer.values.shape == (2, 1, 30, 0)
        assert layer.indexer_keys.shape == (2, 30, text.index_head_dim)


@pytest.mark.parametrize("removed", [1, 7, 39])
@torch.no_grad()
def test_crop_and_go_on(removed):
    layer, everything = filled()
    pointer = layer.keys.data_ptr()
    layer.crop(-removed)
    assert_holds(layer, cut(everything, 40 - removed))
    other = states(40, seed=9)
    append(layer, 40 - removed, 40, other)
    expected = [
        torch.cat([a[..., : 40 - removed, :], b[..., 40 - removed :, :]], dim=-2) for a, b in zip(everything, other)
    ]
    assert_holds(layer, expected)
    assert layer.keys.data_ptr() == pointer  # the room of the removed tokens is used again


def test_crop_by_nothing_changes_nothing():
    layer, everything = filled()
    layer.crop(0)
    assert_holds(layer, everything)


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_batch_operations_and_go_on(operation):
    layer, everything = filled(40)
    rows = {"reorder": [1, 0], "repeat": [0, 0, 0, 1, 1, 1], "select": [1]}[operation]
    if operation == "reorder":
        layer.reorder_cache(torch.tensor(rows))
    elif operation == "repeat":
        layer.batch_repeat_interleave(3)
    else:
        layer.batch_select_indices(torch.tensor(rows))
    changed = [x[rows] for x in everything]
    assert_holds(layer, changed)
    more = states(5, batch=len(rows), seed=4)
    append(layer, 0, 5, more)
    assert_holds(layer, [torch.cat([a, b], dim=-2) for a, b in zip(changed, more, strict=True)])


def test_reorder_to_the_same_rows_does_not_mix_sequences():
    layer, everything = filled(10)
    layer.reorder_cache(torch.tensor([0, 0]))
    more = states(1, seed=3)
    append(layer, 0, 1, more)
    assert_holds(layer, [torch.cat([a[[0, 0]], b], dim=-2) for a, b in zip(everything, more, strict=True)])


def test_copies_are_independent():
    layer, everything = filled(20)
    twin = copy.deepcopy(layer)
    first, second = states(5, seed=1), states(5, seed=2)
    append(layer, 0, 5, first)
    append(twin, 0, 5, second)
    assert_holds(layer, [torch.cat([a, b], dim=-2) for a, b in zip(everything, first, strict=True)])
    assert_holds(twin, [torch.cat([a, b], dim=-2) for a, b in zip(everything, second, strict=True)])


def test_an_earlier_view_keeps_its_content():
    layer, everything = filled(20)
    before = layer.keys
    append(layer, 0, 1, states(1, seed=7))
    assert torch.equal(before, everything[0])


def test_reset_starts_over():
    model = tiny_model("mla")
    cache = DynamicCache(config=model.config.text_config)
    first = forward(model, text_ids(1, 30), cache).logits
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    again = forward(model, text_ids(1, 30), cache).logits
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)


def test_gradients_flow_through_a_cache():
    """A chunk with gradients after a prefix with gradients: the graph is not written over."""
    model = tiny_model("gqa")
    ids = text_ids(1, 40)

    def gradient(chunks):
        model.zero_grad()
        cache, parts = DynamicCache(config=model.config.text_config), []
        for begin, end in chunks:
            parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
        torch.cat(parts, dim=1).square().mean().backward()
        return model.model.language_model.layers[0].self_attn.k_proj.weight.grad.clone()

    whole = gradient([(0, 40)])
    torch.testing.assert_close(gradient([(0, 17), (17, 30), (30, 40)]), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_a_cache_moves_between_gradient_modes(kind, first, then):
    model = tiny_model(kind)
    ids = text_ids(1, 30)
    expected = forward(model, ids).logits[:, 20:]
    with first():
        cache = model(ids[:, :20], use_cache=True).past_key_values
    with then():
        logits = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(logits.detach(), expected, atol=2e-5, rtol=0)


def caches(model):
    text = model.config.text_config
    return {
        "none": None,
        "plain": DynamicCache(),
        "from the model's configuration": DynamicCache(config=model.config),
        "from the text configuration": DynamicCache(config=text),
        "static": StaticCache(config=text, max_cache_len=90),
        "static, whole configuration": StaticCache(config=model.config, max_cache_len=61),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache_gives_the_same_logits(kind):
    model = tiny_model(kind)
    ids = text_ids(2, 61)
    whole = forward(model, ids).logits
    for name, cache in caches(model).items():
        output = forward(model, ids[:, :50], cache)
        assert cache is None or output.past_key_values is cache
        parts = [output.logits]
        for begin, end in ((50, 51), (51, 57), (57, 61)):
            parts.append(forward(model, ids[:, begin:end], output.past_key_values).logits)
        difference = (torch.cat(parts, dim=1) - whole).abs().max()
        assert difference < 2e-5, f"{name}: {difference:.1e}"
        assert output.past_key_values.get_seq_length() == 61


@pytest.mark.parametrize("kind", KINDS)
def test_cropping_a_model_cache_and_going_on(kind):
    model = tiny_model(kind)
    first, second = text_ids(1, 60), text_ids(1, 25, seed=5)
    cache = forward(model, first).past_key_values
    cache.crop(-35)
    logits = forward(model, second, cache).logits
    expected = forward(model, torch.cat([first[:, :25], second], dim=1)).logits[:, 25:]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reordered_and_copied_model_caches(kind):
    model = tiny_model(kind)
    ids = text_ids(3, 31)
    cache = forward(model, ids[:, :30]).past_key_values
    twin = copy.deepcopy(cache)
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    logits = forward(model, ids[:, 30:], cache).logits
    expected = forward(model, torch.cat([ids[order, :30], ids[:, 30:]], dim=1)).logits[:, 30:]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    untouched = forward(model, ids[:, 30:], twin).logits
    torch.testing.assert_close(untouched, forward(model, ids).logits[:, 30:], atol=2e-5, rtol=0)
