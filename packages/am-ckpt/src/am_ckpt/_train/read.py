"""Byte ranges of safetensors files straight into tensors.

Reading a box preads only the ranges that intersect it; into contiguous CPU memory without a copy, otherwise (another
device, a cast, a strided target) through a buffer of bounded size.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy
import torch

from am_ckpt._boxes import Box, describe, require_exact_cover, split
from am_ckpt._copy.engine import fill
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.ranges import Buffers
from am_ckpt._io import open_for_reading
from am_ckpt._sources import Source
from am_ckpt._train.pieces import TORCH_DTYPES, Piece, as_bytes, cut, is_direct


def require_readable(name: str, source: Source, boxes: Iterable[Box]) -> None:
    """Raise `ValueError` unless the chunks hold every element of `boxes` exactly once."""
    for box in boxes:
        chunks = source.rows.chunks_in(box)
        parts = [part for chunk in chunks if (part := chunk.box.intersect(box)) is not None]
        shifted = [Box(tuple(a - b for a, b in zip(p.offset, box.offset, strict=True)), p.size) for p in parts]
        require_exact_cover(f"{name!r}, part {describe(box)}", box.size, shifted)


def _place(pair: tuple[Source, Piece]) -> tuple[str, int]:
    source, piece = pair
    first = min(source.rows.chunks_in(piece.box), key=lambda chunk: chunk.box)
    return str(first.path), first.begin


def num_threads() -> int:
    """How many threads read at once: the cores that the other ranks of this machine leave, up to four."""
    cores = (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return max(1, min(4, cores))


class _OwnBuffers(threading.local):
    """Each thread has its own."""

    def __init__(self) -> None:
        self.buffers = Buffers()


class Reader:
    """Open files of one load; `follow_symlinks` for folders of the Hugging Face cache. Close it after use.

    Threads may read at the same time.
    """

    def __init__(self, *, follow_symlinks: bool = False) -> None:
        self._follow_symlinks = follow_symlinks
        self._descriptors: dict[Path, int] = {}
        # Other threads may be reading from them.
        self._stale: list[int] = []
        self._opening = threading.Lock()
        self._own = _OwnBuffers()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in (*self._descriptors.values(), *self._stale):
            os.close(descriptor)
        self._descriptors.clear()
        self._stale.clear()

    def read_all(self, wanted: Iterable[tuple[Source, Piece]]) -> None:
        """`read` many pieces, in the order of files, on the cores that the ranks of this machine leave.

        Cut small, so that a large tensor is not left to one thread.
        """
        # Of threads, each has its own.
        inference = torch.is_inference_mode_enabled()

        def read(item: tuple[Source, Piece, Box]) -> None:
            source, piece, part = item
            offset = tuple(a + b for a, b in zip(piece.box.offset, part.offset, strict=True))
            with torch.inference_mode(inference), torch.no_grad():
                self.read(source, Piece(Box(offset, part.size), cut(piece.values, part)))

        ordered = sorted((pair for pair in wanted if pair[1].box.count), key=_place)
        with ThreadPoolExecutor(num_threads()) as threads:
            parts = [
                threads.submit(read, (source, piece, part))
                for source, piece in ordered
                for part in split(piece.box.size, ITEM_BYTES[source.dtype])
            ]
            try:
                for reading in parts:
                    reading.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def read(self, source: Source, piece: Piece) -> None:
        """Fill `piece.values` with the box of `source`; values are cast to their dtype block by block."""
        dtype = TORCH_DTYPES[source.dtype]
        target = piece.values
        if target.dtype == dtype and is_direct(target):
            self._fill(source, piece.box, as_bytes(target))
            return
        for part in split(piece.box.size, ITEM_BYTES[source.dtype]):
            buffer = torch.empty(part.size, dtype=dtype)
            offset = tuple(a + b for a, b in zip(piece.box.offset, part.offset, strict=True))
            self._fill(source, Box(offset, part.size), as_bytes(buffer))
            cut(target, part).copy_(buffer)

    def _fill(self, source: Source, box: Box, memory: memoryview) -> None:
        if not box.count:
            return
        block = numpy.frombuffer(memory, f"u{ITEM_BYTES[source.dtype]}").reshape(box.size)
        try:
            fill(block, box, source, self._open, self._own.buffers)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # The server has forgotten these handles, not the files: opened again, once.
            with self._opening:
                self._stale += self._descriptors.values()
                self._descriptors.clear()
            fill(block, box, source, self._open, self._own.buffers)

    def _open(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = open_for_reading(path, follow_symlinks=self._follow_symlinks)
            return self._descriptors[path]
