"""The indexer's loss inside the model: who gets which gradient; checkpointing, mixed precision, accumulation."""

import copy
import math

import pytest
import torch

from modeling_keye import KeyeConfig, attention_keye, sparse_attention_keye
from modeling_keye.attention_keye import KeyeAttention
from modeling_keye.indexer_objective_keye import IndexerLoss
from tests.core.test_memory import Watch
from tests.model.conftest import fresh_model, media_inputs
from tests.model.factories import text_ids, tiny_config, tiny_model
from training.indexer_training import decoder_of, freeze_all_but_indexer

STAGES = ("warmup", "adaptation")
COEFFICIENT = 0.5
TOKENS = 40


@pytest.fixture(params=STAGES)
def stage(request) -> str:
    return request.param


def learner(kind: str, stage: str, coefficient: float = COEFFICIENT, attn_implementation=None, **text):
    """A tiny model in training mode with the objective on."""
    model = fresh_model(kind, attn_implementation, **text)
    model.config.text_config.indexer_loss_coef = coefficient
    model.config.text_config.indexer_stage = stage
    return model.train()


def batch(side: str | None = None, rows: int = 2, tokens: int = TOKENS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Text in which every token but the first is a label; with `side`, the first row is padded there."""
    ids = text_ids(rows, tokens, seed)
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(0, 11) if side == "left" else slice(-11, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, inputs, **keywords) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, use_cache=False, **keywords).loss.backward()
    return collected(model)


def collected(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_indexer(grads: dict) -> dict:
    return {name: grad for name, grad in grads.items() if ".indexer." in name}


def of_trunk(grads: dict) -> dict:
    return {name: grad for name, grad in grads.items() if ".indexer." not in name}


def check_same(actual: dict, expected: dict, factor: float = 1.0, **tolerance):
    assert actual.keys() == expected.keys() and expected
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], factor * grad, **tolerance, msg=lambda text, at=name: f"{at}: {text}")


def indexer_names(model) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".indexer." in name}


def test_the_language_model_loss_gives_the_indexer_nothing(kind, stage):
    """Exactly: its gradient is the same bits whatever the labels are, and there is none without the objective."""
    model, inputs = learner(kind, stage), batch("left")
    other = {**inputs, "labels": inputs["labels"].flip(0)}
    first, second = gradients(model, inputs), gradients(model, other)
    check_same(of_indexer(first), of_indexer(second), rtol=0, atol=0)
    assert of_indexer(first).keys() == indexer_names(model)
    assert all(grad.any() for grad in of_indexer(first).values())
    assert any(not torch.equal(second[name], grad) for name, grad in of_trunk(first).items())
    model.config.text_config.indexer_loss_coef = 0.0
    assert not of_indexer(gradients(model, inputs))


def test_the_objective_gives_nothing_but_the_indexer_anything(kind):
    """Logits, loss and every other gradient are the same bits with the objective on and off."""
    model, inputs = learner(kind, "adaptation"), batch("left")
    outputs = model(**inputs, use_cache=False)
    grads = of_trunk(gradients(model, inputs))
    model.config.text_config.indexer_loss_coef = 0.0
    plain = model(**inputs, use_cache=False)
    assert torch.equal(outputs.logits, plain.logits) and torch.equal(outputs.loss, plain.loss)
    check_same(grads, gradients(model, inputs), rtol=0, atol=0)


def test_warmup_attends_densely_and_leaves_the_dense_gradients_alone(kind):
    model, inputs = learner(kind, "warmup"), batch("left")
    dense = learner(kind, "adaptation", 0.0, indexer_type=None, local_window=None, anchor_stride=None, layer_types=None)
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".indexer." in name for name in unexpected)
    outputs = model(**inputs, use_cache=False)
    assert torch.equal(outputs.logits, dense(**inputs, use_cache=False).logits)
    assert {entry["ran"] for entry in model.attention_backend_report()} == {"dense"}
    check_same(of_trunk(gradients(model, inputs)), gradients(dense, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_loss_equals_that_of_the_dense_mask(kind, stage, side):
    inputs = batch(side)
    models = [learner(kind, stage, attn_implementation=name) for name in (None, "eager")]
    outputs = [model(**inputs, use_cache=False) for model in models]
    torch.testing.assert_close(outputs[0].indexer_loss, outputs[1].indexer_loss, rtol=1e-5, atol=0)
    check_same(*(of_indexer(gradients(model, inputs)) for model in models), rtol=1e-4, atol=1e-7)


def test_the_warmup_of_a_long_prompt_is_that_of_a_short_one(monkeypatch):
    """Where latents are expanded for one head at a time, the loss takes them as they are."""
    model = learner("mla", "warmup", dtype=torch.float64, mlp_layer_types=["dense"] * 3)
    inputs = batch("left")
    expected = gradients(model, inputs)
    monkeypatch.setattr(attention_keye, "_MAX_EXPANDED_ELEMENTS", 0)
    check_same(gradients(model, inputs), expected, rtol=0, atol=1e-10)


def test_the_gradient_is_that_of_the_loss_in_the_output(kind):
    """`indexer_loss` is the mean over layers; what is minimised is the sum over layers, times the coefficient. (In the
    warm-up; afterwards the selection moves along with the indexer, which no gradient sees.)"""
    model, inputs = learner(kind, "warmup"), batch()
    grads = of_indexer(gradients(model, inputs))
    layers = model.config.text_config.num_hidden_layers
    name = max(grads, key=lambda name: grads[name].norm())
    parameter = dict(model.named_parameters())[name]
    direction = grads[name] / grads[name].norm()
    values, step = [], 1e-2
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * direction
        outputs = model(**inputs, use_cache=False)
        assert not outputs.indexer_loss.requires_grad and outputs.indexer_loss.shape == ()
        values.append(COEFFICIENT * layers * outputs.indexer_loss.item())
        with torch.no_grad():
            parameter -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(grads[name].norm().item(), rel=0.02)


def test_the_coefficient_scales_the_gradient(kind, stage):
    inputs = batch()
    one, other = (of_indexer(gradients(learner(kind, stage, value), inputs)) for value in (0.25, 1.0))
    check_same(other, one, factor=4.0, rtol=1e-6, atol=0)


def test_nothing_is_computed_without_the_objective(kind, monkeypatch):
    """In evaluation, without gradients, and with coefficient 0: no cost and no output."""

    def refuse(*arguments):
        raise AssertionError("the objective was computed")

    monkeypatch.setattr(KeyeAttention, "_start_loss", refuse)
    inputs = batch()
    model = learner(kind, "warmup", 0.0)
    assert model(**inputs, use_cache=False).indexer_loss is None
    assert {entry["ran"] for entry in model.attention_backend_report()} == {"torch"}
    model.config.text_config.indexer_loss_coef = 1.0
    with torch.no_grad():
        assert model(**inputs, use_cache=False).indexer_loss is None
    assert model.eval()(**inputs, use_cache=False).indexer_recall is None
    assert {entry["ran"] for entry in model.attention_backend_report()} == {"torch"}
    with pytest.raises(AssertionError, match="was computed"):
        model.train()(**inputs)


def test_recall_is_the_share_of_the_dense_attention_that_is_kept(kind):
    """For 32 tokens and fewer the sample is all of them; a budget that holds everything catches everything."""
    inputs = batch("left", tokens=32)
    for stage in STAGES:
        recalls = [
            learner(kind, stage, attn_implementation=name)(**inputs, use_cache=False).indexer_recall.item()
            for name in (None, "eager")
        ]
        assert recalls[0] == pytest.approx(recalls[1], rel=1e-5) and 0.3 < recalls[0] < 0.99
    assert learner(kind, "adaptation", index_topk=64)(**inputs, use_cache=False).indexer_recall == 1


def checkpointed(model, use_reentrant: bool):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "indexer alone"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(kind, stage, use_reentrant, frozen):
    inputs = batch("left")
    model = learner(kind, stage)
    if frozen:
        freeze_all_but_indexer(model)
    plain, expected = model(**inputs, use_cache=False), gradients(model, inputs)
    checkpointed(model, use_reentrant)
    outputs = model(**inputs, use_cache=False)
    assert torch.equal(outputs.indexer_loss, plain.indexer_loss)
    assert torch.equal(outputs.indexer_recall, plain.indexer_recall)
    # The selection of the recomputation is the same, so is every operation.
    check_same(gradients(model, inputs), expected, rtol=0, atol=0)


def test_frozen_trunk_keeps_no_graph(kind, stage):
    model = learner(kind, stage)
    names = freeze_all_but_indexer(model)
    assert set(names) == indexer_names(model)
    seen = []
    for layer in decoder_of(model).layers:
        layer.mlp.register_forward_hook(lambda module, arguments, output: seen.append(output.requires_grad))
    assert gradients(model, batch()).keys() == set(names)
    assert seen == [False] * len(seen) and seen


def test_freezing_needs_an_indexer():
    model = tiny_model("gqa_dense")
    with pytest.raises(ValueError, match="The model has no indexer to train"):
        freeze_all_but_indexer(model)
    with pytest.raises(ValueError, match="Linear holds no Keye decoder"):
        decoder_of(torch.nn.Linear(1, 1))


def test_two_half_batches_equal_one(kind, stage):
    """Equal lengths, a plain loop that divides its loss by the number of micro-batches."""
    model, inputs = learner(kind, stage), batch(rows=4)
    expected = gradients(model, inputs)
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        half = {name: tensor[rows] for name, tensor in inputs.items()}
        (model(**half, use_cache=False).loss / 2).backward()
    check_same(of_indexer(collected(model)), of_indexer(expected), rtol=1e-4, atol=1e-7)


def test_labels_of_the_whole_step(kind, stage):
    """`num_items_in_batch`: the loss is divided by the labels of the step, and the indexer's weighs as much as it."""
    model, inputs = learner(kind, stage), batch()
    count = int((inputs["labels"][:, 1:] != -100).sum())
    expected = gradients(model, inputs)
    check_same(gradients(model, inputs, num_items_in_batch=4 * count), expected, factor=0.25, rtol=1e-5, atol=1e-9)
    several = gradients(model, inputs, num_items_in_batch=torch.tensor(2 * count))
    check_same(several, expected, factor=0.5, rtol=1e-5, atol=1e-9)


def test_loss_scaling(kind, stage):
    """float16 training multiplies the loss: the indexer's gradient is multiplied along, and unscaled with the rest."""
    model, inputs = learner(kind, stage), batch()
    expected = gradients(model, inputs)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(**inputs, use_cache=False).loss).backward()
    check_same(collected(model), expected, factor=1024.0, rtol=1e-5, atol=1e-4)
    scaler.unscale_(optimizer)
    check_same(collected(model), expected, rtol=1e-5, atol=1e-7)


