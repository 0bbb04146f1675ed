"""Sparse grouped-query attention in Triton against the PyTorch backend in float64, over unions and single lists."""

import dataclasses
import math

import pytest
import torch

from modeling_keye import sparse_reference_keye as reference
from modeling_keye import triton_common_keye, triton_gqa_backward_keye, triton_gqa_keye, triton_union_keye
from modeling_keye.sparse_eager_keye import eager_attention
from modeling_keye.triton_gqa_keye import sparse_gqa
from tests.kernels.aot import SHARED_LIMIT

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
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[request.param])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[3, 17], ids=["lists", "unions"])
def queries(request):
    """With 8 heads in one group, 16 queries make a unit; fewer read their own lists in the forward pass."""
    return request.param


def make(batch, queries, rows, heads, groups, dim, value_dim, dtype=WIDE, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, heads, dim), (batch, groups, rows, dim), (batch, groups, rows, value_dim)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)


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


def judge(inputs, indices, grad_out=None):
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = reference.sparse_gqa(*inputs, indices, SCALE)
    if grad_out is None:
        return out.detach(), lse
    return out.detach(), lse, *torch.autograd.grad(out, inputs, grad_out.double())


def run(inputs, indices, grad_out=None):
    if grad_out is None:
        return sparse_gqa(*inputs, indices, SCALE)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = sparse_gqa(*inputs, indices, SCALE)
    return out.detach(), lse, *torch.autograd.grad(out, inputs, grad_out)


def check(found, expected, tolerance=TOLERANCE):
    for name, ours, theirs in zip(("out", "lse", "grad of q", "grad of k", "grad of v"), found, expected):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def upstream(inputs, seed=9):
    q, _, v = inputs
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*q.shape[:3], v.shape[3], generator=generator, dtype=torch.float64).to(q.device, q.dtype)


SHAPES = [  # batch, queries, rows, heads, groups, head size, head size of values, places
    (1, 1, 1, 1, 1, 16, 16, 1),
    (2, 3, 15, 6, 2, 18, 14, 4),
    (1, 35, 63, 3, 3, 32, 16, 63),
    (2, 17, 40, 8, 1, 16, 48, 64),
    (1, 33, 111, 8, 2, 32, 32, 15),
    (2, 3, 129, 20, 4, 32, 32, 111),
    (1, 9, 129, 16, 1, 64, 32, 65),
    (1, 2, 50, 40, 1, 16, 16, 33),
    (1, 2, 50, 128, 1, 16, 16, 20),
]


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_equals_the_reference(shape, device):
    batch, queries, rows, *heads, places = shape
    inputs = make(batch, queries, rows, *heads, device=device)
    indices = lists(batch, queries, rows, places, device, full=queries == 1)
    grad_out = upstream(inputs)
    expected = judge(inputs, indices, grad_out)
    check(run(inputs, indices, grad_out), expected)
    with torch.no_grad():
        out, lse = run(inputs, indices)
    check((out, lse), expected)
    assert out.dtype == inputs[0].dtype and lse.dtype == WIDE


@pytest.mark.parametrize("where", ["head", "middle", "shuffled", "wider"])
def test_where_unused_places_are_changes_nothing(where, queries, device):
    inputs = make(1, queries, 40, 8, 1, 32, 16, device=device)
    indices = lists(1, queries, 40, 20, device)
    grad_out = upstream(inputs)
    expected = judge(inputs, indices, grad_out)
    if where == "head":
        indices = indices.flip(-1)
    elif where == "middle":
        indices = torch.cat([indices[..., :2], torch.full_like(indices, -1).repeat(1, 1, 4), indices[..., 2:]], dim=-1)
    elif where == "shuffled":
        indices = indices[..., torch.randperm(20)]
    else:
        indices = torch.nn.functional.pad(indices, (0, 150), value=-1)
    check(run(inputs, indices, grad_out), expected)


