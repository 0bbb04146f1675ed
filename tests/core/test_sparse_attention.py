"""Sparse and dense attention against masked float64 maths written out, and gradients against autograd of that maths."""

import math

import pytest
import torch

from modeling_keye import attention_keye, sparse_reference_keye
from modeling_keye.sparse_attention_keye import dense_attention, dense_latent_attention, sparse_gqa, sparse_mla
from modeling_keye.sparse_eager_keye import eager_attention

BATCH, HEADS, SCALE = 2, 6, 0.3
LATENT, ROTARY = 20, 6
DIM, VALUE_DIM = 18, 14


def judge(q, k, v, kept):
    """Masked attention: q [B, S, H, D], k [B, G, T, D], v [B, G, T, Dv], kept bool [B, S, T] -> out, lse, both in the
    dtype of q. Rows that keep nothing give 0 and -inf; rows of k and v that nobody keeps are never multiplied."""
    used = kept.any(dim=1)[:, None, :, None]
    k, v = k.masked_fill(~used, 0.0), v.masked_fill(~used, 0.0)
    group = torch.arange(q.shape[2]) * k.shape[1] // q.shape[2]
    scores = torch.einsum("bshd,bhtd->bsht", q, k[:, group]) * SCALE
    scores = scores.masked_fill(~kept[:, :, None], -math.inf)
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return torch.einsum("bsht,bhtd->bshd", weights, v[:, group]), lse


def random_kept(num_queries: int, num_keys: int, width: int, empty=(), seed: int = 0):
    """int32 indices [B, S, width] of random visible slots and the same as bool [B, S, T]; `empty` queries keep none."""
    generator = torch.Generator().manual_seed(seed)
    offset = num_keys - num_queries
    kept = torch.zeros(BATCH, num_queries, num_keys, dtype=torch.bool)
    for b in range(BATCH):
        for s in range(num_queries):
            most = min(width, offset + s + 1)
            count = 0 if s in empty else int(torch.randint(1, most + 1, (1,), generator=generator))
            kept[b, s, torch.randperm(offset + s + 1, generator=generator)[:count]] = True
    return indices_of(kept, width), kept


def indices_of(kept: torch.Tensor, width: int) -> torch.Tensor:
    num_keys = kept.shape[-1]
    slots = torch.where(kept, torch.arange(num_keys), num_keys).sort(dim=-1).values
    slots = torch.nn.functional.pad(slots, (0, max(0, width - num_keys)), value=num_keys)[..., :width]
    return slots.masked_fill(slots == num_keys, -1).to(torch.int32)


def mla_inputs(num_queries: int, num_keys: int, dtype=torch.float64, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, num_queries, HEADS, LATENT + ROTARY, generator=generator, dtype=torch.float64)
    kv = torch.randn(BATCH, num_keys, LATENT + ROTARY, generator=generator, dtype=torch.float64)
    return q.to(dtype), kv.to(dtype)


