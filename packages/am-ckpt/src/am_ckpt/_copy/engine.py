"""The copy engine: boxes of source files into tensors of output files, through small reused buffers.

A tensor whose parts are long runs in both places is copied as byte ranges; ranges that meet are joined. Any other (a
shard along a later dim, a transposed or strided one, a cast) is put together in tiles: contiguous blocks of the output
of a few MiB, filled from all files that have a part of them and written at once. Source files are opened read-only.
"""

from __future__ import annotations

import errno
import fcntl
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

from am_ckpt._boxes import Box
from am_ckpt._copy.plan import Job, Range
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.ranges import PAGE, SCRATCH_BYTES, Buffers, read_box
from am_ckpt._io import open_for_reading, read_exactly, write_all
from am_ckpt._sources import Source, row_major_strides

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
        count = job.count - job.count % PAGE
        if not self._clones or not count or job.begin % PAGE or job.target % PAGE:
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


def _cast(data: memoryview, source_dtype: str, dtype: str) -> tuple[memoryview, int]:
    """The values of `data` in another floating-point type, rounded to nearest even; how many became infinite."""
    # The one thing here that needs torch: numpy has no bfloat16.
    import torch

    from am_ckpt._train.pieces import TORCH_DTYPES, as_bytes

    values = torch.frombuffer(data, dtype=TORCH_DTYPES[source_dtype])
    cast = values.to(TORCH_DTYPES[dtype])
    infinite = cast.isinf()
    return as_bytes(cast), int((infinite & ~values.isinf()).sum()) if infinite.any() else 0
