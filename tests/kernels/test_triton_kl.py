"""The indexer's KL loss in Triton against the PyTorch code in float64: values and gradients, dense and sparse."""

import math
from functools import partial

import pytest
import torch

from modeling_keye import (
    indexer_objective_keye,
    triton_common_keye,
    triton_kl_dense_keye,
    triton_kl_sparse_keye,
)
from modeling_keye.indexer_objective_keye import IndexerLoss
from modeling_keye.triton_kl_dense_keye import dense_kl
from modeling_keye.triton_kl_keye import head_tiles, split_width, walk_tiles, width_of
from modeling_keye.triton_kl_sparse_keye import sparse_kl
from modeling_keye.triton_kl_target_keye import union_tiles, unit_of
from tests.kernels.aot import CHOOSING, SHARED_LIMIT

# Exactly representable in float32, in which kernels receive it.
SCALE = 0.3125
INTERPRETED = triton_common_keye.INTERPRETED
# Logic is tested in float64 where the interpreter can; a device multiplies float32.
WIDE = torch.float64 if INTERPRETED else torch.float32
TOLERANCE = 1e-12 if INTERPRETED else 1e-5


@pytest.fixture(params=[90, 89], ids=["large", "small"])
def shared_memory(request, monkeypatch):
    """Tiles of an H100 and of consumer cards."""
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[request.param])


class TritonLoss(IndexerLoss):
    """The same class with the kernels in it."""

    def add_dense(self, begin, queries, keys, scaling, lse=None):
        place = slice(begin, begin + queries.shape[1])
        self.value += dense_kl(
            *(self.q[:, place], self.k, self.gates[:, place], self.weights[:, place]),
            *(queries, keys, scaling),
            first_slot=self.query_offset + begin,
            key_mask=self.key_mask,
            lse=lse,
            grads=self.own_grads(place),
        )

    def add_sparse(self, begin, queries, keys, lse, selected, scaling):
        place = slice(begin, begin + queries.shape[1])
        self.value += sparse_kl(
            *(self.q[:, place], self.k, self.gates[:, place], self.weights[:, place]),
            *(queries, keys, lse, selected, scaling),
            grads=self.own_grads(place),
        )

    def own_grads(self, place):
        return self.grads and (self.grads[0][:, place], self.grads[1], self.grads[2][:, place])


def make(batch, queries, keys, heads, groups, dim, index_heads, index_dim, dtype=WIDE, device="cpu", seed=0):
    """Indexer queries, keys, gates; attention queries and keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    index = (draw(batch, queries, index_heads, index_dim), draw(batch, keys, index_dim))
    gates = draw(batch, queries, index_heads)
    gates = gates if dtype == torch.float64 else gates.float()  # as the model makes them
    return (*index, gates), (draw(batch, queries, heads, dim), draw(batch, groups, keys, dim))


def lists(batch, queries, keys, places, key_mask=None, seed=0):
    """int32 [B, S, K]: the last slots are the queries'; random visible slots, ascending, -1 at the end."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.full((batch, queries, places), -1, dtype=torch.int32)
    for b in range(batch):
        for s in range(queries):
            visible = torch.arange(keys - queries + s + 1)
            visible = visible if key_mask is None else visible[key_mask[b, : len(visible)]]
            chosen = visible[torch.randperm(len(visible), generator=generator)[:places]].sort().values
            selected[b, s, : len(chosen)] = chosen
    return selected


