"""The indexer's loss against masked float64 maths written out, its gradients against autograd of that maths."""

import math

import pytest
import torch

from modeling_keye import indexer_objective_keye
from modeling_keye.indexer_objective_keye import (
    IndexerLoss,
    LossScale,
    attach_objective,
    caught_mass,
    follow_loss,
    labelled_share,
)

BATCH, HEADS, DIM, SCALE = 2, 6, 10, 0.4
INDEX_HEADS, INDEX_DIM = 3, 5
# (queries, keys): the first query stands at slot keys - queries.
SIZES = [(1, 1), (15, 15), (63, 63), (40, 111), (1, 129), (129, 129)]
GROUPS = [1, 2, 6]


def inputs(num_queries: int, num_keys: int, groups: int = 2, dtype=torch.float64, seed: int = 0):
    """Indexer queries, keys, gates; attention queries and keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    index = (
        draw(BATCH, num_queries, INDEX_HEADS, INDEX_DIM),
        draw(BATCH, num_keys, INDEX_DIM),
        draw(BATCH, num_queries, INDEX_HEADS),
    )
    return index, (draw(BATCH, num_queries, HEADS, DIM), draw(BATCH, groups, num_keys, DIM))


def visible_keys(num_queries: int, num_keys: int, key_mask=None) -> torch.Tensor:
    """Bool [B, S, T]: causal, without padding."""
    slots = torch.arange(num_keys - num_queries, num_keys)
    visible = (torch.arange(num_keys) <= slots[:, None]).expand(BATCH, -1, -1)
    return visible if key_mask is None else visible & key_mask[:, None]


def random_support(visible: torch.Tensor, width: int, seed: int = 0):
    """Bool [B, S, T] and int32 [B, S, width], up to `width` of the visible keys of each query."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(visible.shape, generator=generator).masked_fill(~visible, -1).argsort(dim=-1, descending=True)
    support = torch.zeros_like(visible).scatter(-1, order[..., :width], True) & visible
    slots = torch.where(support, torch.arange(visible.shape[-1]), visible.shape[-1]).sort(dim=-1).values
    slots = torch.nn.functional.pad(slots, (0, width), value=visible.shape[-1])[..., :width]
    return support, slots.masked_fill(slots == visible.shape[-1], -1).to(torch.int32)


def attention(queries, keys, support):
    """Probabilities [B, S, H, T] and log-sum-exp [B, S, H] of the attention over `support`."""
    keys = keys.repeat_interleave(queries.shape[2] // keys.shape[1], dim=1)
    logits = torch.einsum("bshd,bhtd->bsht", queries, keys) * SCALE
    logits = logits.masked_fill(~support[:, :, None], -math.inf)
    lse = logits.logsumexp(dim=-1)
    return torch.where(support[:, :, None], (logits - lse.unsqueeze(-1)).exp(), 0.0), lse


def judge(index, operands, support, real=None):
    """Mean over real queries of KL(mean attention || softmax of the indexer), both over `support`."""
    q, k, gates = index
    real = support.any(dim=-1) if real is None else real
    target = attention(*operands, support)[0].mean(dim=2)[real].detach()
    scores = torch.einsum("bshd,btd->bsht", q, k).relu().mul(gates.unsqueeze(-1)).sum(dim=2)[real]
    log_q = scores.masked_fill(~support[real], -math.inf).log_softmax(dim=-1)
    terms = torch.where(target > 0, target * (target.clamp(min=1e-300).log() - log_q), 0.0)
    return terms.sum(dim=-1).mean()


def dense_loss(index, operands, key_mask=None) -> torch.Tensor:
    loss = IndexerLoss(*index, query_offset=index[1].shape[1] - index[0].shape[1], key_mask=key_mask)
    loss.add_dense(0, *operands, SCALE)
    return loss.result()


def sparse_loss(index, operands, support, selected, key_mask=None) -> torch.Tensor:
    loss = IndexerLoss(*index, query_offset=index[1].shape[1] - index[0].shape[1], key_mask=key_mask)
    loss.add_sparse(0, *operands, attention(*operands, support)[1], selected, SCALE)
    return loss.result()


def with_gradients(function, index):
    index = [x.detach().requires_grad_() for x in index]
    value = function(index)
    return value.detach(), torch.autograd.grad(value, index)


def check_equal(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual[0], expected[0], atol=atol, rtol=0)
    for gradient, reference in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, reference, atol=atol, rtol=0)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_dense_loss_equals_the_judge(num_queries, num_keys, groups):
    index, operands = inputs(num_queries, num_keys, groups)
    visible = visible_keys(num_queries, num_keys)
    check_equal(
        with_gradients(lambda index: dense_loss(index, operands), index),
        with_gradients(lambda index: judge(index, operands, visible), index),
    )


