"""Bytes of files into memory: ranges piece by piece, and boxes whose elements lie apart. Without torch.

Fresh memory costs more than the I/O, so every thread keeps one tile and one scratch buffer.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy

from am_ckpt._boxes import Shape
from am_ckpt._files.safetensors import element_count
from am_ckpt._io import open_for_reading, read_exactly

# The largest block of a tensor that is put together, and a piece of a range: small enough to stay in the cache between
# reading and writing.
TILE_BYTES = 2 * 2**20
SCRATCH_BYTES = 2**20
PAGE = 4096
# Processors copy a string of bytes several times slower to a place in a page that is this little after its source's.
_SLOW_DISTANCE = 64
# Reading this many times the wanted bytes in one call is cheaper than several calls.
_MAX_WASTE = 2


class Buffers:
    """The memory of one thread.

    Where in a page bytes lie decides how fast the kernel copies them from one file and to another; mappings start on a
    page, so it can be chosen.
    """

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._tile = numpy.frombuffer(mmap.mmap(-1, TILE_BYTES + PAGE, flags), numpy.uint8)
        self._scratch = memoryview(mmap.mmap(-1, SCRATCH_BYTES + 2 * PAGE, flags))

    def block(self, size: Shape, item_bytes: int, target: int = 0) -> numpy.ndarray:
        """A contiguous array of this size (at most `TILE_BYTES`), to be written at byte `target` of a file.

        `target` is a multiple of `item_bytes`. What was in the array before is lost.
        """
        start = target % PAGE
        return self._tile[start : start + element_count(size) * item_bytes].view(f"u{item_bytes}").reshape(size)

    def between(self, begin: int, target: int, count: int) -> memoryview:
        """`count` bytes (at most `SCRATCH_BYTES`) on their way from byte `begin` of a file to `target`."""
        start = target % PAGE
        if 0 < (start - begin) % PAGE < _SLOW_DISTANCE:
            start += PAGE // 2
        return self._scratch[start : start + count]

    def read(self, begin: int, count: int) -> memoryview:
        """`count` bytes (at most `SCRATCH_BYTES`) to hold what is at byte `begin` of a file."""
        # Not after its source's place, and aligned for every item.
        start = begin % PAGE // _SLOW_DISTANCE * _SLOW_DISTANCE
        return self._scratch[start : start + count]


def file_pieces(path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes `begin` to `end` of a file, in pieces that hold until the next is asked for."""
    buffers = Buffers()
    descriptor = open_for_reading(path)
    try:
        for start in range(begin, end, SCRATCH_BYTES):
            piece = buffers.read(start, min(SCRATCH_BYTES, end - start))
            read_exactly(descriptor, piece, start, path)
            yield piece
    finally:
        os.close(descriptor)


def read_box(descriptor: int, begin: int, strides: Shape, out: numpy.ndarray, buffers: Buffers, path: Path) -> None:
    """Fill `out` with the box whose first element is at byte `begin` and whose strides in the file are given."""
    dims = [dim for dim in range(out.ndim) if out.shape[dim] != 1]
    order = sorted(range(len(dims)), key=lambda index: -strides[dims[index]])
    # Most boxes are so already, and a tensor may have many.
    if len(dims) < out.ndim or order != list(range(out.ndim)):
        out = out[(*(slice(None) if n != 1 else 0 for n in out.shape), ...)].transpose(order)
        strides = tuple(strides[dims[index]] for index in order)
    _read(descriptor, begin, strides, out, buffers, path)


def _read(descriptor: int, begin: int, strides: Shape, out: numpy.ndarray, buffers: Buffers, path: Path) -> None:
    """`read_box` for strides that fall from dim to dim."""
    span = out.itemsize
    for n, stride in zip(out.shape, strides, strict=True):
        span += (n - 1) * stride
    if span == out.nbytes and out.flags.c_contiguous:
        read_exactly(descriptor, out.reshape(-1).view(numpy.uint8).data, begin, path)
        return
    if span <= SCRATCH_BYTES and span <= _MAX_WASTE * out.nbytes + PAGE:
        view = buffers.read(begin, span)
        read_exactly(descriptor, view, begin, path)
        out[...] = numpy.ndarray(out.shape, out.dtype, view, strides=strides)
        return
    # Too long or too thin for one read: cut the slowest dim into as many indices as fit.
    inner, wanted = span - (out.shape[0] - 1) * strides[0], out.nbytes // out.shape[0]
    step = 1
    if strides[0] > 0 and max(strides[0], inner) <= _MAX_WASTE * wanted and inner <= SCRATCH_BYTES:
        step = (SCRATCH_BYTES - inner) // strides[0] + 1
    for start in range(0, out.shape[0], step):
        rows = out[start : start + step]
        if len(rows) == 1:
            _read(descriptor, begin + start * strides[0], strides[1:], rows[0, ...], buffers, path)
        else:
            _read(descriptor, begin + start * strides[0], strides, rows, buffers, path)
