"""The generation part of the checklist that Transformers runs over its own models, under the same names.

Not here: what `test_equalities.py` compares token by token (chunks, padding, static caches, beams, second turns).
"""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
)

from modeling_keye.configuration_keye import INDEXED_LAYER_TYPE
from modeling_keye.modeling_keye import KeyeForVideoQA
from tests.model.conftest import fresh_model, media_inputs
from tests.model.factories import tiny_model

pytestmark = pytest.mark.compat

NEW = 4
DETAILS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def eager(kind) -> KeyeForVideoQA:
    return fresh_model(kind, "eager")


def check_details(output, inputs, model, sequences: int) -> None:
    """Shapes of everything that was asked for, for `sequences` rows per step."""
    text, prompt = model.config.text_config, inputs["input_ids"].shape[1]
    steps = output.sequences.shape[1] - prompt
    assert output.sequences.shape[1] == prompt + NEW
    for scores in (output.scores, output.logits):
        assert len(scores) == steps
        assert all(step.shape == (sequences, text.vocab_size) for step in scores)
    assert len(output.hidden_states) == len(output.attentions) == steps
    for step, (states, attentions) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        queries = prompt if step == 0 else 1
        assert len(states) == text.num_hidden_layers + 1 and len(attentions) == text.num_hidden_layers
        assert all(state.shape == (sequences, queries, text.hidden_size) for state in states)
        shape = (sequences, text.num_attention_heads, queries, prompt + step)
        assert all(weights.shape == shape for weights in attentions)
    check_cache(output.past_key_values, text, sequences, prompt + steps - 1)


def check_cache(cache, text, batch: int, length: int) -> None:
    """One row per token and layer: the latent for MLA, keys and values for GQA, and the indexer's keys."""
    assert isinstance(cache, DynamicCache) and len(cache) == text.num_hidden_layers
    assert cache.get_seq_length() == length
    for layer in cache.layers:
        if text.attention_type == "mla":
            assert layer.keys.shape == (batch, 1, length, text.kv_lora_rank + text.qk_rope_head_dim)
            assert layer.values.numel() == 0
        else:
            assert layer.keys.shape == layer.values.shape == (batch, text.num_key_value_heads, length, text.head_dim)
        assert layer.indexer_keys.shape == (batch, length, text.index_head_dim)


def test_greedy_generate(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert output.shape == (2, inputs["input_ids"].shape[1] + NEW)
    assert torch.equal(output[:, :-NEW], inputs["input_ids"])


def test_greedy_generate_dict_outputs(eager, modality):
    inputs = media_inputs(eager.config, modality, batch=2)
    output = eager.generate(**inputs, max_new_tokens=NEW, do_sample=False, **DETAILS)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    check_details(output, inputs, eager, sequences=2)
    best = torch.stack(output.scores, dim=1).argmax(dim=-1)
    assert torch.equal(output.sequences[:, -NEW:], best)


def test_greedy_generate_dict_outputs_use_cache(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **options, use_cache=True)
    uncached = model.generate(**inputs, **options, use_cache=False)
    assert uncached.past_key_values is None
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.logits, uncached.logits, rtol=1e-4, atol=1e-4)
    check_cache(cached.past_key_values, model.config.text_config, 2, cached.sequences.shape[1] - 1)


def test_sample_generate_dict_output(eager, modality):
    inputs = media_inputs(eager.config, modality, batch=2)
    output = eager.generate(
        **inputs, max_new_tokens=NEW, do_sample=True, top_k=20, top_p=0.9, num_return_sequences=2, **DETAILS
    )
    assert output.sequences.shape[0] == 4
    check_details(output, inputs, eager, sequences=4)
    for step, scores in enumerate(output.scores):
        chosen = output.sequences[:, step - NEW, None]
        assert scores.gather(1, chosen).isfinite().all()


@pytest.mark.parametrize("do_sample", [False, True], ids=["beam_search", "beam_sample"])
def test_beam_generate_dict_output(eager, modality, do_sample):
    inputs = media_inputs(eager.config, modality, batch=2)
    output = eager.generate(
        **inputs, max_new_tokens=NEW, do_sample=do_sample, num_beams=3, num_return_sequences=2, **DETAILS
    )
    assert isinstance(output, GenerateBeamDecoderOnlyOutput)
    assert output.sequences.shape == (4, inputs["input_ids"].shape[1] + NEW)
    assert output.sequences_scores.shape == (4,) and output.sequences_scores.isfinite().all()
    assert output.beam_indices.shape[0] == 4
    check_details(output, inputs, eager, sequences=6)