@pytest.mark.parametrize("deterministically", [False, True])
def test_only_keys_are_indices(deterministically, queries, device, request):
    """-1, T and the extremes of int32 name nothing."""
    if deterministically:
        request.getfixturevalue("deterministic")
    inputs = make(2, queries, 10, 8, 1, 16, 16, device=device)
    indices = lists(2, queries, 10, 6, device, full=True)
    wild = torch.tensor([-1, 10, 11, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device).expand(2, queries, -1)
    mixed = torch.cat([wild, indices[..., :3], wild, indices[..., 3:], wild], dim=-1)
    grad_out = upstream(inputs)
    check(run(inputs, mixed, grad_out), judge(inputs, indices, grad_out))


@pytest.mark.parametrize("deterministically", [False, True])
@pytest.mark.parametrize("places", [0, 70])
def test_nothing_selected(places, deterministically, queries, device, request):
    if deterministically:
        request.getfixturevalue("deterministic")
    inputs = make(2, queries, 9, 8, 1, 32, 16, device=device)
    indices = torch.full((2, queries, places), -1, dtype=torch.int32, device=device)
    out, lse, *gradients = run(inputs, indices, upstream(inputs))
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize(("batch", "count", "rows"), [(0, 40, 9), (2, 0, 9), (1, 40, 0), (1, 2, 0)])
def test_empty_inputs(batch, count, rows, device):
    inputs = make(batch, count, rows, 4, 2, 32, 16, device=device)
    indices = torch.full((batch, count, 4), -1, dtype=torch.int32, device=device)
    out, lse, *gradients = run(inputs, indices, upstream(inputs))
    assert out.shape == (batch, count, 4, 16) and lse.shape == (batch, count, 4)
    assert bool((out == 0).all()) and all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_in_unselected_rows_are_never_read(bad, queries, device):
    inputs = make(1, queries, 60, 8, 1, 32, 16, device=device)
    indices = lists(1, queries, 29, 3, device) + 1  # row 0 stays out; unused places become 0
    indices[indices == 0] = -1
    grad_out = upstream(inputs)
    expected = judge(inputs, indices, grad_out)
    unselected = torch.ones(60, dtype=torch.bool, device=device)
    unselected[indices[indices >= 0].long()] = False
    poisoned = [inputs[0], *(x.masked_fill(unselected[None, None, :, None], bad) for x in inputs[1:])]
    check(run(poisoned, indices, grad_out), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_scores_far_below_zero(queries, device):
    """The log-sum-exp of a query is so low that rows of its neighbours would have an infinite probability."""
    inputs = make(1, queries, 40, 8, 1, 32, 16, torch.float32, device)
    q, k, v = inputs[0] / 10 + 6, inputs[1] / 10 - 6, inputs[2]
    k[:, :, ::2] *= -1
    indices = lists(1, queries, 20, 9, device, full=True) * 2 + 1
    indices[:, ::2] -= indices[:, ::2] % 2  # every other query selects the rows of high score
    inputs = q, k, v
    grad_out = upstream(inputs)
    found, exact = run(inputs, indices, grad_out), judge(inputs, indices, grad_out)
    assert exact[1][:, 1::2].max() < -300 and exact[1][:, ::2].min() > 300
    check(found, exact, 1e-2)


@pytest.mark.parametrize("processors", [4, 9, 200])
@pytest.mark.parametrize("count", [1, 17])
def test_parts_of_a_list_are_combined(count, processors, device, monkeypatch):
    """Fewer programs than processors; one list is so short that parts have no key, another has none at all."""
    monkeypatch.setattr(triton_common_keye, "MULTIPROCESSORS_OFF_DEVICE", processors)
    batch = 3 if count == 1 else 1
    inputs = make(batch, count, 600, 8, 1, 32, 16, device=device)
    indices = lists(batch, count, 600, 515 if count == 1 else 40, device, full=True)
    indices.view(-1, indices.shape[-1])[1, 5:] = -1
    indices.view(-1, indices.shape[-1])[2] = -1
    check(run(inputs, indices), judge(inputs, indices))


def test_strided_and_broadcast_inputs(queries, device):
    inputs = make(2, queries, 21, 16, 2, 32, 16, device=device)
    indices = lists(2, queries, 21, 5, device)
    expected = judge(inputs, indices)
    *strided, wide = (torch.stack([x, x + 1], dim=-1)[..., 0] for x in (*inputs, indices))
    assert not any(x.is_contiguous() for x in strided)
    check(run(strided, wide), expected)
    check(run([x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs], indices), expected)

    shared = [x[:1].expand(2, *x.shape[1:]).requires_grad_() for x in inputs]
    out, _ = sparse_gqa(*shared, indices, SCALE)
    found = torch.autograd.grad(out.sum(), shared)  # the gradient of out has strides 0
    ones = torch.ones(1, dtype=WIDE, device=device).expand(out.shape)
    check((out, *found[:0]), judge(shared, indices))
    check(found, judge(shared, indices, ones)[2:])


def test_unions_and_lists_agree(device, monkeypatch):
    inputs = make(1, 40, 90, 8, 2, 32, 16, device=device)
    indices = lists(1, 40, 90, 12, device)
    joined = run(inputs, indices)
    choose = triton_gqa_keye.union_tiles
    monkeypatch.setattr(triton_gqa_keye, "union_tiles", lambda *sizes: dataclasses.replace(choose(*sizes), queries=1))
    check(run(inputs, indices), [x.double() for x in joined])


@pytest.mark.skipif(not INTERPRETED, reason="float64 runs in the interpreter only")
@pytest.mark.parametrize("deterministically", [False, True])
def test_gradcheck(deterministically, request):
    if deterministically:
        request.getfixturevalue("deterministic")
    inputs = [x.requires_grad_() for x in make(1, 3, 8, 2, 1, 16, 16)]
    indices = lists(1, 3, 8, 4)
    assert torch.autograd.gradcheck(lambda *x: sparse_gqa(*x, indices, SCALE)[0], inputs, fast_mode=True)


# Unions.


@pytest.mark.parametrize("queries", [1, 4, 32])
@pytest.mark.parametrize("units_per_chunk", [1, 3, 1000])
def test_unions_reproduce_the_lists(queries, units_per_chunk, device, monkeypatch):
    batch, num_queries, rows, places = 2, 37, 300, 12
    indices = lists(batch, num_queries, rows, places, device)
    indices[1, 5] = -1
    width = max(128, -(-min(rows, queries * places) // 128) * 128)
    monkeypatch.setattr(triton_union_keye, "UNION_BYTES", units_per_chunk * (4 * 4096 + 8 * width))
    units = -(-num_queries // queries)
    seen = 0
    for union in triton_union_keye.unions(indices, rows, queries, 1):
        assert union.first == seen and union.count <= units_per_chunk
        seen += union.count
        for i in range(union.count):
            b, s = (union.first + i) // units, (union.first + i) % units * queries
            size = int(union.sizes[i])
            positions, words = union.positions[i, :size], union.members[i, :size]
            assert torch.equal(positions, indices[b, s : s + queries][indices[b, s : s + queries] >= 0].unique())
            for member in range(queries):
                chosen = positions[(words >> member) & 1 == 1]
                wanted = indices[b, s + member] if s + member < num_queries else indices.new_empty(0)
                assert torch.equal(chosen, wanted[wanted >= 0])
    assert seen == batch * units


def test_unions_over_several_blocks_of_keys(device):
    """The ends of the collecting loop: rows around its block of 4096, and the last one."""
    indices = torch.tensor([[0, 4095, 4096, 8191], [4095, 8192, 8999, -1]], dtype=torch.int32, device=device)[None]
    (union,) = triton_union_keye.unions(indices, 9000, 2, 1)
    assert union.positions[0, :6].tolist() == [0, 4095, 4096, 8191, 8192, 8999]
    assert union.members[0, :6].tolist() == [1, 3, 1, 1, 2, 2] and int(union.sizes[0]) == 6


@pytest.mark.parametrize("deterministically", [False, True])
def test_chunks_change_nothing(deterministically, device, request, monkeypatch):
    if deterministically:
        request.getfixturevalue("deterministic")
    inputs = make(2, 20, 30, 16, 1, 32, 16, device=device)
    indices = lists(2, 20, 30, 5, device)
    grad_out = upstream(inputs)
    monkeypatch.setattr(triton_union_keye, "UNION_BYTES", 2 * (4 * 4096 + 8 * 128))
    monkeypatch.setattr(triton_gqa_backward_keye, "WORKSPACE_BYTES", 1)
    check(run(inputs, indices, grad_out), judge(inputs, indices, grad_out))


@pytest.mark.usefixtures("deterministic")
def test_deterministic_gradients_are_bit_equal(device, monkeypatch):
    """Also where programs finish in another order, which the interpreter cannot show: sums without atomics."""
    inputs = make(2, 20, 30, 16, 2, 32, 16, torch.float32, device=device)
    indices = lists(2, 20, 30, 12, device)
    grad_out = upstream(inputs)
    first = run(inputs, indices, grad_out)
    if INTERPRETED:
        monkeypatch.setattr(triton_gqa_backward_keye.tl, "atomic_add", None)
    for ours, again in zip(run(inputs, indices, grad_out), first):
        assert torch.equal(ours, again)
    check(first, judge(inputs, indices, grad_out), 1e-4)


@pytest.mark.parametrize(("room", "groups", "chunk"), [(9, 2, 6), (7, 2, 6), (5, 2, 3), (5, 4, 3), (2, 2, 2)])
def test_chunks_of_units_are_whole_rounds(room, groups, chunk, device, monkeypatch):
    """Of units on six multiprocessors, else of the programs that the caller makes of them."""
    monkeypatch.setattr(triton_union_keye, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(triton_union_keye, "UNION_BYTES", room * (4 * 4096 + 8 * 128))
    indices = lists(1, 40, 100, 5, device)
    assert next(triton_union_keye.unions(indices, 100, 2, groups)).count == chunk


def test_a_capture_asks_the_device_for_nothing(monkeypatch):
    class OnDevice:
        is_cuda = True

    union = triton_union_keye.Union(0, 3, torch.empty(5, 256), torch.empty(5, 256), OnDevice())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_gqa_backward_keye._most_places(union) == 256


@pytest.mark.usefixtures("deterministic")
def test_rows_for_the_largest_unions_change_no_bit(device, monkeypatch):
    inputs = make(2, 20, 30, 16, 2, 32, 16, torch.float32, device=device)
    indices = lists(2, 20, 30, 12, device)
    grad_out = upstream(inputs)
    asked = run(inputs, indices, grad_out)
    monkeypatch.setattr(triton_gqa_backward_keye, "_most_places", lambda union: union.positions.shape[1])
    assert all(torch.equal(ours, again) for ours, again in zip(run(inputs, indices, grad_out), asked))


# Precision: the error against float64 may not exceed that of PyTorch in the same dtype, plus one rounding. Two codes
# stand for PyTorch: masked attention, and in float32 the tiled backend, which like the kernels takes the mean of the
# gradient of probabilities from the output and loses where it cancels.


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_that_of_plain_code(dtype, queries, device):
    inputs = make(2, queries, 200, 16, 2, 64, 64, dtype, device)
    indices = lists(2, queries, 200, 60, device)
    grad_out = upstream(inputs)
    found, exact = run(inputs, indices, grad_out), judge(inputs, indices, grad_out)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert all(gradient.dtype == dtype for gradient in found[2:])
    kept = torch.zeros(2, queries, 201, dtype=torch.bool, device=device)
    kept.scatter_(-1, indices.long().masked_fill(indices < 0, 200), True)
    inputs = [x.detach().requires_grad_() for x in inputs]
    plain = eager_attention(*inputs, kept[..., :-1], SCALE)[0]
    plain = [plain.detach(), None, *torch.autograd.grad(plain, inputs, grad_out)]
    tiled, _ = reference.sparse_gqa(*inputs, indices, SCALE)
    tiled = [tiled.detach(), None, *torch.autograd.grad(tiled, inputs, grad_out)]
    torch.testing.assert_close(found[1].double(), exact[1], atol=2e-5, rtol=0)
    # In float32 both errors are those of the products: the interpreter leaves small tiles to numpy, which rounds more
    # often than the library behind the plain code.
    slack = 2 if INTERPRETED and dtype == torch.float32 else 1
    for name, number in (("out", 0), ("grad of q", 2), ("grad of k", 3), ("grad of v", 4)):
        most = max((code[number].double() - exact[number]).norm() for code in (plain, tiled))
        allowed = slack * most + torch.finfo(dtype).eps * exact[number].norm()
        error = (found[number].double() - exact[number]).norm()
        print(f"{dtype} {name}: error {error:.2e}, allowed {allowed:.2e}")
        assert error <= allowed, name


def test_refuses_head_sizes_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[89])
    inputs = make(1, 1, 4, 2, 1, 2048, 2048, torch.float16)
    with pytest.raises(ValueError, match='takes [0-9]+ KiB .* may use 99 KiB; choose the backend "torch"'):
        run(inputs, lists(1, 1, 4, 2))


# What only a device can show.


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
def test_more_programs_than_sixteen_bits_count(groups, device):
    queries = 70_000
    inputs = make(1, queries, queries, 2, groups, 16, 16, torch.float32, device)
    indices = torch.arange(queries, dtype=torch.int32, device=device)[None, :, None]
    out, _ = run(inputs, indices)  # each query reads its own row only
    torch.testing.assert_close(out, inputs[2].transpose(1, 2).repeat_interleave(2 // groups, dim=2))
