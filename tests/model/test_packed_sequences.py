"""Several sequences in one row: each is computed as if it stood alone, in logits, gradients and the indexer's loss."""

import pytest
import torch
from torch.nn.functional import pad
from transformers import DataCollatorWithFlattening, DynamicCache

from modeling_keye.packing_keye import packed_bounds
from tests.core.test_memory import Watch
from tests.model.conftest import fresh_model
from tests.model.factories import text_ids, video_inputs
from training.indexer_training import freeze_all_but_indexer
from training.router_balance import RouterBalance

# Most of what the last queries of the longer sequences see is left out by this rule.
RULE = {"index_topk": 16, "local_window": 4, "anchor_stride": 16}
LENGTHS = (120, 1, 37, 150, 9)
COEFFICIENT = 0.5
# For float64. The indexer's gates and the weight of its loss are float32 all the same.
EXACT, OF_INDEXER = {"rtol": 1e-9, "atol": 1e-9}, {"rtol": 1e-5, "atol": 1e-7}
STAGES = ("warmup", "adaptation")


@pytest.fixture(params=STAGES)
def stage(request) -> str:
    return request.param


def learner(kind: str, stage: str, attn_implementation: str | None = None, **text):
    model = fresh_model(kind, attn_implementation, **{**RULE, **text})
    model.config.text_config.indexer_loss_coef = COEFFICIENT
    model.config.text_config.indexer_stage = stage
    return model.train()


def double(model):
    model.set_experts_implementation("eager")  # grouped products know no float64
    return model.double()


def sequences(lengths=LENGTHS) -> list[torch.Tensor]:
    return [text_ids(1, length, seed) for seed, length in enumerate(lengths)]


def row_of(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sequences behind one another, and their bounds as the library's collator gives them."""
    bounds = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0).to(torch.int32)
    return {"input_ids": torch.cat(parts, dim=1), "cu_seq_lens_q": bounds}


def restarting(lengths=LENGTHS) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def probe_like(logits: torch.Tensor) -> torch.Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=logits.dtype)


