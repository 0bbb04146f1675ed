"""Kernels that come near the shared memory of data-centre Blackwell, compiled for it: their blocks are an A100's."""

import types

import pytest
import torch

from modeling_keye import triton_common_keye
from tests.kernels import aot, test_aot_gqa, test_aot_kl, test_aot_mla


def latent_forward():
    test_aot_mla.forward_128_heads()
    test_aot_mla.forward_32_heads()


def latent_gradients():
    test_aot_mla.gradients_32_heads()


def grouped():
    test_aot_gqa.forward_wide_heads()
    test_aot_gqa.gradients_32_heads()


def losses():
    test_aot_kl.dense_absorbed()
    test_aot_kl.sparse_absorbed()


NAMES = {100: ["latent_forward", "latent_gradients", "grouped", "losses"]}


@pytest.mark.parametrize("name", NAMES[100])
def test_fits(name):
    reports = aot.compile_launches(__name__)[100][name]
    print("", *reports, sep="\n")
    assert reports and all(report.shared <= aot.SHARED_LIMIT[100] for report in reports)


@pytest.mark.parametrize(
    ("capability", "limit", "expected"), [(9, 227, 227), (10, 227, 163), (12, 99, 99), (8, 163, 163)]
)
def test_blocks_are_chosen_by(capability, limit, expected, monkeypatch):
    properties = types.SimpleNamespace(major=capability, shared_memory_per_block_optin=limit * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert triton_common_keye.shared_memory(torch.device("cuda")) == expected * 1024
