"""Boxes: rectangles of a global tensor, in elements. Arithmetic alone, without torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from am_ckpt._files.safetensors import element_count
from am_ckpt.errors import IncompleteError

Shape = tuple[int, ...]

# Copies to and from other devices, casts and strided tensors pass through a buffer of about this size.
BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """A rectangle of a global tensor, in elements."""

    offset: Shape
    size: Shape

    @property
    def count(self) -> int:
        return element_count(self.size)

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where there is none."""
        begin, size = [], []
        for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True):
            start = a if a > b else b
            count = (a + n if a + n < b + m else b + m) - start
            if count <= 0:
                return None
            begin.append(start)
            size.append(count)
        return Box(tuple(begin), tuple(size))


@functools.lru_cache(1024)
def row_major(shape: Shape, item_bytes: int) -> Shape:
    """Strides in bytes of a contiguous tensor."""
    return tuple(element_count(shape[dim + 1 :]) * item_bytes for dim in range(len(shape)))


def split(size: Shape, item_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Box]:
    """Cut a box of this size into boxes of at most about `block_bytes`, in row-major order."""
    row = element_count(size[1:]) * item_bytes
    if not size or row * size[0] <= block_bytes:
        yield Box((0,) * len(size), size)
    elif row > block_bytes:
        for index in range(size[0]):
            for box in split(size[1:], item_bytes, block_bytes):
                yield Box((index, *box.offset), (1, *box.size))
    else:
        step = block_bytes // row
        for start in range(0, size[0], step):
            yield Box((start,) + (0,) * (len(size) - 1), (min(step, size[0] - start), *size[1:]))


def runs(region: Box, outer: Box, inner: Box) -> Iterator[tuple[int, int, int]]:
    """Runs of `region` that are contiguous in two row-major arrays, which hold the boxes `outer` and `inner`.

    Yields (first element in `outer`'s array, first element in `inner`'s array, number of elements).
    """
    size = region.size
    # The trailing dims that the region covers completely in both arrays form one run, with the dim before them.
    first = len(size)
    while first > 0:
        first -= 1
        if size[first] != outer.size[first] or size[first] != inner.size[first]:
            break
    length = element_count(size[first:])
    strides = [(element_count(outer.size[dim + 1 :]), element_count(inner.size[dim + 1 :])) for dim in range(len(size))]
    begin_outer = sum((region.offset[d] - outer.offset[d]) * strides[d][0] for d in range(len(size)))
    begin_inner = sum((region.offset[d] - inner.offset[d]) * strides[d][1] for d in range(len(size)))
    for index in itertools.product(*(range(n) for n in size[:first])):
        yield (
            begin_outer + sum(i * strides[d][0] for d, i in enumerate(index)),
            begin_inner + sum(i * strides[d][1] for d, i in enumerate(index)),
            length,
        )


def require_exact_cover(what: str, shape: Shape, boxes: Sequence[Box]) -> None:
    """Raise `ValueError` unless `boxes` tile a tensor of `shape`: every element once, none outside."""
    whole = Box((0,) * len(shape), shape)
    for box in boxes:
        if box.intersect(whole) != box:
            raise ValueError(f"{what} has shape {list(shape)}, a shard of it lies outside: {describe(box)}")
    # Sorted by offset, boxes can only overlap while they overlap on the first dim: few comparisons for shards.
    ordered = sorted(boxes)
    active: list[Box] = []
    for box in ordered:
        if box.size:
            active = [other for other in active if other.offset[0] + other.size[0] > box.offset[0]]
        for other in active:
            if box.intersect(other) is not None:
                raise ValueError(f"{what}: two shards overlap: {describe(other)} and {describe(box)}")
        active.append(box)
    covered = sum(box.count for box in boxes)
    if covered != whole.count:
        raise IncompleteError(
            f"{what} has {whole.count} elements, its shards hold {covered}: a rank's part is missing "
            f"(found {', '.join(describe(box) for box in ordered[:4]) or 'none'})"
        )


def describe(box: Box) -> str:
    """`[0:4, 2:8]`."""
    return "[" + ", ".join(f"{start}:{start + size}" for start, size in zip(box.offset, box.size, strict=True)) + "]"
