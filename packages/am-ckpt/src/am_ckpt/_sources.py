"""Tensors on disk: dtype, global shape, and the chunks of files that hold their boxes. Without torch.

Chunks are rows of tables: a checkpoint may have millions, and an object of each takes longer to make than its bytes to
copy. Objects are made of those of one tensor, when they are asked for.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, overload

import numpy

from am_ckpt._boxes import Box, Shape
from am_ckpt._files.hf_folder import INDEX, SINGLE
from am_ckpt._files.safetensors import Header, parse_json, read_header
from am_ckpt._files.step import read_file
from am_ckpt.errors import UnsafeError

_MAX_INDEX_BYTES = 256 * 2**20
# A tensor of fewer chunks is looked through.
_MIN_SORTED = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """`box` of a tensor from byte `begin` of `path`.

    Row-major, unless `strides` (in elements) say otherwise. With `archive_bytes`, what begins there is an archive
    of that many bytes written by `torch.save`; the values lie inside it.
    """

    path: Path
    begin: int
    box: Box
    strides: Shape | None = None
    archive_bytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Chunks as columns: those of tensors of the same number of dims, each tensor's rows beside each other.

    `file`: index into `paths`; `begin`: as in `Chunk`; `offset`, `size` and, where not all chunks are
    row-major, `strides` are `[rows, dims]`; `archive_bytes`: None where no chunk is an archive.
    """

    paths: list[Path]
    file: numpy.ndarray
    begin: numpy.ndarray
    offset: numpy.ndarray
    size: numpy.ndarray
    strides: numpy.ndarray | None = None
    archive_bytes: numpy.ndarray | None = None


