"""The copy engine: boxes of source files into tensors of output files, through small reused buffers.

A tensor whose parts are long runs in both places is copied as byte ranges; ranges that meet are joined. Any other (a
shard along a later dim, a transposed or strided one, a cast) is put together in tiles: contiguous blocks of the output
of a few MiB, filled from all files that have a part of them and written at once. Fresh memory costs more than the I/O,
so every thread keeps one tile and one scratch buffer. Source files are opened read-only.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import xxhash

from am_ckpt._boxes import Box, Shape
from am_ckpt._copy.plan import TILE_BYTES, Job, Range
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.safetensors import element_count
from am_ckpt._io import open_for_reading, read_exactly, write_all
from am_ckpt._sources import Source, row_major_strides

# A piece of a range: small enough, as tiles are, to stay in the cache between reading and writing.
SCRATCH_BYTES = 2**20
_PAGE = 4096
# Processors copy a string of bytes several times slower to a place in a page that is this little after its source's.
_SLOW_DISTANCE = 64
# Reading this many times the wanted bytes in one call is cheaper than several calls.
_MAX_WASTE = 2
_FICLONERANGE = 0x4020940D


class Copier:
    """Runs jobs on `threads` threads. `targets`: descriptors of the output files, open for reading and writing.

    `digest`: hash what is written.
    """

    def __init__(self, targets: dict[str, int], *, threads: int, follow_symlinks: bool, digest: bool = False) -> None:
        self._targets = targets
        self._threads = threads
        self._follow_symlinks = follow_symlinks
        self._digest = digest
        self._sources: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        # What is not read cannot be hashed.
        self._clones = sys.platform == "linux" and not digest
        # Values that a cast made infinite, by tensor.
        self.overflowed: Counter[str] = Counter()

    def run(self, jobs: Iterator[tuple[int, Job]], finished: Callable[[int, Job, str], None]) -> None:
        """Copy every job; `finished` is called after each, by the thread that did it, with the xxh3_64 of its bytes.

        The first error of any thread stops all of them and is raised here, as is an interrupt.
        """
        failures: list[BaseException] = []

        def work() -> None:
            buffers = Buffers()
            try:
                while not self._stopped.is_set():
                    with self._lock:
                        item = next(jobs, None)
                    if item is None:
                        return
                    finished(*item, self._copy(item[1], buffers))
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                failures.append(error)
                self._stopped.set()

        workers = [threading.Thread(target=work, name=f"am-ckpt-copy-{i}") for i in range(self._threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            self._stopped.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            for descriptor in self._sources.values():
                os.close(descriptor)
            self._sources.clear()
        if failures:
            raise failures[0]

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._sources:
                self._sources[path] = open_for_reading(path, follow_symlinks=self._follow_symlinks)
            return self._sources[path]

    def _copy(self, job: Job, buffers: Buffers) -> str:
        if isinstance(job, Range):
            return self._copy_range(job, buffers)
        output, box, target = job.output, job.box, job.target
        cast = output.dtype != output.source_dtype
        block = buffers.block(box.size, ITEM_BYTES[output.source_dtype], 0 if cast else target)
        fill(block, box, output.source, self._open, buffers)
        data = block.reshape(-1).view(numpy.uint8).data
        if cast:
            data, num_lost = _cast(data, output.source_dtype, output.dtype)
            if num_lost:
                with self._lock:
                    self.overflowed[output.name] += num_lost
        write_all(self._targets[output.file], data, target, output.file)
        return xxhash.xxh3_64_hexdigest(data) if self._digest else ""

    def _copy_range(self, job: Range, buffers: Buffers) -> str:
        hasher = xxhash.xxh3_64()
        source, target = self._open(job.path), self._targets[job.file]
        done = self._clone(source, target, job)
        while done < job.count:
            # Up to a multiple of this: the page cache then has it in few large pieces.
            count = min(SCRATCH_BYTES - (job.target + done) % SCRATCH_BYTES, job.count - done)
            view = buffers.between(job.begin + done, job.target + done, count)
            read_exactly(source, view, job.begin + done, job.path)
            if self._digest:
                hasher.update(view)
            write_all(target, view, job.target + done, job.file)
            done += len(view)
        return hasher.hexdigest() if self._digest else ""

    def _clone(self, source: int, target: int, job: Range) -> int:
        """Share the aligned blocks of a range where the file system can (XFS, btrfs); returns how many bytes it did."""
        count = job.count - job.count % _PAGE
        if not self._clones or not count or job.begin % _PAGE or job.target % _PAGE:
            return 0
        try:
            fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, job.begin, count, job.target))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            # Not this file system, or not between these two: do not ask again.
            self._clones = False
            return 0
        return count


class Buffers:
    """The memory of one thread.

    Where in a page bytes lie decides how fast the kernel copies them from one file and to another; mappings start on a
    page, so it can be chosen.
    """

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._tile = numpy.frombuffer(mmap.mmap(-1, TILE_BYTES + _PAGE, flags), numpy.uint8)
        self._scratch = memoryview(mmap.mmap(-1, SCRATCH_BYTES + 2 * _PAGE, flags))

    def block(self, size: Shape, item_bytes: int, target: int = 0) -> numpy.ndarray:
        """A contiguous array of this size (at most `TILE_BYTES`), to be written at byte `target` of a file.

        `target` is a multiple of `item_bytes`. What was in the array before is lost.
        """
        start = target % _PAGE
        return self._tile[start : start + element_count(size) * item_bytes].view(f"u{item_bytes}").reshape(size)

    def between(self, begin: int, target: int, count: int) -> memoryview:
        """`count` bytes (at most `SCRATCH_BYTES`) on their way from byte `begin` of a file to `target`."""
        start = target % _PAGE
        if 0 < (start - begin) % _PAGE < _SLOW_DISTANCE:
            start += _PAGE // 2
        return self._scratch[start : start + count]

    def read(self, begin: int, count: int) -> memoryview:
        """`count` bytes (at most `SCRATCH_BYTES`) to hold what is at byte `begin` of a file."""
        # Not after its source's place, and aligned for every item.
        start = begin % _PAGE // _SLOW_DISTANCE * _SLOW_DISTANCE
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


def fill(block: numpy.ndarray, box: Box, source: Source, open_file: Callable[[Path], int], buffers: Buffers) -> None:
    """Fill `block`, which stands for `box` of a tensor, from the parts of it that files hold."""
    rows = source.rows
    table, places = rows.table, rows.in_box(box)
    strides = row_major_strides(table.size[places]) if table.strides is None else table.strides[places]
    columns = (
        table.file[places],
        table.begin[places],
        table.offset[places],
        table.size[places],
        strides * block.itemsize,
    )
    for file, begin, offset, size, steps in zip(*(column.tolist() for column in columns), strict=True):
        here: list[Any] = []
        for a, n, step, b, m in zip(offset, size, steps, box.offset, box.size, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if start >= stop:
                break
            begin += (start - a) * step
            here.append(slice(start - b, stop - b))
        else:
            path = table.paths[file]
            # With an ellipsis, a 0-d block gives a view instead of a value.
            read_box(open_file(path), begin, tuple(steps), block[(*here, ...)], buffers, path)


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
    if span <= SCRATCH_BYTES and span <= _MAX_WASTE * out.nbytes + _PAGE:
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


def _cast(data: memoryview, source_dtype: str, dtype: str) -> tuple[memoryview, int]:
    """The values of `data` in another floating-point type, rounded to nearest even; how many became infinite."""
    # The one thing here that needs torch: numpy has no bfloat16.
    import torch

    from am_ckpt._train.pieces import TORCH_DTYPES, as_bytes

    values = torch.frombuffer(data, dtype=TORCH_DTYPES[source_dtype])
    cast = values.to(TORCH_DTYPES[dtype])
    infinite = cast.isinf()
    return as_bytes(cast), int((infinite & ~values.isinf()).sum()) if infinite.any() else 0
