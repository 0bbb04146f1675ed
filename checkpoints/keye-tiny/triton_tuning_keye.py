"""Blocks of a kernel: those that its file chooses by arithmetic, or others that were measured to be faster.

Either way they depend on head sizes, dtype and the device, never on a length, so that nothing is compiled per length
and one choice serves all calls of a model. `autotune_keye.py` measures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What a kernel may vary: kernel -> field of its blocks -> values that are right for all inputs, if not for all devices.
OPTIONS: dict[str, dict[str, tuple]] = {}
_choosers: dict[str, Callable] = {}
_measured: dict[tuple[str, tuple], object] = {}
_asked: dict[str, tuple] = {}


def tunable(kernel: str, **options: tuple) -> Callable:
    """Decorator of the function that chooses the blocks of `kernel`, a frozen dataclass, by sizes alone."""

    def decorate(choose: Callable) -> Callable:
        OPTIONS[kernel], _choosers[kernel] = options, choose

        @functools.wraps(choose)
        def chosen(*sizes):
            _asked[kernel] = sizes
            blocks = _measured.get((kernel, sizes))
            return choose(*sizes) if blocks is None else blocks

        return chosen

    return decorate


def own_choice(kernel: str, sizes: tuple):
    """The blocks that the file of `kernel` chooses."""
    return _choosers[kernel](*sizes)


def asked_by(kernel: str, step: Callable) -> tuple[object, tuple | None]:
    """The result of a call, and the sizes for which it let blocks of `kernel` be chosen, None when it did not."""
    _asked.pop(kernel, None)
    return step(), _asked.get(kernel)


def use(kernel: str, sizes: tuple, blocks) -> None:
    """From now on `kernel` takes these blocks for these sizes; None stands for its own choice."""
    _measured.pop((kernel, sizes), None)
    if blocks is not None:
        _measured[kernel, sizes] = blocks


@contextmanager
def trial(kernel: str, sizes: tuple, blocks) -> Iterator[None]:
    """The same for the length of a `with` block."""
    before = _measured.get((kernel, sizes))
    use(kernel, sizes, blocks)
    try:
        yield
    finally:
        use(kernel, sizes, before)