@dataclass(slots=True, eq=False)
class Rows(Sequence[Chunk]):
    """The chunks of one tensor: the rows `first` to `last` of a table, in the order of the files."""

    table: Table
    first: int
    last: int
    _by_place: tuple[int, numpy.ndarray, numpy.ndarray, numpy.ndarray] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.last - self.first

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...

    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        rows = range(self.first, self.last)[index]
        if isinstance(rows, int):
            return self._chunks(numpy.array([rows]))[0]
        return self._chunks(numpy.arange(rows.start, rows.stop, rows.step))

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self[:])

    def _chunks(self, rows: numpy.ndarray) -> list[Chunk]:
        table = self.table
        columns: list[Iterable[Any]] = [
            repeat(None) if column is None else column[rows].tolist()
            for column in (table.file, table.begin, table.offset, table.size, table.strides, table.archive_bytes)
        ]
        return [
            Chunk(
                table.paths[file],
                begin,
                Box(tuple(offset), tuple(size)),
                None if strides is None else tuple(strides),
                archive_bytes,
            )
            for file, begin, offset, size, strides, archive_bytes in zip(*columns, strict=False)
        ]

    def chunks_in(self, box: Box) -> list[Chunk]:
        """At least all chunks that have elements of `box`."""
        return self._chunks(self.in_box(box))

    def in_box(self, box: Box) -> numpy.ndarray:
        """The rows of at least all chunks that have elements of `box`, found without going through all of many."""
        if len(self) < _MIN_SORTED or not box.size:
            return numpy.arange(self.first, self.last)
        dim, order, starts, stops = self._sorted()
        begin = box.offset[dim]
        low = numpy.searchsorted(stops, begin, "right")
        return order[low : numpy.searchsorted(starts, begin + box.size[dim])]

    def _sorted(self) -> tuple[int, numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The dim that is cut most, the rows in its order, where they start on it, and where all up to each stop."""
        if self._by_place is None:
            offset, size = (column[self.first : self.last] for column in (self.table.offset, self.table.size))
            distinct = numpy.count_nonzero(numpy.diff(numpy.sort(offset, axis=0), axis=0), axis=0)
            dim = int(distinct.argmax())
            order = numpy.argsort(offset[:, dim], kind="stable")
            starts = offset[order, dim]
            stops = numpy.maximum.accumulate(starts + size[order, dim])
            self._by_place = dim, order + self.first, starts, stops
        return self._by_place


@dataclass(slots=True)
class Source:
    """A tensor on disk."""

    dtype: str
    shape: Shape
    chunks: Sequence[Chunk] = field(default_factory=list)

    @property
    def rows(self) -> Rows:
        """The chunks as rows of a table, which they are from then on."""
        if not isinstance(self.chunks, Rows):
            self.chunks = Rows(_table(self.chunks, len(self.shape)), 0, len(self.chunks))
        return self.chunks

    @property
    def paths(self) -> list[Path]:
        """The files of the chunks, in the order of the first of each."""
        rows = self.rows
        return [rows.table.paths[file] for file in dict.fromkeys(rows.table.file[rows.first : rows.last].tolist())]


def paths_of(sources: Iterable[Source]) -> set[Path]:
    """The files that hold `sources`, with those beside them in the same tables."""
    tables = {id(rows.table): rows.table for source in sources for rows in (source.rows,)}
    return {path for table in tables.values() for path in table.paths}


@dataclass(frozen=True)
class Group:
    """The chunks of all tensors that are in one table.

    `members [tensors]`: which tensors these are; `shapes [tensors, dims]`. `rows [chunks]`: their rows in the
    table, `owner [chunks]`: of which of the tensors each is; in the order of the tensors.
    """

    table: Table
    members: numpy.ndarray
    shapes: numpy.ndarray
    rows: numpy.ndarray
    owner: numpy.ndarray


def by_table(sources: Sequence[Source]) -> Iterator[Group]:
    """All chunks of `sources`."""
    tables, number, firsts, lasts = places_of(sources)
    order = numpy.argsort(number, kind="stable")
    edges = numpy.searchsorted(number[order], numpy.arange(len(tables) + 1)).tolist()
    for table, start, stop in zip(tables, edges[:-1], edges[1:], strict=True):
        members = order[start:stop]
        counts = lasts[members] - firsts[members]
        shapes = numpy.array([sources[index].shape for index in members.tolist()], numpy.int64)
        owner = numpy.repeat(numpy.arange(len(members)), counts)
        rows = numpy.arange(len(owner)) + (firsts[members] - numpy.cumsum(counts) + counts)[owner]
        yield Group(table, members, shapes, rows, owner)


def places_of(sources: Sequence[Source]) -> tuple[list[Table], numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """The tables of `sources`; of each source, which of these it is in, and its first and last row."""
    rows = [source.rows for source in sources]
    tables = {id(own.table): own.table for own in rows}
    numbers = {key: number for number, key in enumerate(tables)}
    columns = ([numbers[id(own.table)] for own in rows], [own.first for own in rows], [own.last for own in rows])
    number, first, last = (numpy.array(column, numpy.int64) for column in columns)
    return list(tables.values()), number, first, last


def share_tables(sources: Iterable[Source]) -> None:
    """Put chunks that are in no table yet into one for each number of dims: they are then planned together."""
    by_num_dims: dict[int, list[Source]] = {}
    for source in sources:
        if not isinstance(source.chunks, Rows):
            by_num_dims.setdefault(len(source.shape), []).append(source)
    for num_dims, group in by_num_dims.items():
        table = _table([chunk for source in group for chunk in source.chunks], num_dims)
        last = 0
        for source in group:
            first, last = last, last + len(source.chunks)
            source.chunks = Rows(table, first, last)


def _table(chunks: Sequence[Chunk], num_dims: int) -> Table:
    files: dict[Path, int] = {}
    file = numpy.array([files.setdefault(chunk.path, len(files)) for chunk in chunks], numpy.int32)
    begin = numpy.array([chunk.begin for chunk in chunks], numpy.int64)
    offset, size = (
        numpy.array(rows, numpy.int64).reshape(len(chunks), num_dims)
        for rows in ([chunk.box.offset for chunk in chunks], [chunk.box.size for chunk in chunks])
    )
    strides = None
    if any(chunk.strides is not None for chunk in chunks):
        strides = row_major_strides(size)
        for row, chunk in enumerate(chunks):
            strides[row] = strides[row] if chunk.strides is None else chunk.strides
    archives = [chunk.archive_bytes for chunk in chunks]
    # All chunks of a checkpoint are archives, or none.
    archive_bytes = None if None in archives or not archives else numpy.array(archives, numpy.int64)
    return Table(list(files), file, begin, offset, size, strides, archive_bytes)


def row_major_strides(size: numpy.ndarray) -> numpy.ndarray:
    """Strides, in elements, of contiguous tensors whose sizes are the rows of `size`."""
    strides = numpy.ones_like(size)
    for dim in reversed(range(size.shape[1] - 1)):
        strides[:, dim] = strides[:, dim + 1] * size[:, dim + 1]
    return strides


def by_dims(num_dims: numpy.ndarray, *columns: numpy.ndarray) -> Iterator[tuple[numpy.ndarray, list[numpy.ndarray]]]:
    """Rows of the same number of dims, and `[rows, dims]` of `columns`, in which rows lie one after the other."""
    found = numpy.flatnonzero(numpy.bincount(num_dims)).tolist()
    if len(found) == 1:
        yield numpy.arange(len(num_dims)), [column.reshape(len(num_dims), found[0]) for column in columns]
        return
    starts = numpy.cumsum(num_dims) - num_dims
    for dims in found:
        rows = numpy.flatnonzero(num_dims == dims)
        places = starts[rows][:, None] + numpy.arange(dims)
        yield rows, [column[places] for column in columns]


def tuples(rows: numpy.ndarray) -> list[tuple[int, ...]]:
    """The rows of an array as tuples."""
    return list(zip(*rows.T.tolist(), strict=True)) if rows.shape[1] else [()] * len(rows)


def whole_sources(path: Path, header: Header) -> dict[str, Source]:
    """The tensors of an ordinary safetensors file, each whole."""
    columns = header.columns
    found: dict[str, Source] = {}
    for rows, (size,) in by_dims(columns.num_dims, columns.sizes):
        begin = columns.begins[rows] + header.data_start
        table = Table([path], numpy.zeros(len(rows), numpy.int32), begin, numpy.zeros_like(size), size)
        for first, (row, shape) in enumerate(zip(rows.tolist(), tuples(size), strict=True)):
            found[columns.names[row]] = Source(columns.dtypes[row], shape, Rows(table, first, first + 1))
    return {name: found[name] for name in columns.names}


def hf_sources(folder: Path) -> dict[str, Source]:
    """The tensors of a Hugging Face folder by name; every header is checked, no data is read."""
    if (folder / INDEX).is_file():
        return _indexed_sources(folder)
    if (folder / SINGLE).is_file():
        return whole_sources(folder / SINGLE, read_header(folder / SINGLE, follow_symlinks=True))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give the local folder of a model, not the name of one on a hub"
        )
    there = sorted(path.name for path in folder.iterdir())
    advice = ""
    if any(name.startswith("shard-") for name in there):
        advice = "; it holds the shards of a training checkpoint: load them with Checkpointer.load, or merge them"
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in there):
        advice = "; it holds pickled weights, which can run code: convert them to safetensors first"
    raise FileNotFoundError(
        f"{folder} has neither {SINGLE} nor {INDEX}{advice} (found {', '.join(there[:8]) or 'nothing'})"
    )


def read_weight_map(where: Path, suffix: str) -> dict[str, str]:
    """Tensor -> file of an index of a Hugging Face folder; every file is in the folder and ends in `suffix`."""
    try:
        index = parse_json(read_file(where, _MAX_INDEX_BYTES, follow_symlinks=True), str(where))
    except UnsafeError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; copy the file again or write it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{where} has no weight_map of names to file names; copy it again or write it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or not name.endswith(suffix):
            raise UnsafeError(f"{where} names {name!r}; only {suffix[1:]} files of the folder itself are read")
        if not (where.parent / name).is_file():
            raise FileNotFoundError(f"{where.parent / name} is missing; {where.name} expects {len(names)} files")
    return weight_map


def _indexed_sources(folder: Path) -> dict[str, Source]:
    where = folder / INDEX
    weight_map = read_weight_map(where, ".safetensors")
    files = {
        name: whole_sources(folder / name, read_header(folder / name, follow_symlinks=True))
        for name in sorted(set(weight_map.values()))
    }
    absent = [tensor for tensor, name in weight_map.items() if tensor not in files[name]]
    if absent:
        raise ValueError(
            f"{where} places {absent[0]!r} in {weight_map[absent[0]]}, which lacks it ({len(absent)} such); copy both "
            "again"
        )
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Plans are millions of small objects without cycles; going through them again and again takes as long as they."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
