"""Sparse latent attention in Triton against the PyTorch backend in float64: outputs, log-sum-exps and gradients."""

import math

import pytest
import torch

from modeling_keye import sparse_reference_keye as reference
from modeling_keye import triton_common_keye, triton_mla_backward_keye
from modeling_keye.sparse_eager_keye import eager_attention
from modeling_keye.triton_mla_backward_keye import row_tiles, score_tiles
from modeling_keye.triton_mla_keye import MAX_HEADS, forward_tiles, sparse_mla
from tests.kernels.aot import CHOOSING, SHARED_LIMIT

# Exactly representable in float32, in which kernels receive it.
SCALE = 0.3125
INTERPRETED = triton_common_keye.INTERPRETED
# Logic is tested in float64 where the interpreter can; a device multiplies float32.
WIDE = torch.float64 if INTERPRETED else torch.float32
TOLERANCE = 1e-11 if INTERPRETED else 1e-4


@pytest.fixture(autouse=True)
def whole_lists(monkeypatch):
    """As if the device were full, so that no list is split unless a test asks for it."""
    monkeypatch.setattr(triton_common_keye, "MULTIPROCESSORS_OFF_DEVICE", 1)


@pytest.fixture(params=[90, 89], ids=["large", "small"])
def shared_memory(request, monkeypatch):
    """Tiles of an H100, where few heads are columns of the products, and of consumer cards."""
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[request.param])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(batch, queries, rows, heads, latent, rotary, dtype=WIDE, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads, latent + rotary, generator=generator, dtype=torch.float64)
    kv = torch.randn(batch, rows, latent + rotary, generator=generator, dtype=torch.float64)
    return q.to(device, dtype), kv.to(device, dtype)


