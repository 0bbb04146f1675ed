"""Equalities that users rely on: however a prompt reaches the model, the answer is the same."""

import itertools

import pytest
import torch

from modeling_keye import vision_keye
from modeling_keye.configuration_keye import INDEXED_LAYER_TYPE
from modeling_keye.modeling_keye import KeyeForVideoQA
from tests.model.factories import model_of, text_ids, tiny_config, tiny_model, video_inputs

KINDS = ["mla", "mla_dense", "gqa", "gqa_dense"]
SPARSE_KINDS = ["mla", "gqa"]
CHUNKS = [1, 5, 7, 16, 64]
TOLERANCE = 1e-4  # logits are about 1.5 in size; greedy tokens are compared exactly
NEW = 12


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def generate(model, new: int = NEW, **inputs) -> torch.Tensor:
    """Generated tokens only, greedy unless told otherwise."""
    sequences = model.generate(**{"do_sample": False, "max_new_tokens": new, **inputs})
    length = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    return sequences[:, length:]


def greedy_by_hand(model, inputs: dict, new: int = NEW) -> torch.Tensor:
    """Greedy decoding without a cache and without `generate`: the whole prompt, pixels included, at every step."""
    inputs = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    length = inputs["input_ids"].shape[1]
    for _ in range(new):
        token = logits_of(model, **inputs, use_cache=False)[:, -1:].argmax(dim=-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return inputs["input_ids"][:, length:]


def text_inputs(batch: int = 1, length: int = 70, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = text_ids(batch, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batch_of(prompts: list[dict]) -> dict[str, torch.Tensor]:
    """Left-padded batch of single prompts, with the media of all of them one after the other."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for key in prompts[0]:
        parts = [prompt[key] for prompt in prompts]
        if key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            parts = [torch.nn.functional.pad(part, (length - part.shape[1], 0)) for part in parts]
        batch[key] = torch.cat(parts)
    return batch


def prompt_of(model, media: str, **options) -> dict[str, torch.Tensor]:
    if media == "text":
        return text_inputs(**options)
    return video_inputs(model.config, ((3, 4, 6), (2, 6, 4), (2, 4, 4)), **options)


EVERY_PROMPT = list(itertools.product(KINDS, ["text", "video"]))


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_cached_is_uncached(kind, media):
    model = tiny_model(kind)
    inputs = prompt_of(model, media)
    by_hand = greedy_by_hand(model, inputs)
    assert len(set(by_hand[0].tolist())) > 1, "the model repeats one token: the comparison would show little"
    assert torch.equal(generate(model, **inputs), by_hand)
    assert torch.equal(generate(model, **inputs, use_cache=False), by_hand)


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_cached_logits_are_uncached_logits(kind, media):
    model = tiny_model(kind)
    inputs = prompt_of(model, media)
    inputs.pop("mm_token_type_ids", None)
    more = text_ids(1, 20, seed=8)
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    mask = torch.ones_like(ids)
    whole = logits_of(model, **{**inputs, "input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        parts, length = [output.logits], inputs["input_ids"].shape[1]
        for begin, end in ((0, 1), (1, 2), (2, 9), (9, 20)):
            parts.append(model(more[:, begin:end], past_key_values=output.past_key_values).logits)
    assert output.past_key_values.get_seq_length() == length + 20
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_every_prefill_chunk_is_one_shot(kind, media, chunk):
    model = tiny_model(kind)
    prompts = [prompt_of(model, media), prompt_of(model, media, seed=3)]
    if media == "text":
        prompts[1] = text_inputs(length=41, seed=3)
    inputs = batch_of(prompts)
    one_shot = logits_of(model, **inputs)
    assert_close(logits_of(model, **inputs, prefill_chunk_size=chunk), one_shot)
    for kept in (25,) if chunk == 1 else (1, 25, 10**6, -5):
        found = logits_of(model, **inputs, prefill_chunk_size=chunk, logits_to_keep=kept)
        assert_close(found, one_shot[:, -kept:])
    answer = generate(model, **inputs)
    assert torch.equal(generate(model, **inputs, prefill_chunk_size=chunk), answer)

    in_config = model_of(tiny_config(kind, prefill_chunk_tokens=chunk))
    assert_close(logits_of(in_config, **inputs, use_cache=False), one_shot)
    if media == "text":
        # A hundred more tokens behind a cache run in chunks as well.
        with torch.no_grad():
            cache = in_config(**inputs, use_cache=True).past_key_values
            more = text_ids(2, 60, seed=4)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 60), value=1)
            continued = in_config(more, attention_mask=mask, past_key_values=cache).logits
        whole = logits_of(model, input_ids=torch.cat([inputs["input_ids"], more], dim=1), attention_mask=mask)
        assert_close(continued, whole[:, -60:])


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
def test_batched_with_left_padding_is_single(kind, media, attention):
    model = tiny_model(kind, attn_implementation=attention)
    if media == "text":
        prompts = [text_inputs(length=n, seed=n) for n in (70, 31, 69, 2)]
    else:
        grids = ((3, 4, 6), (2, 6, 4)), ((2, 4, 4),), ((1, 6, 6), (3, 2, 4))
        prompts = [video_inputs(model.config, grid, seed=i) for i, grid in enumerate(grids)]
    batch = batch_of(prompts)
    together = logits_of(model, **batch)
    answers = generate(model, **batch)
    for b, prompt in enumerate(prompts):
        assert_close(together[b, -prompt["input_ids"].shape[1] :], logits_of(model, **prompt)[0])
        assert torch.equal(answers[b], generate(model, **prompt)[0])


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_left_padding_shifts_the_selection(kind):
    model = tiny_model(kind)
    prompts = [text_inputs(length=70), text_inputs(length=43, seed=1)]
    with torch.no_grad():
        together = model(**batch_of(prompts), output_indexer_selections=True).indexer_selections
        single = model(**prompts[1], output_indexer_selections=True).indexer_selections
    for padded, alone in zip(together, single, strict=True):
        padded, alone = padded[1, 27:], alone[0]
        padded = torch.where(padded < 0, padded, padded - 27)
        assert torch.equal(padded[:, : alone.shape[1]], alone)
        assert bool((padded[:, alone.shape[1] :] == -1).all())


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_static_cache_is_dynamic_cache(kind, media):
    model = tiny_model(kind)
    prompts = [prompt_of(model, media), prompt_of(model, media, seed=6)]
    if media == "text":
        prompts[1] = text_inputs(length=41, seed=3)
    inputs = batch_of(prompts)
    dynamic = generate(model, **inputs)
    assert torch.equal(generate(model, **inputs, cache_implementation="static"), dynamic)
    chunked = generate(model, **inputs, cache_implementation="static", prefill_chunk_size=16)
    assert torch.equal(chunked, dynamic)


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_beams(kind, media):
    model = tiny_model(kind)
    prompts = [prompt_of(model, media), prompt_of(model, media, seed=6)]
    if media == "text":
        prompts[1] = text_inputs(length=41, seed=3)
    options = {"num_beams": 3, "num_return_sequences": 2, "new": 8}
    singles = torch.cat([generate(model, **prompt, **options) for prompt in prompts])
    assert singles.shape == (4, 8)
    assert not torch.equal(singles[0], singles[1])
    batch = batch_of(prompts)
    assert torch.equal(generate(model, **batch, **options), singles)
    if media == "text":
        assert torch.equal(generate(model, **batch, **options, use_cache=False), singles)
    assert torch.equal(generate(model, **batch, **options, cache_implementation="static"), singles)


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_sampling_with_a_seed(kind, media):
    model = tiny_model(kind)
    inputs = prompt_of(model, media)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3}

    def sample(seed: int, **more):
        torch.manual_seed(seed)
        return generate(model, **inputs, **options, **more)

    first = sample(1)
    assert first.shape == (3, NEW)
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2), first)
    assert torch.equal(sample(1, cache_implementation="static"), first)
    assert torch.equal(sample(1, prefill_chunk_size=7), first)
    if media == "text":
        assert torch.equal(sample(1, use_cache=False), first)


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_prompt_lookup_is_greedy(kind, media):
    model = tiny_model(kind)
    inputs = prompt_of(model, media)
    # A prompt that repeats itself, so that some guesses are right and some are cropped away.
    inputs["input_ids"][:, -6:-3] = inputs["input_ids"][:, -3:]
    answer = generate(model, new=25, **inputs)
    assert torch.equal(generate(model, new=25, **inputs, prompt_lookup_num_tokens=4), answer)


@pytest.mark.parametrize("kind", KINDS)
def test_from_embeddings(kind):
    model = tiny_model(kind)
    inputs = batch_of([text_inputs(), text_inputs(length=33, seed=2)])
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = inputs["attention_mask"]
    assert torch.equal(logits_of(model, inputs_embeds=embeddings, attention_mask=mask), logits_of(model, **inputs))
    answer = generate(model, **inputs)
    assert torch.equal(generate(model, inputs_embeds=embeddings, attention_mask=mask), answer)
    assert torch.equal(generate(model, inputs_embeds=embeddings, attention_mask=mask, prefill_chunk_size=7), answer)


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_a_second_turn_is_one_go(kind, media):
    model = tiny_model(kind)
    inputs = prompt_of(model, media)
    first = model.generate(**inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True, use_cache=True)
    ids = torch.cat([first.sequences, text_ids(1, 15, seed=11)], dim=1)
    mask = torch.ones_like(ids)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    second = generate(model, input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)
    media_inputs = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw") if key in inputs}
    assert torch.equal(second, generate(model, input_ids=ids, attention_mask=mask, **media_inputs))
    whole = {"input_ids": ids, "attention_mask": mask, **media_inputs}
    assert torch.equal(second, greedy_by_hand(model, whole))


@pytest.mark.parametrize(("kind", "media"), EVERY_PROMPT)
def test_sparse_is_eager(kind, media):
    sparse, eager = (tiny_model(kind, attn_implementation=name) for name in ("keye_sparse", "eager"))
    assert [row["implementation"] for row in sparse.attention_backend_report()] == ["keye_sparse"] * 3
    prompts = [prompt_of(sparse, media), prompt_of(sparse, media, seed=6)]
    if media == "text":
        prompts[1] = text_inputs(length=41, seed=3)
    inputs = batch_of(prompts)
    mask = inputs["attention_mask"].bool()
    assert_close(logits_of(sparse, **inputs)[mask], logits_of(eager, **inputs)[mask])
    ran = "dense" if kind.endswith("dense") else "torch"
    assert [row["ran"] for row in sparse.attention_backend_report()] == [ran] * 3
    assert [row["ran"] for row in eager.attention_backend_report()] == ["dense mask"] * 3
    assert torch.equal(generate(sparse, **inputs), generate(eager, **inputs))


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_sparse_is_eager_in_every_part(kind):
    for parts in itertools.product([None, 9], [None, 6], [None, 11]):
        if parts == (None, None, None):
            continue
        topk, window, stride = parts
        changes = {"local_window": window, "anchor_stride": stride}
        changes |= {"indexer_type": None} if topk is None else {"index_topk": topk}
        sparse, eager = (tiny_model(kind, attn_implementation=name, **changes) for name in ("keye_sparse", "eager"))
        inputs = batch_of([text_inputs(length=70), text_inputs(length=41, seed=3)])
        mask = inputs["attention_mask"].bool()
        assert_close(logits_of(sparse, **inputs)[mask], logits_of(eager, **inputs)[mask])
        assert torch.equal(generate(sparse, **inputs), generate(eager, **inputs))


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_gradients_of_sparse_are_those_of_eager(kind):
    gradients = []
    for name in ("keye_sparse", "eager"):
        model = tiny_model(kind, attn_implementation=name)
        inputs = batch_of([text_inputs(length=60), text_inputs(length=35, seed=2)])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert (ours is None) == (theirs is None), name
        if ours is None:
            assert "indexer" in name or name.startswith(("model.visual", "model.projector")), name
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("budget", [{"index_topk": 500}, {"local_window": 500}, {"anchor_stride": 1}], ids=str)
def test_a_full_budget_is_dense(kind, attention, budget):
    sparse = tiny_model(kind, attn_implementation=attention, **budget)
    dense = model_of(tiny_config(kind, layer_types=["full_attention"] * 3), attn_implementation=attention)
    missing, unexpected = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert not missing and all(".indexer." in name for name in unexpected)
    inputs = batch_of([text_inputs(length=90), text_inputs(length=41, seed=3)])
    mask = inputs["attention_mask"].bool()
    assert_close(logits_of(sparse, **inputs)[mask], logits_of(dense, **inputs)[mask])
    assert torch.equal(generate(sparse, **inputs), generate(dense, **inputs))


def test_a_small_budget_is_not_dense():
    """Otherwise the test above would pass for a model that ignores its selection."""
    sparse = tiny_model("mla")
    dense = model_of(tiny_config("mla", layer_types=["full_attention"] * 3))
    dense.load_state_dict(sparse.state_dict(), strict=False)
    inputs = text_inputs(length=90)
    assert (logits_of(sparse, **inputs) - logits_of(dense, **inputs)).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
@pytest.mark.parametrize("change", [{"index_topk": 2}, {"local_window": None}, {"anchor_stride": 3}], ids=str)
def test_a_budget_that_is_changed_later_holds_at_once(change, attention):
    """What the config says is what runs, and what is saved."""
    model, inputs = tiny_model("gqa", attn_implementation=attention), text_inputs(length=90)
    before = logits_of(model, **inputs)
    for name, value in change.items():
        setattr(model.config.text_config, name, value)
    changed = tiny_model("gqa", attn_implementation=attention, **change)
    changed.load_state_dict(model.state_dict())
    after = logits_of(model, **inputs)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, logits_of(changed, **inputs))
    assert model.attention_backend_report() == changed.attention_backend_report()


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_layers_may_differ(kind):
    types = ["full_attention", INDEXED_LAYER_TYPE, "full_attention"]
    sparse, eager = (tiny_model(kind, attn_implementation=n, layer_types=types) for n in ("keye_sparse", "eager"))
    inputs = text_inputs(length=90)
    assert_close(logits_of(sparse, **inputs), logits_of(eager, **inputs))
    assert torch.equal(generate(sparse, **inputs), greedy_by_hand(sparse, inputs))
    assert torch.equal(generate(sparse, **inputs, cache_implementation="static"), greedy_by_hand(sparse, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "gqa_moe"])
def test_saved_is_reloaded(kind, dtype, tmp_path):
    model = tiny_model(kind, dtype=dtype)
    inputs = prompt_of(model, "video")
    before = logits_of(model, **inputs)
    assert before.dtype == dtype
    buffers = {name: buffer.clone() for name, buffer in KeyeForVideoQA(model.config).named_buffers()}
    for turn in range(2):
        model.save_pretrained(tmp_path / str(turn))
        model = KeyeForVideoQA.from_pretrained(tmp_path / str(turn), dtype=dtype)
        assert not model.training
        assert torch.equal(logits_of(model, **inputs), before)
        restored = dict(model.named_buffers())
        assert restored.keys() == buffers.keys()
        for name, buffer in buffers.items():
            if "inv_freq" in name:
                assert restored[name].dtype == torch.float32, name
                assert torch.equal(restored[name], buffer), name
        assert any("rotary_emb.inv_freq" in name for name in buffers)


# Video.


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_chunks_are_one_shot(kind):
    model = tiny_model(kind)
    inputs = prompt_of(model, "video")
    one_shot, answer = logits_of(model, **inputs), generate(model, **inputs)
    for patches in (1, 24, 50, 100):
        model.config.vision_config.encode_chunk_patches = patches
        assert_close(logits_of(model, **inputs), one_shot)
        assert torch.equal(generate(model, **inputs), answer)


@pytest.mark.parametrize("kind", KINDS)
def test_images_beside_videos(kind):
    """Two prompts, of which one holds an image and a video and the other two images."""
    model = tiny_model(kind)
    config = model.config
    grids = [torch.tensor([[1, 6, 4]]), torch.tensor([[1, 4, 4], [1, 2, 6]])]
    prompts = [video_inputs(config, ((2, 4, 6),)), text_inputs(length=12, seed=4)]
    for prompt, grid in zip(prompts, grids, strict=True):
        images = [torch.full((1, int(row.prod()) // 4), config.image_token_id) for row in grid]
        ids = [part for image in images for part in (image, text_ids(1, 2))]
        prompt["input_ids"] = torch.cat([*ids, prompt["input_ids"]], dim=1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        prompt["image_grid_thw"] = grid
        prompt["pixel_values"] = torch.randn(int(grid.prod(-1).sum()), 3, 14, 14)
    by_hand = [greedy_by_hand(model, prompt) for prompt in prompts]
    assert all(torch.equal(generate(model, **prompt), answer) for prompt, answer in zip(prompts, by_hand, strict=True))
    media = {key: prompts[0][key] for key in ("pixel_values_videos", "video_grid_thw")}
    media |= {key: torch.cat([p[key] for p in prompts]) for key in ("pixel_values", "image_grid_thw")}
    batch = batch_of([{key: p[key] for key in ("input_ids", "attention_mask")} for p in prompts])
    assert torch.equal(generate(model, **batch, **media), torch.cat(by_hand))
    beams = generate(model, **batch, **media, num_beams=2)
    assert torch.equal(beams, torch.cat([generate(model, **prompt, num_beams=2) for prompt in prompts]))


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_the_video_matters_and_is_encoded_once(kind, monkeypatch):
    model = tiny_model(kind)
    inputs = prompt_of(model, "video")
    calls = []
    original = model.model.get_video_features
    monkeypatch.setattr(model.model, "get_video_features", lambda *a, **k: calls.append(1) or original(*a, **k))
    generate(model, **inputs, num_beams=2)
    assert len(calls) == 1
    other = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    assert (logits_of(model, **inputs) - logits_of(model, **other)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_rows_of_one_frame_are_a_row_of_frames(kind):
    """The processor merges frames of equal size in one row; writing them as rows of one frame changes nothing."""
    model = tiny_model(kind)
    inputs = video_inputs(model.config, ((3, 4, 6),))
    split = {**inputs, "video_grid_thw": torch.tensor([[1, 4, 6]] * 3)}
    assert_close(logits_of(model, **split), logits_of(model, **inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_features_in_place_of_pixels(kind):
    model = tiny_model(kind)
    inputs = prompt_of(model, "video")
    expected = logits_of(model, **inputs)
    with torch.no_grad():
        features = model.get_video_features(inputs.pop("pixel_values_videos"), inputs["video_grid_thw"])
    encoded = {"mm_encoder_outputs": {"video": features}}
    assert_close(logits_of(model, **inputs, **encoded), expected)
    # Embeddings of the caller stay his; those of the placeholders say where the features go.
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
    before = embeddings.clone()
    positions, _ = model.model.get_rope_index(ids, video_grid_thw=inputs.pop("video_grid_thw"))
    three_axes = model.config.text_config.mrope_section is not None
    inputs = {"attention_mask": inputs["attention_mask"], "position_ids": positions if three_axes else None}
    assert_close(logits_of(model, **inputs, inputs_embeds=embeddings, **encoded), expected)
    assert torch.equal(embeddings, before)


def test_vision_module_is_the_one_under_test():
    assert tiny_model("mla").model.visual.vision_model.__class__.__module__ == vision_keye.__name__


# Three-axis positions: the numbers of the published models.


def test_positions_of_preview():
    model = tiny_model("gqa_dense")
    video = model.config.video_token_id
    ids = torch.tensor([[5, 6, model.config.vision_start_token_id, *[video] * 8, 7, 8]])
    positions, deltas = model.model.get_rope_index(
        ids, video_grid_thw=torch.tensor([[2, 4, 4]]), second_per_grid_ts=[0.5]
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6],
        [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 5, 6],
    ]
    assert deltas.tolist() == [[-6]]


def test_positions_of_one_and_a_half():
    model = tiny_model("gqa")
    video = [model.config.video_token_id] * 4
    ids = torch.tensor([[5, 6, model.config.vision_start_token_id, 9, 9, 9, 9, *video, 9, 9, 9, 9, *video, 7, 8]])
    positions, deltas = model.model.get_rope_index(ids, video_grid_thw=torch.tensor([[2, 4, 4]]))
    text = [[0, 1, 2, 3, 4, 5, 6], [9, 10, 11, 12], [15, 16]]
    assert positions[:, 0].tolist() == [
        [*text[0], 7, 7, 7, 7, *text[1], 13, 13, 13, 13, *text[2]],
        [*text[0], 7, 7, 8, 8, *text[1], 13, 13, 14, 14, *text[2]],
        [*text[0], 7, 8, 7, 8, *text[1], 13, 14, 13, 14, *text[2]],
    ]
    assert deltas.tolist() == [[17 - 21]]


def test_positions_of_a_padded_batch():
    model = tiny_model("gqa")
    prompts = [video_inputs(model.config, ((2, 4, 6),)), video_inputs(model.config, ((1, 4, 4),), seed=1)]
    batch = batch_of(prompts)
    positions, deltas = model.model.get_rope_index(
        batch["input_ids"], video_grid_thw=batch["video_grid_thw"], attention_mask=batch["attention_mask"]
    )
    for b, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        alone, delta = model.model.get_rope_index(prompt["input_ids"], video_grid_thw=prompt["video_grid_thw"])
        assert torch.equal(positions[:, b, -length:], alone[:, 0])
        # The next token stands at slot `padded length` and continues behind the largest position.
        assert int(deltas[b]) + batch["input_ids"].shape[1] == int(alone.max()) + 1 == int(delta) + length


def test_positions_with_images_and_videos():
    model = tiny_model("gqa")
    config = model.config
    ids = torch.tensor([[5, *[config.image_token_id] * 6, 7, *[config.video_token_id] * 2, 8]])
    positions, _ = model.model.get_rope_index(
        ids, image_grid_thw=torch.tensor([[1, 6, 4]]), video_grid_thw=torch.tensor([[1, 2, 4]])
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 5, 7],
        [0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 7],
        [0, 1, 2, 1, 2, 1, 2, 4, 5, 6, 7],
    ]


def test_positions_refuse_grids_that_do_not_fit():
    model = tiny_model("gqa")
    ids = torch.tensor([[5, *[model.config.video_token_id] * 3, 8]])
    with pytest.raises(ValueError, match="does not fit the image and video grids"):
        model.model.get_rope_index(ids, video_grid_thw=torch.tensor([[1, 4, 4]]))


def test_clip_time_scale_reaches_generation():
    """`second_per_grid_ts` changes the positions at prefill and in every step after it."""
    model = tiny_model("gqa_dense")
    inputs = video_inputs(model.config, ((4, 4, 6),))
    slow, fast = ({**inputs, "second_per_grid_ts": [seconds]} for seconds in (0.5, 30.0))
    assert (logits_of(model, **slow) - logits_of(model, **fast)).abs().max() > 0.01
    for prompt in (slow, fast):
        assert torch.equal(generate(model, **prompt), greedy_by_hand(model, prompt))
