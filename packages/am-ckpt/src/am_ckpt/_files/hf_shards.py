"""What shard files hold of which tensors, from their headers: `DCP_SHARDING_INFO`, as torch's writers put it there.

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
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.safetensors import Header, integers, is_sizes, parse_json, parse_rows
from am_ckpt._sources import Rows, Source, Table, by_dims, tuples

_CODES = {name: code for code, name in enumerate(ITEM_BYTES)}
_DTYPES = list(ITEM_BYTES)
# The end of a part that began further out could be more than an int64 holds.
_MAX_PLACE = 2**62


def shard_sources(
    files: Iterable[tuple[Path, Header]], described: Mapping[str, tuple[str, Shape]] | None = None
) -> tuple[dict[str, Source], bool]:
    """The tensors of which shard files hold parts, by name; and whether all files say how large they are as a whole.

    A file without `DCP_SHARDING_INFO` holds whole tensors. `described`: dtype and shape of all tensors, where a
    manifest says so; otherwise they are as large as what is there. Raises `ValueError` with file and tensor.
    """
    collected = _collect(files, described)
    if collected is None:
        return {name: Source(*item) for name, item in (described or {}).items()}, True
    paths, names, (owner, code, file, begin, num_dims, said, sizes, offsets, ends) = collected
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
    sources: list[Source | None] = [None] * len(names)
    for rows, (size, offset, end) in by_dims(num_dims, sizes, offsets, ends):
        order = numpy.argsort(owner[rows], kind="stable")
        rows, size, offset, end = rows[order], size[order], offset[order], end[order]
        starts = numpy.flatnonzero(numpy.diff(owner[rows], prepend=-1))
        tensors = owner[rows[starts]]
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
        own_dtypes = [dtypes[tensor] for tensor in tensors.tolist()]
        found_rows = map(Rows, repeat(table), *edges)
        for tensor, source in zip(tensors.tolist(), map(Source, own_dtypes, tuples(shapes), found_rows), strict=True):
            sources[tensor] = source
    for number, (dtype, shape) in enumerate((described or {}).values()):
        # Empty, or of a rank whose file is missing.
        sources[number] = sources[number] or Source(dtype, shape)
    return {name: source for name, source in zip(names, sources, strict=True) if source is not None}, bool(said.all())


def _collect(
    files: Iterable[tuple[Path, Header]], described: Mapping[str, tuple[str, Shape]] | None
) -> tuple[list[Path], list[str], tuple[numpy.ndarray, ...]] | None:
    """The parts in all files: the files, the tensors' names, and a row of every part; None where there is no file.

    Of a part: the number of its tensor, of its dtype and of its file, its first byte, its number of dims, whether the
    tensor's shape is said; and one after the other its sizes, its offsets, and the tensor's sizes or where it ends.
    """
    paths: list[Path] = []
    numbers = {name: number for number, name in enumerate(described or ())}
    found: list[tuple[numpy.ndarray, ...]] = []
    columns = None
    for path, header in files:
        if header.columns is not columns:
            columns = header.columns
            owner = numpy.array([numbers.setdefault(name, len(numbers)) for name in columns.names], numpy.int32)
            code = numpy.array([_CODES[dtype] for dtype in columns.dtypes], numpy.int8)
        if described is not None and len(numbers) > len(described):
            raise ValueError(f"{path} holds {list(numbers)[len(described)]!r}, which the manifest does not list")
        offset, end, said = _places(path, header)
        file = numpy.full(len(owner), len(paths), numpy.int32)
        begin = columns.begins + header.data_start
        found.append((owner, code, file, begin, columns.num_dims, said, columns.sizes, offset, end))
        paths.append(path)
    if not found:
        return None
    return paths, list(numbers), tuple(map(numpy.concatenate, zip(*found, strict=True)))


def _places(path: Path, header: Header) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Of each tensor of a file: its offset in the global one; the shape of that if it is said, else where it ends;
    whether it is said. The first two as `Columns.sizes`."""
    columns = header.columns
    count = len(columns.names)
    if "DCP_SHARDING_INFO" not in header.metadata:
        return numpy.zeros_like(columns.sizes), columns.sizes, numpy.ones(count, bool)
    text = header.metadata["DCP_SHARDING_INFO"]
    found = _kinds(text)
    if found is None:
        info = parse_rows(text, f"{path}, DCP_SHARDING_INFO", 0)
        if not isinstance(info, dict):
            raise ValueError(f"{path}, DCP_SHARDING_INFO is {type(info).__name__}, not an object")
        found = list(map(info.get, columns.names, repeat({}))), dict(zip(columns.names, range(count), strict=True))
    entries, kind_of = found
    try:
        kind = numpy.array(list(map(kind_of.__getitem__, columns.names)), numpy.int64)
        offsets = _rows(entries, "saved_offsets", kind, columns.num_dims)
        # All entries have this key alone, or all have both.
        if sum(map(len, entries)) == len(entries):
            return offsets, offsets + columns.sizes, numpy.zeros(count, bool)
        return offsets, _rows(entries, "global_shape", kind, columns.num_dims), numpy.ones(count, bool)
    except (TypeError, KeyError, ValueError):
        own = [entries[kind_of[name]] if name in kind_of else {} for name in columns.names]
        return _places_one_by_one(path, header, own)


def _kinds(text: str) -> tuple[list[Any], dict[str, int]] | None:
    """The different entries of `DCP_SHARDING_INFO`, and which of them each tensor has; each is parsed once.

    None unless the text is as torch writes it: `{"NAME": {ENTRY}, "NAME": {ENTRY}}`, without escapes.
    """
    if "\\" in text or not text.startswith('{"') or not text.endswith("}}"):
        return None
    first, *pieces = f'{text[2:-2]}}}, "'.split('": {')
    cut = list(map(str.rpartition, pieces, repeat('}, "')))
    if not cut:
        return None
    found, between, following = zip(*cut, strict=True)
    names = (first, *following[:-1])
    plain = "".join(names)
    numbers = {entry: number for number, entry in enumerate(dict.fromkeys(found))}
    kind_of = dict(zip(names, map(numbers.__getitem__, found), strict=True))
    # Where entries or names are repeated in other ways, or are no JSON, the usual way says so.
    if following[-1] or "" in between or '"' in plain or not plain.isprintable() or len(kind_of) != len(names):
        return None
    if len(numbers) > len(names) // 4 + 1:
        return None
    try:
        return [parse_json(f"{{{entry}}}".encode(), "") for entry in numbers], kind_of
    except ValueError:
        return None


def _rows(entries: list[Any], key: str, kind: numpy.ndarray, num_dims: numpy.ndarray) -> numpy.ndarray:
    """What tensors of these kinds have under `key`, one after the other; raises what any other thing there raises."""
    found = integers(list(map(itemgetter(key), entries)))
    if found is None or found[1].max(initial=0) >= _MAX_PLACE or (found[0][kind] != num_dims).any():
        raise ValueError(key)
    starts = numpy.cumsum(found[0]) - found[0]
    ends = numpy.cumsum(num_dims)
    return found[1][numpy.repeat(starts[kind] - ends + num_dims, num_dims) + numpy.arange(ends[-1] if len(ends) else 0)]


def _places_one_by_one(
    path: Path, header: Header, entries: list[Any]
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """`_places` where entries do not all say the same, or one is wrong."""
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
