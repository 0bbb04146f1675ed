"""The selection kernels, compiled for real devices without one: registers, spills, shared memory, instructions."""

import pytest
import torch

from modeling_keye.triton_selection_keye import select_tokens
from tests.kernels.aot import CHOOSING, SHARED_LIMIT, compile_launches

MODULE = "tests.kernels.test_aot"
SHAPES = ["4x128", "16x64", "32x128", "64x128"]
# Registers of one multiprocessor and threads per warp.
REGISTERS, WARP = 65536, 32


def _launch(
    shape: str,
    dtype: torch.dtype,
    num_keys: int = 4144,
    num_queries: int = 48,
    masked: bool = True,
    at_slot: bool = False,
) -> None:
    heads, dim = map(int, shape.split("x"))
    select_tokens(
        torch.zeros(1, num_queries, heads, dim, dtype=dtype),
        torch.zeros(1, num_keys, dim, dtype=dtype),
        torch.zeros(1, num_queries, heads, dtype=dtype),
        topk=2048,
        local_window=128,
        anchor_stride=64,
        batch_size=1,
        num_queries=num_queries,
        query_offset=num_keys - num_queries,
        key_mask=torch.ones(1, num_keys, dtype=torch.bool) if masked else None,
        width=2304,
        device=torch.device("cpu"),
        slot=torch.tensor(0) if at_slot else None,
    )


def bf16_4x128() -> None:
    _launch("4x128", torch.bfloat16)


def bf16_16x64() -> None:
    _launch("16x64", torch.bfloat16)


def bf16_32x128() -> None:
    _launch("32x128", torch.bfloat16)


def bf16_64x128() -> None:
    _launch("64x128", torch.bfloat16)


def fp16_16x64() -> None:
    _launch("16x64", torch.float16)


def fp32_16x64() -> None:
    _launch("16x64", torch.float32)


def many_rows() -> None:
    """More than an H100 has multiprocessors, unpadded; all others are few."""
    _launch("16x64", torch.bfloat16, num_queries=200, masked=False)


def other_lengths() -> None:
    """The kernels of `bf16_16x64` at lengths that are odd, and for a single query."""
    _launch("16x64", torch.bfloat16, num_keys=5001, num_queries=37)
    _launch("16x64", torch.bfloat16, num_keys=9999, num_queries=1)


def steps() -> None:
    """A decoding step whose slot is read on the device: in a long and in a short static cache, with and without a
    mask, one that keeps everything, and a few queries at once."""
    for shape in SHAPES:
        _launch(shape, torch.bfloat16, num_keys=5001, num_queries=1, masked=False, at_slot=True)
    for num_keys in (5001, 40000, 300):
        _launch("16x64", torch.bfloat16, num_keys=num_keys, num_queries=1, at_slot=True)
    _launch("16x64", torch.bfloat16, num_keys=9999, num_queries=5, at_slot=True)


def enumerated() -> None:
    """A short prompt, which keeps everything, then window and anchors without an indexer."""
    _launch("16x64", torch.bfloat16, num_keys=300, num_queries=300)
    for stride, slot in ((None, None), (64, None), (64, torch.tensor(0))):
        select_tokens(
            *(None, None, None),
            topk=None,
            local_window=512,
            anchor_stride=stride,
            batch_size=2,
            num_queries=9,
            query_offset=4000,
            key_mask=None,
            width=640,
            device=torch.device("cpu"),
            slot=slot,
        )


ALL = [f"bf16_{shape}" for shape in SHAPES]
ALL += ["fp16_16x64", "fp32_16x64", "many_rows", "other_lengths", "steps", "enumerated"]
NAMES = dict.fromkeys(CHOOSING, ALL)


@pytest.mark.parametrize("arch", CHOOSING, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("name", ALL)
def test_no_spills_and_fits(name, arch):
    reports = compile_launches(MODULE)[arch][name]
    print(*reports, sep="\n")
    for report in reports:
        assert report.stack == 0, f"spills: {report}"
        assert report.shared <= SHARED_LIMIT[arch], f"does not fit: {report}"
        assert not {"STL", "LDL"} & set(report.instructions), f"local memory: {report}"
        # At least one program fits the registers of a multiprocessor; a scoring program wants two beside it.
        programs = REGISTERS // (report.registers * report.num_warps * WARP)
        assert programs >= (2 if "score" in report.kernel else 1), str(report)


@pytest.mark.parametrize("arch", CHOOSING, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_run_on_tensor_cores_behind_asynchronous_copies(shape, arch):
    score, select = compile_launches(MODULE)[arch][f"bf16_{shape}"]
    assert (score.kernel, select.kernel) == ("_score_kernel", "_select_kernel")
    assert score.instructions.get("HGMMA" if arch == 90 else "HMMA"), str(score)
    assert score.instructions.get("LDGSTS"), str(score)


@pytest.mark.parametrize("arch", CHOOSING, ids=lambda arch: f"sm_{arch}")
def test_lengths_and_strides_compile_nothing_new(arch):
    reports = compile_launches(MODULE)[arch]
    assert set(map(str, reports["other_lengths"])) == set(map(str, reports["bf16_16x64"]))
    masked = [
        report for report in reports["steps"] if report.constants["HAS_MASK"] and report.kernel == "_score_kernel"
    ]
    assert len(masked) == 3 and len(set(map(str, masked))) == 1
