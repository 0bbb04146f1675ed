"""Kernel tests run in Triton's interpreter on the CPU, or on the device where there is one, over poisoned memory."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bench import use_model_without_video

use_model_without_video()  # so that `pytest tests/kernels` runs on a lent GPU machine that has no PyAV
# Triton reads this when a kernel is decorated, so it stands before the first import of a kernel file.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The release that `.ci/run` installs; another compiler allocates registers in its own way.
COMPILER = "3.8"
# No slot, no count and no offset that a kernel could make sense of.
POISONED_INTEGER = -(2**30) - 12345


def pytest_collection_modifyitems(items):
    if find_spec("triton") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="Triton is not installed (pip install triton)"))
        return
    found = version("triton")
    if not found.startswith(COMPILER):
        reason = (
            f"registers and spills are those of Triton {COMPILER}'s compiler, {found} is installed; "
            f"`pip install --no-deps triton=={COMPILER}.0` runs these tests"
        )
        for item in items:
            if Path(__file__).parent in item.path.parents and item.path.name.startswith("test_aot"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, or a wild integer, instead of the zeros that a fresh page has."""

    def filling(allocate):
        def filled(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():  # a leaf that asks for a gradient is filled too
                if tensor.dtype == torch.bool:
                    return tensor.fill_(True)
                if tensor.dtype in (torch.uint8, torch.int8):
                    return tensor.fill_(77)
                return tensor.fill_(float("nan") if tensor.is_floating_point() else POISONED_INTEGER)

        return filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filling(getattr(owner, name)))