def gqa_inputs(num_queries: int, num_keys: int, groups: int, dtype=torch.float64, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, num_queries, HEADS, DIM, generator=generator, dtype=torch.float64)
    k = torch.randn(BATCH, groups, num_keys, DIM, generator=generator, dtype=torch.float64)
    v = torch.randn(BATCH, groups, num_keys, VALUE_DIM, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(inputs, indices):
    if len(inputs) == 2:
        return sparse_mla(*inputs, indices, SCALE, LATENT)
    return sparse_gqa(*inputs, indices, SCALE)


def both_ways(inputs, indices):
    """Results with gradients on and off: they take different code."""
    with torch.no_grad():
        first = run(inputs, indices)
    second = run([x.detach().requires_grad_() for x in inputs], indices)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    return first


def run_judge(inputs, kept):
    if len(inputs) == 2:
        q, kv = inputs
        return judge(q, kv[:, None], kv[:, None, :, :LATENT], kept)
    return judge(*inputs, kept)


def make(kind: str, num_queries: int, num_keys: int, dtype=torch.float64):
    if kind == "mla":
        return mla_inputs(num_queries, num_keys, dtype)
    return gqa_inputs(num_queries, num_keys, int(kind[3:]), dtype)


KINDS = ["mla", "gqa1", "gqa2", "gqa6"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "width"),
    [(1, 1, 1), (15, 15, 4), (63, 63, 80), (40, 111, 8), (1, 129, 64), (129, 129, 16)],
)
def test_equals_masked_maths(kind, num_queries, num_keys, width):
    indices, kept = random_kept(num_queries, num_keys, width)
    inputs = make(kind, num_queries, num_keys)
    out, lse = both_ways(inputs, indices)
    expected, expected_lse = run_judge(inputs, kept)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_without_keys(kind):
    indices, kept = random_kept(12, 20, 5, empty=(0, 5, 11))
    inputs = [x.requires_grad_() for x in make(kind, 12, 20)]
    out, lse = run(inputs, indices)
    expected, expected_lse = run_judge(inputs, kept)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    assert bool((out[:, [0, 5, 11]] == 0).all()) and bool((lse[:, [0, 5, 11]] == -math.inf).all())
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in inputs)
    assert bool((inputs[0].grad[:, [0, 5, 11]] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_selected_anywhere(kind):
    inputs = [x.requires_grad_() for x in make(kind, 4, 9)]
    out, lse = run(inputs, torch.full((BATCH, 4, 3), -1, dtype=torch.int32))
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["head", "middle", "shuffled", "wider"])
def test_where_the_unused_places_are_changes_nothing(kind, order):
    indices, _ = random_kept(20, 30, 6)
    inputs = make(kind, 20, 30)
    out, lse = both_ways(inputs, indices)
    if order == "head":
        indices = indices.flip(-1)
    elif order == "middle":
        indices = torch.cat([indices[..., :2], torch.full_like(indices, -1), indices[..., 2:]], dim=-1)
    elif order == "shuffled":
        indices = indices[..., torch.randperm(6)]
    else:
        indices = torch.nn.functional.pad(indices, (0, 50), value=-1)
    other_out, other_lse = both_ways(inputs, indices)
    torch.testing.assert_close(other_out, out, atol=1e-12, rtol=0)
    torch.testing.assert_close(other_lse, lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_in_unselected_rows_are_never_read(kind, bad):
    num_keys = 40
    indices, kept = random_kept(10, num_keys, 4, empty=(3,))
    unused = ~kept.any(dim=1)
    unused[:, 0] = True  # the row an unused place might be sent to
    kept[..., 0] = False
    indices = indices_of(kept, 4)
    inputs = make(kind, 10, num_keys)
    poisoned = [inputs[0].requires_grad_()]
    for rows in inputs[1:]:
        where = unused[..., None] if rows.dim() == 3 else unused[:, None, :, None]
        poisoned.append(rows.masked_fill(where, bad).requires_grad_())
    out, lse = run(poisoned, indices)
    expected, expected_lse = run_judge(inputs, kept)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    grads = torch.autograd.grad(out.square().sum(), poisoned)
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_and_broadcast_inputs(kind):
    indices, kept = random_kept(9, 21, 5)
    inputs = make(kind, 9, 21)
    expected, _ = run_judge(inputs, kept)
    strided = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    wide = torch.stack([indices, indices], dim=-1)[..., 0]
    torch.testing.assert_close(run(strided, wide)[0], expected, atol=1e-12, rtol=0)

    shared = [x[:1].expand(BATCH, *x.shape[1:]) for x in inputs]
    expected, _ = run_judge(shared, kept)
    torch.testing.assert_close(run(shared, indices)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_autograd_of_the_maths(kind):
    indices, kept = random_kept(33, 50, 7, empty=(4,))
    inputs = [x.requires_grad_() for x in make(kind, 33, 50)]
    out, _ = run(inputs, indices)
    expected, _ = run_judge(inputs, kept)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(out, inputs, upstream)
    # The empty row makes 0 * inf in autograd of the plain formula, so it is left out there.
    upstream = upstream.masked_fill(~kept.any(-1)[..., None, None], 0.0)
    rows = kept.any(-1)[..., None, None].expand_as(expected)
    wanted = torch.autograd.grad(expected[rows], inputs, upstream[rows])
    for name, gradient, reference in zip(("q", "k", "v"), found, wanted, strict=False):
        reference = reference.nan_to_num(0.0) if name == "q" else reference
        assert bool(reference.isfinite().all()), "the judge itself must be finite"
        torch.testing.assert_close(gradient, reference, atol=1e-11, rtol=0, msg=lambda m, n=name: f"grad of {n}: {m}")


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
def test_autocast_changes_no_bit(kind):
    """Neither in forward nor in a backward pass that is called where it is still on."""
    leaves = [x.float().requires_grad_() for x in make(kind, 9, 30)]
    indices, _ = random_kept(9, 30, 6)

    def step():
        out, lse = run(leaves, indices)
        return out, lse, *torch.autograd.grad(out.square().sum(), leaves)

    expected = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
def test_gradcheck(kind):
    indices, _ = random_kept(3, 5, 3, empty=(1,))
    inputs = [x.requires_grad_() for x in make(kind, 3, 5)]
    assert torch.autograd.gradcheck(lambda *x: run(x, indices)[0], inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
def test_steps_agree(kind, monkeypatch):
    indices, _ = random_kept(50, 60, 9)
    inputs = [x.requires_grad_() for x in make(kind, 50, 60)]
    out, lse = run(inputs, indices)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    for elements in (1, 9 * 40 * 7, 2**24):
        monkeypatch.setattr(sparse_reference_keye, "_GATHER_ELEMENTS", elements)
        other, other_lse = run(inputs, indices)
        torch.testing.assert_close(other, out, atol=1e-12, rtol=0)
        torch.testing.assert_close(other_lse, lse, atol=1e-12, rtol=0)
        for first, second in zip(torch.autograd.grad(other.square().sum(), inputs), grads, strict=True):
            torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


def test_more_rows_than_sixteen_bits_count():
    num_queries = 70_000
    q, kv = torch.randn(1, num_queries, 1, 3), torch.randn(1, num_queries, 3)
    indices = torch.arange(num_queries, dtype=torch.int32)[None, :, None]
    out, lse = sparse_mla(q, kv, indices, 1.0, 2)  # each query reads its own row only
    assert torch.equal(out[:, :, 0], kv[..., :2])
    torch.testing.assert_close(lse[..., 0], (q[:, :, 0] * kv).sum(dim=-1))


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
def test_everything_selected_is_dense(kind):
    """K >= T: the sparse path, the dense path and the maths agree."""
    num_keys = 70
    kept = torch.tril(torch.ones(num_keys, num_keys, dtype=torch.bool)).expand(BATCH, -1, -1)
    inputs = make(kind, num_keys, num_keys)
    sparse, _ = run(inputs, indices_of(kept, num_keys + 3))
    if kind == "mla":
        dense = dense_latent_attention(*inputs, scaling=SCALE, value_dim=LATENT)
    else:
        dense = dense_attention(inputs[0].transpose(1, 2), *inputs[1:], scaling=SCALE)
    torch.testing.assert_close(sparse, dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(dense, run_judge(inputs, kept)[0], atol=1e-12, rtol=0)


# Precision: the error against float64 may not exceed that of plain code in the same dtype, plus one rounding.


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_that_of_plain_code(kind, dtype):
    indices, kept = random_kept(100, 200, 24)
    inputs = make(kind, 100, 200, dtype)
    out, lse = both_ways(inputs, indices)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact, exact_lse = run_judge([x.double() for x in inputs], kept)
    q, k, v = inputs if kind != "mla" else (inputs[0], inputs[1][:, None], inputs[1][:, None, :, :LATENT])
    plain, _ = eager_attention(q, k, v, kept, SCALE)
    allowed = (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    error = (out.double() - exact).abs().max()
    print(f"{kind} {dtype}: error {error:.2e}, allowed {allowed:.2e}")
    assert error <= allowed
    assert (lse.double() - exact_lse).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_error_is_at_most_that_of_plain_code(kind, dtype):
    indices, kept = random_kept(100, 200, 24)
    inputs = [x.requires_grad_() for x in make(kind, 100, 200, dtype)]
    upstream = torch.randn(run(inputs, indices)[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(run_judge(exact_inputs, kept)[0], exact_inputs, upstream.double())
    q, k, v = inputs if kind != "mla" else (inputs[0], inputs[1][:, None], inputs[1][:, None, :, :LATENT])
    plain = torch.autograd.grad(eager_attention(q, k, v, kept, SCALE)[0], inputs, upstream)
    found = torch.autograd.grad(run(inputs, indices)[0], inputs, upstream)
    for ours, theirs, reference in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype
        allowed = (theirs.double() - reference).norm() + torch.finfo(dtype).eps * reference.norm()
        error = (ours.double() - reference).norm()
        print(f"{kind} {dtype}: gradient error {error:.2e}, allowed {allowed:.2e}")
        assert error <= allowed


# Dense attention.


def causal(num_queries: int, num_keys: int, key_mask=None) -> torch.Tensor:
    offset = num_keys - num_queries
    kept = torch.arange(num_keys) <= torch.arange(offset, num_keys)[:, None]
    kept = kept.expand(BATCH, -1, -1)
    return kept if key_mask is None else kept & key_mask[:, None]


def padding(case: str, num_keys: int) -> torch.Tensor | None:
    if case == "none":
        return None
    mask = torch.ones(BATCH, num_keys, dtype=torch.bool)
    if case == "left":
        mask[1, : num_keys // 3 + 1] = False
    elif case == "holes":
        mask[0, num_keys // 2 : num_keys // 2 + 2] = False
        mask[1, ::5] = False
    elif case == "empty":
        mask[1] = False
    return mask


DENSE_SHAPES = [(1, 1), (15, 15), (64, 64), (111, 111), (1, 129), (40, 111)]


def run_dense(kind, inputs, num_keys, key_mask, offset=None):
    offset = num_keys - inputs[0].shape[1] if offset is None else offset
    options = {"scaling": SCALE, "query_offset": offset, "key_mask": key_mask}
    if kind == "mla":
        return dense_latent_attention(*inputs, value_dim=LATENT, **options)
    return dense_attention(inputs[0].transpose(1, 2), *inputs[1:], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["none", "full", "left", "holes", "empty"])
@pytest.mark.parametrize(("num_queries", "num_keys"), DENSE_SHAPES)
def test_dense_equals_masked_maths(kind, case, num_queries, num_keys):
    key_mask = padding(case, num_keys)
    inputs = make(kind, num_queries, num_keys)
    out = run_dense(kind, inputs, num_keys, key_mask)
    expected, _ = run_judge(inputs, causal(num_queries, num_keys, key_mask))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mla"])
@pytest.mark.parametrize(("num_queries", "num_keys"), DENSE_SHAPES)
def test_dense_with_a_bias_in_place_of_masks(kind, num_queries, num_keys, monkeypatch):
    """The way of a CUDA device with PyTorch's own kernels; there are keys behind the last query."""
    monkeypatch.setattr(sparse_reference_keye, "_has_fused_kernel", lambda *tensors: True)
    monkeypatch.setattr(sparse_reference_keye, "_causal_mask", None)
    q, k, v = make(kind, num_queries, num_keys)
    longer = (torch.nn.functional.pad(x, (0, 0, 0, 5), value=torch.nan) for x in (k, v))
    expected, _ = run_judge((q, k, v), causal(num_queries, num_keys, None))
    out = run_dense(kind, (q, *longer), num_keys, None)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 40), (7, 7), (7, 40)])
def test_dense_is_one_graph(num_queries, num_keys, monkeypatch):
    """Where there would be a bias, which the compiler does not know, there are masks."""
    monkeypatch.setattr(sparse_reference_keye, "_has_fused_kernel", lambda *tensors: True)
    inputs = make("gqa2", num_queries, num_keys)
    torch.compiler.reset()
    compiled = torch.compile(run_dense, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled("gqa2", inputs, num_keys, None)
    torch.compiler.reset()
    torch.testing.assert_close(found, run_dense("gqa2", inputs, num_keys, None), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["none", "left", "holes", "empty"])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_dense_at_a_slot_on_the_device(kind, case, num_queries):
    """Over a whole static cache, with a tensor as `query_offset`: what an int gives for the keys up to the queries."""
    room = 60
    key_mask = padding(case, room)
    inputs = make(kind, num_queries, room)
    for offset in (0, 1, 20, 33, room - num_queries):
        seen = offset + num_queries
        # Keys are the last but one dimension in either layout.
        cut = [inputs[0], *(x[..., :seen, :] for x in inputs[1:])]
        expected = run_dense(kind, cut, seen, None if key_mask is None else key_mask[:, :seen])
        found = run_dense(kind, inputs, room, key_mask, torch.tensor(offset))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
@pytest.mark.parametrize("case", ["none", "left", "empty"])
def test_dense_steps_and_gradients(kind, case, monkeypatch):
    num_queries, num_keys = 50, 60
    key_mask = padding(case, num_keys)
    inputs = [x.requires_grad_() for x in make(kind, num_queries, num_keys)]
    kept = causal(num_queries, num_keys, key_mask)
    seen = kept.any(-1)[..., None, None]
    upstream = torch.randn(BATCH, num_queries, HEADS, 1, dtype=torch.float64)
    expected, _ = run_judge(inputs, kept)
    rows = seen.expand_as(expected)
    wanted = torch.autograd.grad((expected * upstream)[rows].sum(), inputs)
    for block in (7, 256):
        monkeypatch.setattr(sparse_reference_keye, "_DENSE_QUERY_BLOCK", block)
        monkeypatch.setattr(sparse_reference_keye, "_SCORE_TILE_ELEMENTS", block * HEADS * num_keys)
        out = run_dense(kind, inputs, num_keys, key_mask)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        found = torch.autograd.grad((out * upstream).sum(), inputs)
        for gradient, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, reference.nan_to_num(0.0), atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", ["mla", "gqa2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_error_is_at_most_that_of_plain_code(kind, dtype):
    key_mask = padding("left", 120)
    inputs = make(kind, 100, 120, dtype)
    out = run_dense(kind, inputs, 120, key_mask)
    kept = causal(100, 120, key_mask)
    exact, _ = run_judge([x.double() for x in inputs], kept)
    q, k, v = inputs if kind != "mla" else (inputs[0], inputs[1][:, None], inputs[1][:, None, :, :LATENT])
    plain, _ = eager_attention(q, k, v, kept, SCALE)
    allowed = (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("heads", [1, 2])  # of three
def test_dense_latents_expanded_for_some_heads_at_a_time(heads, monkeypatch):
    """Long prompts are expanded in parts, in training again in backward: the same logits and gradients."""
    from tests.model.factories import text_ids, tiny_model

    model = tiny_model("mla_dense", dtype=torch.float64, mlp_layer_types=["dense"] * 3)
    config, ids = model.config.text_config, text_ids(2, 60)
    seen = []

    def attend(q, *rest, **place):
        seen.append(q.shape[1])
        return dense_attention(q, *rest, **place)

    monkeypatch.setattr(attention_keye, "dense_attention", attend)

    def run():
        model.zero_grad()
        seen.clear()
        logits = model(ids).logits
        logits.square().mean().backward()
        return logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)

    whole = run()
    assert set(seen) == {config.num_attention_heads}
    per_head = 2 * 60 * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    monkeypatch.setattr(attention_keye, "_MAX_EXPANDED_ELEMENTS", heads * per_head)
    parts = run()
    assert max(seen) == heads
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 5)}, r"must be \[B, S, H, W\]"),
        ({"kv": torch.zeros(1, 7, 6)}, r"cache rows \(1, 7, 6\)"),
        ({"indices": torch.zeros(1, 2, 3, dtype=torch.int32)}, "do not fit"),
        ({"backend": "none"}, "no sparse attention backend 'none'"),
    ],
)
def test_mla_refuses_what_does_not_fit(change, message):
    arguments = {"q": torch.zeros(1, 3, 2, 5), "kv": torch.zeros(1, 7, 5), "scaling": 1.0, "value_dim": 4}
    arguments["indices"] = torch.zeros(1, 3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        sparse_mla(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 5, 4)}, "do not fit"),
        ({"v": torch.zeros(1, 2, 6, 4)}, "do not fit"),
        ({"indices": torch.zeros(2, 3, 3, dtype=torch.int32)}, "do not fit"),
    ],
)
def test_gqa_refuses_what_does_not_fit(change, message):
    arguments = {"q": torch.zeros(1, 3, 4, 4), "k": torch.zeros(1, 2, 7, 4), "v": torch.zeros(1, 2, 7, 4)}
    arguments |= {"scaling": 1.0, "indices": torch.zeros(1, 3, 2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        sparse_gqa(**{**arguments, **change})