def collected(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def check_same(actual: dict, expected: dict, of_indexer: dict | None = None, **tolerance):
    assert actual.keys() == expected.keys() and expected
    for name, grad in expected.items():
        allowed = of_indexer if of_indexer and ".indexer." in name else tolerance
        torch.testing.assert_close(actual[name], grad, **allowed, msg=lambda text, at=name: f"{at}: {text}")


def alone(model, parts: list[dict], probe: torch.Tensor):
    """Logits, objective [2] and gradients of the sequences one by one, weighed by their share of the tokens."""
    total, begin = probe.shape[1], 0
    logits, objective = [], 0
    for part in parts:
        length = part["input_ids"].shape[1]
        model.config.text_config.indexer_loss_coef = COEFFICIENT * length / total
        outputs = model(**part, use_cache=False)
        (outputs.logits * probe[:, begin : begin + length]).sum().backward()
        logits.append(outputs.logits.detach())
        objective += torch.stack([outputs.indexer_loss, outputs.indexer_recall]) * length / total
        begin += length
    model.config.text_config.indexer_loss_coef = COEFFICIENT
    return torch.cat(logits, dim=1), objective, collected(model)


def together(model, row: dict, probe: torch.Tensor | None = None):
    """As `alone`, for the sequences in one row."""
    outputs = model(**row, use_cache=False)
    (outputs.logits * (probe_like(outputs.logits) if probe is None else probe)).sum().backward()
    objective = torch.stack([outputs.indexer_loss, outputs.indexer_recall])
    return outputs.logits.detach(), objective, collected(model)


def check_equal_to_alone(model, row, parts, logits_tolerance, grads_tolerance=None):
    logits, objective, grads = together(model, row)
    expected_logits, expected_objective, expected_grads = alone(model, parts, probe_like(logits))
    torch.testing.assert_close(logits, expected_logits, **logits_tolerance)
    torch.testing.assert_close(objective, expected_objective, rtol=1e-5, atol=0)
    check_same(grads, expected_grads, **(grads_tolerance or EXACT), of_indexer=OF_INDEXER)


@pytest.mark.parametrize("attn_implementation", [None, "eager"])
def test_a_packed_row_equals_each_sequence_alone(kind, stage, attn_implementation):
    """Logits, the gradient of every parameter, the indexer's loss and its recall, in float64."""
    model = double(learner(kind, stage, attn_implementation))
    parts = [{"input_ids": ids} for ids in sequences()]
    check_equal_to_alone(model, row_of(sequences()), parts, EXACT)


def test_float32(kind, stage):
    parts = [{"input_ids": ids} for ids in sequences()]
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    check_equal_to_alone(learner(kind, stage), row_of(sequences()), parts, tolerance, {"rtol": 1e-4, "atol": 1e-3})


def test_selections_are_slots_of_the_row(kind):
    for attn_implementation in (None, "eager"):
        model = fresh_model(kind, attn_implementation, **RULE)
        chosen = model(**row_of(sequences()), output_indexer_selections=True).indexer_selections
        # Although the last sequence keeps everything.
        ran = "torch" if attn_implementation is None else "dense mask"
        assert {entry["ran"] for entry in model.attention_backend_report()} == {ran}
        begin = 0
        for ids in sequences():
            expected = model(ids, output_indexer_selections=True).indexer_selections
            for layer, one in zip(chosen, expected, strict=True):
                assert layer.shape[-1] < max(LENGTHS) // 2
                shifted = torch.where(one < 0, one, one + begin)
                shifted = pad(shifted, (0, layer.shape[-1] - one.shape[-1]), value=-1)
                assert torch.equal(layer[:, begin : begin + ids.shape[1]], shifted)
            begin += ids.shape[1]


def test_attention_matrices_are_block_diagonal(kind):
    model = fresh_model(kind, "eager", **RULE)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    foreign = owner[:, None] != owner
    for weights in model(**row_of(sequences()), output_attentions=True).attentions:
        assert not weights[0, :, foreign].any()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_the_padded_batch_gives_the_same_loss(kind, stage):
    """The mean of the indexer's loss is taken over real tokens, and the labels are those of the library's collator."""
    model, parts = double(learner(kind, stage)), sequences()
    row = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids[0]} for ids in parts])
    rows = torch.cat([pad(ids, (0, max(LENGTHS) - ids.shape[1])) for ids in parts])
    mask = torch.cat([pad(torch.ones_like(ids), (0, max(LENGTHS) - ids.shape[1])) for ids in parts])
    padded = {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}
    results = []
    for inputs in (row, padded):
        outputs = model(**inputs, use_cache=False)
        outputs.loss.backward()
        results.append((outputs.loss.detach(), outputs.indexer_loss, collected(model)))
    (loss, indexer_loss, grads), (expected_loss, expected_indexer_loss, expected_grads) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)  # the library's loss is float32
    torch.testing.assert_close(indexer_loss, expected_indexer_loss, rtol=1e-5, atol=0)
    check_same(grads, expected_grads, rtol=1e-5, atol=1e-7)


def test_one_sequence_is_no_packing(kind, stage):
    """Bit for bit what a plain call gives."""
    ids, model = text_ids(1, 120), learner(kind, stage)
    expected = together(model, {"input_ids": ids})
    for extra in ({"cu_seq_lens_q": torch.tensor([0, 120], dtype=torch.int32)}, {"position_ids": restarting((120,))}):
        logits, objective, grads = together(model, {"input_ids": ids, **extra})
        assert torch.equal(logits, expected[0]) and torch.equal(objective, expected[1])
        check_same(grads, expected[2], rtol=0, atol=0)


def test_sequences_of_one_token(kind, stage):
    lengths = (1,) * 7
    model, parts = double(learner(kind, stage)), [{"input_ids": ids} for ids in sequences(lengths)]
    check_equal_to_alone(model, row_of(sequences(lengths)), parts, EXACT)


@pytest.mark.parametrize("return_flash_attn_kwargs", [False, True])
def test_the_collator_of_the_library(kind, stage, return_flash_attn_kwargs):
    """Its position ids alone tell, as do its bounds; a batch of lists, as the collator gets them from a data set."""
    model, row = learner(kind, stage), row_of(sequences())
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=return_flash_attn_kwargs)
    inputs = collator([{"input_ids": ids[0].tolist()} for ids in sequences()])
    assert ("cu_seq_lens_q" in inputs) is return_flash_attn_kwargs
    expected = together(model, row)
    logits, objective, grads = together(model, inputs)
    assert torch.equal(logits, expected[0]) and torch.equal(objective, expected[1])
    check_same(grads, expected[2], rtol=0, atol=0)