def lists(batch, queries, rows, places, device="cpu", seed=0, full=False):
    """int32 [B, S, K]: random rows, ascending, -1 at the end; the first query of each sequence has none unless full."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((batch, queries, places), -1, dtype=torch.int32)
    for b in range(batch):
        for s in range(queries):
            most = min(places, rows)
            count = most if full else int(torch.randint(1, most + 1, (1,), generator=generator)) if s else 0
            indices[b, s, :count] = torch.randperm(rows, generator=generator)[:count].sort().values
    return indices.to(device)


def judge(q, kv, indices, latent, grad_out=None):
    """out, lse and, given the gradient of out, those of q and kv, by the PyTorch backend in float64."""
    q, kv = (x.detach().double().requires_grad_() for x in (q, kv))
    out, lse = reference.sparse_mla(q, kv, indices, SCALE, latent)
    if grad_out is None:
        return out.detach(), lse
    return out.detach(), lse, *torch.autograd.grad(out, (q, kv), grad_out.double())


def run(q, kv, indices, latent, grad_out=None):
    if grad_out is None:
        return sparse_mla(q, kv, indices, SCALE, latent)
    q, kv = (x.detach().requires_grad_() for x in (q, kv))
    out, lse = sparse_mla(q, kv, indices, SCALE, latent)
    return out.detach(), lse, *torch.autograd.grad(out, (q, kv), grad_out)


def check(found, expected, tolerance=TOLERANCE):
    for name, ours, theirs in zip(("out", "lse", "grad of q", "grad of kv"), found, expected):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def upstream(q, latent, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*q.shape[:3], latent, generator=generator, dtype=torch.float64).to(q.device, q.dtype)


SHAPES = [  # batch, queries, rows, heads, latent, rotary, places
    (1, 1, 1, 1, 16, 16, 1),
    (2, 3, 15, 5, 32, 16, 4),
    (1, 2, 63, 16, 48, 16, 63),
    (1, 2, 40, 20, 80, 32, 64),
    (1, 2, 111, 40, 32, 0, 65),
    (1, 2, 300, 64, 16, 16, 129),
    (1, 2, 30, 70, 32, 16, 111),
    (1, 1, 50, 128, 64, 32, 33),
]


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_equals_the_reference(shape, device):
    batch, queries, rows, heads, latent, rotary, places = shape
    q, kv = make(batch, queries, rows, heads, latent, rotary, device=device)
    indices = lists(batch, queries, rows, places, device, full=queries == 1)
    grad_out = upstream(q, latent)
    check(run(q, kv, indices, latent, grad_out), judge(q, kv, indices, latent, grad_out))
    with torch.no_grad():
        out, lse = run(q, kv, indices, latent)
    check((out, lse), judge(q, kv, indices, latent))
    assert out.dtype == q.dtype and lse.dtype == WIDE


@pytest.mark.parametrize("rows", [40, 1])
@pytest.mark.parametrize("where", ["head", "middle", "shuffled", "wider"])
def test_where_unused_places_are_changes_nothing(where, rows, device):
    q, kv = make(1, 3, rows, 3, 32, 16, device=device)
    indices = lists(1, 3, rows, 20, device)
    grad_out = upstream(q, 32)
    expected = judge(q, kv, indices, 32, grad_out)
    if where == "head":
        indices = indices.flip(-1)
    elif where == "middle":
        indices = torch.cat([indices[..., :2], torch.full_like(indices, -1).repeat(1, 1, 4), indices[..., 2:]], dim=-1)
    elif where == "shuffled":
        indices = indices[..., torch.randperm(20)]
    else:
        indices = torch.nn.functional.pad(indices, (0, 150), value=-1)
    check(run(q, kv, indices, 32, grad_out), expected)


@pytest.mark.parametrize("deterministically", [False, True])
def test_only_rows_of_the_cache_are_indices(deterministically, device, request):
    """-1, T and the extremes of int32 name nothing."""
    if deterministically:
        request.getfixturevalue("deterministic")
    q, kv = make(2, 2, 10, 3, 16, 16, device=device)
    indices = lists(2, 2, 10, 6, device, full=True)
    wild = torch.tensor([-1, 10, 11, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device).expand(2, 2, -1)
    mixed = torch.cat([wild, indices[..., :3], wild, indices[..., 3:], wild], dim=-1)
    grad_out = upstream(q, 16)
    check(run(q, kv, mixed, 16, grad_out), judge(q, kv, indices, 16, grad_out))


@pytest.mark.parametrize("deterministically", [False, True])
def test_nothing_selected(deterministically, device, request):
    if deterministically:
        request.getfixturevalue("deterministic")
    q, kv = make(2, 3, 9, 3, 32, 16, device=device)
    for indices in (
        torch.full((2, 3, 70), -1, dtype=torch.int32, device=device),
        torch.empty(2, 3, 0, dtype=torch.int32, device=device),
    ):
        out, lse, grad_q, grad_kv = run(q, kv, indices, 32, upstream(q, 32))
        assert bool((out == 0).all()) and bool((lse == -math.inf).all())
        assert bool((grad_q == 0).all()) and bool((grad_kv == 0).all())


@pytest.mark.parametrize(("batch", "queries", "rows"), [(0, 2, 9), (2, 0, 9), (2, 2, 0)])
def test_empty_inputs(batch, queries, rows, device):
    q, kv = make(batch, queries, rows, 3, 32, 16, device=device)
    indices = torch.full((batch, queries, 4), -1, dtype=torch.int32, device=device)
    out, lse, grad_q, grad_kv = run(q, kv, indices, 32, upstream(q, 32))
    assert out.shape == (batch, queries, 3, 32) and lse.shape == (batch, queries, 3)
    assert bool((out == 0).all()) and bool((grad_q == 0).all()) and bool((grad_kv == 0).all())


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_in_unselected_rows_are_never_read(bad, device):
    q, kv = make(1, 3, 60, 3, 32, 16, device=device)
    indices = lists(1, 3, 59, 20, device) + 1  # row 0 stays out; unused places become 0
    indices[indices == 0] = -1
    grad_out = upstream(q, 32)
    expected = judge(q, kv, indices, 32, grad_out)
    unselected = torch.ones(60, dtype=torch.bool, device=device)
    unselected[indices[indices >= 0].long()] = False
    poisoned = kv.masked_fill(unselected[None, :, None], bad)
    check(run(q, poisoned, indices, 32, grad_out), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_scores_far_below_zero(device):
    """The log-sum-exp is so low that the score 0 of an unused place would have an infinite probability."""
    q, kv = make(1, 2, 40, 3, 32, 16, torch.float32, device)
    q, kv = q / 10 + 6, kv / 10 - 6
    indices = lists(1, 2, 40, 20, device)
    grad_out = upstream(q, 32)
    found, exact = run(q, kv, indices, 32, grad_out), judge(q, kv, indices, 32, grad_out)
    assert exact[1][:, 1].max() < -400
    check(found, exact, 1e-2)


@pytest.mark.parametrize("processors", [4, 9, 200])
def test_parts_of_a_list_are_combined(processors, device, monkeypatch):
    """Fewer queries than processors; one query's list is so short that parts have no key, another has none at all."""
    monkeypatch.setattr(triton_common_keye, "MULTIPROCESSORS_OFF_DEVICE", processors)
    q, kv = make(3, 1, 600, 20, 32, 16, device=device)
    indices = lists(3, 1, 600, 515, device, full=True)
    indices[1, :, 40:] = -1
    indices[2] = -1
    grad_out = upstream(q, 32)
    check(run(q, kv, indices, 32, grad_out), judge(q, kv, indices, 32, grad_out))


