"""What shard files hold of which tensors, from their headers: ``DCP_SHARDING_INFO``, as torch's writers put it there.

All of it is arrays, since there may be millions of parts: a row a part, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy

from am_ckpt._boxes import Shape
from am_ckpt._format import ITEM_BYTES, Header, integers, is_sizes, parse_rows
from am_ckpt._sources import Rows, Source, Table, by_dims

_CODES = {name: code for code, name in enumerate(ITEM_BYTES)}
_DTYPES = list(ITEM_BYTES)
# The end of a part that began further out could be more than an int64 holds.
_MAX_PLACE = 2**62


def shard_sources(
    files: Iterable[tuple[Path, Header]], described: Mapping[str, tuple[str, Shape]] | None = None
) -> tuple[dict[str, Source], bool]:
    """The tensors of which shard files hold parts, by name; and whether all files say how large they are as a whole.

    A file without ``DCP_SHARDING_INFO`` holds whole tensors. ``described``: dtype and shape of all tensors, where a
    manifest says so; otherwise they are as large as what is there. Raises ``ValueError`` with file and tensor.
    """
    paths: list[Path] = []
    numbers = {name: number for number, name in enumerate(described or ())}
    found: list[tuple[numpy.ndarray, ...]] = []
    columns = None
    for path, header in files:
        if header.columns is not columns:
            columns = header.columns
            owner = numpy.array([numbers.setdefault(name, len(numbers)) for name in columns.names], numpy.int64)
            code = numpy.array([_CODES[dtype] for dtype in columns.dtypes], numpy.int64)
        if described is not None and len(numbers) > len(described):
            raise ValueError(f"{path} holds {list(numbers)[len(described)]!r}, which the manifest does not list")
        offset, end, said = _places(path, header)
        file = numpy.full(len(owner), len(paths), numpy.int32)
        begin = columns.begins + header.data_start
        found.append((owner, code, file, begin, columns.num_dims, said, columns.sizes, offset, end))
        paths.append(path)
    if not found:
        return {name: Source(*item) for name, item in (described or {}).items()}, True
    owner, code, file, begin, num_dims, said, sizes, offsets, ends = map(numpy.concatenate, zip(*found, strict=True))
    names = list(numbers)
    first = numpy.zeros(len(names), numpy.int64)
    first[owner[::-1]] = numpy.arange(len(owner))[::-1]
    dtypes = [_DTYPES[number] for number in code[first].tolist()]
    dims = num_dims[first]
    if described is not None:
        dtypes = [dtype for dtype, _ in described.values()]
        dims = numpy.array([len(shape) for _, shape in described.values()], numpy.int64)
    codes = numpy.array([_CODES.get(dtype, -1) for dtype in dtypes], numpy.int64)
    for row in numpy.flatnonzero(num_dims != dims[owner])[:1]:
        what = f"{paths[file[row]]}: {names[owner[row]]!r}"
        raise ValueError(f"{what} has {num_dims[row]} dims, other files say {dims[owner[row]]}")
    for row in numpy.flatnonzero(code != codes[owner])[:1]:
        what = f"{paths[file[row]]}: {names[owner[row]]!r}"
        raise ValueError(
            f"{what} is {_DTYPES[code[row]]}, the others say {dtypes[owner[row]]}; the file is damaged or of another "
            "save: copy it again"
        )
    sources: dict[int, Source] = {}
    for rows, (size, offset, end) in by_dims(num_dims, sizes, offsets, ends):
        order = numpy.argsort(owner[rows], kind="stable")
        rows, size, offset, end = rows[order], size[order], offset[order], end[order]
        tensors, starts = numpy.unique(owner[rows], return_index=True)
        if described is None:
            shapes = numpy.maximum.reduceat(end, starts, axis=0)
        else:
            shapes = numpy.array([described[names[tensor]][1] for tensor in tensors.tolist()], numpy.int64)
            shapes = shapes.reshape(size[starts].shape)
            own = numpy.repeat(shapes, numpy.diff(starts, append=len(rows)), axis=0)
            for row in rows[said[rows] & (end != own).any(axis=1)][:1]:
                what = f"{paths[file[row]]}: {names[owner[row]]!r}"
                raise ValueError(f"{what} is not the tensor that the manifest describes")
        # Ranks without a part may have an empty one.
        kept = (size > 0).all(axis=1)
        rows = rows[kept]
        table = Table(paths, file[rows], begin[rows], offset[kept], size[kept])
        edges = (numpy.searchsorted(owner[rows], tensors, side).tolist() for side in ("left", "right"))
        for tensor, shape, start, stop in zip(tensors.tolist(), map(tuple, shapes.tolist()), *edges, strict=True):
            sources[tensor] = Source(dtypes[tensor], shape, Rows(table, start, stop))
    for number, (dtype, shape) in enumerate((described or {}).values()):
        # Empty, or of a rank whose file is missing.
        sources.setdefault(number, Source(dtype, shape))
    return {name: sources[number] for name, number in numbers.items()}, bool(said.all())


def _places(path: Path, header: Header) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Of each tensor of a file: its offset in the global one; the shape of that if it is said, else where it ends;
    whether it is said. The first two as ``Columns.sizes``."""
    columns = header.columns
    count = len(columns.names)
    if "DCP_SHARDING_INFO" not in header.metadata:
        return numpy.zeros_like(columns.sizes), columns.sizes, numpy.ones(count, bool)
    where = f"{path}, DCP_SHARDING_INFO"
    info = parse_rows(header.metadata["DCP_SHARDING_INFO"], where, 0)
    if not isinstance(info, dict):
        raise ValueError(f"{where} is {type(info).__name__}, not an object")
    entries = list(map(info.get, columns.names, repeat({})))
    try:
        offsets = _rows(entries, "saved_offsets", columns.num_dims)
        # All entries have this key alone, or all have both.
        if sum(map(len, entries)) == count:
            return offsets, offsets + columns.sizes, numpy.zeros(count, bool)
        return offsets, _rows(entries, "global_shape", columns.num_dims), numpy.ones(count, bool)
    except (TypeError, KeyError, ValueError):
        return _places_one_by_one(path, header, entries)


def _rows(entries: list[Any], key: str, num_dims: numpy.ndarray) -> numpy.ndarray:
    found = integers(list(map(itemgetter(key), entries)))
    if found is None or (found[0] != num_dims).any() or found[1].max(initial=0) >= _MAX_PLACE:
        raise ValueError(key)
    return found[1]


def _places_one_by_one(
    path: Path, header: Header, entries: list[Any]
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """:func:`_places` where entries do not all say the same, or one is wrong."""
    offsets: list[int] = []
    ends: list[int] = []
    said = []
    for (name, part), entry in zip(header.entries.items(), entries, strict=True):
        dims = len(part.shape)
        what = f"{path}: DCP_SHARDING_INFO of {name!r} is {entry!r}"
        offset = entry.get("saved_offsets", [0] * dims) if isinstance(entry, dict) else None
        shape = entry.get("global_shape") if isinstance(entry, dict) else None
        for row in (offset, shape):
            if row is not None and not (is_sizes(row) and len(row) == dims and max(row, default=0) < _MAX_PLACE):
                raise ValueError(f"{what}, it needs {dims} sizes")
        if offset is None:
            raise ValueError(f"{what}, it needs saved_offsets")
        offsets += offset
        ends += shape if shape is not None else map(sum, zip(offset, part.shape, strict=True))
        said.append(shape is not None)
    return numpy.array(offsets, numpy.int64), numpy.array(ends, numpy.int64), numpy.array(said, bool)