def test_the_collator_of_trl(kind):
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    collator = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    model = learner(kind, "adaptation")
    expected = together(model, row_of(sequences()))[0]
    inputs = collator([{"input_ids": ids[0].tolist()} for ids in sequences()])
    only_positions = {name: inputs[name] for name in ("input_ids", "position_ids")}
    for row in (inputs, only_positions):
        assert torch.equal(together(model, row)[0], expected)


@pytest.mark.parametrize("attn_implementation", [None, "eager"])
def test_a_video_in_each_sequence(kind, stage, attn_implementation):
    """Media stand in the order of the sequences; positions on three axes start anew in each."""
    model = double(learner(kind, stage, attn_implementation))
    parts = [
        video_inputs(model.config, grid=grid, text=text, seed=seed)
        for seed, (grid, text) in enumerate((((((5, 4, 6),)), 40), (((2, 4, 4), (3, 4, 6)), 7), (((4, 8, 4),), 21)))
    ]
    for part in parts:
        del part["attention_mask"]
        part["pixel_values_videos"] = part["pixel_values_videos"].double()
    row = row_of([part["input_ids"] for part in parts])
    for name in ("pixel_values_videos", "video_grid_thw"):
        row[name] = torch.cat([part[name] for part in parts])
    check_equal_to_alone(model, row, parts, EXACT)


def test_positions_on_three_axes_that_start_anew():
    """Three rows tell by position 0 on all axes, four by that of the text; a picture does not divide its sequence."""
    model = learner("gqa", "adaptation")
    parts = [video_inputs(model.config, text=text, seed=text) for text in (40, 12)]
    row = row_of([part["input_ids"] for part in parts])
    for name in ("pixel_values_videos", "video_grid_thw"):
        row[name] = torch.cat([part[name] for part in parts])
    expected = together(model, row)[0]
    del row["cu_seq_lens_q"]
    positions = [model.model.get_rope_index(part["input_ids"], None, part["video_grid_thw"])[0] for part in parts]
    three = torch.cat(positions, dim=-1)
    text = restarting([part["input_ids"].shape[1] for part in parts])
    for position_ids in (three, torch.cat([text[None], three])):
        outputs = model(**row, position_ids=position_ids, use_cache=False)
        assert torch.equal(outputs.logits, expected) and outputs.rope_deltas is None
    assert packed_bounds(None, positions[0], None, None, 1, positions[0].shape[-1]) is None


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "indexer alone"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(kind, stage, use_reentrant, frozen):
    model, row = learner(kind, stage), row_of(sequences((60, 1, 37)))
    if frozen:
        freeze_all_but_indexer(model)
    expected = together(model, row)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    logits, objective, grads = together(model, row)
    assert torch.equal(logits, expected[0]) and torch.equal(objective, expected[1])
    check_same(grads, expected[2], rtol=0, atol=0)


def test_router_balance_counts_every_token_once():
    model, loads = learner("mla", "adaptation"), []
    balance = RouterBalance(0.001)
    balance.on_train_begin(None, None, None, model=model)
    with torch.no_grad():
        for calls in ([row_of(sequences())], [{"input_ids": ids} for ids in sequences()]):
            for inputs in calls:
                model(**inputs, use_cache=False)
            loads.append([load.clone() for load in balance.loads.values()])
            for load in balance.loads.values():
                load.zero_()
    balance.on_train_end(None, None, None)
    for packed, one_by_one in zip(*loads, strict=True):
        assert torch.equal(packed, one_by_one) and packed.sum() == 2 * sum(LENGTHS)


def test_evaluation_neither_chunks_nor_keeps_a_cache(kind):
    model, row = fresh_model(kind, **RULE), row_of(sequences())
    expected = model(**row).logits
    with torch.no_grad():
        outputs = model(**row, prefill_chunk_size=16)
    assert outputs.past_key_values is None
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)


