"""Kernels of the indexer's KL loss compiled for real devices: spills, shared memory, matrix instructions.

`dense_...` and `sparse_...` run in a process of their own, where a launch compiles and does not run.
"""

import pytest
import torch

from modeling_keye.triton_kl_dense_keye import dense_kl
from modeling_keye.triton_kl_sparse_keye import sparse_kl
from tests.kernels import aot

QUERIES, KEYS, PLACES = 256, 4096, 2048


def inputs(heads: int, groups: int, dim: int, index: tuple[int, int], dtype: torch.dtype, queries: int = QUERIES):
    """Indexer queries, keys, gates and weights; attention queries and keys; gradients."""
    learned = (
        torch.empty(1, queries, *index, dtype=dtype),
        torch.empty(1, KEYS, index[1], dtype=dtype),
        torch.empty(1, queries, index[0]),
    )
    attention = (torch.empty(1, queries, heads, dim, dtype=dtype), torch.empty(1, groups, KEYS, dim, dtype=dtype))
    grads = (torch.empty_like(learned[0]), torch.zeros(learned[1].shape), torch.empty_like(learned[2]))
    return (*learned, torch.ones(1, queries)), attention, grads


def dense(heads, groups, dim, index=(16, 64), dtype=torch.bfloat16, masked=False):
    learned, attention, grads = inputs(heads, groups, dim, index, dtype)
    mask = torch.ones(1, KEYS, dtype=torch.bool) if masked else None
    dense_kl(*learned, *attention, 0.1, first_slot=KEYS - QUERIES, key_mask=mask, grads=grads)


def sparse(heads, groups, dim, index=(16, 64), dtype=torch.bfloat16):
    learned, attention, grads = inputs(heads, groups, dim, index, dtype)
    lse, selected = torch.empty(1, QUERIES, heads), torch.empty(1, QUERIES, PLACES, dtype=torch.int32)
    sparse_kl(*learned, *attention, lse, selected, 0.1, grads=grads)


def dense_grouped():
    dense(32, 4, 128)


def dense_grouped_padded():
    dense(32, 4, 128, masked=True)


def dense_expanded():
    """Latent attention with keys expanded: every head its own."""
    dense(128, 128, 192, (64, 128))


def dense_absorbed():
    dense(128, 1, 576, (64, 128))


def dense_float32():
    dense(32, 4, 128, dtype=torch.float32)


def sparse_grouped():
    sparse(32, 4, 128)


def sparse_grouped_deterministic():
    torch.use_deterministic_algorithms(True)
    sparse(32, 4, 128)
    torch.use_deterministic_algorithms(False)


def sparse_grouped_wide():
    """Heads that are no power of two, six of them to a group of keys."""
    sparse(24, 4, 160)


def sparse_absorbed():
    sparse(128, 1, 576, (64, 128))


def sparse_few_heads():
    sparse(16, 1, 160, (4, 128))


def sparse_float32():
    sparse(32, 4, 128, dtype=torch.float32)


LAUNCHES = {
    90: [
        dense_grouped,
        dense_grouped_padded,
        dense_expanded,
        dense_absorbed,
        sparse_grouped,
        sparse_grouped_deterministic,
        sparse_grouped_wide,
        sparse_absorbed,
        sparse_few_heads,
        dense_float32,
        sparse_float32,
    ],
    80: [dense_grouped, dense_absorbed, sparse_grouped, sparse_absorbed],
    89: [dense_grouped, dense_absorbed, sparse_grouped, sparse_absorbed, dense_float32, sparse_float32],
}
NAMES = {arch: [function.__name__ for function in functions] for arch, functions in LAUNCHES.items()}

PRODUCTS = (
    "_attention_lse_kernel",
    "_index_lse_kernel",
    "_divergence_kernel",
    "_query_gradients_kernel",
    "_key_gradients_kernel",
    "_gradients_kernel",
    "_list_kernel",
    "_union_kernel",
)
# Adds to keys that queries share.
SHARED_KEYS = ("_gradients_kernel", False)
# Bytes per thread. Keys of absorbed latent attention are 576 wide; the model expands them unless memory is short.
SPILLS = {
    (90, "dense_absorbed", "_divergence_kernel"): 72,
    (80, "dense_absorbed", "_divergence_kernel"): 16,
    (89, "dense_absorbed", "_divergence_kernel"): 24,
}


@pytest.mark.parametrize(("arch", "name"), [(arch, name) for arch in NAMES for name in NAMES[arch]])
def test_compiles_for_the_device(arch, name):
    reports = aot.compile_launches(__name__)[arch][name]
    print("", *reports, sep="\n")
    if (arch, name) == (90, "sparse_absorbed"):
        # Of one group of four warps: 36 for a tile of 64 places, and 4 in the branch that is never taken.
        assert [r.instructions["HGMMA"] for r in reports if r.kernel == "_list_kernel"] == [40], reports
    for report in reports:
        assert report.shared <= aot.SHARED_LIMIT[arch], report
        atomic = report.kernel == "_mark_kernel" or (report.kernel, report.constants.get("OWN_ROWS")) == SHARED_KEYS
        assert bool({"RED", "REDG", "ATOM", "ATOMG"} & set(report.instructions)) == atomic, report
        assert report.stack <= SPILLS.get((arch, name, report.kernel), 0), report
        if report.kernel in PRODUCTS and not name.endswith("float32"):
            expected, unexpected = ("HGMMA", "HMMA") if arch == 90 else ("HMMA", "HGMMA")
            assert expected in report.instructions and unexpected not in report.instructions, report
            assert "LDGSTS" in report.instructions, f"operands are not loaded asynchronously: {report}"