@pytest.mark.parametrize("width", [1, 8, 200])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_sparse_loss_equals_the_judge(num_queries, num_keys, groups, width):
    index, operands = inputs(num_queries, num_keys, groups)
    support, selected = random_support(visible_keys(num_queries, num_keys), width)
    check_equal(
        with_gradients(lambda index: sparse_loss(index, operands, support, selected), index),
        with_gradients(lambda index: judge(index, operands, support), index),
    )


def test_gradcheck_dense():
    index, operands = inputs(9, 9)
    index = [x.requires_grad_() for x in index]
    assert torch.autograd.gradcheck(lambda *index: dense_loss(index, operands), index)


def test_gradcheck_sparse():
    index, operands = inputs(9, 12)
    support, selected = random_support(visible_keys(9, 12), 4)
    index = [x.requires_grad_() for x in index]
    assert torch.autograd.gradcheck(lambda *index: sparse_loss(index, operands, support, selected), index)


@pytest.mark.parametrize("tile", [1, 64, 1000])
def test_tiles_change_nothing(monkeypatch, tile):
    index, operands = inputs(100, 150)
    support, selected = random_support(visible_keys(100, 150), 20)
    losses = (
        lambda index: dense_loss(index, operands),
        lambda index: sparse_loss(index, operands, support, selected),
    )
    whole = [with_gradients(loss, index) for loss in losses]
    monkeypatch.setattr(indexer_objective_keye, "_TILE_ELEMENTS", {"cpu": tile})
    monkeypatch.setattr(indexer_objective_keye, "_QUERY_BLOCK", 7)
    for loss, expected in zip(losses, whole, strict=True):
        check_equal(with_gradients(loss, index), expected)


def test_spans_add_up():
    """Queries that see little attend densely, the others to a selection: one loss over both."""
    index, operands = inputs(50, 50)
    visible = visible_keys(50, 50)
    support, selected = random_support(visible, 12)
    support[:, :12] = visible[:, :12]
    lse = attention(*operands, support)[1]

    def in_spans(index):
        queries, keys = operands
        loss = IndexerLoss(*index)
        loss.add_dense(0, queries[:, :12], keys[:, :, :12], SCALE)
        for begin, end in ((12, 30), (30, 50)):
            loss.add_sparse(begin, queries[:, begin:end], keys, lse[:, begin:end], selected[:, begin:end], SCALE)
        return loss.result()

    check_equal(with_gradients(in_spans, index), with_gradients(lambda index: judge(index, operands, support), index))


