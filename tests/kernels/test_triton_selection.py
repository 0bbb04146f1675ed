"""Selection kernels against the float64 oracle and the PyTorch backend.

Queries, keys and gates are small integers where sets are compared exactly: float32 scores are then exact and many tie.
The interpreter takes about 0.2 s per query that is scored, so few queries look back over many keys.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from modeling_keye import sparse_reference_keye, triton_common_keye, triton_selection_keye
from modeling_keye.sparse_attention_keye import Selection
from modeling_keye.triton_common_keye import INTERPRETED, jit, ordered_bits, tl, triton_usable
from modeling_keye.triton_selection_keye import _kth_largest, score_tiles
from tests.core.test_selection import PARTS, as_lists, assert_selected, float64_scores, oracle

FULL = Selection(topk=7, local_window=9, anchor_stride=16)
SCORED = [rule for rule in PARTS if rule.topk is not None]


def integers(num_queries: int, num_keys: int, batch: int = 1, heads: int = 3, dim: int = 5, seed: int = 0, most=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    return draw(batch, num_queries, heads, dim), draw(batch, num_keys, dim), draw(batch, num_queries, heads)


def normal(num_queries: int, num_keys: int, heads: int, dim: int, dtype=torch.float32, batch: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, num_queries, heads, dim), (batch, num_keys, dim), (batch, num_queries, heads)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def select(backend, rule: Selection, index, num_keys: int, first_query: int = 0, key_mask=None) -> torch.Tensor:
    """Slots of the queries at `first_query` .. `num_keys - 1`, on the device of `index`."""
    q, k, weights = index if rule.topk is not None else (None, None, None)
    return backend.select_tokens(
        q,
        k,
        weights,
        topk=rule.topk,
        local_window=rule.local_window,
        anchor_stride=rule.anchor_stride,
        batch_size=index[0].shape[0],
        num_queries=num_keys - first_query,
        query_offset=first_query,
        key_mask=key_mask,
        width=rule.width(num_keys),
        device=index[0].device,
    )


def on(device: torch.device, tensors):
    return tuple(tensor.to(device) for tensor in tensors)


def assert_equals_oracle(rule, index, num_keys, first_query, device) -> None:
    indices = select(triton_selection_keye, rule, on(device, index), num_keys, first_query)
    assert indices.shape == (1, num_keys - first_query, rule.width(num_keys))
    with np.errstate(invalid="ignore"):
        scores = float64_scores(index[0][0], index[1][0], index[2][0])
    assert_selected(indices[0].cpu(), oracle(rule, scores, num_keys, first_query))


@pytest.mark.parametrize("num_keys", [1, 15, 63, 65, 129, 1000], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("rule", PARTS, ids=str)
def test_equals_oracle(rule, num_keys, device):
    first_query = max(0, num_keys - 3)
    index = integers(num_keys - first_query, num_keys, seed=num_keys)
    assert_equals_oracle(rule, index, num_keys, first_query, device)


def test_whole_prefill_equals_the_torch_backend(device):
    index = integers(50, 50, seed=4)
    found = select(triton_selection_keye, FULL, on(device, index), 50)
    assert torch.equal(found.cpu(), select(sparse_reference_keye, FULL, index, 50))


@pytest.mark.parametrize("topk", [1, 8, 64])
def test_around_the_budget(topk, device):
    for num_keys in {1, max(1, topk - 1), topk, topk + 1}:
        index = integers(min(2, num_keys), num_keys, seed=num_keys)
        assert_equals_oracle(Selection(topk=topk), index, num_keys, num_keys - min(2, num_keys), device)


@pytest.mark.parametrize("case", ["equal", "zero", "signed_zero", "one_level", "huge", "denormal"])
def test_ties_go_to_the_lowest_position(case, device):
    num_keys, num_queries = 300, 2
    q, k, weights = integers(num_queries, num_keys)
    if case in ("equal", "one_level"):
        q, k, weights = torch.ones_like(q), torch.ones_like(k), torch.ones_like(weights)
    if case == "zero":
        q = torch.zeros_like(q)
    elif case == "signed_zero":
        # Every product is clipped to +0; gates of either sign make +0 and -0 of it.
        q, k = q.abs(), -k.abs()
        weights = torch.tensor([-1.0, 1.0])[None, :, None].expand_as(weights).contiguous()
    elif case == "one_level":
        k[:, 77::40] += 1
    elif case == "huge":
        q, k = q * 2.0**50, k * 2.0**50
    elif case == "denormal":
        q, k = q * 2.0**-70, k * 2.0**-70
    for rule in (Selection(topk=13), Selection(topk=13, local_window=4, anchor_stride=32)):
        assert_equals_oracle(rule, (q, k, weights), num_keys, num_keys - num_queries, device)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_scores_lose_but_stay_candidates(value, device):
    """A score that is NaN or -inf ranks last, lowest position first; it is still chosen when there is room."""
    num_keys, rule = 129, Selection(topk=40, local_window=3)
    q, k, weights = integers(2, num_keys)
    k[0, 5:100:3, 0] = value
    q[0, 1, 0] = float("nan")  # this query has no usable score
    assert_equals_oracle(rule, (q, k, weights), num_keys, num_keys - 2, device)
    found = select(triton_selection_keye, rule, on(device, (q, k, weights)), num_keys, num_keys - 2)
    assert as_lists(found[0].cpu())[1] == [*range(40), 125, 126, 127, 128]


def test_greatest_and_infinite_scores_tie(device):
    num_keys = 40
    q, k, weights = torch.ones(1, 1, 1, 1), torch.zeros(1, num_keys, 1), torch.ones(1, 1, 1)
    k[0, [3, 9, 30], 0] = torch.tensor([torch.finfo(torch.float32).max, math.inf, math.inf])
    for topk, expected in ((1, [3]), (2, [3, 9]), (4, [0, 3, 9, 30])):
        found = select(triton_selection_keye, Selection(topk=topk), on(device, (q, k, weights)), num_keys, num_keys - 1)
        assert as_lists(found[0].cpu()) == [expected]


@pytest.mark.parametrize("rule", PARTS, ids=str)
def test_padding_and_holes(rule, device):
    num_keys, first_query = 150, 148
    mask = torch.ones(6, num_keys, dtype=torch.bool)
    mask[1, :37] = False  # left padding
    mask[2, :3] = False
    mask[2, 40:61] = False  # left padding and a hole
    mask[3] = False  # no token at all
    mask[4, :149] = False  # one token, behind the first query
    mask[5, 149] = False  # the last query itself
    index = integers(num_keys - first_query, num_keys, batch=6)
    index[1][1, :37] = float("nan")  # what padding holds must not matter
    found = select(triton_selection_keye, rule, on(device, index), num_keys, first_query, mask.to(device)).cpu()
    for b in range(6):
        scores = float64_scores(index[0][b], index[1][b], index[2][b])
        assert_selected(found[b], oracle(rule, scores, num_keys, first_query, mask[b].numpy()))
    assert bool((found[3] == -1).all()) and bool((found[4, 0] == -1).all())


@pytest.mark.parametrize("fill", [float("nan"), -math.inf, 3e38], ids=str)
def test_unwritten_memory_is_not_read(fill, device, monkeypatch):
    """Tiles before the first real token are not scored; what their memory holds must not matter."""
    allocate = torch.empty

    def filled(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(fill) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)
    num_keys = 290
    for seed, start in enumerate((5, 77, 197, 262)):
        mask = torch.arange(num_keys)[None] >= start
        rule = Selection(topk=17, local_window=(None, 3)[seed % 2])
        index = integers(1, num_keys, seed=seed, most=50)
        found = select(triton_selection_keye, rule, on(device, index), num_keys, num_keys - 1, mask.to(device))
        assert torch.equal(found.cpu(), select(sparse_reference_keye, rule, index, num_keys, num_keys - 1, mask))


@pytest.mark.parametrize("seed", range(4))
def test_random_cases_equal_the_torch_backend(seed, device):
    generator = np.random.default_rng(seed)
    for case in range(6):
        num_queries, batch = generator.integers(1, 3, size=2).tolist()
        num_keys = num_queries + int(generator.integers(1, 400))
        rule = Selection(
            int(generator.choice([1, 3, 16, 50, 200])),
            *(generator.choice([None, 0, 5, 33]), generator.choice([None, 1, 3, 17, 64])),
        )
        mask = torch.from_numpy(generator.random((batch, num_keys)) < generator.choice([0.05, 0.5, 1.0]))
        mask &= torch.arange(num_keys) >= torch.from_numpy(generator.integers(0, num_keys, size=(batch, 1)))
        index = integers(num_queries, num_keys, batch, seed=case, most=int(generator.choice([1, 50])))
        first_query = num_keys - num_queries
        found = select(triton_selection_keye, rule, on(device, index), num_keys, first_query, mask.to(device))
        expected = select(sparse_reference_keye, rule, index, num_keys, first_query, mask)
        assert torch.equal(found.cpu(), expected), f"{rule}, {num_queries} of {num_keys}, case {case}"


def test_batch_composition_changes_nothing(device):
    """Sequences of different length, left-padded into one batch, select what each selects alone."""
    lengths, num_keys = (130, 64, 97), 130
    q, k, weights = normal(1, num_keys, 4, 8, batch=3)
    mask = torch.stack([torch.arange(num_keys) >= num_keys - n for n in lengths])
    together = select(
        triton_selection_keye, FULL, on(device, (q, k, weights)), num_keys, num_keys - 1, mask.to(device)
    ).cpu()
    for b, length in enumerate(lengths):
        alone = on(device, (q[b : b + 1], k[b : b + 1, num_keys - length :], weights[b : b + 1]))
        alone = as_lists(select(triton_selection_keye, FULL, alone, length, length - 1)[0].cpu())
        assert [[s - (num_keys - length) for s in row] for row in as_lists(together[b])] == alone


def test_chunks_and_repeats_change_nothing(device, monkeypatch):
    num_keys, first_query = 170, 165
    index = on(device, normal(num_keys - first_query, num_keys, 4, 8, batch=2))
    whole = select(triton_selection_keye, FULL, index, num_keys, first_query)
    q, k, weights = index
    for begin, end in ((165, 167), (167, 170), (169, 170)):
        rows = slice(begin - first_query, end - first_query)
        part = select(triton_selection_keye, FULL, (q[:, rows], k, weights[:, rows]), end, begin)
        assert as_lists(part[0].cpu()) == as_lists(whole[0, rows].cpu())
    # A slab that holds two rows: chunks of two queries, one sequence at a time.
    monkeypatch.setattr(triton_selection_keye, "SLAB_ELEMENTS", 3 * 256)
    assert torch.equal(select(triton_selection_keye, FULL, index, num_keys, first_query), whole)


@pytest.mark.parametrize(
    ("tile", "digit", "span", "row_multiple"), [(64, 8, 64, 64), (1024, 10, 128, 32), (256, 3, 1024, 64)]
)
def test_tilings_agree(tile, digit, span, row_multiple, device, monkeypatch):
    num_keys, first_query = 420, 418
    index = integers(num_keys - first_query, num_keys, seed=9)
    rule = Selection(topk=100, local_window=5, anchor_stride=50)
    monkeypatch.setattr(triton_selection_keye, "select_tile", lambda *_: (tile, 4))
    monkeypatch.setattr(triton_selection_keye, "DIGIT", digit)
    monkeypatch.setattr(triton_selection_keye, "SCORE_SPAN", span)
    monkeypatch.setattr(triton_selection_keye, "ROW_MULTIPLE", row_multiple)
    assert_equals_oracle(rule, index, num_keys, first_query, device)


def select_at(slot: int, rule: Selection, index, key_mask=None) -> torch.Tensor:
    """As `select`, over the whole of `index` as a static cache, with a slot that only the device knows."""
    q, k, weights = index if rule.topk is not None else (None, None, None)
    num_queries, room = index[0].shape[1], index[1].shape[1]
    return triton_selection_keye.select_tokens(
        q,
        k,
        weights,
        topk=rule.topk,
        local_window=rule.local_window,
        anchor_stride=rule.anchor_stride,
        batch_size=index[0].shape[0],
        num_queries=num_queries,
        query_offset=room - num_queries,
        key_mask=key_mask,
        width=rule.width(room),
        device=index[0].device,
        slot=torch.tensor(slot, device=index[0].device),
    )


def assert_slot_selects_the_same(rule, index, slots, device, mask=None) -> None:
    """The lists of an int offset at each of the slots, whatever the cache holds behind the queries."""
    num_queries, room = index[0].shape[1], index[1].shape[1]
    for slot in slots:
        num_keys = slot + num_queries
        seen = None if mask is None else mask[:, :num_keys]
        expected = select(sparse_reference_keye, rule, index, num_keys, slot, seen)
        keys = index[1].clone()
        keys[:, num_keys:] = math.nan
        part = on(device, (index[0], keys, index[2]))
        found = select_at(slot, rule, part, None if mask is None else mask.to(device)).cpu()
        assert found.shape == (*expected.shape[:2], rule.width(room))
        assert as_lists(found.flatten(0, 1)) == as_lists(expected.flatten(0, 1)), f"at slot {slot}"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rule", [*PARTS, Selection(topk=500, local_window=3)], ids=str)
def test_a_slot_on_the_device_selects_the_same(rule, padded, device):
    """At the start of the cache, where all is kept, at tile borders, among padding and at the last slot."""
    room = 150
    mask = None
    if padded:
        mask = torch.ones(2, room, dtype=torch.bool)
        mask[0, 60:70] = False
        mask[1, :37] = False
    index = integers(1, room, batch=2, seed=3)
    assert_slot_selects_the_same(rule, index, (0, 8, 15, 16, 36, 63, 64, 100, room - 1), device, mask)


@pytest.mark.parametrize(("tile", "digit", "span", "slab"), [(64, 8, 64, 768), (256, 3, 1024, 7 * 2**20)])
def test_tilings_agree_at_a_slot_on_the_device(tile, digit, span, slab, device, monkeypatch):
    """Several queries, in chunks of two where the slab is small."""
    monkeypatch.setattr(triton_selection_keye, "select_tile", lambda *_: (tile, 4))
    monkeypatch.setattr(triton_selection_keye, "DIGIT", digit)
    monkeypatch.setattr(triton_selection_keye, "SCORE_SPAN", span)
    monkeypatch.setattr(triton_selection_keye, "SLAB_ELEMENTS", slab)
    index = integers(3, 250, batch=2, seed=9)
    assert_slot_selects_the_same(Selection(50, 5, 40), index, (0, 55, 128, 247), device)


def test_every_score_a_survivor(device, monkeypatch):
    """More survivors than one tile holds: all scores equal, so no peak excludes a group."""
    monkeypatch.setattr(triton_selection_keye, "select_tile", lambda *_: (64, 4))
    num_keys = 300
    index = torch.ones(1, 1, 2, 4), torch.ones(1, num_keys, 4), torch.ones(1, 1, 2)
    assert_equals_oracle(Selection(topk=200, local_window=0), index, num_keys, num_keys - 1, device)


@pytest.mark.parametrize("heads,dim", [(1, 16), (3, 5), (4, 128), (16, 64), (20, 96), (32, 128), (64, 128)])
def test_head_sizes_and_rounding(heads, dim, device):
    """Float scores may swap tokens only where the float64 scores are closer than rounding."""
    num_keys, rule = 600, Selection(topk=32)
    index = normal(2, num_keys, heads, dim, seed=heads)
    found = as_lists(select(triton_selection_keye, rule, on(device, index), num_keys, num_keys - 2)[0].cpu())
    scores = float64_scores(index[0][0], index[1][0], index[2][0])
    for t, (row, wanted) in enumerate(zip(found, oracle(rule, scores, num_keys, num_keys - 2))):
        swapped = list(set(row) ^ set(wanted))
        rounding = dim * np.finfo(np.float32).eps * np.abs(scores[t]).max()
        assert np.all(np.abs(scores[t, swapped] - scores[t, wanted].min()) <= rounding), f"query {t}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, device):
    index = tuple(x.to(dtype) for x in integers(2, 200))
    assert_equals_oracle(FULL, index, 200, 198, device)
    mixed = index[0], index[1].float(), index[2]
    assert_equals_oracle(FULL, mixed, 200, 198, device)


def test_strided_and_broadcast_inputs(device):
    num_keys = 130
    q, k, weights = on(device, integers(2, num_keys, batch=2, heads=4, dim=8))
    expected = select(triton_selection_keye, FULL, (q, k, weights), num_keys, num_keys - 2)
    longer = torch.full((2, num_keys + 9, 16), float("nan"), device=device)
    longer[:, :num_keys, ::2] = k
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), longer[..., ::2], weights.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided)
    mask = torch.ones(2, num_keys + 4, dtype=torch.bool, device=device)[:, :num_keys]
    assert torch.equal(select(triton_selection_keye, FULL, strided, num_keys, num_keys - 2, mask), expected)
    broadcast = q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1), weights[:1].expand(2, -1, -1)
    found = select(triton_selection_keye, FULL, broadcast, num_keys, num_keys - 2)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[0])


def test_head_order_changes_nothing(device):
    q, k, weights = on(device, integers(2, 200))
    first = select(triton_selection_keye, FULL, (q, k, weights), 200, 198)
    order = torch.tensor([2, 0, 1], device=device)
    assert torch.equal(select(triton_selection_keye, FULL, (q[:, :, order], k, weights[:, :, order]), 200, 198), first)


@pytest.mark.parametrize("rule", [FULL, Selection(topk=64), Selection(topk=2000, local_window=3)], ids=str)
def test_nothing_is_scored_where_everything_fits(rule, device, monkeypatch):
    """The first query that keeps less than it sees is the first that is scored."""
    scored = []
    score = triton_selection_keye._select
    monkeypatch.setattr(
        triton_selection_keye, "_select", lambda *arguments: (scored.append(arguments[-1]), score(*arguments))
    )
    num_keys = 66
    index = on(device, integers(num_keys, num_keys))
    whole = rule.dense_length(num_keys)
    if whole < num_keys:
        index = tuple(x[:, : whole + 1] for x in index)
        num_keys = whole + 1
    found = select(triton_selection_keye, rule, index, num_keys)
    assert scored == ([] if whole == num_keys else [whole])
    assert as_lists(found[0, :whole].cpu()) == [list(range(t + 1)) for t in range(whole)]
    assert torch.equal(found.cpu(), select(sparse_reference_keye, rule, on("cpu", index), num_keys))


def test_no_queries():
    index = integers(0, 5)
    assert select(triton_selection_keye, FULL, index, 5, 5).shape == (1, 0, FULL.width(5))


@pytest.mark.parametrize(
    ("batch", "first_query", "num_queries", "offset"),
    [(1, 2048, 131072, 0), (1, 0, 4096, 131072 - 4096), (64, 0, 1, 131071), (3, 0, 700, 4000), (1, 0, 1, 1 << 20)],
)
def test_workspace_and_chunks_at_full_size(batch, first_query, num_queries, offset):
    """Every query is in exactly one chunk and no chunk needs more than 64 MiB, without running anything."""
    seen = np.zeros((batch, num_queries), np.int64)
    for b, sequences, begin, count in triton_selection_keye._chunks(batch, first_query, num_queries, offset):
        seen[b : b + sequences, begin : begin + count] += 1
        row = triton_selection_keye._row_stride(offset + begin + count)
        assert row >= offset + begin + count and row % triton_selection_keye.ROW_MULTIPLE == 0
        workspace = sequences * count * row * 8 * (1 + 1 / triton_selection_keye.GROUP)
        assert workspace <= 64 * 2**20
    assert (seen[:, :first_query] == 0).all() and (seen[:, first_query:] == 1).all()


def test_workspace_of_a_call(device, monkeypatch):
    """What a call allocates is what the chunks need, and the result; every row has scratch of its own."""
    tensors = []
    allocate = torch.empty

    def counting(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    monkeypatch.setattr(triton_selection_keye, "SLAB_ELEMENTS", 1024)
    select(triton_selection_keye, FULL, on(device, integers(5, 300)), 300, 295)
    assert [tensor.nbytes for tensor in tensors] == [
        5 * FULL.width(300) * 4,
        2 * 320 * 4,
        2 * 320 // 16 * 4,
        2 * 320 * 4,
        2 * 320 // 16 * 4,
    ]
    # The last chunk holds one query; the second row of the scratch is what the chunk before left there.
    firsts = [scratch.view(2, -1)[:, 0] for scratch in tensors[1:]]
    assert all(not bool(first.isnan().any()) if first.is_floating_point() else min(first) >= 0 for first in firsts)


def test_tiles_refuse_what_no_device_holds():
    with pytest.raises(ValueError, match=r'128 heads of 512 in torch.float32 .* 99 KiB .* choose the backend "torch"'):
        score_tiles(128, 512, torch.float32, 99 * 1024)


@jit
def _ordered_bits_kernel(x_ptr, out_ptr, count, TILE: tl.constexpr):
    offsets = tl.arange(0, TILE)
    bits = ordered_bits(tl.load(x_ptr + offsets, mask=offsets < count, other=0.0))
    tl.store(out_ptr + offsets, bits.to(tl.int64), mask=offsets < count)


def test_ordered_bits_order_as_numbers(device):
    greatest = torch.finfo(torch.float32).max
    numbers = [-math.inf, -greatest, -1.5, -1e-38, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 1.5, greatest]
    x = torch.tensor(numbers, device=device)
    out = torch.empty(len(x), dtype=torch.int64, device=device)
    _ordered_bits_kernel[(1,)](x, out, len(x), TILE=16)
    bits = out.tolist()
    assert bits == sorted(set(bits)) and bits[0] == 0 and bits[1] == 1


@jit
def _kth_largest_kernel(x_ptr, out_ptr, count, k, slack, TILE: tl.constexpr, DIGIT: tl.constexpr):
    lowest, highest, room = _kth_largest(x_ptr, x_ptr, count, k, slack, False, TILE, DIGIT)
    tl.store(out_ptr, lowest.to(tl.int64))
    tl.store(out_ptr + 1, highest.to(tl.int64))
    tl.store(out_ptr + 2, room)


@pytest.mark.parametrize("slack", [0, 5, 200])
@pytest.mark.parametrize("kind", ["unrelated", "close", "rounded", "equal", "few"])
def test_radix_select_stops_where_it_may(kind, slack, device):
    """The interval holds the k-th largest, no more than `slack` too many, unless these are equal."""
    k, count = 60, 300
    x = torch.randn(count, device=device)
    x = {"close": 1 + x * 1e-6, "rounded": x.round(), "equal": torch.ones_like(x)}.get(kind, x)
    x[torch.randperm(count, device=device)[: 250 if kind == "few" else 20]] = -torch.inf
    x += 0.0  # as the scoring kernel does
    bits = torch.empty(512, dtype=torch.int64, device=device)
    _ordered_bits_kernel[(1,)](x, bits, count, TILE=512)
    bits = bits[:count][bits[:count] != 0]
    out = torch.empty(3, dtype=torch.int64, device=device)
    _kth_largest_kernel[(1,)](x, out, count, k, slack, TILE=128, DIGIT=6)
    lowest, highest, room = out.tolist()
    inside, above = (bits >= lowest) & (bits <= highest), bits > highest
    if kind == "few":
        assert len(bits) == 50 and room == k and bool(inside.all())
        return
    assert int(above.sum()) + room == k and 0 < room <= int(inside.sum())
    assert int(inside.sum()) <= room + slack or len(bits[inside].unique()) == 1
    if kind == "unrelated":  # the last digits are not looked at, and with some slack a whole bin is taken
        assert highest - lowest >= 63 and (slack < 200 or int(inside.sum()) > room)


@pytest.mark.skipif(not INTERPRETED, reason="about machines without a device")
def test_usable_names_what_is_missing(monkeypatch):
    cpu = torch.device("cpu")
    assert triton_usable(cpu, torch.float32, torch.bfloat16) is None
    assert "not torch.int32; choose" in triton_usable(cpu, torch.float32, torch.int32)
    assert "not on 'mps'" in triton_usable(torch.device("mps"))
    assert "TRITON_INTERPRET=1 is set" in triton_usable(torch.device("cuda"))
    monkeypatch.setattr(triton_common_keye, "INTERPRETED", False)
    assert "on the CPU only with TRITON_INTERPRET=1" in triton_usable(cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 has compute capability 7.5 and 8.0 is the least" in triton_usable(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_usable(torch.device("cuda"), torch.bfloat16) is None
    assert "float64" in triton_usable(torch.device("cuda"), torch.float64)
    monkeypatch.setattr(triton_common_keye, "triton", None)
    for device in (cpu, torch.device("cuda")):
        sentence = triton_usable(device)
        assert sentence.startswith("Triton is not installed") and sentence.endswith('choose the backend "torch".')


def test_files_import_without_triton():
    """The kernel files are part of the model's code, so they load where there is no Triton."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from modeling_keye import triton_common_keye, triton_selection_keye\n"
        "from modeling_keye.sparse_attention_keye import warm_up\n"
        "import torch; print(triton_common_keye.triton_usable(torch.device('cpu')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton is not installed")