def test_strided_and_broadcast_inputs(device):
    q, kv = make(2, 2, 21, 3, 32, 16, device=device)
    indices = lists(2, 2, 21, 5, device)
    expected = judge(q, kv, indices, 32)
    strided = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in (q, kv, indices)]
    assert not any(x.is_contiguous() for x in strided)
    check(run(*strided, 32), expected)
    transposed = (q.transpose(1, 2).contiguous().transpose(1, 2), kv.mT.contiguous().mT)
    check(run(*transposed, indices, 32), expected)

    shared = [x[:1].expand(2, *x.shape[1:]).requires_grad_() for x in (q, kv)]
    out, _ = sparse_mla(*shared, indices, SCALE, 32)
    found = torch.autograd.grad(out.sum(), shared)  # the gradient of out has strides 0
    check((out, *found[:0]), judge(*shared, indices, 32))
    ones = torch.ones(1, dtype=WIDE, device=device).expand(out.shape)
    check(found, judge(*shared, indices, 32, ones)[2:])


@pytest.mark.parametrize("wanted", ["q", "kv"])
def test_gradient_of_one_input_only(wanted, device):
    q, kv = make(1, 2, 21, 3, 32, 16, device=device)
    indices = lists(1, 2, 21, 5, device)
    grad_out = upstream(q, 32)
    expected = judge(q, kv, indices, 32, grad_out)
    chosen = (q if wanted == "q" else kv).requires_grad_()
    out, _ = sparse_mla(q, kv, indices, SCALE, 32)
    check(torch.autograd.grad(out, chosen, grad_out), expected[2:3] if wanted == "q" else expected[3:])


def test_repeated_rows_count_each(device):
    q, kv = make(1, 2, 7, 3, 32, 16, device=device)
    indices = torch.tensor([[3, 3, 5, -1, 3], [6, 0, 0, 1, -1]], dtype=torch.int32, device=device)[None]
    grad_out = upstream(q, 32)
    check(run(q, kv, indices, 32, grad_out), judge(q, kv, indices, 32, grad_out))


@pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter only")
@pytest.mark.parametrize("deterministically", [False, True])
def test_gradcheck(deterministically, request):
    if deterministically:
        request.getfixturevalue("deterministic")
    q, kv = make(1, 3, 8, 2, 16, 16)
    indices = lists(1, 3, 8, 4)
    inputs = [q.requires_grad_(), kv.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: sparse_mla(*x, indices, SCALE, 16)[0], inputs, fast_mode=True)


# The workspace of the backward pass.


@pytest.mark.parametrize("deterministically", [False, True])
@pytest.mark.parametrize("queries_per_chunk", [1, 3])
def test_chunks_of_queries_change_nothing(deterministically, queries_per_chunk, device, request, monkeypatch):
    if deterministically:
        request.getfixturevalue("deterministic")
    q, kv = make(2, 4, 30, 3, 32, 16, device=device)
    indices = lists(2, 4, 30, 12, device)
    grad_out = upstream(q, 32)
    per_query = 2 * 3 * 64 * q.element_size() + (12 * 48 * q.element_size() if deterministically else 0)
    monkeypatch.setattr(triton_mla_backward_keye, "WORKSPACE_BYTES", queries_per_chunk * per_query)
    check(run(q, kv, indices, 32, grad_out), judge(q, kv, indices, 32, grad_out))


