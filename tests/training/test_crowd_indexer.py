"""The indexer learns to find in whole clips what the decoder looks at in condensed ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_keye import KeyeConfig, KeyeForVideoQA
from training.crowd_indexer import CrowdMixture, Crowds, crowd_objective, crowd_scores
from training.data import ConversationEncoder, Example
from training.indexer_training import decoder_of, set_topk
from training.long_videos import draw_clip, make_alike_clip, make_long_clip, make_long_questions
from training.tokenizer import build_tokenizer

MIXTURE = CrowdMixture(1, (90, 90), (5, 5), ("identity", "colour"), questions=3, empty=6, words=1.0)
TOPK = 16


@pytest.fixture(scope="module")
def encoder():
    return ConversationEncoder(build_tokenizer())


LATENT = {
    "attention_type": "mla",
    "indexer_type": "deepseek_v32",
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


@pytest.fixture(params=["gqa", "mla"])
def model(request):
    torch.manual_seed(0)
    config = KeyeConfig.from_preset("keye-tiny").to_dict()
    if request.param == "mla":
        config["text_config"] = {**config["text_config"], **LATENT}
    model = KeyeForVideoQA(KeyeConfig.from_dict(config))
    set_topk(model, TOPK)
    return model


def _question_prompt(encoder, seed):
    """The clip of `MIXTURE` for a seed with its first question, as `Crowds` draws them."""
    rng = np.random.default_rng([seed, 4])
    rng.uniform(), rng.uniform()  # frames and shapes
    clip = make_long_clip(rng, 90, 5)
    rng.random()
    rng.integers(0, 90, MIXTURE.empty)
    return Example(clip, make_long_questions(clip, rng, 3, MIXTURE.kinds)[:1], words=True)


def test_scores_choose_what_the_model_selects_in_the_whole_clip(model, encoder):
    (item,) = Crowds(model, encoder, MIXTURE, seed=7)
    assert decoder_of(model).config.index_topk == TOPK and model.training
    batch = encoder.batch([_question_prompt(encoder, 7)])
    del batch["labels"]
    with torch.no_grad():
        selected = model.eval()(**batch, output_indexer_selections=True).indexer_selections[0][0]
    # The first layer reads embeddings, which leaving frames out does not change.
    layer, part = decoder_of(model).layers[0].self_attn, item["layers"][0]
    scores, left_out = crowd_scores(layer, item, part)
    video, prompt = int(item["key_slots"][-1]) + 1, batch["input_ids"].shape[1]
    assert len(item["key_slots"]) == video
    for row in range(prompt - video):
        slot = int(item["query_slots"][row])
        assert slot == video + row
        kept = {int(s) for s in selected[slot] if s >= 0}
        chosen = {int(s) for s in item["key_slots"][scores[row].topk(TOPK).indices]}
        assert len(kept) > TOPK + 64 and {s for s in kept if s % 64 and slot - s > 64} == chosen
        assert left_out[row].sum() == sum(s % 64 == 0 or slot - s <= 64 for s in range(video))


def test_the_target_is_the_attention_over_the_condensed_clip(model, encoder):
    (item,) = Crowds(model, encoder, replace(MIXTURE, video_queries=0), seed=7)
    example = _question_prompt(encoder, 7)
    slots = item["key_slots"][item["target_keys"]]
    starts = [encoder.length(example.clip, index) + 4 for index in range(91)]
    kept = tuple(index for index in range(90) if (slots == starts[index]).any())
    assert len(kept) < 12 and {i for i, thing in enumerate(example.clip.things) if thing} <= set(kept)
    batch = encoder.batch([replace(example, kept=kept)])
    del batch["labels"]
    model.eval().set_attn_implementation("eager")
    set_topk(model, 10_000)
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    seen, length = len(slots), batch["input_ids"].shape[1]
    for weights, part in zip(attentions, item["layers"]):
        expected = weights[0].mean(0)[seen:length, :seen]
        torch.testing.assert_close(part["target"][: length - seen], expected, rtol=1e-4, atol=1e-6)


def test_only_the_indexer_learns_and_it_finds_more(model, encoder):
    crowds = Crowds(model, encoder, replace(MIXTURE, crowd=300), seed=1)
    (item,) = crowds
    assert len(item["key_slots"]) < 450 and torch.isin(item["key_slots"][item["target_keys"]], item["key_slots"]).all()
    layers = decoder_of(model).layers
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".indexer." in n], lr=1e-3)
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        objectives = [crowd_objective(layer.self_attn, item, part) for layer, part in zip(layers, item["layers"])]
        loss, recall = torch.stack([torch.stack(objective) for objective in objectives]).mean(0)
        loss.backward()
        optimizer.step()
        found.append((loss.item(), recall.item()))
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(".indexer." in name for name in trained)
    assert found[-1][0] < 0.9 * found[0][0] and found[-1][1] > found[0][1]


def test_crowds_are_a_function_of_weights_and_seed(model, encoder):
    first, again, other = (Crowds(model, encoder, MIXTURE, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first["layers"][4]["target"], again["layers"][4]["target"])
    assert not torch.equal(first["target_keys"], other["target_keys"])


def test_alike_clips_differ_in_their_hundreds_of_seconds():
    for seed in range(20):
        clip = make_alike_clip(np.random.default_rng(seed), 4000, 12)
        places = [index for index, thing in enumerate(clip.things) if thing]
        assert len(places) == 12 and places[-1] == len(clip.things) - 1 < 4000
        assert len({float(clip.times[index]) % 100 for index in places}) == 1
    with pytest.raises(ValueError, match="599 frames hold no 12 shapes a hundred seconds apart"):
        make_alike_clip(np.random.default_rng(0), 599, 12)


def test_clips_of_both_ends_have_shapes_in_their_first_and_last_hundred_frames():
    for seed in range(20):
        clip = draw_clip(np.random.default_rng(seed), 4000, 16, ends=1.0)
        places = [index for index, thing in enumerate(clip.things) if thing]
        assert len(places) == 16 and places[-1] == 3999
        assert sum(place < 100 for place in places) >= 3 and sum(place >= 3900 for place in places) >= 3
    # No room for them: shapes at random places, from the same draws.
    assert draw_clip(np.random.default_rng(0), 40, 16, ends=1.0) == make_long_clip(np.random.default_rng(0), 40, 16)
