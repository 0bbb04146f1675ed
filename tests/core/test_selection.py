"""Selection against a direct oracle: float64 scores, one stable sort per query, sets built in plain Python.

Queries, keys and gates are small integers where sets are compared exactly: then float32 scores are exact, many of them
tie, and every tiling must give the same sets.
"""

import math

import numpy as np
import pytest
import torch

from modeling_keye import attention_keye, sparse_reference_keye
from modeling_keye.sparse_attention_keye import Selection, select_tokens, sparse_attention_mask
from modeling_keye.sparse_eager_keye import eager_selection
from tests.model.factories import text_ids, tiny_model

HEADS, DIM = 3, 5
SIZES = [1, 15, 63, 64, 65, 111, 129, 1000]
PARTS = [
    Selection(topk=7),
    Selection(local_window=0),
    Selection(local_window=9),
    Selection(anchor_stride=1),
    Selection(anchor_stride=16),
    Selection(local_window=9, anchor_stride=16),
    Selection(topk=7, local_window=9),
    Selection(topk=7, anchor_stride=16),
    Selection(topk=7, local_window=9, anchor_stride=16),
    Selection(topk=2000, local_window=2000, anchor_stride=64),
]


def oracle(rule: Selection, scores: np.ndarray | None, num_keys: int, first_query: int = 0, valid=None) -> list[list]:
    """Kept slots of the queries at slots `first_query` .. `num_keys - 1`; scores float64 [queries, num_keys]."""
    valid = np.ones(num_keys, bool) if valid is None else np.asarray(valid)[:num_keys]
    start = int(np.argmax(valid)) if valid.any() else num_keys
    kept = []
    for row, t in enumerate(range(first_query, num_keys)):
        visible = [s for s in range(t + 1) if valid[s]]
        forced = set()
        if rule.local_window is not None:
            forced |= {s for s in visible if t - s <= rule.local_window}
        if rule.anchor_stride is not None:
            forced |= {s for s in visible if (s - start) % rule.anchor_stride == 0}
        best = []
        if rule.topk is not None:
            others = np.array([s for s in visible if s not in forced], dtype=int)
            canonical = np.nan_to_num(scores[row, others], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
            best = others[np.argsort(-canonical, kind="stable")[: rule.topk]].tolist()
        kept.append(sorted(forced | set(best)))
    return kept


def float64_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    products = np.maximum(np.einsum("shd,td->sht", q.double().numpy(), k.double().numpy()), 0.0)
    return np.einsum("sht,sh->st", products, weights.double().numpy())


def integers(num_queries: int, num_keys: int, batch: int = 1, seed: int = 0, most: int = 6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    return draw(batch, num_queries, HEADS, DIM), draw(batch, num_keys, DIM), draw(batch, num_queries, HEADS)


def select(rule: Selection, index, num_keys: int, first_query: int = 0, key_mask=None, batch: int = 1) -> torch.Tensor:
    q, k, weights = index if rule.topk is not None else (None, None, None)
    return select_tokens(
        rule,
        q,
        k,
        weights,
        batch_size=batch,
        num_queries=num_keys - first_query,
        query_offset=first_query,
        key_mask=key_mask,
        device=torch.device("cpu"),
    )


def as_lists(indices: torch.Tensor) -> list[list[int]]:
    """Rows of int32 [S, K] as lists, after checking their form: ascending, unique, -1 only at the end."""
    assert indices.dtype == torch.int32
    rows = []
    for row in indices.tolist():
        used = [s for s in row if s != -1]
        assert row == used + [-1] * (len(row) - len(used)), f"-1 before a slot: {row}"
        assert used == sorted(set(used)), f"not ascending and unique: {used}"
        rows.append(used)
    return rows


def assert_selected(indices: torch.Tensor, expected: list[list[int]]) -> None:
    for t, (found, wanted) in enumerate(zip(as_lists(indices), expected, strict=True)):
        assert found == wanted, f"query {t}: extra {set(found) - set(wanted)}, missing {set(wanted) - set(found)}"


@pytest.mark.parametrize("rule", PARTS, ids=str)
@pytest.mark.parametrize("num_keys", SIZES, ids=lambda n: f"N{n}")
def test_equals_oracle(rule, num_keys):
    index = integers(num_keys, num_keys)
    indices = select(rule, index, num_keys)
    assert indices.shape == (1, num_keys, rule.width(num_keys))
    scores = float64_scores(index[0][0], index[1][0], index[2][0])
    assert_selected(indices[0], oracle(rule, scores, num_keys))


@pytest.mark.parametrize("topk", [1, 8, 64])
def test_around_the_budget(topk):
    for num_keys in {1, max(1, topk - 1), topk, topk + 1}:
        index = integers(num_keys, num_keys, seed=num_keys)
        scores = float64_scores(index[0][0], index[1][0], index[2][0])
        indices = select(Selection(topk=topk), index, num_keys)
        assert_selected(indices[0], oracle(Selection(topk=topk), scores, num_keys))
        if num_keys <= topk:
            assert as_lists(indices[0]) == [list(range(t + 1)) for t in range(num_keys)]


@pytest.mark.parametrize("case", ["equal", "zero", "signed_zero", "one_level", "huge", "denormal"])
@pytest.mark.parametrize("rule", [Selection(topk=13), Selection(topk=13, local_window=4, anchor_stride=32)], ids=str)
def test_ties_go_to_the_lowest_position(case, rule):
    num_keys = 300
    q, k, weights = integers(num_keys, num_keys)
    if case == "equal":
        q, k, weights = torch.ones_like(q), torch.ones_like(k), torch.ones_like(weights)
    elif case == "zero":
        q = torch.zeros_like(q)
    elif case == "signed_zero":
        # Every product is clipped to +0; gates of either sign make +0 and -0 of it.
        q, k = q.abs(), -k.abs()
        weights = torch.where(torch.arange(num_keys)[None, :, None] % 2 == 0, -1.0, 1.0).expand_as(weights).contiguous()
    elif case == "one_level":
        q, k, weights = torch.ones_like(q), torch.ones_like(k), torch.ones_like(weights)
        k[:, 77::40] += 1
    elif case == "huge":
        q, k = q * 2.0**50, k * 2.0**50
    elif case == "denormal":
        q, k = q * 2.0**-70, k * 2.0**-70
    indices = select(rule, (q, k, weights), num_keys)
    assert_selected(indices[0], oracle(rule, float64_scores(q[0], k[0], weights[0]), num_keys))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_scores_lose_but_stay_candidates(value):
    """A score that is NaN or -inf ranks last, lowest position first; it is still chosen when there is room."""
    num_keys = 129
    rule = Selection(topk=40, local_window=3)
    q, k, weights = integers(num_keys, num_keys)
    k[0, 5:100:3, 0] = value
    indices = select(rule, (q, k, weights), num_keys)
    with np.errstate(invalid="ignore"):
        scores = float64_scores(q[0], k[0], weights[0])
    assert_selected(indices[0], oracle(rule, scores, num_keys))

    q, k, weights = integers(num_keys, num_keys)
    q[0, 50] = float("nan")  # a query without any usable score
    indices = as_lists(select(rule, (q, k, weights), num_keys)[0])
    assert indices[50] == [*range(40), 47, 48, 49, 50]


def test_bad_scores_in_padding_do_no_harm():
    num_keys = 65
    rule = Selection(topk=10, local_window=2, anchor_stride=8)
    q, k, weights = integers(num_keys, num_keys)
    mask = torch.arange(num_keys)[None] >= 20
    clean = select(rule, (q, k, weights), num_keys, key_mask=mask)
    k[:, :20] = float("nan")
    assert torch.equal(select(rule, (q, k, weights), num_keys, key_mask=mask), clean)


@pytest.mark.parametrize("rule", PARTS, ids=str)
def test_padding_and_holes(rule):
    num_keys = 150
    mask = torch.ones(5, num_keys, dtype=torch.bool)
    mask[1, :37] = False  # left padding
    mask[2, :3] = False
    mask[2, 40:61] = False  # left padding and a hole
    mask[3] = False  # no token at all
    mask[4, :149] = False  # one token
    index = integers(num_keys, num_keys, batch=5)
    indices = select(rule, index, num_keys, key_mask=mask, batch=5)
    for b in range(5):
        scores = float64_scores(index[0][b], index[1][b], index[2][b])
        assert_selected(indices[b], oracle(rule, scores, num_keys, valid=mask[b].numpy()))
    assert bool((indices[3] == -1).all())


@pytest.mark.parametrize("rule", PARTS, ids=str)
def test_left_padding_only_shifts(rule):
    padding, length = 21, 111
    q, k, weights = integers(length, length)

    def padded(x):
        return torch.cat([x.new_full((1, padding, *x.shape[2:]), 3.0), x], dim=1)

    mask = torch.arange(padding + length)[None] >= padding
    single = as_lists(select(rule, (q, k, weights), length)[0])
    batched = as_lists(
        select(rule, (padded(q), padded(k), padded(weights)), padding + length, key_mask=mask)[0, padding:]
    )
    assert [[s - padding for s in row] for row in batched] == single


@pytest.mark.parametrize("rule", PARTS, ids=str)
@pytest.mark.parametrize("padding", [0, 9])
def test_decode_equals_the_last_rows_of_prefill(rule, padding):
    num_keys = 140
    mask = None if padding == 0 else torch.arange(num_keys)[None] >= padding
    q, k, weights = integers(num_keys, num_keys)
    whole = as_lists(select(rule, (q, k, weights), num_keys, key_mask=mask)[0])
    for first, last in ((139, 140), (100, 101), (60, 140), (0, 1), (64, 70)):
        # The key buffer and the mask may be longer than what the queries see.
        part = select(rule, (q[:, first:last], k, weights[:, first:last]), last, first, mask)
        assert as_lists(part[0]) == whole[first:last]


@pytest.mark.parametrize("rule", PARTS, ids=str)
def test_tilings_agree(rule, monkeypatch):
    num_keys = 333
    index = integers(num_keys, num_keys, batch=2)
    mask = torch.ones(2, num_keys, dtype=torch.bool)
    mask[1, :50] = False
    default = select(rule, index, num_keys, key_mask=mask, batch=2)
    for query_block, tile_elements in ((1, 1), (7, 7 * HEADS * 70), (64, 2**10), (1000, 2**24)):
        monkeypatch.setattr(sparse_reference_keye, "_QUERY_BLOCK", query_block)
        monkeypatch.setattr(sparse_reference_keye, "_SCORE_TILE_ELEMENTS", tile_elements)
        assert torch.equal(select(rule, index, num_keys, key_mask=mask, batch=2), default)


@pytest.mark.parametrize("rule", PARTS, ids=str)
def test_eager_judge_agrees(rule):
    num_keys, offset = 130, 17
    index = integers(num_keys - offset, num_keys, batch=3)
    mask = torch.ones(3, num_keys, dtype=torch.bool)
    mask[1, :40] = False
    mask[2, 60:70] = False
    indices = select(rule, index, num_keys, offset, mask, batch=3)
    kept = eager_selection(
        rule, index if rule.topk else None, (3, num_keys - offset), offset, mask, torch.device("cpu")
    )
    for b in range(3):
        assert as_lists(indices[b]) == [row.nonzero().squeeze(-1).tolist() for row in kept[b]]


def test_float_scores_differ_from_float64_within_rounding_only():
    num_keys, rule = 700, Selection(topk=32)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, num_keys, HEADS, DIM, generator=generator)
    k = torch.randn(1, num_keys, DIM, generator=generator)
    weights = torch.randn(1, num_keys, HEADS, generator=generator)
    scores = float64_scores(q[0], k[0], weights[0])
    exact = oracle(rule, scores, num_keys)
    for t, (found, wanted) in enumerate(zip(as_lists(select(rule, (q, k, weights), num_keys)[0]), exact, strict=True)):
        swapped = list(set(found) ^ set(wanted))
        rounding = 8 * np.finfo(np.float32).eps * np.abs(scores[t]).max()
        assert np.all(np.abs(scores[t, swapped] - scores[t, wanted].min()) <= rounding), f"query {t}"


def test_repeats_and_head_order_change_nothing():
    num_keys, rule = 200, Selection(topk=17, local_window=5)
    q, k, weights = integers(num_keys, num_keys)
    first = select(rule, (q, k, weights), num_keys)
    assert torch.equal(select(rule, (q, k, weights), num_keys), first)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(select(rule, (q[:, :, order], k, weights[:, :, order]), num_keys), first)


@pytest.mark.parametrize("num_keys", [0, 1, 8, 9, 63, 64, 65, 500])
@pytest.mark.parametrize("rule", [*PARTS, Selection()], ids=str)
def test_width_and_dense_length_count_what_is_kept(rule, num_keys):
    counts = [0, *(len(row) for row in oracle(rule, np.zeros((num_keys, num_keys)), num_keys))]
    if rule.is_dense:
        counts = list(range(num_keys + 1))
    else:
        assert rule.width(num_keys) == max(counts)
    everything = [n for n, count in enumerate(counts) if count == n]
    assert rule.dense_length(num_keys) == max(everything)
    assert [n for n in range(num_keys + 1) if rule.keeps_everything(n)] == everything


# The mask that the local window and the anchors stand for, and the model that uses nothing else.


@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("window", [0, 1, 16, 63, 64, 128, 2000])
@pytest.mark.parametrize("stride", [64, 10])
def test_without_indexer_equals_the_mask(num_keys, window, stride):
    rule = Selection(local_window=window, anchor_stride=stride)
    indices = select(rule, None, num_keys)[0].long()
    kept = torch.zeros(num_keys, num_keys + 1, dtype=torch.bool).scatter(1, indices % (num_keys + 1), True)
    mask = sparse_attention_mask(num_keys, window, stride)
    assert torch.equal(kept[:, :-1], mask)
    t, s = np.mgrid[0:num_keys, 0:num_keys]
    assert np.array_equal(mask.numpy(), (s <= t) & ((t - window <= s) | (s % stride == 0)))


@pytest.mark.parametrize("attention", ["keye_sparse", "eager"])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("window", [0, 16, 128])
def test_model_without_indexer_keeps_the_mask(kind, attention, window):
    model = tiny_model(
        kind,
        attn_implementation=attention,
        indexer_type=None,
        local_window=window,
        anchor_stride=64,
        num_hidden_layers=2,
    )
    for num_keys in (1, 63, 64, 65, 1000):
        with torch.no_grad():
            output = model(text_ids(1, num_keys), output_indexer_selections=True)
        assert len(output.indexer_selections) == 2
        mask = sparse_attention_mask(num_keys, window, 64)
        for selection in output.indexer_selections:
            assert as_lists(selection[0]) == [row.nonzero().squeeze(-1).tolist() for row in mask]


def test_query_steps_of_the_layer_change_nothing(monkeypatch):
    model = tiny_model("mla")
    ids = text_ids(2, 150)
    with torch.no_grad():
        whole = model(ids, output_indexer_selections=True)
        monkeypatch.setattr(attention_keye, "_QUERY_STEP", 13)
        steps = model(ids, output_indexer_selections=True)
    for first, second in zip(whole.indexer_selections, steps.indexer_selections, strict=True):
        assert torch.equal(first, second)
    torch.testing.assert_close(steps.logits, whole.logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("rule", [*PARTS, Selection(topk=500, local_window=3)], ids=str)
def test_a_slot_on_the_device_selects_the_same(rule, num_queries, padded):
    """Whatever the static cache holds behind the queries, a tensor as `query_offset` selects what an int does."""
    room = 140
    index = integers(num_queries, room, batch=2)
    mask = None
    if padded:
        mask = torch.ones(2, room, dtype=torch.bool)
        mask[0, 50:55] = False
        mask[1, :37] = False
    for first_query in (0, 1, 8, 36, 37, 52, 80, room - num_queries):
        num_keys = first_query + num_queries
        expected = select(rule, index, num_keys, first_query, mask, batch=2)
        q, k, weights = (x.clone() for x in index) if rule.topk is not None else (None, None, None)
        if k is not None:
            k[:, num_keys:] = math.nan
        arguments = {"batch_size": 2, "num_queries": num_queries, "key_mask": mask, "num_keys": room}
        found = select_tokens(rule, q, k, weights, **arguments, query_offset=torch.tensor(first_query))
        assert found.dtype == torch.int32 and found.shape == (2, num_queries, rule.width(room))
        assert as_lists(found.flatten(0, 1)) == as_lists(expected.flatten(0, 1)), f"at slot {first_query}"


def test_the_length_of_a_static_cache_comes_from_what_is_given():
    slot, arguments = torch.tensor(4), {"batch_size": 1, "num_queries": 1}
    rule = Selection(local_window=2, anchor_stride=4)
    mask = torch.ones(1, 20, dtype=torch.bool)
    by_mask = select_tokens(rule, None, None, None, **arguments, query_offset=slot, key_mask=mask)
    by_number = select_tokens(rule, None, None, None, **arguments, query_offset=slot, num_keys=20)
    assert by_mask.tolist() == by_number.tolist() == [[[0, 2, 3, 4] + [-1] * (rule.width(20) - 4)]]
    with pytest.raises(ValueError, match="pass `num_keys`"):
        select_tokens(rule, None, None, None, **arguments, query_offset=slot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": Selection()}, "dense"),
        ({"q": None}, "missing"),
        ({"selection": Selection(local_window=3)}, "given"),
        ({"backend": "cuda"}, "auto, torch, triton"),
        ({"batch_size": 2}, "do not fit"),
        ({"query_offset": 5}, "at offset 5"),
        ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "must cover"),
        ({"num_keys": 8}, "`num_keys` is 8, but `query_offset` is 0"),
        ({"query_offset": torch.tensor([0])}, r"int64 \[\], not torch.int64 \[1\]"),
        ({"query_offset": torch.tensor(0.0)}, r"not torch.float32 \[\]"),
        ({"query_offset": torch.tensor(0, device="meta")}, "lies on meta, the indexer's inputs on cpu"),
        ({"query_offset": torch.tensor(0), "num_keys": 7}, "8 queries do not fit a cache of 7 slots"),
        ({"query_offset": torch.tensor(0), "num_keys": 9}, "at offset 1"),
        ({"query_offset": torch.tensor(0), "key_mask": torch.ones(1, 3, dtype=torch.bool)}, "must cover"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    q, k, weights = integers(8, 8)
    arguments = {"selection": Selection(topk=3), "q": q, "k": k, "weights": weights, "batch_size": 1, "num_queries": 8}
    arguments |= change
    rule = arguments.pop("selection")
    with pytest.raises(ValueError, match=message):
        select_tokens(rule, arguments.pop("q"), arguments.pop("k"), arguments.pop("weights"), **arguments)


@pytest.mark.parametrize("arguments", [(-1, 3), (4, -1), (4, 3, 0)])
def test_mask_refuses_bad_numbers(arguments):
    with pytest.raises(ValueError, match="must be at least"):
        sparse_attention_mask(*arguments)