@pytest.mark.parametrize("side", ["left", "right", "all of one"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_padding_counts_for_nothing(kind, side):
    """Neither as a key nor as a query, nor in the mean; padded queries on the right do see real keys."""
    num_tokens = 40
    key_mask = torch.ones(BATCH, num_tokens, dtype=torch.bool)
    key_mask[0, slice(None) if side == "all of one" else slice(0, 13) if side == "left" else slice(-13, None)] = False
    index, operands = inputs(num_tokens, num_tokens)
    visible = visible_keys(num_tokens, num_tokens, key_mask)
    support, selected = random_support(visible, 6)
    if kind == "dense":
        support = visible

    def loss(index):
        if kind == "dense":
            return dense_loss(index, operands, key_mask)
        return sparse_loss(index, operands, support, selected, key_mask)

    actual = with_gradients(loss, index)
    check_equal(actual, with_gradients(lambda index: judge(index, operands, support, key_mask), index))
    for gradient in actual[1]:
        assert not gradient[~key_mask].any()


def test_a_batch_of_padding_alone():
    index, operands = inputs(5, 5)
    value, gradients = with_gradients(lambda index: dense_loss(index, operands, torch.zeros(BATCH, 5).bool()), index)
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_a_single_visible_key_teaches_nothing():
    """Both distributions are 1 there, whatever the scores."""
    index, operands = inputs(1, 1)
    value, gradients = with_gradients(lambda index: dense_loss(index, operands), index)
    assert abs(value) < 1e-15 and all(gradient.abs().max() < 1e-15 for gradient in gradients)


def test_equal_scores_give_the_distance_to_uniform():
    """Exact zeros are common behind a ReLU: KL(p || 1/n) = log n - entropy of p."""
    (q, k, gates), operands = inputs(30, 30)
    q = -q.abs()
    k = k.abs()
    target = attention(*operands, visible_keys(30, 30))[0].mean(dim=2)
    entropy = -torch.special.xlogy(target, target).sum(dim=-1)
    expected = (torch.arange(1, 31, dtype=torch.float64).log() - entropy).mean()
    value, gradients = with_gradients(lambda index: dense_loss(index, operands), (q, k, gates))
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    assert not any(gradient.any() for gradient in gradients)


def matched_inputs():
    """An indexer whose scores are the attention's logits plus a constant, so that softmax of both is the same."""
    _, (queries, keys) = inputs(24, 24, groups=1)
    queries = queries[:, :, :1]
    q = torch.cat([queries * SCALE, torch.ones(BATCH, 24, 1, 1, dtype=torch.float64)], dim=-1)
    # The constant keeps every product above the ReLU's kink.
    k = torch.cat([keys[:, 0], torch.full((BATCH, 24, 1), 50.0, dtype=torch.float64)], dim=-1)
    return (q, k, torch.ones(BATCH, 24, 1, dtype=torch.float64)), (queries, keys)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_no_loss_and_no_gradient_at_the_target(kind):
    index, operands = matched_inputs()
    support, selected = random_support(visible_keys(24, 24), 7)
    loss = dense_loss if kind == "dense" else lambda *arguments: sparse_loss(*arguments, support, selected)
    value, gradients = with_gradients(lambda index: loss(index, operands), index)
    assert abs(value) < 1e-12
    # The products of the constant are 50 times as large as the rest.
    assert all(gradient.abs().max() < 1e-13 * 50 for gradient in gradients)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_constant_added_to_the_scores_changes_nothing(kind):
    """An indexer head whose product is the same at every key adds its gate, a constant per query."""
    (q, k, gates), operands = inputs(30, 30)
    support, selected = random_support(visible_keys(30, 30), 7)
    loss = dense_loss if kind == "dense" else lambda *arguments: sparse_loss(*arguments, support, selected)
    flat = torch.zeros_like(q[:, :, :1])
    wide = (
        torch.cat([torch.cat([q, torch.zeros_like(q[..., :1])], -1), torch.cat([flat, flat[..., :1] + 1], -1)], dim=2),
        torch.cat([k, torch.ones_like(k[..., :1])], dim=-1),
        torch.cat([gates, 3 * torch.randn(BATCH, 30, 1, dtype=torch.float64)], dim=-1),
    )
    value, gradients = with_gradients(lambda index: loss(index, operands), (q, k, gates))
    shifted, wide_gradients = with_gradients(lambda index: loss(index, operands), wide)
    inner = (
        wide_gradients[0][:, :, :INDEX_HEADS, :INDEX_DIM],
        wide_gradients[1][..., :INDEX_DIM],
        wide_gradients[2][..., :INDEX_HEADS],
    )
    check_equal((shifted, inner), (value, gradients))
    assert wide_gradients[2][..., -1].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_attention_gets_no_gradient(kind):
    index, operands = inputs(20, 20)
    support, selected = random_support(visible_keys(20, 20), 7)
    index, operands = ([x.requires_grad_() for x in part] for part in (index, operands))
    value = dense_loss(index, operands) if kind == "dense" else sparse_loss(index, operands, support, selected)
    assert torch.autograd.grad(value, operands, allow_unused=True, retain_graph=True) == (None, None)
    assert all(gradient.any() for gradient in torch.autograd.grad(value, index))


def test_only_what_asks_gets_a_gradient():
    index, operands = inputs(20, 20)
    expected = with_gradients(lambda index: dense_loss(index, operands), index)
    alone = [x.detach() for x in index]
    assert not dense_loss(alone, operands).requires_grad
    alone[1].requires_grad_()
    value = dense_loss(alone, operands)
    assert torch.equal(value, expected[0])
    assert torch.equal(torch.autograd.grad(value, alone[1])[0], expected[1][1])
    with torch.no_grad():
        assert torch.equal(dense_loss(alone, operands), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_low_precision_inputs(kind, dtype):
    """The statistics are float32: against float64 maths of the same rounded inputs only the rounding of the result is
    left. A gradient comes in the dtype of its input."""
    index, operands = inputs(63, 63, dtype=dtype)
    support, selected = random_support(visible_keys(63, 63), 12)
    if kind == "dense":
        support = visible_keys(63, 63)
    exact = [[x.double() for x in part] for part in (index, operands)]
    expected = with_gradients(lambda index: judge(index, exact[1], support), exact[0])

    def loss(index):
        value = IndexerLoss(*index)
        if kind == "dense":
            value.add_dense(0, *operands, SCALE)
        else:
            value.add_sparse(0, *operands, attention(*exact[1], support)[1].float(), selected, SCALE)
        return value.result()

    value, gradients = with_gradients(loss, index)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected[0], rtol=2e-6, atol=0)
    for gradient, reference in zip(gradients, expected[1], strict=True):
        assert gradient.dtype == dtype
        # Half a unit of the last place, and the float32 noise of sums over 63 keys.
        rounding = torch.finfo(dtype).eps / 2 + 4e-6
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (gradient.double() - reference).norm() <= rounding * reference.norm() + tiny * gradient.numel() ** 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = with_gradients(loss, index)
    assert torch.equal(again[0], value) and all(torch.equal(a, b) for a, b in zip(again[1], gradients, strict=True))


@pytest.mark.parametrize("groups", GROUPS)
def test_caught_mass_is_the_attention_on_the_selected(groups):
    index, operands = inputs(30, 47, groups)
    key_mask = torch.ones(BATCH, 47, dtype=torch.bool)
    key_mask[1, :5] = False
    visible = visible_keys(30, 47, key_mask)
    support, selected = random_support(visible, 9)
    expected = (attention(*operands, visible)[0].mean(dim=2) * support).sum(dim=-1)
    options = {"scaling": SCALE, "query_offset": 17, "key_mask": key_mask}
    torch.testing.assert_close(caught_mass(*operands, selected, **options), expected, atol=1e-12, rtol=0)
    everything = random_support(visible, 47)[1]
    torch.testing.assert_close(caught_mass(*operands, everything, **options), torch.ones_like(expected))
    nothing = torch.full_like(selected, -1)
    assert not caught_mass(*operands, nothing, **options).any()


def objective_gradient(scales, make_loss):
    """What `objective` [2] gets when `make_loss(hidden_states)` is backpropagated; coefficient 0.5."""
    objective = torch.tensor([3.0, 4.0], requires_grad=True)
    hidden_states = torch.randn(2, 5, requires_grad=True)
    attached = attach_objective(hidden_states, objective, 0.5, scales)
    assert torch.equal(attached, hidden_states)
    make_loss(attached).backward()
    gradient = hidden_states.grad.clone()
    hidden_states.grad = None
    make_loss(hidden_states).backward()
    assert torch.equal(gradient, hidden_states.grad)
    return objective.grad.tolist()


def test_the_objective_weighs_its_coefficient_when_nothing_is_known_of_the_loss():
    assert objective_gradient((LossScale(),), lambda x: 7 * x.square().sum()) == [0.5, 0.0]


def test_the_objective_is_scaled_as_the_followed_loss():
    scale = LossScale()
    loss = objective_gradient((scale,), lambda x: 1024 * follow_loss(x.square().sum(), scale) / 4)
    assert loss == [0.5 * 256, 0.0]


def test_the_share_of_a_loss_over_a_whole_step():
    scale = LossScale()
    loss = objective_gradient((scale,), lambda x: follow_loss(x.square().sum() / 40, scale, share=0.25))
    assert loss == [0.125, 0.0]


def test_the_scale_of_this_call_comes_before_that_of_the_model():
    own, model = LossScale(), LossScale()
    model.value = 3.0
    assert objective_gradient((own, model), lambda x: x.sum()) == [1.5, 0.0]
    assert objective_gradient((own, model), lambda x: 8 * follow_loss(x.sum(), own)) == [4.0, 0.0]


def test_a_followed_loss_keeps_its_value_and_may_be_changed_in_place():
    scale = LossScale()
    x = torch.tensor(2.0, requires_grad=True)
    loss = follow_loss(x.square(), scale)
    assert loss == 4
    loss *= 3
    loss.backward()
    assert (x.grad, scale.value) == (12, 3)


def test_labelled_share():
    labels = torch.tensor([[5, -100, 6, 7], [5, 6, -100, -100]])
    assert labelled_share(labels, None) == 1.0
    assert labelled_share(labels, 12) == 0.25  # the first column is never predicted
    assert labelled_share(labels, torch.tensor(6)) == 0.5
