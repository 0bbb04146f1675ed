"""What every Triton kernel file shares: whether kernels can run, the device's limits, and small jitted helpers.

Triton is optional. Without it this file and the kernel files still import, `jit` returns plain functions, and
`triton_usable` says why nothing can run. Kernel files postpone annotations (`from __future__ import annotations`), so
that `tl.constexpr` in a signature needs no Triton either.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

OLDEST_TRITON = (3, 5)
# Compute capability 8.0 is the first with bfloat16 matrix instructions and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)
# Stand in for a device where there is none: in the interpreter and when compiling ahead of time. An H100's.
SHARED_MEMORY_OFF_DEVICE = 227 * 1024
MULTIPROCESSORS_OFF_DEVICE = 132
# By how much blocks are chosen from capability 10 on, where there may be as much as on Hopper: matrix instructions find
# more of their operands in shared memory there, and Hopper's blocks would not fit. An A100's.
SHARED_MEMORY_PAST_HOPPER = 163 * 1024

# Triton decides when a kernel is decorated, hence once for this process.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(fn=None, **options):
    """`triton.jit`, with or without options; without Triton the function stays as it is and must not be launched."""
    if triton is None:
        return (lambda undecorated: undecorated) if fn is None else fn
    return triton.jit(fn, **options)


def triton_usable(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """None when the kernels can run on `device` for inputs of `dtypes`, else one sentence that says what is missing."""
    device = torch.device(device)
    problem = _missing(device) or _unsupported_dtype(dtypes)
    return None if problem is None else f'{problem}; choose the backend "torch".'


def _missing(device: torch.device) -> str | None:
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return (
            f"Triton {triton.__version__} is installed and {'.'.join(map(str, OLDEST_TRITON))} is the oldest that works"
        )
    if device.type == "cpu":
        if not INTERPRETED:
            return "Triton kernels run on CUDA devices, and on the CPU only with TRITON_INTERPRET=1 set before import"
        return None
    if device.type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device.type!r}"
    if torch.version.hip is not None:
        return "The Triton kernels are tuned and tested for NVIDIA devices, and this PyTorch is built for ROCm"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which would run the kernels on the CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found, oldest = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found} and {oldest} is the least"
    return None


def _unsupported_dtype(dtypes: tuple[torch.dtype, ...]) -> str | None:
    known = [torch.float32, torch.float16, torch.bfloat16] + ([torch.float64] if INTERPRETED else [])
    unknown = [str(dtype) for dtype in dtypes if dtype not in known]
    if unknown:
        return f"The Triton kernels take {', '.join(map(str, known))}, not {', '.join(unknown)}"
    return None


def operand_dtype(dtype: torch.dtype):
    """Triton dtype in which operands of that torch dtype enter `tl.dot`.

    The interpreter keeps bfloat16 as bit patterns and would multiply those, so it gets float32.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that blocks are chosen by, no more than a program may use: 227 KiB on an H100, 163 on an
    A100 and a B200, 99 on consumer cards."""
    if device.type != "cuda":
        return SHARED_MEMORY_OFF_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return memory_of_blocks(properties.major, properties.shared_memory_per_block_optin)


def memory_of_blocks(major: int, limit: int) -> int:
    """The same for the first number of a compute capability, where a program may use `limit` bytes."""
    return limit if major < 10 else min(limit, SHARED_MEMORY_PAST_HOPPER)


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type != "cuda":
        return MULTIPROCESSORS_OFF_DEVICE
    return torch.cuda.get_device_properties(device).multi_processor_count


def within_32_bits(x: torch.Tensor) -> torch.Tensor:
    """x [B, S, H, ...], copied where its heads lie too far apart: kernels count from head to head in 32 bits."""
    return x.contiguous() if x.shape[2] * x.stride(2) >= 2**31 else x


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Launches:
    """Launches of one kernel in a row, of which only numbers change that it is not specialised on.

    Triton looks at types, alignments and constants for the first of them alone. That takes tens of microseconds, as
    long as a short kernel. `constants` are the last parameters of the kernel, in its order.
    """

    def __init__(self, kernel, constants: dict, **options):
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled = None

    def __call__(self, programs: int, *arguments) -> None:
        if self._compiled is None:  # and remains so in the interpreter
            self._compiled = self._kernel[(programs,)](*arguments, **self._constants, **self._options)
        else:
            self._compiled[(programs, 1, 1)](*arguments, *self._constants.values())


@jit
def ordered_bits(x):
    """float32 without NaN and -0 -> uint32 that compare as the numbers do, 0 for -inf."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000) - 0x007FFFFF