def test_beam_search_scores_are_those_of_a_forward_pass(model, modality):
    """A beam that was reordered, cache included, has the probability that one pass over the text gives it."""
    inputs = media_inputs(model.config, modality, batch=1)
    output = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, num_beams=3, return_dict_in_generate=True, output_scores=True
    )
    prompt = inputs["input_ids"].shape[1]
    row = output.sequences[:1]
    inputs = {**inputs, "input_ids": row, "attention_mask": torch.ones_like(row)}
    with torch.no_grad():
        logits = model(**inputs).logits[:, prompt - 1 : -1].float()
    logits[..., model.generation_config.suppress_tokens] = -float("inf")
    total = logits.log_softmax(-1).gather(-1, row[:, prompt:, None]).sum()
    # The score is the log-probability; processors act on it, so suppressed tokens keep their share.
    steps = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    assert steps.sum() <= total + 1e-4
    torch.testing.assert_close(output.sequences_scores, steps.sum(-1) / NEW, rtol=1e-4, atol=1e-4)


def test_generate_without_input_ids(kind):
    model = fresh_model(kind, bos_token_id=2)
    output = model.generate(do_sample=False, max_new_tokens=NEW)
    assert output.shape == (1, NEW + 1) and output[0, 0] == 2
    assert torch.equal(output, model.generate(torch.tensor([[2]]), do_sample=False, max_new_tokens=NEW))


@pytest.mark.parametrize("helper", ["itself", "another"])
@pytest.mark.parametrize("modality", ["text", "image", "video"])
def test_assisted_decoding_matches_greedy_search(model, kind, modality, helper):
    inputs = media_inputs(model.config, modality)
    assistant = model if helper == "itself" else tiny_model(kind, seed=5)
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assistant = copy.deepcopy(assistant)
    assistant.generation_config.num_assistant_tokens = 3
    found = model.generate(**inputs, **options, assistant_model=assistant)
    assert torch.equal(found, expected)


def test_assisted_decoding_sample(model):
    inputs = media_inputs(model.config, "video")
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 2
    output = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=True, assistant_model=assistant, return_dict_in_generate=True
    )
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + NEW


@pytest.mark.parametrize("batch", [1, 3])
def test_past_key_values_format(model, modality, batch):
    inputs = media_inputs(model.config, modality, batch=batch)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    check_cache(cache, model.config.text_config, batch, inputs["input_ids"].shape[1])


def test_past_key_values_of_a_static_cache(model):
    inputs = media_inputs(model.config, "text")
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 3)
    with torch.no_grad():
        output = model(**inputs, past_key_values=cache)
    assert output.past_key_values is cache and int(cache.get_seq_length()) == length
    assert all(layer.keys.shape[2] == length + 3 for layer in cache.layers)


def test_dense_layers_keep_no_indexer_keys(kind):
    layer_types = [INDEXED_LAYER_TYPE, "full_attention", INDEXED_LAYER_TYPE]
    model = fresh_model(kind, layer_types=layer_types)
    output = model.generate(
        **media_inputs(model.config, "video"), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    kept = [getattr(layer, "indexer_keys", None) is not None for layer in output.past_key_values.layers]
    assert kept == [True, False, True]


def prompt_embeddings(model, modality: str) -> dict:
    """Embeddings with the media already in their places, as a caller with an encoder of its own has them."""
    inputs = media_inputs(model.config, modality)
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    for name, suffix in (("image", ""), ("video", "_videos")):
        if f"pixel_values{suffix}" in inputs:
            with torch.no_grad():
                features = getattr(model, f"get_{name}_features")(
                    inputs[f"pixel_values{suffix}"], inputs[f"{name}_grid_thw"]
                ).pooler_output
            embeds[ids == getattr(model.config, f"{name}_token_id")] = torch.cat(list(features))
    positions = {}
    if model.config.text_config.mrope_section is not None:
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        positions["position_ids"] = model.model.get_rope_index(ids, **grids)[0]
    return {"inputs": inputs, "embeds": {"inputs_embeds": embeds}, "positions": positions}


def test_inputs_embeds_with_media_match_input_ids(model, modality):
    """A forward pass takes embeddings that already hold the features, with positions of the caller."""
    prompt = prompt_embeddings(model, modality)
    with torch.no_grad():
        expected = model(**prompt["inputs"]).logits
        found = model(**prompt["embeds"], **prompt["positions"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_from_inputs_embeds(model, cache):
    inputs = media_inputs(model.config, "text", batch=2)
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(**inputs, **options)[:, -NEW:]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **options), expected)
    # With both, the embeddings decide and the ids come back in front.
    both = model.generate(inputs["input_ids"], inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(both[:, -NEW:], expected)
    other = model.generate(inputs_embeds=torch.randn_like(embeds), attention_mask=mask, **options)
    assert other.shape == (2, NEW) and not torch.equal(other, expected)


def test_generate_continue_from_past_key_values(model, modality):
    inputs = media_inputs(model.config, modality)
    options = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, max_new_tokens=2 * NEW, **options).sequences
    first = model.generate(**inputs, max_new_tokens=NEW, **options)
    again = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW,
        **options,
    )
    assert torch.equal(again.sequences, expected)


