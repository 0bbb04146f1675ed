"""The indexer's KL losses, value and gradients, against the PyTorch objective in float64."""

import torch

from benchmarks.gpu.bench import Bench, relative_error
from benchmarks.gpu.part_check_attention import random_lists
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


def run(bench: Bench) -> None:
    dtypes = [torch.float32] if bench.dry_run else [torch.float16, torch.bfloat16, torch.float32]
    num_queries, heads, groups, dim = (20, 4, 2, 16) if bench.dry_run else (400, 32, 4, 128)
    index_heads, index_dim, places = (2, 16, 8) if bench.dry_run else (16, 64, 200)
    for dtype in dtypes:
        q, k = (
            bench.randn(1, num_queries, index_heads, index_dim, dtype=dtype),
            bench.randn(1, num_queries, index_dim, dtype=dtype),
        )
        gates = bench.randn(1, num_queries, index_heads, dtype=torch.float32) * (index_heads * index_dim) ** -0.5
        queries = bench.randn(1, num_queries, heads, dim, dtype=dtype)
        keys = bench.randn(1, groups, num_queries, dim, dtype=dtype)
        indices = random_lists(bench, 1, num_queries, num_queries, places)
        slots = torch.arange(num_queries, device=bench.device)[:, None]
        indices = indices.masked_fill(indices > slots, -1)
        indices[..., 0] = 0
        indices = torch.where(indices < 0, num_queries, indices).sort(dim=-1).values
        repeated = torch.nn.functional.pad(indices.diff(dim=-1) == 0, (1, 0))
        indices = indices.masked_fill(repeated | (indices == num_queries), -1).to(torch.int32)
        wide = [x.double() for x in (queries, keys)]
        lse = sparse_reference_keye.sparse_gqa(*wide, wide[1], indices, SCALE)[1]
        for name in ("dense", "sparse"):
            leaves = [x.double().requires_grad_() for x in (q, k, gates)]
            judge = IndexerLoss(*leaves)
            weights = judge.weights.float()
            grads = empty_gradients(q, k, gates)
            if name == "dense":
                judge.add_dense(0, *wide, SCALE)
                value = dense_kl(q, k, gates, weights, queries, keys, SCALE, grads=grads)
            else:
                judge.add_sparse(0, *wide, lse, indices, SCALE)
                value = sparse_kl(q, k, gates, weights, queries, keys, lse.float(), indices, SCALE, grads=grads)
            exact = judge.result()
            exact.backward()
            allowed = 2e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
            error = abs(float(value) / float(exact.detach()) - 1)
            bench.check(f"kl {name} value", error, allowed, dtype=str(dtype))
            for part, ours, leaf in zip(("q", "k", "gates"), grads, leaves):
                bench.check(f"kl {name} grad {part}", relative_error(ours, leaf.grad), allowed, dtype=str(dtype))
