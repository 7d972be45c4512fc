"""What is to be copied, planned before a byte is: tensors of output files, and the jobs that fill them.

All of it is arrays, since a checkpoint may have millions of parts; a job becomes an object when it is run. Long runs in
both places are ranges, and ranges that meet are one; everything else is put together in tiles: see `engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy
import xxhash

from am_ckpt._boxes import Box, Shape, row_major
from am_ckpt._copy.mapping import Record, dropped_dims, output_shape
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.ranges import TILE_BYTES
from am_ckpt._files.safetensors import element_count
from am_ckpt._sources import Group, Rows, Source, Table, by_table, places_of, row_major_strides

# Parts with shorter runs than this go through tiles: there, a read serves many runs.
_MIN_RUN_BYTES = 2**18
_MAX_RANGE_BYTES = 64 * 2**20


@dataclass(slots=True)
class Output:
    """One tensor of the result: `source` as `dtype`, from byte `begin` of output file `file`."""

    name: str
    file: str
    begin: int
    dtype: str
    source: Source

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def source_dtype(self) -> str:
        return self.source.dtype


@dataclass(frozen=True)
class Range:
    """`count` bytes from `begin` of `path` to `target` of output file `file`."""

    path: Path
    begin: int
    file: str
    target: int
    count: int


@dataclass(frozen=True)
class Tile:
    """A block of an output tensor that is contiguous there."""

    output: Output
    box: Box

    @property
    def file(self) -> str:
        return self.output.file

    @property
    def target(self) -> int:
        strides = row_major(self.output.shape, ITEM_BYTES[self.output.dtype])
        return self.output.begin + sum(a * b for a, b in zip(self.box.offset, strides, strict=True))

    @property
    def count(self) -> int:
        return self.box.count * ITEM_BYTES[self.output.dtype]


Job = Range | Tile


# Output, source file, and the bytes of jobs: see Jobs.
_Columns = tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, numpy.ndarray, numpy.ndarray]


@dataclass(frozen=True)
class Jobs(Sequence[Job]):
    """All copies, in the order of the outputs, as columns; objects are made of those that are asked for.

    `output`: index into `outputs`; `path`: index into `paths`, -1 for tiles; `begin`, `target`,
    `num_bytes`: as in `Range`, but that tiles begin that many bytes after their output does.
    """

    outputs: Sequence[Output]
    paths: list[Path]
    output: numpy.ndarray
    path: numpy.ndarray
    begin: numpy.ndarray
    target: numpy.ndarray
    num_bytes: numpy.ndarray

    def __len__(self) -> int:
        return len(self.output)

    def digest(self) -> str:
        """Equal for equal jobs on equal parts of files of the same order."""
        tables, *places = places_of([output.source for output in self.outputs])
        columns = [self.output, self.path, self.begin, self.target, self.num_bytes, *places]
        for table in tables:
            columns += [table.file, table.begin, table.offset, table.size]
            columns += [] if table.strides is None else [table.strides]
        hasher = xxhash.xxh3_128()
        for column in columns:
            hasher.update(numpy.ascontiguousarray(column).data)
        digest: str = hasher.hexdigest()
        return digest

    @overload
    def __getitem__(self, index: int) -> Job: ...

    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...

    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        output = self.outputs[self.output[index]]
        columns = (self.path, self.begin, self.target, self.num_bytes)
        path, begin, target, count = (int(column[index]) for column in columns)
        if path < 0:
            item = ITEM_BYTES[output.dtype]
            return Tile(output, _block(output.shape, begin // item, count // item))
        return Range(self.paths[path], begin, output.file, target, count)


def plan_jobs(outputs: Sequence[Output]) -> Jobs:
    """All copies; ranges that continue each other are one, of up to 64 MiB."""
    paths: dict[Path, int] = {}
    none = numpy.zeros(0, numpy.int64)
    columns: list[_Columns] = [(none, none, none, none, none)]
    for group in by_table([output.source for output in outputs]):
        members = [outputs[index] for index in group.members.tolist()]
        numbers = numpy.array([paths.setdefault(path, len(paths)) for path in group.table.paths], numpy.int64)
        columns += _group_jobs(group, members, numbers)
    found = [numpy.concatenate(column) for column in zip(*columns, strict=True)]
    order = numpy.argsort(found[0], kind="stable")
    output, path, begin, target, count = (column[order] for column in found)
    files: dict[str, int] = {}
    file = numpy.array([files.setdefault(output.file, len(files)) for output in outputs], numpy.int64)[output]
    # A range that goes on where the one before it ends; then pieces of what is too long.
    joined = (path[1:] >= 0) & (path[1:] == path[:-1]) & (file[1:] == file[:-1])
    joined &= (begin[1:] == (begin + count)[:-1]) & (target[1:] == (target + count)[:-1])
    starts = numpy.flatnonzero(numpy.append(True, ~joined)[: len(count)])
    count = numpy.add.reduceat(count, starts) if len(starts) else count
    pieces = -(-count // _MAX_RANGE_BYTES)
    index = numpy.repeat(numpy.arange(len(pieces)), pieces)
    skipped = (numpy.arange(len(index)) - (numpy.cumsum(pieces) - pieces)[index]) * _MAX_RANGE_BYTES
    output, path, begin, target = (column[starts][index] for column in (output, path, begin, target))
    count = numpy.minimum(count[index] - skipped, _MAX_RANGE_BYTES)
    return Jobs(outputs, list(paths), output, path, begin + skipped, target + skipped, count)


def _group_jobs(group: Group, outputs: list[Output], numbers: numpy.ndarray) -> Iterator[_Columns]:
    """Ranges, of any length, and tiles of outputs whose parts are in one table; `numbers`: of its paths."""
    table, owner = group.table, group.owner
    item = numpy.array([ITEM_BYTES[output.source.dtype] for output in outputs], numpy.int64)
    out_item = numpy.array([ITEM_BYTES[output.dtype] for output in outputs], numpy.int64)
    size = table.size[group.rows]
    strides = row_major_strides(size) if table.strides is None else table.strides[group.rows]
    strides = strides * item[owner, None]
    targets = (row_major_strides(group.shapes) * out_item[:, None])[owner]
    # Of each part, the trailing dims that are contiguous in both places form a run; `outer` dims are left.
    run, outer = item[owner], numpy.full(len(owner), size.shape[1])
    alike = numpy.ones(len(owner), bool)
    for dim in reversed(range(size.shape[1])):
        alike &= (size[:, dim] == 1) | ((strides[:, dim] == run) & (targets[:, dim] == run))
        run = numpy.where(alike, run * size[:, dim], run)
        outer -= alike
    # A whole tensor is one run, whatever its size.
    whole = (numpy.bincount(owner, minlength=len(outputs)) == 1)[owner] & (outer == 0)
    tiled = numpy.array([output.dtype != output.source.dtype for output in outputs], bool)
    tiled[owner[(run < _MIN_RUN_BYTES) & ~whole]] = True
    yield _tiles(group, tiled, item, out_item)

    rows = numpy.flatnonzero(~tiled[owner] & (run > 0))
    indices = numpy.where(numpy.arange(size.shape[1]) < outer[rows, None], size[rows], 1)
    num_runs = indices.prod(axis=1)
    part = numpy.repeat(numpy.arange(len(rows)), num_runs)
    left = numpy.arange(len(part)) - (numpy.cumsum(num_runs) - num_runs)[part]
    begins = numpy.array([output.begin for output in outputs], numpy.int64)
    begin = table.begin[group.rows[rows]][part]
    target = (begins[owner[rows]] + (table.offset[group.rows[rows]] * targets[rows]).sum(axis=1))[part]
    for dim in reversed(range(size.shape[1])):
        left, index = numpy.divmod(left, indices[part, dim])
        begin = begin + index * strides[rows, dim][part]
        target = target + index * targets[rows, dim][part]
    rows = rows[part]
    yield group.members[owner[rows]], numbers[table.file[group.rows[rows]]], begin, target, run[rows]


def _tiles(group: Group, tiled: numpy.ndarray, item: numpy.ndarray, out_item: numpy.ndarray) -> _Columns:
    """The tiles of the outputs that are `tiled`."""
    elements = group.shapes.prod(axis=1)
    # Nearly all tensors are one tile, and there may be many.
    small = numpy.flatnonzero(tiled & (elements > 0) & (elements * item <= TILE_BYTES))
    member, first, count = [small], [numpy.zeros_like(small)], [elements[small]]
    for index in numpy.flatnonzero(tiled & (elements * item > TILE_BYTES)).tolist():
        starts, counts = _cut(tuple(group.shapes[index].tolist()), TILE_BYTES // int(item[index]))
        member.append(numpy.full(len(starts), index))
        first.append(starts)
        count.append(counts)
    owner = numpy.concatenate(member)
    size = out_item[owner]
    begin, nothing = numpy.concatenate(first) * size, numpy.zeros_like(owner)
    return group.members[owner], nothing - 1, begin, nothing, numpy.concatenate(count) * size


def _cut(shape: Shape, limit: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """First elements, and their numbers, of contiguous boxes of at most `limit` elements that tile a tensor."""
    dim, inner = 0, element_count(shape[1:])
    while inner > limit:
        dim += 1
        inner = element_count(shape[dim + 1 :])
    step, outer = limit // inner * inner, shape[dim] * inner
    starts = (numpy.arange(0, element_count(shape), outer)[:, None] + numpy.arange(0, outer, step)).reshape(-1)
    return starts, numpy.minimum(step, outer - starts % outer)


def _block(shape: Shape, first: int, count: int) -> Box:
    """The box of `count` elements from element `first` on."""
    strides = row_major(shape, 1)
    offset = tuple(first // stride % size for stride, size in zip(strides, shape, strict=True))
    return Box(offset, tuple(min(size, max(1, count // stride)) for stride, size in zip(strides, shape, strict=True)))


def parts_of(record: Record, source: Source) -> Source:
    """The published tensor of `record`, in its own dims: where it is in the files of its parameter."""
    rows, dropped = source.rows, dropped_dims(record, source.shape)
    if record.box.size == source.shape and not record.transpose and not dropped:
        return Source(source.dtype, source.shape, rows)
    table, places = rows.table, rows.in_box(record.box)
    there, size = table.offset[places], table.size[places]
    strides = row_major_strides(size) if table.strides is None else table.strides[places]
    low = numpy.array(record.box.offset, numpy.int64)
    offset, end = numpy.maximum(there, low), numpy.minimum(there + size, low + record.box.size)
    begin = table.begin[places] + ((offset - there) * strides).sum(axis=1) * ITEM_BYTES[source.dtype]
    kept = (offset < end).all(axis=1)
    dims = list(range(len(source.shape)))
    if record.transpose:
        dims[-1], dims[-2] = dims[-2], dims[-1]
    dims = [dim for index, dim in enumerate(dims) if index not in dropped]
    boxes = [column[kept][:, dims] for column in (offset - low, end - offset, strides)]
    part = Table(table.paths, table.file[places][kept], begin[kept], *boxes)
    return Source(source.dtype, output_shape(record, source.shape), Rows(part, 0, len(part.begin)))
