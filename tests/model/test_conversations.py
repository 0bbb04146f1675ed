"""What several turns, several conversations and incomplete inputs must not do to each other."""

import pytest
import torch
from transformers import StaticCache

from tests.model.factories import text_ids, tiny_model, video_inputs

KINDS = ["mla", "gqa", "gqa_dense"]
TOLERANCE = 1e-4


def merged(first: dict, second: dict) -> dict:
    """Two prompts as one, media in order."""
    dims = {"pixel_values_videos": 0, "video_grid_thw": 0}
    return {key: torch.cat([first[key], second[key]], dim=dims.get(key, 1)) for key in first}


def prefill(model, inputs: dict, past=None):
    """Forward of the new tokens of `inputs` behind `past`; the mask covers both."""
    seen = 0 if past is None else past.get_seq_length()
    mask = torch.ones(1, seen + inputs["input_ids"].shape[1], dtype=torch.long)
    with torch.no_grad():
        return model(**{**inputs, "attention_mask": mask}, past_key_values=past, use_cache=True)


@pytest.mark.parametrize("kind", KINDS)
def test_interleaved_conversations_do_not_meet(kind):
    model = tiny_model(kind)
    video, more = video_inputs(model.config), {"input_ids": text_ids(1, 9, seed=4)}
    alone = prefill(model, more, prefill(model, video).past_key_values).logits
    past = prefill(model, video).past_key_values
    prefill(model, {"input_ids": text_ids(1, 20, seed=5)})
    torch.testing.assert_close(prefill(model, more, past).logits, alone, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_turn", ["video", "text"])
def test_a_later_turn_may_bring_a_video(kind, first_turn):
    model = tiny_model(kind)
    first = video_inputs(model.config, ((2, 4, 6),), seed=1)
    second = video_inputs(model.config, ((3, 6, 4),), seed=2)
    whole = merged(first, second)
    if first_turn == "text":
        first = {"input_ids": text_ids(1, 11, seed=1)}
        whole = {**second, "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1)}
    wanted = prefill(model, whole).logits[:, -second["input_ids"].shape[1] :]
    found = prefill(model, second, prefill(model, first).past_key_values).logits
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_continues_with_a_video(kind):
    model = tiny_model(kind)
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    first, second = (video_inputs(model.config, grid, seed=n) for n, grid in enumerate([((2, 4, 6),), ((3, 6, 4),)]))
    first.pop("mm_token_type_ids"), second.pop("mm_token_type_ids")
    answer = model.generate(**first, **options, return_dict_in_generate=True)
    ids = torch.cat([answer.sequences, second["input_ids"]], dim=1)
    turn = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = model.generate(**turn, **options, past_key_values=answer.past_key_values)
    whole = {key: torch.cat([first[key], second[key]]) for key in ("pixel_values_videos", "video_grid_thw")}
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **whole, **options)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", ["text", "video", "two videos"])
def test_generate_takes_the_whole_conversation_behind_a_cache(kind, more):
    """As the processor prepares it: media of earlier turns are in the cache and are not encoded again."""
    model = tiny_model(kind)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    rows = [
        merged(*(video_inputs(model.config, ((2, 4, 6),), seed=2 * row + turn) for turn in (0, 1))) for row in (0, 1)
    ]
    first = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    first.pop("mm_token_type_ids")
    answer = model.generate(**first, **options, return_dict_in_generate=True)
    new = {"text": (), "video": ((3, 6, 4),), "two videos": ((1, 4, 4), (2, 4, 4))}[more]
    turns = [video_inputs(model.config, new, seed=8 + row) for row in (0, 1)] if new else []
    ids = torch.cat([turn["input_ids"] for turn in turns]) if new else text_ids(2, 9, seed=8)
    ids = torch.cat([answer.sequences, ids], dim=1)
    media = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("pixel_values_videos", "video_grid_thw"):
        halves = first[key].chunk(2)
        media[key] = torch.cat(
            [x for row in (0, 1) for x in (halves[row], *(turn[key] for turn in turns[row : row + 1]))]
        )
    wanted = model.generate(**media, **options)
    frames = []
    encode = model.model.get_video_features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model.model, "get_video_features", lambda x, grid, **rest: (frames.append(grid), encode(x, grid, **rest))[1]
        )
        patch.setattr(model, "get_video_features", model.model.get_video_features)
        found = model.generate(**media, **options, past_key_values=answer.past_key_values)
    assert torch.equal(found, wanted)
    assert sum(len(grid) for grid in frames) == 2 * len(new)