def list_lse(queries, keys, selected):
    """Log-sum-exp [B, S, H] of the attention over the lists, in float64."""
    keys = keys.double().repeat_interleave(queries.shape[2] // keys.shape[1], dim=1)
    logits = torch.einsum("bshd,bhtd->bsht", queries.double(), keys) * SCALE
    kept = torch.zeros(*selected.shape[:2], keys.shape[2] + 1, dtype=torch.bool, device=keys.device)
    kept.scatter_(-1, selected.long().masked_fill(selected < 0, keys.shape[2]), True)
    return logits.masked_fill(~kept[:, :, None, :-1], -math.inf).logsumexp(dim=-1)


def loss_of(kind, index, attention, key_mask=None, selected=None, scale=1.0):
    """Value and gradients; over the lists when there are some, else over all that is visible."""
    index = [x.detach().requires_grad_() for x in index]
    loss = kind(*index, query_offset=index[1].shape[1] - index[0].shape[1], key_mask=key_mask)
    loss.weights = loss.weights * scale
    if selected is None:
        loss.add_dense(0, *attention, SCALE)
    else:
        lse = list_lse(*attention, selected)
        loss.add_sparse(0, *attention, lse.to(loss.dtype), selected, SCALE)
    result = loss.result()
    return result.detach(), *torch.autograd.grad(result, index)


def judge(index, attention, key_mask=None, selected=None, dtype=torch.float64, scale=1.0):
    """By the PyTorch code in `dtype`, on the CPU, where no kernel is chosen."""
    index, attention = (tuple(x.detach().cpu().to(dtype) for x in tensors) for tensors in (index, attention))
    if dtype in (torch.float16, torch.bfloat16):
        index = (*index[:2], index[2].float())
    key_mask, selected = (None if x is None else x.cpu() for x in (key_mask, selected))
    return loss_of(IndexerLoss, index, attention, key_mask, selected, scale)


def check(found, expected, tolerance=TOLERANCE):
    for name, ours, theirs in zip(("value", "grad of q", "grad of k", "grad of gates"), found, expected, strict=True):
        torch.testing.assert_close(
            ours.double().cpu(), theirs, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


DENSE = [  # batch, queries, keys, heads, groups, head size, heads and head size of the indexer
    (1, 1, 1, 1, 1, 16, 1, 16),
    (2, 15, 15, 6, 2, 10, 3, 5),
    (1, 33, 63, 4, 4, 48, 5, 32),
    (1, 3, 129, 3, 1, 80, 2, 16),
    (1, 4, 31, 16, 4, 32, 17, 24),
    (1, 2, 5, 64, 1, 16, 1, 16),
]
SPARSE = [  # the same and the places of a list
    (1, 1, 1, 1, 1, 16, 1, 16, 1),
    (2, 3, 15, 6, 2, 10, 3, 5, 4),
    (1, 2, 63, 4, 4, 48, 5, 32, 63),
    (1, 2, 40, 20, 1, 80, 20, 16, 65),
    (1, 1, 50, 128, 1, 64, 64, 24, 33),
]


def names(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", DENSE, ids=names)
def test_dense_equals_the_judge(shape, device):
    index, attention = make(*shape, device=device)
    check(loss_of(TritonLoss, index, attention), judge(index, attention))


@pytest.mark.parametrize("shape", SPARSE, ids=names)
def test_sparse_equals_the_judge(shape, device):
    index, attention = make(*shape[:-1], device=device)
    selected = lists(*shape[:3], shape[-1]).to(device)
    check(loss_of(TritonLoss, index, attention, selected=selected), judge(index, attention, selected=selected))


def test_value_without_gradients(device):
    index, attention = make(1, 5, 9, 2, 1, 16, 2, 16, device=device)
    selected = lists(1, 5, 9, 4).to(device)
    for chosen in (None, selected):
        loss = TritonLoss(*index, query_offset=4)
        if chosen is None:
            loss.add_dense(0, *attention, SCALE)
        else:
            loss.add_sparse(0, *attention, list_lse(*attention, chosen).to(WIDE), chosen, SCALE)
        assert loss.grads is None
        expected = judge(index, attention, selected=chosen)[0]
        torch.testing.assert_close(loss.result().double().cpu(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "all of one"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_padding_counts_for_nothing(kind, side, device):
    """Neither as a key nor as a query, nor in the mean; what stands there is not read into a result."""
    tokens = 12
    key_mask = torch.ones(2, tokens, dtype=torch.bool)
    key_mask[0, slice(None) if side == "all of one" else slice(0, 5) if side == "left" else slice(-5, None)] = False
    index, attention = make(2, tokens, tokens, 2, 1, 16, 3, 16, device=device)
    selected = lists(2, tokens, tokens, 5, key_mask).to(device) if kind == "sparse" else None
    key_mask = key_mask.to(device)
    expected = judge(index, attention, key_mask, selected)
    rows = (~key_mask)[:, :, None]
    poisoned = (index[0], index[1].masked_fill(rows, math.nan), index[2])
    keys = attention[1].masked_fill(rows[:, None], math.nan)
    found = loss_of(TritonLoss, poisoned, (attention[0], keys), key_mask, selected)
    check(found, expected)
    for gradient in found[1:]:
        assert not gradient[~key_mask].any()


def test_a_batch_of_padding_alone(device):
    index, attention = make(2, 5, 5, 2, 1, 16, 3, 16, device=device)
    nothing = torch.zeros(2, 5, dtype=torch.bool, device=device)
    for selected in (None, torch.full((2, 5, 3), -1, dtype=torch.int32, device=device)):
        found = loss_of(TritonLoss, index, attention, nothing, selected)
        assert found[0] == 0 and not any(gradient.any() for gradient in found[1:])


@pytest.mark.parametrize("where", ["head", "middle", "wild", "wider"])
def test_where_unused_places_are_changes_nothing(where, device):
    index, attention = make(1, 3, 12, 2, 1, 16, 3, 16, device=device)
    selected = lists(1, 3, 12, 12).to(device)
    expected = judge(index, attention, selected=selected)
    lse = list_lse(*attention, selected).to(WIDE)
    if where == "head":
        selected = selected.flip(-1)
    elif where == "middle":
        selected = torch.cat([selected[..., :2], torch.full_like(selected, -1), selected[..., 2:]], dim=-1)
    elif where == "wild":
        wild = torch.tensor([12, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device).expand(1, 3, -1)
        selected = torch.cat([wild, selected, wild], dim=-1)
    else:
        selected = torch.nn.functional.pad(selected, (0, 70), value=-1)
    learned = [x.detach().requires_grad_() for x in index]
    loss = TritonLoss(*learned, query_offset=9)
    loss.add_sparse(0, *attention, lse, selected, SCALE)
    result = loss.result()
    check((result.detach(), *torch.autograd.grad(result, learned)), expected)


@pytest.mark.parametrize(("batch", "queries", "places"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_empty_inputs(batch, queries, places, device):
    index, attention = make(batch, queries, 4, 2, 1, 16, 2, 16, device=device)
    weights = torch.ones(batch, queries, dtype=WIDE, device=device)
    selected = torch.full((batch, queries, places), -1, dtype=torch.int32, device=device)
    lse = torch.zeros(batch, queries, 2, dtype=WIDE, device=device)
    grads = (torch.empty_like(index[0]), torch.zeros_like(index[1]), torch.empty_like(index[2]))
    assert sparse_kl(*index, weights, *attention, lse, selected, SCALE, grads=grads) == 0
    assert not any(gradient.any() for gradient in grads)
    if batch * queries == 0:
        assert dense_kl(*index, weights, *attention, SCALE, first_slot=2, grads=grads) == 0


def test_spans_add_up(device):
    """Queries that see little attend densely, the others to a selection, in several calls; gradients stay in place."""
    index, attention = make(2, 9, 9, 2, 2, 16, 3, 16, device=device)
    selected = lists(2, 9, 9, 5).to(device)
    lse = list_lse(*attention, selected).to(WIDE)

    def in_spans(kind, index, attention, selected, lse):
        learned = [x.detach().requires_grad_() for x in index]
        queries, keys = attention
        loss = kind(*learned)
        loss.add_dense(0, queries[:, :5], keys[:, :, :5], SCALE)
        for begin, end in ((5, 7), (7, 9)):
            span = slice(begin, end)
            loss.add_sparse(begin, queries[:, span], keys, lse[:, span], selected[:, span], SCALE)
        result = loss.result()
        return result.detach(), *torch.autograd.grad(result, learned)

    exact = [tuple(x.cpu().double() for x in tensors) for tensors in (index, attention)]
    expected = in_spans(IndexerLoss, *exact, selected.cpu(), lse.cpu().double())
    check(in_spans(TritonLoss, index, attention, selected, lse), expected)


def test_strided_and_broadcast_inputs(device):
    index, attention = make(2, 3, 6, 2, 2, 16, 3, 16, device=device)
    selected = lists(2, 3, 6, 4).to(device)
    strided = [[torch.stack([x, x + 1], dim=-1)[..., 0] for x in tensors] for tensors in (index, attention)]
    spread = torch.stack([selected, selected + 1], dim=-1)[..., 0]
    assert not any(x.is_contiguous() for x in (*strided[0], *strided[1], spread))
    transposed = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in index]
    for inputs in (strided[0], transposed):
        for chosen in (None, spread):
            expected = judge(index, attention, selected=None if chosen is None else selected)
            check(loss_of(TritonLoss, inputs, strided[1], selected=chosen), expected)
    shared = [[x[:1].expand(2, *x.shape[1:]) for x in tensors] for tensors in (index, attention)]
    check(loss_of(TritonLoss, *shared), judge(*shared))


def test_log_sum_exp_of_the_caller(device, monkeypatch):
    """It lies in memory as attention kernels leave it, [B, H, S], and saves the pass that would make it."""
    index, attention = make(1, 20, 33, 4, 2, 16, 3, 16, device=device)
    everything = torch.where(torch.ones(20, 33).tril(13).bool(), torch.arange(33), -1).to(torch.int32)[None].to(device)
    lse = list_lse(*attention, everything).to(WIDE).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(triton_kl_dense_keye, "_attention_lse", None)
    learned = [x.detach().requires_grad_() for x in index]
    loss = TritonLoss(*learned, query_offset=13)
    loss.add_dense(0, *attention, SCALE, lse=lse)
    result = loss.result()
    check((result.detach(), *torch.autograd.grad(result, learned)), judge(index, attention))
    # The class of the model hands it on.
    narrow = [[x.float() for x in part] for part in (index, attention)]
    loss = IndexerLoss(*narrow[0], query_offset=13, backend="triton")
    loss.add_dense(0, *narrow[1], SCALE, lse.float())
    torch.testing.assert_close(loss.result().double(), result.detach().double(), rtol=1e-5, atol=0)


def test_everything_selected_is_dense(device):
    index, attention = make(1, 10, 10, 2, 1, 16, 3, 16, device=device)
    selected = lists(1, 10, 10, 10).to(device)
    check(loss_of(TritonLoss, index, attention, selected=selected), judge(index, attention))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["dense", "sparse", "unions"])
def test_chunks_change_nothing_and_repeats_are_bit_equal(kind, device, monkeypatch):
    """Also where programs finish in another order, which the interpreter cannot show: no atomics."""
    index, attention = make(2, 34, 34, 1, 1, 16, 2, 16, torch.float32, device)
    selected = None
    if kind != "dense":
        queries, heads, groups = (4, 2, 1) if kind == "sparse" else (17, 8, 2)
        index, attention = make(2, queries, 19, heads, groups, 16, 3, 16, torch.float32, device)
        selected = lists(2, queries, 19, 6).to(device)
        assert (unit_of(*attention, SHARED_LIMIT[90]) is not None) == (kind == "unions")
    if INTERPRETED:
        monkeypatch.setattr(triton_common_keye.tl, "atomic_add", None)
    whole = [loss_of(TritonLoss, index, attention, selected=selected) for _ in range(2)]
    assert all(torch.equal(ours, again) for ours, again in zip(*whole))
    module, size = (triton_kl_dense_keye, 1) if kind == "dense" else (triton_kl_sparse_keye, 3000)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", size)
    check(loss_of(TritonLoss, index, attention, selected=selected), [x.double().cpu() for x in whole[0]], 1e-6)


# Lists of neighbouring queries, read as their union. Heads per group of keys: 4, 3, 1; the last unit is a short one.
UNIONS = [
    (1, 16, 40, 8, 2, 16, 3, 16, 12),
    (2, 9, 30, 6, 2, 10, 5, 5, 7),
    (1, 35, 70, 3, 3, 48, 2, 32, 33),
    (1, 20, 150, 4, 1, 80, 17, 16, 70),
]


@pytest.mark.parametrize("shape", UNIONS, ids=names)
def test_unions_equal_the_judge(shape, device):
    index, attention = make(*shape[:-1], device=device)
    assert unit_of(*attention, SHARED_LIMIT[90]) is not None
    selected = lists(*shape[:3], shape[-1]).to(device)
    check(loss_of(TritonLoss, index, attention, selected=selected), judge(index, attention, selected=selected))


@pytest.mark.parametrize("side", ["left", "right"])
def test_unions_with_padding_and_unused_places_anywhere(side, device):
    batch, tokens = 2, 21
    key_mask = torch.ones(batch, tokens, dtype=torch.bool)
    key_mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = False
    index, attention = make(batch, tokens, tokens, 8, 2, 16, 3, 16, device=device)
    assert unit_of(*attention, SHARED_LIMIT[90]) is not None
    selected = lists(batch, tokens, tokens, 6, key_mask).to(device)
    key_mask = key_mask.to(device)
    expected = judge(index, attention, key_mask, selected)
    lse = list_lse(*attention, selected).to(WIDE)
    wild = torch.tensor([tokens, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device).expand(batch, tokens, -1)
    spread = torch.cat([wild, selected[..., :2], torch.full_like(wild, -1), selected[..., 2:], wild], dim=-1)
    keys = attention[1].masked_fill(~key_mask[:, None, :, None], math.nan)
    learned = [x.detach().requires_grad_() for x in index]
    loss = TritonLoss(*learned, key_mask=key_mask)
    loss.add_sparse(0, attention[0], keys, lse, spread, SCALE)
    result = loss.result()
    check((result.detach(), *torch.autograd.grad(result, learned)), expected)


def test_sparse_gradients_of_keys_added_in_order_and_as_they_come(device):
    index, attention = make(2, 5, 30, 2, 1, 16, 3, 16, device=device)
    selected = lists(2, 5, 30, 11).to(device)
    expected = judge(index, attention, selected=selected)
    for ordered in (False, True):
        torch.use_deterministic_algorithms(ordered)
        try:
            check(loss_of(TritonLoss, index, attention, selected=selected), expected)
        finally:
            torch.use_deterministic_algorithms(False)


# Precision: the error against float64 may not exceed that of the PyTorch code, which multiplies in float32 whatever the
# inputs are, plus one rounding to the dtype of the inputs, in which operands of the gradients' products are.


@pytest.mark.usefixtures("shared_memory")
@pytest.mark.parametrize("kind", ["dense", "sparse", "unions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_that_of_plain_code(dtype, kind, device):
    shape = {
        "dense": (1, 20, 150, 4, 2, 96, 5, 32),
        "sparse": (1, 4, 150, 20, 1, 160, 5, 32),
        "unions": (1, 17, 90, 8, 2, 96, 5, 32),
    }[kind]
    index, attention = make(*shape, dtype, device)
    attention = (attention[0] / 2, attention[1])
    selected = None if kind == "dense" else lists(*shape[:3], 60 if kind == "unions" else 100).to(device)
    # As in a batch of a million tokens: a weight that float16 cannot hold.
    found = loss_of(TritonLoss, index, attention, selected=selected, scale=1e-5)
    exact = judge(index, attention, selected=selected, scale=1e-5)
    plain = judge(index, attention, selected=selected, dtype=dtype, scale=1e-5)
    # In float32 both errors are those of the products: the interpreter leaves small tiles to numpy, which rounds more
    # often than the library behind the plain code. It multiplies bfloat16 as float32, too.
    in_float32 = dtype == torch.float32 or (kind == "unions" and dtype == torch.bfloat16)
    slack = 2 if INTERPRETED and in_float32 else 1
    assert found[0].dtype == torch.float32 and [x.dtype for x in found[1:]] == [x.dtype for x in index]
    for name, ours, theirs, truth in zip(("value", "grad of q", "grad of k", "grad of gates"), found, plain, exact):
        if ours.dtype == torch.float16:
            continue  # without the loss scale, which comes later, these are rounded to nothing
        epsilon = torch.finfo(torch.float32 if name == "value" else dtype).eps
        allowed = slack * (theirs.double() - truth).norm() + epsilon * truth.norm()
        error = (ours.double().cpu() - truth).norm()
        print(f"{dtype} {name}: error {error:.2e}, allowed {allowed:.2e}")
        assert error <= allowed, name


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_of_float16_survive_until_the_loss_scale(kind, device):
    index, attention = make(1, 20, 40, 2, 1, 32, 3, 32, torch.float16, device)
    selected = None if kind == "dense" else lists(1, 20, 40, 9).to(device)
    index = [x.detach().requires_grad_() for x in index]
    loss = TritonLoss(*index, query_offset=20)
    loss.weights = loss.weights * 1e-5
    if selected is None:
        loss.add_dense(0, *attention, SCALE)
    else:
        loss.add_sparse(0, *attention, list_lse(*attention, selected).float(), selected, SCALE)
    found = torch.autograd.grad(loss.result() * 1e5, index)
    exact = judge(index, attention, selected=selected)[1:]
    for ours, theirs in zip(found, exact):
        assert (ours.double().cpu() - theirs).norm() <= torch.finfo(torch.float16).eps * theirs.norm()


def test_wider_of_two_dtypes(device):
    index, attention = make(1, 4, 9, 2, 1, 16, 3, 16, torch.float16, device)
    index, attention = (index[0], index[1].float() + 1e-4, index[2]), (attention[0], attention[1].float() + 1e-4)
    exact = judge(index, attention)
    found = loss_of(TritonLoss, index, attention)
    assert [x.dtype for x in found] == [torch.float32, torch.float16, torch.float32, torch.float32]
    for ours, theirs in zip(found, exact):
        torch.testing.assert_close(
            ours.double().cpu(), theirs, atol=5e-4 if ours.dtype == torch.float16 else 1e-5, rtol=0
        )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_scores_far_apart(kind, device):
    """Log-sum-exps so low that a pair that does not count would have an infinite probability."""
    index, attention = make(1, 6, 20, 2, 1, 16, 3, 16, torch.float32, device)
    attention = (attention[0] / 10 + 6, attention[1] / 10 - 6)
    selected = None if kind == "dense" else lists(1, 6, 20, 5).to(device)
    check(loss_of(TritonLoss, index, attention, selected=selected), judge(index, attention, selected=selected), 1e-3)


@pytest.mark.parametrize("dim", [1, 10, 16, 17, 31, 32, 48, 64, 80, 96, 100, 128, 160, 192, 256, 288, 576])
def test_split_width_covers_every_column(dim):
    widths = split_width(dim)
    assert widths["A"] + widths["R"] == dim
    assert widths["A"] <= widths["BLOCK_A"] and widths["R"] <= widths["BLOCK_R"]
    for block in (widths["BLOCK_A"], widths["BLOCK_R"]):
        assert block >= 16 and block & (block - 1) == 0
    assert width_of(dim) <= max(16, 1.34 * dim) or dim < 32


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("arch", CHOOSING)
@pytest.mark.parametrize("width", [16, 128, 192, 576])
def test_tiles_fit_shared_memory(width, arch, element_size):
    for choose in (walk_tiles, head_tiles):
        tiles = choose(width, element_size, SHARED_LIMIT[arch])
        assert (tiles.rows + tiles.keys) * width * element_size <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("arch", CHOOSING)
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (6, 192), (8, 128), (16, 576), (128, 64)])
def test_tiles_of_unions_fit_shared_memory(heads, width, arch, element_size):
    tiles = union_tiles(heads, width, element_size, SHARED_LIMIT[arch])
    assert heads <= tiles.heads < 2 * heads and 1 <= tiles.queries <= 32
    assert (tiles.heads * tiles.queries + tiles.places) * width * element_size <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("module", [triton_kl_dense_keye, triton_kl_sparse_keye], ids=["dense", "sparse"])
def test_refuses_rows_that_do_not_fit(module, monkeypatch):
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[89])
    index, attention = make(1, 2, 2, 2, 1, 2048, 2, 16, torch.float16)
    message = 'takes [0-9]+ KiB .* may use 99 KiB; choose the backend "torch"'
    assert module.unsupported(*make(1, 2, 2, 2, 1, 64, 2, 16)[1], *index[:2]) is None
    assert module.unsupported(*attention, *index[:2]) is not None
    selected = None if module is triton_kl_dense_keye else lists(1, 2, 2, 2)
    with pytest.raises(ValueError, match=message):
        loss_of(TritonLoss, index, attention, selected=selected)


# What only a device can show.


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_more_programs_than_sixteen_bits_count(kind, device):
    """Value and gradients of 70,000 queries; dense ones in many short sequences."""
    batch, queries = (70_000, 1) if kind == "dense" else (1, 70_000)
    index, attention = make(batch, queries, queries, 2, 1, 16, 2, 16, torch.float32, device)
    selected = None
    if kind == "sparse":
        selected = torch.stack([torch.arange(queries) // 2, torch.arange(queries)], dim=-1)
        selected[0, 0] = -1
        selected = selected.to(device, torch.int32)[None]
    learned = [x.detach().requires_grad_() for x in index]
    loss = TritonLoss(*learned)
    if selected is None:
        loss.add_dense(0, *attention, SCALE)
        assert abs(float(loss.result())) < 1e-6  # one key each: nothing to learn
        return
    rows = selected[0].clamp(min=0).long()
    logits = torch.einsum("shd,skd->shk", attention[0][0], attention[1][0, 0][rows]) * SCALE
    logits[0, :, 0] = -math.inf
    loss.add_sparse(0, *attention, logits.logsumexp(dim=-1)[None], selected, SCALE)
    p = logits.softmax(dim=-1).mean(dim=1)
    scores = torch.einsum("shd,skd->shk", index[0][0], index[1][0][rows]).relu().mul(index[2][0, :, :, None]).sum(dim=1)
    scores[0, 0] = -math.inf
    terms = torch.where(p > 0, p * (p.clamp(min=1e-30).log() - scores.log_softmax(dim=-1)), 0.0)
    torch.testing.assert_close(loss.result(), terms.sum(dim=-1).mean(), atol=1e-5, rtol=0)


# The dispatch.


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_loss_takes_the_backend_that_is_named(kind, device, monkeypatch):
    index, attention = make(1, 4, 7, 2, 1, 16, 2, 16, device=device)
    selected = None if kind == "dense" else lists(1, 4, 7, 3).to(device)
    ran = []
    for name, kernel in (("dense_kl", dense_kl), ("sparse_kl", sparse_kl)):
        monkeypatch.setattr(
            indexer_objective_keye,
            name,
            lambda *args, kernel=kernel, name=name, **kwargs: (ran.append(name), kernel(*args, **kwargs))[1],
        )
    named = partial(IndexerLoss, backend="triton")
    check(loss_of(named, index, attention, selected=selected), judge(index, attention, selected=selected))
    assert ran == [f"{kind}_kl"]


def test_the_loss_refuses_a_backend_that_cannot_run(monkeypatch):
    index, attention = make(1, 2, 2, 2, 1, 2048, 2, 16, torch.float16)
    monkeypatch.setattr(triton_common_keye, "SHARED_MEMORY_OFF_DEVICE", SHARED_LIMIT[89])
    with pytest.raises(ValueError, match='choose the backend "torch"'):
        loss_of(partial(IndexerLoss, backend="triton"), index, attention)
