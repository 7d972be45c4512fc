"""Byte ranges of safetensors files straight into tensors.

Reading a box preads only the ranges that intersect it; into contiguous CPU memory without a copy, otherwise (another
device, a cast, a strided target) through a buffer of bounded size.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from am_ckpt._boxes import Box, describe, require_exact_cover, runs, split
from am_ckpt._format import ITEM_BYTES
from am_ckpt._io import open_for_reading, read_exactly
from am_ckpt._shards import DTYPES, Piece, as_bytes, cut, is_direct
from am_ckpt._sources import Source

# Shorter runs that lie this close together are read as one: a page comes from the disk anyway.
_SMALL_RUN = 4096
_MAX_JOINED = 2**20


def require_readable(name: str, source: Source, boxes: Iterable[Box]) -> None:
    """Raise ``ValueError`` unless the chunks hold every element of ``boxes`` exactly once."""
    for box in boxes:
        parts = [part for chunk in source.chunks if (part := chunk.box.intersect(box)) is not None]
        shifted = [Box(tuple(a - b for a, b in zip(p.offset, box.offset, strict=True)), p.size) for p in parts]
        require_exact_cover(f"{name!r}, part {describe(box)}", box.size, shifted)


class Reader:
    """Open files of one load; ``follow_symlinks`` for folders of the Hugging Face cache. Close it after use.

    Threads may read at the same time.
    """

    def __init__(self, *, follow_symlinks: bool = False) -> None:
        self._follow_symlinks = follow_symlinks
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, source: Source, piece: Piece) -> None:
        """Fill ``piece.values`` with the box of ``source``; values are cast to their dtype block by block."""
        dtype = DTYPES[source.dtype]
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
        item = ITEM_BYTES[source.dtype]
        for chunk in source.chunks:
            region = chunk.box.intersect(box)
            if region is None:
                continue
            ranges = ((chunk.begin + a * item, b * item, n * item) for a, b, n in runs(region, chunk.box, box))
            self._read_ranges(chunk.path, ranges, memory)

    def _read_ranges(self, path: Path, ranges: Iterable[tuple[int, int, int]], memory: memoryview) -> None:
        """Read (file offset, memory offset, bytes) ranges in rising file order, joining short neighbours."""
        descriptor = self._open(path)
        joined: list[tuple[int, int, int]] = []
        for begin, target, count in ranges:
            if count >= _SMALL_RUN:
                read_exactly(descriptor, memory[target : target + count], begin, path)
                continue
            if joined:
                end = joined[-1][0] + joined[-1][2]
                if begin - end > _SMALL_RUN or begin + count - joined[0][0] > _MAX_JOINED:
                    self._read_joined(descriptor, path, joined, memory)
                    joined = []
            joined.append((begin, target, count))
        if joined:
            self._read_joined(descriptor, path, joined, memory)

    def _read_joined(self, descriptor: int, path: Path, ranges: list[tuple[int, int, int]], memory: memoryview) -> None:
        first = ranges[0][0]
        buffer = memoryview(bytearray(ranges[-1][0] + ranges[-1][2] - first))
        read_exactly(descriptor, buffer, first, path)
        for begin, target, count in ranges:
            memory[target : target + count] = buffer[begin - first : begin - first + count]

    def _open(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = open_for_reading(path, follow_symlinks=self._follow_symlinks)
            return self._descriptors[path]
