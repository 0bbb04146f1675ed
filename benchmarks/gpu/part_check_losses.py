"""The indexer's KL losses, value and gradients, against the PyTorch objective in float64."""

import torch

from benchmarks.gpu.attention_checks import random_lists
from benchmarks.gpu.bench import Bench, relative_error
from modeling_keye import sparse_reference_keye
from modeling_keye.indexer_objective_keye import IndexerLoss
from modeling_keye.triton_kl_dense_keye import dense_kl
from modeling_keye.triton_kl_sparse_keye import sparse_kl

SCALE = 0.0722


def empty_gradients(q, k, gates):
    """What the kernels write, or add to (keys). Float16 cannot hold gradients before the loss scale is on them."""
    wide = torch.float32 if q.dtype == torch.float16 else q.dtype
    grad_k, grad_gates = torch.zeros_like(k, dtype=torch.float32), torch.empty_like(gates, dtype=torch.float32)
    return torch.empty_like(q, dtype=wide), grad_k, grad_gates


# Heads, heads of keys, head size: unions of neighbours' lists are read, and lists one by one.
SHAPES = {"grouped": (32, 4, 128), "latent": (128, 1, 576)}
TINY = {"grouped": (4, 2, 16), "latent": (4, 1, 32)}


def ascending_lists(bench: Bench, num_queries: int, places: int) -> torch.Tensor:
    """int32 [1, S, places]: slots that the query sees, without repeats, -1 at the end."""
    indices = random_lists(bench, 1, num_queries, num_queries, places)
    slots = torch.arange(num_queries, device=bench.device)[:, None]
    indices = indices.masked_fill((indices < 0) | (indices > slots), num_queries)
    indices[..., 0] = 0
    indices = indices.sort(dim=-1).values
    repeated = torch.nn.functional.pad(indices.diff(dim=-1) == 0, (1, 0))
    indices = indices.masked_fill(repeated, num_queries).sort(dim=-1).values
    return indices.masked_fill(indices == num_queries, -1).to(torch.int32)


def run(bench: Bench) -> None:
    for kind, shape in (TINY if bench.dry_run else SHAPES).items():
        dtypes = [torch.float16, torch.bfloat16, torch.float32] if kind == "grouped" else [torch.bfloat16]
        for dtype in [torch.float32] if bench.dry_run else dtypes:  # each compiles all kernels, for seconds
            check(bench, kind, shape, dtype)


def check(bench: Bench, kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    heads, groups, dim = shape
    num_queries, places = bench.size(400, 10), bench.size(200, 4)
    index_heads, index_dim = (2, 16) if bench.dry_run else (16, 64)
    q = bench.randn(1, num_queries, index_heads, index_dim, dtype=dtype)
    k = bench.randn(1, num_queries, index_dim, dtype=dtype)
    gates = bench.randn(1, num_queries, index_heads, dtype=torch.float32) * (index_heads * index_dim) ** -0.5
    queries = bench.randn(1, num_queries, heads, dim, dtype=dtype)
    keys = bench.randn(1, groups, num_queries, dim, dtype=dtype)
    indices = ascending_lists(bench, num_queries, places)
    wide = [x.double() for x in (queries, keys)]
    lse = sparse_reference_keye.sparse_gqa(*wide, wide[1], indices, SCALE)[1]
    allowed = 2e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    for name in ("dense", "sparse", "sparse, in order"):
        leaves = [x.double().requires_grad_() for x in (q, k, gates)]
        judge = IndexerLoss(*leaves)
        weights = judge.weights.float()
        runs = []
        torch.use_deterministic_algorithms(name == "sparse, in order")
        for _ in range(2):
            grads = empty_gradients(q, k, gates)
            if name == "dense":
                value = dense_kl(q, k, gates, weights, queries, keys, SCALE, grads=grads)
            else:
                value = sparse_kl(q, k, gates, weights, queries, keys, lse.float(), indices, SCALE, grads=grads)
            runs.append((value, *grads))
        torch.use_deterministic_algorithms(False)
        if name == "dense":
            judge.add_dense(0, *wide, SCALE)
        else:
            judge.add_sparse(0, *wide, lse, indices, SCALE)
        exact = judge.result()
        exact.backward()
        label, of = f"kl {name}, {kind}", {"dtype": str(dtype)}
        bench.check(f"{label}: value", abs(float(runs[0][0]) / float(exact.detach()) - 1), allowed, **of)
        for part, ours, leaf in zip(("q", "k", "gates"), runs[0][1:], leaves):
            bench.check(f"{label}: grad {part}", relative_error(ours, leaf.grad), allowed, **of)
        if name != "sparse":  # whose keys are added to in no fixed order
            different = sum(float((a != b).sum()) for a, b in zip(*runs))
            bench.check(f"{label}: repeated", different, 0.0, **of)