@pytest.mark.usefixtures("deterministic")
def test_deterministic_gradients_are_bit_equal(device, monkeypatch):
    """Also where the programs of a launch finish in another order, which the interpreter cannot show: no atomics."""
    q, kv = make(2, 5, 20, 3, 32, 16, torch.float32, device=device)
    indices = lists(2, 5, 20, 12, device, full=True)
    grad_out = upstream(q, 32)
    monkeypatch.setattr(triton_mla_backward_keye, "WORKSPACE_BYTES", 2**14)
    first = run(q, kv, indices, 32, grad_out)
    if INTERPRETED:
        monkeypatch.setattr(triton_mla_backward_keye.tl, "atomic_add", None)
    for ours, again in zip(run(q, kv, indices, 32, grad_out), first):
        assert torch.equal(ours, again)
    check(first, judge(q, kv, indices, 32, grad_out), 1e-4)


# Precision: the error against float64 may not exceed that of PyTorch in the same dtype, plus one rounding. Two codes
# stand for PyTorch: masked attention, and in float32 the tiled backend, which like the kernels takes the mean of the
# gradient of probabilities from the output and loses where it cancels.


def plain(q, kv, indices, latent):
    kept = torch.zeros(*indices.shape[:2], kv.shape[1] + 1, dtype=torch.bool, device=q.device)
    kept.scatter_(-1, indices.long().masked_fill(indices < 0, kv.shape[1]), True)
    return eager_attention(q, kv[:, None], kv[:, None, :, :latent], kept[..., :-1], SCALE)[0]


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_that_of_plain_code(dtype, device):
    latent = 128
    q, kv = make(1, 6, 300, 20, latent, 32, dtype, device)
    indices = lists(1, 6, 300, 200, device)
    grad_out = upstream(q, latent)
    found, exact = run(q, kv, indices, latent, grad_out), judge(q, kv, indices, latent, grad_out)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert found[2].dtype == found[3].dtype == dtype
    inputs = [x.detach().requires_grad_() for x in (q, kv)]
    theirs = plain(*inputs, indices, latent)
    theirs = [theirs.detach(), None, *torch.autograd.grad(theirs, inputs, grad_out)]
    tiled, _ = reference.sparse_mla(*inputs, indices, SCALE, latent)
    tiled = [tiled.detach(), None, *torch.autograd.grad(tiled, inputs, grad_out)]
    torch.testing.assert_close(found[1].double(), exact[1], atol=2e-5, rtol=0)
    # In float32 both errors are those of the products: the interpreter leaves small tiles to numpy, which rounds more
    # often than the library behind the plain code.
    slack = 2 if INTERPRETED and dtype == torch.float32 else 1
    for name, number in (("out", 0), ("grad of q", 2), ("grad of kv", 3)):
        most = max((code[number].double() - exact[number]).norm() for code in (theirs, tiled))
        allowed = slack * most + torch.finfo(dtype).eps * exact[number].norm()
        error = (found[number].double() - exact[number]).norm()
        print(f"{dtype} {name}: error {error:.2e}, allowed {allowed:.2e}")
        assert error <= allowed, name


def test_the_kernels_of_a_gradient_may_differ_in_their_tiles(device):
    """At the flagship's sizes an H100 writes probabilities by 32 places and reads them by 64: no list is that long."""
    shared = SHARED_LIMIT[90]
    assert score_tiles(64, 512, 576, 2, shared).places < row_tiles(64, 576, 2, shared).places
    q, kv = make(1, 2, 200, 64, 512, 64, torch.float16, device)
    indices = torch.full((1, 2, 96), -1, dtype=torch.int32, device=device)
    for query, used in enumerate((20, 70)):
        indices[0, query, :used] = 2 * torch.arange(used)
    grad_out = upstream(q, 512)
    _, _, grad_q, grad_kv = run(q, kv, indices, 512, grad_out)
    _, _, exact_q, exact_kv = judge(q, kv, indices, 512, grad_out)
    for found, exact in ((grad_q, exact_q), (grad_kv, exact_kv)):
        assert (found.double() - exact).norm() < 2e-3 * exact.norm()