def own_loss(model, inputs):
    logits = model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_a_loss_made_of_the_logits_trains_the_indexer(kind, stage):
    """Nothing tells how such a loss is scaled: the coefficient stands as it is, unless the loss is followed."""
    model, inputs = learner(kind, stage), batch()
    expected = of_indexer(gradients(model, inputs))
    model.zero_grad()
    (own_loss(model, inputs) * 8).backward()
    check_same(of_indexer(collected(model)), expected, rtol=0, atol=0)
    model.zero_grad()
    (model.follow_loss(own_loss(model, inputs)) * 8).backward()
    check_same(of_indexer(collected(model)), expected, factor=8.0, rtol=1e-6, atol=0)
    model.zero_grad()
    model.follow_loss(own_loss(model, inputs), share=0.5).backward()
    check_same(of_indexer(collected(model)), expected, factor=0.5, rtol=1e-6, atol=0)


def test_unused_outputs_of_a_labelled_call(kind):
    """Labels were passed, but another loss is backpropagated: the indexer learns all the same."""
    model, inputs = learner(kind, "adaptation"), batch()
    expected = of_indexer(gradients(model, inputs))
    model.zero_grad()
    model(**inputs, use_cache=False).logits.square().mean().backward()
    check_same(of_indexer(collected(model)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_autocast(kind, stage, use_reentrant):
    """bfloat16 products, float32 statistics: near the float32 gradient, and the same with checkpointing."""
    model, inputs = learner(kind, stage), batch("left")
    exact = of_indexer(gradients(model, inputs))
    if use_reentrant is not None:
        checkpointed(model, use_reentrant)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs, use_cache=False)
    outputs.loss.backward()
    assert outputs.indexer_loss.dtype == torch.float32 and outputs.indexer_loss.isfinite()
    grads = of_indexer(collected(model))
    assert grads.keys() == exact.keys()
    assert all(grad.isfinite().all() for grad in grads.values())
    together = [torch.cat([grad.flatten() for grad in part.values()]) for part in (grads, exact)]
    assert torch.cosine_similarity(*together, dim=0) > 0.9


def test_autocast_reaches_selection_attention_and_loss(kind, stage, monkeypatch):
    """They are no operators that autocast knows: left alone they would get float32 from norms and rotations."""
    found = {}

    def noted(name, real):
        def call(*arguments, **keywords):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
            found.setdefault(name, set()).add(tuple(x.dtype for x in tensors))
            return real(*arguments, **keywords)

        return call

    functions = ("dense_attention_with_lse", "dense_latent_attention", "sparse_gqa", "sparse_mla", "select_tokens")
    for name in (*functions, "IndexerLoss"):
        monkeypatch.setattr(attention_keye, name, noted(name, getattr(attention_keye, name)))
    for name in ("add_dense", "add_sparse"):
        monkeypatch.setattr(IndexerLoss, name, noted(name, getattr(IndexerLoss, name)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner(kind, stage)(**batch("left"), use_cache=False).loss.backward()
    low, high = torch.bfloat16, torch.float32
    assert found.pop("IndexerLoss") == {(low, low, high)}  # gates are float32 everywhere
    assert found.pop("select_tokens") == {(low, low, high)}
    if stage == "adaptation":
        assert found.pop("add_sparse") == {(low, low, high)}  # the log-sum-exp
    assert found.pop("add_dense") == {(low, low)}
    assert found and set().union(*found.values()) <= {(low, low), (low, low, low)}


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_the_loss_gets_the_log_sum_exp_of_its_attention(kind, monkeypatch):
    """Where the attention knows it; of heads that are expanded in parts no operands are kept that it belongs to."""
    given = []

    def attend(q, k, v, **place):
        lse = torch.randn(q.shape[0], q.shape[2], q.shape[1])
        given.append(lse)
        return sparse_attention_keye.dense_attention(q, k, v, **place), lse

    def add(self, begin, queries, keys, scaling, lse=None):
        taken.append(lse)
        assert keys.shape[1] in (1, 2, queries.shape[2])

    taken = []
    monkeypatch.setattr(attention_keye, "dense_attention_with_lse", attend)
    monkeypatch.setattr(IndexerLoss, "add_dense", add)
    model, inputs = learner(kind, "warmup"), batch(tokens=400)
    model(**inputs, use_cache=False)
    assert len(given) == len(taken) > 0 and all(a is b for a, b in zip(taken, given, strict=True))
    if kind == "mla":
        taken.clear()
        monkeypatch.setattr(attention_keye, "_MAX_EXPANDED_ELEMENTS", 1)
        model(**inputs, use_cache=False)
        assert taken and not any(lse is not None for lse in taken)


def test_bfloat16_weights(kind, stage):
    model = tiny_model(kind, dtype=torch.bfloat16).train()
    model.config.text_config.indexer_loss_coef, model.config.text_config.indexer_stage = 1.0, stage
    grads = of_indexer(gradients(model, batch("left")))
    assert grads.keys() == indexer_names(model) and all(grad.isfinite().all() for grad in grads.values())


def test_with_a_video(kind, stage):
    """Three-axis positions, padding and media: every indexer learns, and the two implementations agree."""
    models = [learner(kind, stage, attn_implementation=name) for name in (None, "eager")]
    inputs = media_inputs(models[0].config, batch=2)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    grads = [of_indexer(gradients(model, inputs)) for model in models]
    check_same(*grads, rtol=1e-4, atol=1e-7)


def test_keye_vl_2_indexer_on_latent_attention(stage):
    text = {"indexer_type": "keye_vl_2", "index_head_dim": 32}
    models = [learner("mla", stage, attn_implementation=name, **text) for name in (None, "eager")]
    check_same(*(of_indexer(gradients(model, batch("left"))) for model in models), rtol=1e-4, atol=1e-7)


def test_dense_layers_between(kind, stage):
    """A layer without an indexer has no loss; the others count alone."""
    layer_types = ["full_attention", "indexed_attention", "indexed_attention"]
    model = learner(kind, stage, layer_types=layer_types)
    outputs = model(**batch(), use_cache=False)
    outputs.loss.backward()
    assert {name.split(".")[3] for name in of_indexer(collected(model))} == {"1", "2"}
    eager = learner(kind, stage, attn_implementation="eager", layer_types=layer_types)
    torch.testing.assert_close(outputs.indexer_loss, eager(**batch(), use_cache=False).indexer_loss, rtol=1e-5, atol=0)


def test_tokens_behind_a_cache(kind, stage):
    """The loss covers the queries of the call; what they see in the cache belongs to their support."""
    ids = text_ids(1, TOKENS)
    for attn_implementation in (None, "eager"):
        model = learner(kind, stage, attn_implementation=attn_implementation)
        with torch.no_grad():
            cache = model(ids[:, :25], use_cache=True).past_key_values
        outputs = model(ids[:, 25:], past_key_values=cache, use_cache=True)
        outputs.logits.sum().backward()
        assert of_indexer(collected(model)).keys() == indexer_names(model)
        if attn_implementation is None:
            expected = outputs.indexer_loss
    torch.testing.assert_close(outputs.indexer_loss, expected, rtol=1e-5, atol=0)


def test_outputs_as_a_tuple_keep_the_loss_first(kind):
    model, inputs = learner(kind, "adaptation"), batch()
    named = model(**inputs, use_cache=False)
    assert torch.equal(model(**inputs, use_cache=False, return_dict=False)[0], named.loss)


def test_hidden_states_and_selections_are_recorded_beside_the_objective(kind):
    model, inputs = learner(kind, "adaptation"), batch()
    extra = {"output_hidden_states": True, "output_indexer_selections": True}
    with_objective = model(**inputs, use_cache=False, **extra)
    model.config.text_config.indexer_loss_coef = 0.0
    plain = model(**inputs, use_cache=False, **extra)
    for name in ("hidden_states", "indexer_selections"):
        pairs = zip(with_objective[name], plain[name], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name


def test_sharded_heads_are_refused(kind):
    """The target is a mean over all heads; a mean over some would train every copy of the indexer to something else."""
    model = learner(kind, "adaptation")
    for layer in decoder_of(model).layers:
        layer.self_attn.num_heads *= 2
    with pytest.raises(ValueError, match="mean over all .* heads, but this process holds .* of them"):
        model(**batch(), use_cache=False)


def warm_up(model, inputs, steps: int, learning_rate: float) -> list[float]:
    freeze_all_but_indexer(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        outputs = model(**inputs, use_cache=False)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.indexer_loss.item())
    losses.append(outputs.indexer_recall.item())
    return losses


def test_a_few_steps_of_warmup_teach_the_indexer(kind):
    model, inputs = learner(kind, "warmup", 1.0, local_window=None, anchor_stride=None), batch(rows=1, tokens=64)
    before = copy.deepcopy(of_trunk(model.state_dict()))
    first_recall = model(**inputs, use_cache=False).indexer_recall.item()
    *losses, recall = warm_up(model, inputs, steps=40, learning_rate=3e-2)
    print(f"{kind}: KL {losses[0]:.3f} -> {losses[-1]:.3f}, recall {first_recall:.3f} -> {recall:.3f}")
    assert losses[-1] < 0.35 * losses[0]
    assert recall > first_recall + 0.02
    for name, tensor in of_trunk(model.state_dict()).items():
        assert torch.equal(tensor, before[name]), name


def test_memory_grows_with_the_number_of_tokens(kind, stage):
    """Twice the tokens, at most 2.1 times the memory, and no tensor of queries by keys. As the stages are run: the
    indexer alone, then everything."""
    rule = {"anchor_stride": None, "local_window": 64, "index_topk": 32}
    model = tiny_model(kind, num_hidden_layers=1, mlp_layer_types=["dense"], **rule).train()
    model.config.text_config.indexer_loss_coef, model.config.text_config.indexer_stage = 1.0, stage
    if stage == "warmup":
        freeze_all_but_indexer(model)
    peaks = []
    for num_tokens in (3072, 6144):
        inputs = batch(rows=1, tokens=num_tokens)
        inputs["attention_mask"][:, :4] = 0
        model.zero_grad()
        with Watch() as watch:
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        del loss
        assert watch.largest < num_tokens * num_tokens // 4, watch.largest_by
        peaks.append(watch.peak)
    print(f"{kind} {stage}: {peaks[0] / 2**20:.0f} MiB at 3072 tokens, {peaks[1] / 2**20:.0f} MiB at 6144")
    assert peaks[1] <= 2.1 * peaks[0]


def test_refused_settings():
    for settings, sentence in (
        ({"indexer_stage": "dense"}, "`indexer_stage` is 'dense'; it must be one of 'warmup', 'adaptation'"),
        ({"indexer_loss_coef": -1.0}, "`indexer_loss_coef` is -1.0; it must be a number from 0 up"),
        ({"indexer_loss_coef": math.nan}, "`indexer_loss_coef` is nan; it must be a number from 0 up"),
    ):
        with pytest.raises(ValueError) as error:
            tiny_config("mla", **settings)
        assert sentence in str(error.value)
    for text in ({"indexer_type": None}, {"layer_types": ["full_attention"] * 3}):
        with pytest.raises(ValueError) as error:
            tiny_config("mla", indexer_loss_coef=1.0, **text)
        assert "`indexer_loss_coef` is 1.0, but no layer has an indexer to train" in str(error.value)


def test_settings_are_saved(tmp_path):
    tiny_config("gqa", indexer_loss_coef=0.25, indexer_stage="warmup").save_pretrained(tmp_path)
    text = KeyeConfig.from_pretrained(tmp_path).text_config
    assert (text.indexer_loss_coef, text.indexer_stage) == (0.25, "warmup")
