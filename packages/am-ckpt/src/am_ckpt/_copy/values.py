"""Values of stored tensors, a block at a time, without torch: for comparing and checking them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy

from am_ckpt._boxes import Box, split
from am_ckpt._copy.engine import fill
from am_ckpt._copy.mapping import Record, whole_record
from am_ckpt._copy.plan import parts_of
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.archive import locate
from am_ckpt._files.ranges import TILE_BYTES, Buffers
from am_ckpt._io import open_for_reading
from am_ckpt._sources import Source, share_tables

# A checkpoint may have more files than a process may open.
_MAX_OPEN = 256


class TensorReader:
    """Keeps the files it has read last open; use it in a `with` statement."""

    def __init__(self, *, follow_symlinks: bool) -> None:
        self._follow_symlinks = follow_symlinks
        self._descriptors: dict[Path, int] = {}
        self._buffers = Buffers()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[path] = open_for_reading(path, follow_symlinks=self._follow_symlinks)
        return self._descriptors[path]

    def located(self, name: str, source: Source) -> Source:
        """`source` with the places of its values instead of the archives that they are in."""
        if source.rows.table.archive_bytes is None:
            return source
        chunks = [locate(name, source.dtype, chunk, self._open(chunk.path)) for chunk in source.chunks]
        return Source(source.dtype, source.shape, chunks)

    def all_located(self, tensors: Mapping[str, Source]) -> dict[str, Source]:
        """`located` of all tensors."""
        archives = [name for name, source in tensors.items() if source.rows.table.archive_bytes is not None]
        found = {name: self.located(name, tensors[name]) for name in archives}
        share_tables(found.values())
        return {**tensors, **found}

    def blocks(
        self, name: str, source: Source, record: Record | None = None, block_item_bytes: int | None = None
    ) -> Iterator[tuple[Box, numpy.ndarray]]:
        """The tensor's values as unsigned integers of its item size, in blocks of about 2 MiB, row-major.

        `record`: the published tensor to read, instead of all of the parameter. `block_item_bytes`: cut as for
        items of this size, so that tensors of different dtypes are cut alike. The array is reused: it holds until the
        next block is asked for.
        """
        source = self.located(name, source)
        item = ITEM_BYTES[source.dtype]
        record = record or whole_record(name, source.shape)
        published = parts_of(record, source)
        for box in split(published.shape, block_item_bytes or item, TILE_BYTES):
            if box.count:
                values = self._buffers.block(box.size, item)
                fill(values, box, published, self._open, self._buffers)
                yield box, values

    def equal(self, name: str, source: Source, other_name: str, other: Source) -> bool:
        """Whether two tensors of equal dtype and shape hold the same bytes."""
        with TensorReader(follow_symlinks=self._follow_symlinks) as second:
            pairs = zip(self.blocks(name, source), second.blocks(other_name, other), strict=True)
            return all(numpy.array_equal(mine, theirs) for (_, mine), (_, theirs) in pairs)