def test_generate_continue_from_inputs_embeds(model):
    ids = media_inputs(model.config, "text")["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    options = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(inputs_embeds=embeds, max_new_tokens=2 * NEW, **options).sequences
    first = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, **options)
    longer = torch.cat([embeds, model.get_input_embeddings()(first.sequences)], dim=1)
    again = model.generate(
        inputs_embeds=longer,
        attention_mask=torch.ones(longer.shape[:2], dtype=torch.long),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW,
        **options,
    )
    assert torch.equal(torch.cat([first.sequences, again.sequences], dim=1), expected)


def test_generate_with_static_cache_random(model, modality):
    """Sampled, with beams' worth of rows: the static cache gives the same draws as the growing one."""
    inputs = media_inputs(model.config, modality, batch=2)
    outputs = []
    for cache in (None, "static"):
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                **inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=2, cache_implementation=cache
            )
        )
    assert torch.equal(*outputs)


def test_generate_with_quant_cache(model):
    inputs = media_inputs(model.config, "text")
    with pytest.raises((ValueError, ImportError), match="(?i)quant"):
        model.generate(**inputs, max_new_tokens=NEW, cache_implementation="quantized")


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generate_methods_with_logits_to_keep(model, options, monkeypatch):
    """Prefill computes the logits of one position, and that changes nothing."""
    inputs = media_inputs(model.config, "video")
    lengths = []
    forward = model.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        output = forward(*args, **kwargs)
        lengths.append(output.logits.shape[1])
        return output

    torch.manual_seed(1)
    expected = model.generate(**inputs, max_new_tokens=NEW, **{"do_sample": False, **options}, logits_to_keep=0)
    monkeypatch.setattr(model, "forward", counted)
    torch.manual_seed(1)
    found = model.generate(**inputs, max_new_tokens=NEW, **{"do_sample": False, **options})
    assert torch.equal(found, expected)
    assert max(lengths) <= 3


def test_logits_to_keep(model, modality):
    inputs = media_inputs(model.config, modality, batch=2)
    with torch.no_grad():
        every = model(**inputs).logits
        for kept in (1, 3, torch.tensor([0, 4, 2])):
            expected = every[:, -kept:] if isinstance(kept, int) else every[:, kept]
            found = model(**inputs, logits_to_keep=kept).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_placeholders_are_never_generated(kind, tmp_path):
    """A generated placeholder would ask for pixels at the next step; the model suppresses both by itself."""
    model = fresh_model(kind)
    config = model.config
    placeholders = [config.image_token_id, config.video_token_id]
    inputs = media_inputs(config, "video")
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state[0, -1]
        model.lm_head.weight[placeholders] = 10 * states
        assert model(**inputs).logits[0, -1].argmax() in placeholders
    model.save_pretrained(tmp_path)
    for each in (model, KeyeForVideoQA.from_pretrained(tmp_path)):
        output = each.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=False)
        assert not torch.isin(output[:, -NEW:], torch.tensor(placeholders)).any()


def test_generation_config_is_saved(model, tmp_path):
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 3
    loaded = KeyeForVideoQA.from_pretrained(tmp_path)
    inputs = media_inputs(model.config, "video")
    assert loaded.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
