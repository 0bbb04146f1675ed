"""The plan of weights at its edges: fp8 values that must not change unnoticed, and tensors that are no weights."""

import pytest
import torch

from modeling_keye.checkpoint_keye import CheckpointError, StoredTensor
from modeling_keye.layouts_keye import LAYOUTS
from modeling_keye.weights_keye import FP8, plan_loading, plan_publishing

LAYOUT = LAYOUTS["deepseek_v3"]
BLOCK = (3, 4)
ROWS, COLUMNS = 7, 10  # partial blocks at both edges
WEIGHT, SCALE = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv"
OURS = "model.language_model.layers.0.self_attn.o_proj.weight"


class Memory(dict):
    """Tensors as a source of recipes."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        entries = {n: StoredTensor(n, t.dtype, tuple(t.shape), None, 0, t.nbytes) for n, t in tensors.items()}
        super().__init__(entries)
        self.tensors = tensors

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, part: int | None = None
    ) -> torch.Tensor:
        tensor = self.tensors[name] if part is None else self.tensors[name][part]
        return tensor if start is None else tensor[start:stop]


def every_fp8_value() -> torch.Tensor:
    """[7, 10] of bytes that all differ; no NaN among them."""
    return (torch.arange(ROWS * COLUMNS) * 3 % 127).to(torch.uint8).view(ROWS, COLUMNS).view(FP8)


def published(scale: float = 0.37, **tensors: torch.Tensor) -> Memory:
    scales = scale * (1 + torch.arange(9.0).view(3, 3))
    return Memory({WEIGHT: every_fp8_value(), SCALE: scales, **tensors})


def load(source: Memory, **options):
    plan = plan_loading(LAYOUT, source, {OURS: (ROWS, COLUMNS)}, num_hidden_layers=1, block=BLOCK, **options)
    return plan[OURS].build(source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_values_come_back(dtype):
    source = published()
    values = load(source, fp8_dtype=dtype, prove_fp8=True)
    spread = source.tensors[SCALE].repeat_interleave(3, 0)[:ROWS].repeat_interleave(4, 1)[:, :COLUMNS]
    assert torch.equal(values, (source.tensors[WEIGHT].float() * spread).to(dtype))
    ours = Memory({OURS: values, SCALE: source.tensors[SCALE]})
    back = plan_publishing(LAYOUT, ours, block=BLOCK)
    assert torch.equal(back[WEIGHT].build(ours).view(torch.uint8), source.tensors[WEIGHT].view(torch.uint8))
    assert torch.equal(back[SCALE].build(ours), source.tensors[SCALE])


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e37])
def test_fp8_that_could_not_come_back_is_refused(scale):
    with pytest.raises(CheckpointError, match="o_proj.weight' holds fp8 values that cannot be restored"):
        load(published(scale), prove_fp8=True)


def test_zero_scale_of_zeros_comes_back():
    source = published(0.0)
    source.tensors[WEIGHT] = torch.zeros(ROWS, COLUMNS).to(FP8)
    assert not load(source, prove_fp8=True).any()


@pytest.mark.parametrize("factor", [1.01, 3.0])
def test_trained_weights_are_not_rounded_back_to_fp8(factor):
    source = published()
    ours = Memory({OURS: load(source) * factor, SCALE: source.tensors[SCALE]})
    with pytest.raises(CheckpointError, match="trained since.*--dtype bfloat16"):
        plan_publishing(LAYOUT, ours, block=BLOCK)[WEIGHT].build(ours)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_only_floats_are_weights(dtype):
    source = Memory({WEIGHT: torch.ones(ROWS, COLUMNS).to(dtype)})
    with pytest.raises(CheckpointError, match=f"o_proj.weight is {dtype}; weights are"):
        load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SCALE: torch.ones(3, 2)}, r"o_proj.weight_scale_inv' is torch.float32 of shape \[3, 2\].*\[3, 3\]"),
        ({SCALE: torch.ones(3, 3, dtype=torch.bfloat16)}, "is torch.bfloat16 of shape"),
        ({WEIGHT: torch.ones(ROWS, COLUMNS)}, "has the scale .* but is torch.float32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        load(published(**change))


def test_fp8_without_scale_is_refused():
    with pytest.raises(CheckpointError, match="stored as fp8 without its 'weight_scale_inv'"):
        load(Memory({WEIGHT: every_fp8_value()}))
