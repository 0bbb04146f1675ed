"""The whole model on a CUDA device that is none: "auto" takes the kernels, no operand is left behind, no value is read.

What a CPU's tests cannot show, because there every tensor is on one device and reading a value costs nothing.
"""

import pytest
import torch
from transformers import DynamicCache

from modeling_keye import attention_keye
from modeling_keye.triton_common_keye import INTERPRETED
from tests.kernels.pretended_device import DEVICE, OnDevice, pretended_device
from tests.model.conftest import media_inputs
from tests.model.factories import text_ids, tiny_model, video_inputs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="there is a real device")
# As in `tests/model/test_equalities.py`: logits are about 1.5 in size.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def poisoned():
    """In the place of the folder's fixture, which does not know this device."""


def two_layers(kind: str):
    return tiny_model(
        kind, num_hidden_layers=2, mlp_layer_types=["dense", "dense" if kind == "gqa_dense" else "sparse"]
    )


def moved(inputs: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def steps(model, inputs: dict, tokens: torch.Tensor, reads: list[str]) -> list[torch.Tensor]:
    """Logits behind the prompt and behind each of `tokens`; `reads` keeps those of the steps."""
    cache = DynamicCache(config=model.config)
    logits = [model(**inputs, past_key_values=cache).logits[:, -1:]]
    reads.clear()
    return logits + [model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mla", "gqa", "gqa_dense"])
def test_decoding_steps_behind_a_video(kind):
    """Logits of the CPU; a step reads nothing but whether it was given a placeholder, nothing in the decoder."""
    model = two_layers(kind)
    inputs, tokens = video_inputs(model.config, ((2, 4, 4),)), text_ids(1, 2)
    wanted = steps(model, inputs, tokens, [])
    with pretended_device() as reads:
        found = steps(model.to(DEVICE), moved(inputs), tokens.to(DEVICE), reads)
        assert all("placeholder" in read for read in reads)
    ran = {layer["ran"] for layer in model.attention_backend_report()}
    assert ran == ({"dense"} if kind == "gqa_dense" else {"triton"})
    for ours, theirs in zip(found, wanted):
        assert isinstance(ours, OnDevice) and ours.is_cuda
        torch.testing.assert_close(ours.held, theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_generating_behind_padded_media(kind):
    model = two_layers(kind)
    inputs = media_inputs(model.config, "image" if kind == "gqa" else "video", batch=2)
    wanted = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with pretended_device():
        found = model.to(DEVICE).generate(**moved(inputs), max_new_tokens=2, do_sample=False)
    assert torch.equal(found.held, wanted)


@torch.no_grad()
def test_packed_sequences():
    model = two_layers("mla")
    ids, positions = text_ids(1, 30), torch.cat([torch.arange(12), torch.arange(18)])[None]
    wanted = model(ids, position_ids=positions).logits
    with pretended_device():
        found = model.to(DEVICE)(ids.to(DEVICE), position_ids=positions.to(DEVICE)).logits
    torch.testing.assert_close(found.held, wanted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_chunk_of_grouped_queries_is_one_step(monkeypatch):
    """Units of neighbouring queries share a program, so short steps would leave multiprocessors without one."""
    ids = text_ids(1, 600)
    called = []

    def select(*arguments, num_queries, **place):
        called.append(num_queries)
        raise StopIteration

    monkeypatch.setattr(attention_keye, "select_tokens", select)
    with pretended_device(), pytest.raises(StopIteration):
        two_layers("gqa").to(DEVICE)(ids.to(DEVICE))
    with pytest.raises(StopIteration):
        two_layers("gqa")(ids)
    assert called[0] > 512 == called[1]


def test_operands_on_two_devices_are_an_error():
    with pretended_device() as reads:
        here = torch.arange(3, device="cuda")
        with pytest.raises(RuntimeError, match="two devices"):
            here + torch.arange(3)
        assert (here + torch.tensor(1)).is_cuda and reads == []
        assert here.tolist() == [0, 1, 2] and len(reads) == 1
        assert not here.cpu().is_cuda and len(reads) == 2


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.where(x > 0),
        lambda x: torch.argwhere(x),
        lambda x: torch.nonzero(x),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.bincount(x),
        lambda x: x.masked_select(x > 0),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x.sum()),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: bool(x.any()),
    ],
)
def test_what_waits_for_the_device_is_noted(operation):
    with pretended_device() as reads:
        here = torch.arange(3, device="cuda")
        reads.clear()
        operation(here)
        assert reads