# On a device: sizes that the interpreter cannot hold.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads,dim", [(4, 128), (16, 64), (32, 128), (64, 128)])
def test_device_equals_torch_backend(heads, dim, dtype):
    """Exact scores (integers below 2**24), so every backend must return the same sets."""
    num_keys, first_query, rule = 9000, 8700, Selection(topk=512, local_window=128, anchor_stride=64)
    generator = torch.Generator().manual_seed(heads)
    index = tuple(
        torch.randint(-2, 3, shape, generator=generator).to("cuda", dtype)
        for shape in ((2, 300, heads, dim), (2, num_keys, dim), (2, 300, heads))
    )
    mask = torch.arange(num_keys, device="cuda") >= torch.tensor([[0], [777]], device="cuda")
    found = select(triton_selection_keye, rule, index, num_keys, first_query, mask)
    assert torch.equal(found, select(sparse_reference_keye, rule, index, num_keys, first_query, mask))


@pytest.mark.gpu
def test_device_decode_equals_prefill():
    num_keys, first_query, rule = 70001, 69900, Selection(topk=2048, local_window=512, anchor_stride=64)
    q, k, weights = on("cuda", normal(num_keys - first_query, num_keys, 16, 64, torch.bfloat16))
    whole = select(triton_selection_keye, rule, (q, k, weights), num_keys, first_query)
    assert torch.equal(select(triton_selection_keye, rule, (q, k, weights), num_keys, first_query), whole)
    last = select(triton_selection_keye, rule, (q[:, -1:], k, weights[:, -1:]), num_keys, num_keys - 1)
    assert torch.equal(last[0, 0], whole[0, -1])


