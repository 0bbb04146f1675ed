"""Two tensors compared bit by bit, in pieces, so that memory does not grow with their size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Bytes of one read of a stored tensor, unless a single row is larger.
_READ_BYTES = 8 * 2**20
# Elements compared at once: bounds the float64 copies that a difference is measured with.
_SLICE = 2**21
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorStream:
    """A tensor that is read in pieces: `pieces()` yields parts that, one behind the other along dim 0, are the tensor.

    `recast(dtype)` is the same tensor in another dtype, None where converting the pieces is all there is to it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]
    recast: "Callable[[torch.dtype], TensorStream] | None" = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "TensorStream":
        """The same values, rounded to `dtype`."""
        if dtype == self.dtype:
            return self
        if self.recast is not None:
            return self.recast(dtype)
        return TensorStream(self.name, self.shape, dtype, lambda: (piece.to(dtype) for piece in self.pieces()))


def stored_stream(name: str, source: Any, entry: Any) -> TensorStream:
    """The tensor that `source` (a `Checkpoint`) stores as `entry` (a `StoredTensor`), called `name` in reports."""

    def pieces() -> Iterator[torch.Tensor]:
        if not entry.shape or not entry.nbytes:
            yield source.read(entry.name)
            return
        rows = max(1, _READ_BYTES * entry.shape[0] // entry.nbytes)
        for start in range(0, entry.shape[0], rows):
            yield source.read(entry.name, start, min(start + rows, entry.shape[0]))

    return TensorStream(name, entry.shape, entry.dtype, pieces)


def recipe_stream(recipe: Any, source: Any, recast: Callable[[torch.dtype], TensorStream] | None = None):
    """The tensor that `recipe` (a `Recipe`) makes out of `source`."""
    return TensorStream(recipe.name, tuple(recipe.shape), recipe.dtype, lambda: recipe.parts(source), recast)


@dataclass(frozen=True)
class Difference:
    """One tensor in which A and B differ.

    kind: "only in A", "only in B", "shape", "dtype" (the values are equal once A is rounded to B's dtype), "values",
    "unreadable" (`a` says why).
    For "values": the multi-index of the first different element, both values there, how many elements differ, and the
    largest absolute difference (NaN where a difference is no number).
    """

    name: str
    kind: str
    a: str = ""
    b: str = ""
    index: tuple[int, ...] | None = None
    first_a: float | None = None
    first_b: float | None = None
    elements: int = 0
    max_abs_difference: float | None = None

    def __str__(self) -> str:
        if self.kind == "unreadable":
            return f"{self.name}: {self.a}"
        if self.kind.startswith("only in"):
            return f"{self.name}: {self.kind} ({self.a or self.b})"
        if self.kind == "shape":
            return f"{self.name}: shape {self.a} in A, {self.b} in B"
        if self.kind == "dtype":
            return f"{self.name}: {self.a} in A, {self.b} in B, the values are equal"
        where = f"[{', '.join(map(str, self.index))}]"
        cast = f" ({self.a} in A, {self.b} in B)" if self.a != self.b else ""
        verb = "differs" if self.elements == 1 else "differ"
        return (
            f"{self.name}{cast}: {plural(self.elements, 'element')} {verb}, first at {where}: {self.first_a!r} in A, "
            f"{self.first_b!r} in B; largest difference {self.max_abs_difference:.6g}"
        )


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(
    a: TensorStream, b: TensorStream, progress: Callable[[int], object] = lambda count: None
) -> list[Difference]:
    """What differs between two streams: nothing, the shape, or the dtype and/or the values.

    Values are compared as bits, after rounding A to B's dtype where the dtypes differ. `progress` is called with the
    number of bytes of B done since its last call. Raises `ValueError` when pieces do not add up to the tensor.
    """
    if a.shape != b.shape:
        return [Difference(b.name, "shape", str(list(a.shape)), str(list(b.shape)))]
    names = short_dtype(a.dtype), short_dtype(b.dtype)
    first, elements, largest, seen = None, 0, 0.0, 0
    for x, y in _aligned(a.to(b.dtype), b):
        progress(y.numel() * y.element_size())
        places = _different(x, y)
        if places.numel():
            at = int(places[0])
            first = first or (seen + at, _value(x[at]), _value(y[at]))
            elements += places.numel()
            distance = float((x.to(torch.float64) - y.to(torch.float64))[places].abs().max())
            largest = math.nan if math.isnan(distance + largest) else max(distance, largest)
        seen += x.numel()
    if first is not None:
        return [Difference(b.name, "values", *names, _multi_index(first[0], b.shape), *first[1:], elements, largest)]
    return [Difference(b.name, "dtype", *names)] if a.dtype != b.dtype else []


def _aligned(a: TensorStream, b: TensorStream) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Flat slices of both tensors, equally long, however each of them is cut."""
    sources, rest, seen = (a.pieces(), b.pieces()), [None, None], 0
    while True:
        for i, source in enumerate(sources):
            while rest[i] is None or rest[i].numel() == 0:
                piece = next(source, None)
                if piece is None:
                    rest[i] = None
                    break
                rest[i] = piece.flatten()
        if rest[0] is None or rest[1] is None:
            break
        count = min(rest[0].numel(), rest[1].numel(), _SLICE)
        seen += count
        yield rest[0][:count], rest[1][:count]
        rest = [part[count:] for part in rest]
    # Without this check a reader that stops early would prove equality.
    if seen != b.numel or rest != [None, None]:
        raise ValueError(f"{b.name}: the pieces of A and B hold {seen:,} elements in common, the tensor {b.numel:,}.")


def _different(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    bits = _BITS[x.element_size()]
    x, y = x.view(bits), y.view(bits)
    if torch.equal(x, y):
        return torch.empty(0, dtype=torch.long)
    return (x != y).nonzero().flatten()


def _value(element: torch.Tensor) -> float:
    return float(element.to(torch.float64))


def _multi_index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))