def test_wider_of_two_dtypes(device):
    q, kv = make(1, 3, 40, 3, 32, 16, torch.float16, device)
    kv = kv.float() + 1e-4
    indices = lists(1, 3, 40, 12, device)
    grad_out = upstream(q, 32)
    out, lse, grad_q, grad_kv = run(q, kv, indices, 32, grad_out)
    assert (out.dtype, lse.dtype, grad_q.dtype, grad_kv.dtype) == (q.dtype, kv.dtype, q.dtype, kv.dtype)
    check((out, lse, grad_q, grad_kv), judge(q, kv, indices, 32, grad_out), 4e-3)
    check((lse,), judge(q, kv, indices, 32)[1:], 1e-5)


def test_all_rows_selected_is_dense(device):
    rows = 70
    q, kv = make(1, rows, rows, 2, 32, 16, device=device)
    kept = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    indices = torch.where(kept, torch.arange(rows, device=device), -1).to(torch.int32)[None]
    out, _ = run(q, kv, indices, 32)
    dense = reference.dense_latent_attention(q, kv, scaling=SCALE, value_dim=32, query_offset=0, key_mask=None)
    torch.testing.assert_close(out, dense, atol=TOLERANCE, rtol=0)


def test_refuses_too_many_heads():
    q, kv = make(1, 1, 4, MAX_HEADS + 1, 16, 16)
    with pytest.raises(ValueError, match=f'up to {MAX_HEADS} heads, not {MAX_HEADS + 1}; choose the backend "torch"'):
        run(q, kv, lists(1, 1, 4, 2), 16)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("arch", CHOOSING)
@pytest.mark.parametrize("latent", [16, 128, 512, 1024])
@pytest.mark.parametrize("heads", [1, 17, 48, 128])
def test_tiles_fit_shared_memory(heads, latent, arch, element_size):
    shared, width = SHARED_LIMIT[arch], latent + 64
    for choose, columns in ((forward_tiles, width), (score_tiles, width + latent)):
        try:
            tiles = choose(heads, latent, width, element_size, shared)
        except ValueError:
            assert latent == 1024 and shared < 200 * 1024  # the only ones that do not fit
        else:
            assert (tiles.heads * columns + tiles.places * width) * element_size <= shared


def test_refuses_rows_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[89])
    q, kv = make(1, 1, 4, 16, 2048, 64, torch.float16)
    with pytest.raises(ValueError, match='takes [0-9]+ KiB .* may use 99 KiB; choose the backend "torch"'):
        run(q, kv, lists(1, 1, 4, 2), 2048)


# What only a device can show.


@pytest.mark.gpu
def test_more_programs_than_sixteen_bits_count(device):
    queries = 70_000
    q, kv = make(1, queries, queries, 1, 16, 0, torch.float32, device)
    indices = torch.arange(queries, dtype=torch.int32, device=device)[None, :, None]
    out, lse = run(q, kv, indices, 16)  # each query reads its own row only
    torch.testing.assert_close(out[:, :, 0], kv)
    torch.testing.assert_close(lse[..., 0], SCALE * (q[:, :, 0] * kv).sum(dim=-1), atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_more_elements_than_thirty_one_bits_count(device):
    rows = 2**31 // 576 + 1000
    kv = torch.zeros(1, rows, 576, dtype=torch.float16, device=device)
    kv[:, -64:] = torch.randn(64, 576, device=device).half()
    q = torch.randn(1, 2, 16, 576, device=device).half()
    indices = torch.arange(rows - 64, rows, dtype=torch.int32, device=device).expand(1, 2, -1)
    out, lse = run(q, kv, indices, 512)
    expected = judge(q, kv[:, -64:], indices - (rows - 64), 512)
    check((out, lse), expected, 1e-2)