@pytest.mark.gpu
def test_device_at_a_slot_on_the_device_equals_decode():
    room, rule = 70001, Selection(topk=2048, local_window=512, anchor_stride=64)
    index = on("cuda", normal(1, room, 16, 64, torch.bfloat16))
    for slot in (0, 2500, 4095, 40000, room - 1):
        expected = select(triton_selection_keye, rule, index, slot + 1, slot)
        assert as_lists(select_at(slot, rule, index)[0].cpu()) == as_lists(expected[0].cpu())


@pytest.mark.gpu
def test_device_more_rows_than_a_grid_axis_other_than_x_holds():
    num_keys, rule = 70000, Selection(topk=64, local_window=16, anchor_stride=4096)
    q, k, weights = on("cuda", normal(num_keys, num_keys, 4, 16, torch.float16))
    found = select(triton_selection_keye, rule, (q, k, weights), num_keys)
    for first in (0, 65530, 69990):
        rows = slice(first, first + 10)
        part = select(triton_selection_keye, rule, (q[:, rows], k, weights[:, rows]), first + 10, first)
        assert as_lists(part[0].cpu()) == as_lists(found[0, rows].cpu())


@pytest.mark.gpu
def test_device_workspace_at_128k():
    num_keys, num_queries, rule = 131072, 4096, Selection(topk=2048, local_window=512, anchor_stride=64)
    index = on("cuda", normal(num_queries, num_keys, 16, 64, torch.bfloat16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = select(triton_selection_keye, rule, index, num_keys, num_keys - num_queries)
    assert torch.cuda.max_memory_allocated() - before - found.nbytes <= 64 * 2**20