def test_a_cache_that_ends_within_a_video_is_refused():
    model = tiny_model("gqa")
    inputs = video_inputs(model.config)
    inputs.pop("mm_token_type_ids")
    past = prefill(model, inputs).past_key_values
    within = int((inputs["input_ids"] == model.config.video_token_id).nonzero()[2, 1])
    past.crop(within - inputs["input_ids"].shape[1])
    with pytest.raises(
        ValueError, match="The cache ends within one of the videos .* Crop it to where the video begins"
    ):
        model.generate(**inputs, max_new_tokens=2, past_key_values=past)


@pytest.mark.parametrize("kind", KINDS)
def test_rope_deltas_follow_the_positions_that_were_used(kind):
    model = tiny_model(kind)
    inputs = video_inputs(model.config)
    output = prefill(model, inputs)
    if kind == "mla":
        assert output.rope_deltas is None
        return
    positions, deltas = model.model.get_rope_index(inputs["input_ids"], video_grid_thw=inputs["video_grid_thw"])
    assert output.rope_deltas.tolist() == deltas.tolist()
    given = prefill(model, {**inputs, "position_ids": positions + 3})
    assert given.rope_deltas.tolist() == (deltas + 3).tolist()


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_eager_places_anchors_behind_the_padding(kind, cache):
    """A static cache hands `eager` a 4-D mask; anchors count from the first real token all the same."""
    model = tiny_model(kind, attn_implementation="eager")
    ids = text_ids(1, 40, seed=3)
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 40:]
    found = model.generate(padded, attention_mask=mask, cache_implementation=cache, **options)[:, 45:]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_autocast_keeps_the_selection(kind):
    """Training in mixed precision must select what inference selects: scores stay in float32."""
    layer = tiny_model(kind).model.language_model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 200, 5, layer.indexer.head_dim, generator=generator)
    k = torch.randn(1, 200, layer.indexer.head_dim, generator=generator)
    gates = torch.randn(1, 200, 5, generator=generator)
    plain = layer._select((q, k, gates), 1, 0, 200, 0, None, q.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer._select((q, k, gates), 1, 0, 200, 0, None, q.device)
    assert torch.equal(plain, cast)


def test_incomplete_inputs_are_refused():
    model = tiny_model("gqa")
    inputs = video_inputs(model.config)
    with pytest.raises(ValueError, match="video placeholders .* no video was passed"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="no video was passed"):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
    with pytest.raises(ValueError, match="Pixels were passed without `video_grid_thw`"):
        model(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values_videos"])
    with pytest.raises(ValueError, match="Pixels were passed without `video_grid_thw`"):
        model.generate(**{key: inputs[key] for key in ("input_ids", "pixel_values_videos")}, max_new_tokens=2)
    small = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="static cache holds 20 tokens, and with this input there are 21"):
        model(text_ids(1, 21), past_key_values=small)
    with pytest.raises(ValueError, match="uint8"):
        model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"].to(torch.uint8)})
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    media = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")}
    with pytest.raises(ValueError, match="need `input_ids` or `position_ids`"):
        model(inputs_embeds=embeds, **media)
    ids = text_ids(1, 6)
    with pytest.raises(ValueError, match=r"must describe the 6 tokens"):
        model(ids, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match="need a configuration with `mrope_section`"):
        tiny_model("mla")(ids, position_ids=torch.arange(6).expand(3, 1, -1))
    with pytest.raises(ValueError, match="at least 1"), torch.no_grad():
        model(ids, prefill_chunk_size=0)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="leave out `logits_to_keep`"):
        model(ids, labels=ids, logits_to_keep=1)


def test_beams_with_missing_features_are_refused():
    model = tiny_model("mla")
    inputs = video_inputs(model.config)
    inputs["video_grid_thw"] = inputs["video_grid_thw"][:, [0, 1, 2]] - torch.tensor([[1, 0, 0]])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][: int(inputs["video_grid_thw"].prod())]
    inputs.pop("mm_token_type_ids")
    with pytest.raises(ValueError, match="placeholders, but the video features are"):
        model.generate(**inputs, num_beams=2, max_new_tokens=2)
