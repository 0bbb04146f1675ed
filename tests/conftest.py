"""What every test shares: few threads, no network, a Hub cache of its own, fixed seeds, GPU tests only with a GPU."""

import os
import shutil
import tempfile

# Set before torch or huggingface_hub are imported anywhere: both read the environment once, at import.
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
_threads = str(max(1, _cores // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
# Not `setdefault`: a worker inherits what the process that started it, which counts no workers, has set here. Two
# workers of two threads each on two cores spend most of their time waiting in OpenMP's barriers.
os.environ.update(OMP_NUM_THREADS=_threads, MKL_NUM_THREADS=_threads)
_hub_home = tempfile.mkdtemp(prefix="keye-tests-hub-")
os.environ.update(
    HF_HOME=_hub_home,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Triton reads this when a kernel is decorated. Without a GPU its interpreter runs the kernels that a test names.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# These would win over HF_HOME and let one run see the remote code of another.
for _name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_TOKEN", "KEYE_MODEL"):
    os.environ.pop(_name, None)

import ipaddress  # noqa: E402 the environment above comes first
import random  # noqa: E402
import socket  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _is_loopback(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def refuse_network():
    """Only this machine can be reached. `pytest.fail` is no `Exception`, so library code cannot catch it and retry."""
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    real_getaddrinfo = socket.getaddrinfo

    def guarded(name):
        def connect(self, address, *args):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                pytest.fail(f"a test tried to reach {address[0]}:{address[1]}; tests may only use loopback addresses")
            return real[name](self, address, *args)

        return connect

    def getaddrinfo(host, *args, **kwargs):
        if not _is_loopback(host):
            pytest.fail(f"a test tried to look up {host!r}; tests may only use loopback addresses")
        return real_getaddrinfo(host, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    for name in real:
        patch.setattr(socket.socket, name, guarded(name))
    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_unconfigure():
    shutil.rmtree(_hub_home, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_global_switch_stays():
    """A test that leaves gradients off or a default device behind makes others fail elsewhere; it fails itself."""
    yield
    left = [] if torch.is_grad_enabled() else ["gradients off"]
    left += [] if torch.overrides._len_torch_function_stack() == 0 else ["a function mode (default device?)"]
    torch.set_grad_enabled(True)
    assert not left