def test_no_tensor_of_queries_by_keys(kind, stage):
    model = learner(kind, stage, num_hidden_layers=1, mlp_layer_types=["dense"], local_window=64, index_topk=32)
    parts = sequences((1024, 1024, 1024))
    with Watch() as watch:
        model(**row_of(parts), use_cache=False).logits.sum().backward()
    assert watch.largest < 3072 * 3072 // 4, watch.largest_by


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([[0, 1, 2, 3]], None),
        ([[5, 6, 7, 8]], None),
        ([[0, 1, 7, 8]], None),
        ([[0, 1, 0, 1]], (0, 2, 4)),
        ([[0, 0, 0, 1]], (0, 1, 2, 4)),
        ([[2, 3, 4, 2]], (0, 3, 4)),
        ([[7, 8, 0, 1]], (0, 2, 4)),
        ([[[0, 1, 1, 2]], [[0, 1, 1, 2]], [[0, 1, 2, 3]]], None),
        ([[[0, 1, 0, 0]], [[0, 1, 0, 0]], [[0, 1, 0, 1]]], (0, 2, 4)),
        ([[[0, 1, 0, 1]], [[0, 1, 0, 0]], [[0, 1, 0, 0]], [[0, 1, 0, 1]]], (0, 2, 4)),
        ([[[0, 1, 2, 3]], [[0, 1, 1, 1]], [[0, 1, 1, 2]], [[0, 1, 2, 1]]], None),
    ],
)
def test_where_positions_tell_that_a_sequence_begins(positions, bounds):
    positions = torch.tensor(positions)
    assert packed_bounds(None, positions, None, None, 1, 4) == bounds
    mask, cache = torch.ones(1, 4, dtype=torch.long), DynamicCache()
    assert packed_bounds(None, positions, mask, None, 1, 4) is None
    assert packed_bounds(None, positions, None, cache, 1, 4) is None


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        (torch.tensor([1, 4, 10]), "`cu_seq_lens_q` starts at 1. It must be one list of integers that rises from 0"),
        (torch.tensor([0, 4, 4, 10]), "`cu_seq_lens_q` does not rise from 4 to 4 (entry 2)"),
        (torch.tensor([0, 6, 4, 10]), "`cu_seq_lens_q` does not rise from 6 to 4 (entry 2)"),
        (
            torch.tensor([0, 4, 9]),
            "`cu_seq_lens_q` ends at 9. It must be one list of integers that rises from 0 to the 10",
        ),
        (torch.tensor([0]), "`cu_seq_lens_q` is [0]"),
        (torch.tensor([[0, 4, 10]]), "`cu_seq_lens_q` is [[0, 4, 10]]"),
        ([0, 4.5, 10], "`cu_seq_lens_q` is [0, 4.5, 10]"),
    ],
)
def test_bounds_that_do_not_divide_the_row(bounds, sentence):
    for model in (fresh_model("mla"), fresh_model("mla").model.language_model):
        with pytest.raises(ValueError) as error:
            model(text_ids(1, 10), cu_seq_lens_q=bounds)
        assert sentence in str(error.value)


def test_refused_calls(kind):
    model, ids, bounds = fresh_model(kind), text_ids(1, 10), torch.tensor([0, 4, 10])
    mask = torch.ones_like(ids)
    assert model(ids, attention_mask=mask, cu_seq_lens_q=bounds).logits.isfinite().all()
    mask[0, 0] = 0
    for extra, sentence in (
        ({"past_key_values": DynamicCache()}, "A row of 2 packed sequences cannot go on from a cache"),
        ({"use_cache": True}, "A row of 2 packed sequences leaves no cache to go on from: leave out `use_cache=True`"),
        ({"attention_mask": mask}, "`attention_mask` (1, 10) masks tokens of 2 packed sequences"),
    ):
        with pytest.raises(ValueError) as error:
            model(ids, cu_seq_lens_q=bounds, **extra)
        assert sentence in str(error.value)
    with pytest.raises(ValueError, match="A sequence begins at token 4 of a row, but the batch has 2 rows"):
        model(text_ids(2, 10), position_ids=restarting((4, 6)).expand(2, -1))
    with pytest.raises(ValueError, match="`position_ids` .1, 9. must describe the 10 tokens of this call"):
        model(ids, position_ids=restarting((4, 5)))
