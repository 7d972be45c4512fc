"""The safetensors container: a bounded, strict header parser and an aligned header writer.

A safetensors file is `<u64 header length><JSON header><data>`. The parser allocates no more than the header's own
size (at most 100 MB, never more than the file holds) and refuses what the format forbids or what hides trouble:
duplicate keys, holes, overlaps, trailing bytes, sizes that disagree with shapes. The writer pads the header with
spaces so that data starts on a multiple of 4096 bytes, and puts tensors whose size is a multiple of 4096 first: ranges
can then be cloned or read with direct I/O. Reference: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import numpy

from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._io import open_for_reading, read_exactly

ALIGNMENT = 4096
MAX_HEADER_BYTES = 100_000_000
# numpy and torch have no tensors of more.
_MAX_DIMS = 64
_METADATA = '{"__metadata__":'
_NEXT_NAME = re.compile(r',[ \t\n\r]*"')


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: `begin` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Columns:
    """The tensors of a file as columns, for headers hold up to millions in all.

    `begins` and `ends`: bytes from the start of the data, int64. `sizes`: the shapes one after the other, int64;
    `num_dims`: how many of them each tensor has. `text`: the JSON they were read from.
    """

    names: list[str]
    dtypes: list[str]
    num_dims: numpy.ndarray
    sizes: numpy.ndarray
    begins: numpy.ndarray
    ends: numpy.ndarray
    text: str = ""


@dataclass(frozen=True)
class Header:
    """A parsed header. `text` is its exact bytes including the length prefix, `data_start` their number."""

    metadata: dict[str, str]
    columns: Columns
    text: bytes
    file_bytes: int

    @property
    def data_start(self) -> int:
        return len(self.text)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The tensors by name, in the order of the header."""
        columns, start = self.columns, self.data_start
        sizes, stops = columns.sizes.tolist(), numpy.cumsum(columns.num_dims).tolist()
        shapes = [tuple(sizes[a:b]) for a, b in zip([0, *stops], stops, strict=False)]
        begins, ends = ((offsets + start).tolist() for offsets in (columns.begins, columns.ends))
        return dict(zip(columns.names, map(Entry, columns.dtypes, shapes, begins, ends), strict=True))


def element_count(shape: Iterable[int]) -> int:
    """Number of elements of a tensor of this shape (1 for a 0-d tensor)."""
    return math.prod(shape)


def is_sizes(value: Any) -> bool:
    """Whether `value` is a list of integers that can be sizes or offsets."""
    if not isinstance(value, list):
        return False
    # A loop takes half the time of all(), and headers hold millions.
    for item in value:  # noqa: SIM110
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads`: two values under one key are an error, not the last one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice in one JSON object")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json(text: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN. `where` begins every error message."""
    try:
        # Decoded here, since json would take UTF-16 and UTF-32 too.
        return json.loads(text.decode(), object_pairs_hook=refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error or 'nested too deeply'}") from error


def parse_rows(text: str, where: str, num_texts: int) -> Any:
    """`parse_json` for an object of objects with `num_texts` values each that are text; faster.

    Of a key that occurs twice only the last value is left; then the text has more strings than what was made of it.
    """
    try:
        rows = json.loads(text, parse_constant=_refuse_constant)
        kept = (1 + num_texts) * len(rows) + sum(map(len, rows.values()))
        if kept == _num_strings(text) and set(map(type, rows.values())) <= {dict}:
            return rows
    except (ValueError, TypeError, AttributeError, RecursionError):
        # Said better below.
        pass
    return parse_json(text.encode(), where)


def _num_strings(text: str) -> int:
    """Strings in valid JSON: half of the quotes that are not escaped."""
    escaped = text.replace("\\\\", "").count('\\"') if "\\" in text else 0
    return (text.count('"') - escaped) // 2


def integers(rows: list[Any]) -> tuple[numpy.ndarray, numpy.ndarray] | None:
    """Length of each list in `rows` and all of their items, int64; None where `is_sizes` is not true of one."""
    if not set(map(type, rows)) <= {list}:
        return None
    items = list(chain.from_iterable(rows))
    if not set(map(type, items)) <= {int}:
        return None
    try:
        values = numpy.array(array("q", items))
    except OverflowError:
        return None
    if values.size and values.min() < 0:
        return None
    return numpy.fromiter(map(len, rows), numpy.int64, len(rows)), values


def products(num_dims: numpy.ndarray, sizes: numpy.ndarray) -> numpy.ndarray:
    """Number of elements of each tensor, from its number of dims and the sizes of all one after the other.

    Exact where it is less than `2**58`; otherwise some number that is not less.
    """
    counts = numpy.ones(len(num_dims), numpy.int64)
    starts = (numpy.cumsum(num_dims) - num_dims)[num_dims > 0]
    if starts.size:
        exact = numpy.multiply.reduceat(sizes, starts)
        # Without zeros, so that the product of the other sizes, which has no bound, does not matter.
        empty = numpy.minimum.reduceat(sizes, starts) == 0
        with numpy.errstate(over="ignore"):
            about = numpy.multiply.reduceat(numpy.maximum(sizes, 1).astype(numpy.float64), starts)
        counts[num_dims > 0] = numpy.where(empty, 0, numpy.where(about < 2**59, exact, 2**59))
    return counts


def parse_header(text: bytes, file_bytes: int, where: str, like: Header | None = None) -> Header:
    """Check and decode `text`, the length prefix and the header of a file of `file_bytes` bytes.

    `like`: a header that is likely to describe the same tensors, as those of other ranks do.
    """
    metadata, rest = _split(text[8:])
    if rest and like is not None and rest == like.columns.text:
        columns = like.columns
    else:
        raw = parse_rows(rest, where, 1) if rest else parse_json(text[8:], where)
        if not isinstance(raw, dict):
            raise ValueError(f"{where}: the header is {type(raw).__name__}, not an object")
        if rest and "__metadata__" in raw:
            raise ValueError(f"{where}: not valid JSON: the key '__metadata__' occurs twice in one JSON object")
        metadata = metadata if rest else raw.pop("__metadata__", {})
        columns = _columns(raw, rest, len(text), where)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: __metadata__ must map strings to strings")
    position = len(text) + int(columns.ends.max(initial=0))
    if position != file_bytes:
        state = "truncated" if position > file_bytes else "followed by bytes that belong to no tensor"
        raise ValueError(f"{where}: {state}: the header describes {position} bytes, the file has {file_bytes}")
    return Header(metadata, columns, text, file_bytes)


def _split(text: bytes) -> tuple[Any, str]:
    """The metadata, which writers put first, and the header without it; nothing where it is not so."""
    try:
        decoded = text.decode()
        if decoded.startswith(_METADATA):
            decoder = json.JSONDecoder(object_pairs_hook=refuse_duplicates, parse_constant=_refuse_constant)
            start = len(_METADATA) + decoded.startswith(" ", len(_METADATA))
            metadata, end = decoder.raw_decode(decoded, start)
            # A comma alone is not JSON.
            if _NEXT_NAME.match(decoded, end):
                # Without the padding, which is as long as the metadata makes it.
                return metadata, "{" + decoded[end + 1 :].rstrip(" ")
    except (ValueError, RecursionError):
        # Said better where all of it is parsed.
        pass
    return {}, ""


def _columns(raw: dict[str, Any], text: str, data_start: int, where: str) -> Columns:
    values = list(raw.values())
    try:
        dtypes, shapes, places = (list(map(itemgetter(key), values)) for key in ("dtype", "shape", "data_offsets"))
        items = numpy.array([ITEM_BYTES[dtype] for dtype in dtypes], numpy.int64)
        rows, offsets = integers(shapes), integers(places)
        if rows is None or offsets is None or not set(map(len, values)) <= {3} or not set(offsets[0].tolist()) <= {2}:
            raise ValueError
        begins, ends = offsets[1][0::2], offsets[1][1::2]
        counts = products(*rows)
        if rows[0].max(initial=0) > _MAX_DIMS or (counts >= 2**59).any() or (ends - begins != counts * items).any():
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        problems = filter(None, map(_entry_problem, raw, values))
        raise ValueError(f"{where}: {next(problems, 'its tensors are larger than any file')}") from error
    order = numpy.lexsort((ends, begins))
    expected = numpy.concatenate(([0], ends[order][:-1])) if values else begins
    wrong = numpy.flatnonzero(begins[order] != expected)
    if wrong.size:
        begin, position = int(begins[order[wrong[0]]]), int(expected[wrong[0]])
        name = list(raw)[order[wrong[0]]]
        kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
        raise ValueError(
            f"{where}: tensor {name!r} {kind} (begins at byte {data_start + begin}, expected {data_start + position})"
        )
    return Columns(list(raw), dtypes, *rows, begins, ends, text)


def _entry_problem(name: str, value: Any) -> str | None:
    """Why an entry of a header is not what it must be."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return f"tensor {name!r} must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"tensor {name!r} has dtype {dtype!r}; supported are {', '.join(ITEM_BYTES)}"
    for field in (shape, offsets):
        if not is_sizes(field):
            return f"tensor {name!r}: {field!r} is not a list of non-negative integers"
    if len(offsets) != 2 or offsets[1] - offsets[0] != element_count(shape) * ITEM_BYTES[dtype]:
        return f"tensor {name!r}: offsets {offsets} do not fit {dtype} {shape}"
    if len(shape) > _MAX_DIMS:
        return f"tensor {name!r} has {len(shape)} dims, more than {_MAX_DIMS}"
    if element_count(shape) >= 2**59:
        return f"tensor {name!r} of shape {shape} is larger than any file"
    return None


def read_header(path: Path, *, follow_symlinks: bool = False, like: Header | None = None) -> Header:
    """Read and check the header of `path`; `ValueError` names the file, `OSError` where it cannot be read.

    `like`: see `parse_header`.
    """
    descriptor = open_for_reading(path, follow_symlinks=follow_symlinks)
    try:
        file_bytes = os.fstat(descriptor).st_size
        if file_bytes < 10:
            raise ValueError(
                f"{path}: truncated: {file_bytes} bytes are too few for a safetensors file; copy the file again"
            )
        prefix = bytearray(8)
        read_exactly(descriptor, prefix, 0, path)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(
                f"{path}: not a safetensors file or truncated: its header claims {length} bytes, "
                f"the file has {file_bytes} and the limit is {MAX_HEADER_BYTES}; copy the file again"
            )
        text = bytearray(8 + length)
        read_exactly(descriptor, text, 0, path)
        try:
            return parse_header(bytes(text), file_bytes, str(path), like)
        except ValueError as error:
            raise ValueError(f"{error}; copy the file again, or write it again") from error
    finally:
        os.close(descriptor)


def require_storable(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that no tensor of a safetensors file can have."""
    for name in names:
        if name == "__metadata__":
            raise ValueError(
                f"a safetensors file cannot hold a tensor named {name!r}, its own entry; name it otherwise"
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a safetensors file cannot hold a tensor named {name!r}: half a surrogate pair has no UTF-8; name it "
                "otherwise"
            ) from error


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """The header of a file that will hold `tensors` (name -> safetensors dtype, shape); data starts aligned.

    The columns are in file order: tensors of a multiple of 4096 bytes first, then larger items before smaller ones,
    so that every tensor starts on a multiple of its item size.
    """
    names = sorted(tensors)
    require_storable(names)
    dtypes, shapes = [tensors[name][0] for name in names], [tensors[name][1] for name in names]
    items = numpy.array([ITEM_BYTES[dtype] for dtype in dtypes], numpy.int64)
    sizes = numpy.array([math.prod(shape) for shape in shapes], numpy.int64) * items
    order = numpy.lexsort((-items, sizes % ALIGNMENT != 0))
    if (numpy.diff(order) < 0).any():
        names, dtypes, shapes = ([column[index] for index in order.tolist()] for column in (names, dtypes, shapes))
    ends = numpy.cumsum(sizes[order])
    begins = ends - sizes[order]
    rows = [json.dumps({"__metadata__": dict(metadata)}, separators=(",", ":"), ensure_ascii=False)[1:-1]]
    # No newline is inside of a JSON string.
    quoted = json.dumps(names, separators=("\n", ":"), ensure_ascii=False)[1:-1].split("\n")
    listed = {shape: ",".join(map(str, shape)) for shape in set(shapes)}
    rows += [
        f'{name}:{{"dtype":"{dtype}","shape":[{listed[shape]}],"data_offsets":[{begin},{end}]}}'
        for name, dtype, shape, begin, end in zip(
            quoted if names else (), dtypes, shapes, begins.tolist(), ends.tolist(), strict=True
        )
    ]
    body = f"{{{','.join(rows)}}}".encode()
    body += b" " * (-(8 + len(body)) % ALIGNMENT)
    if len(body) > MAX_HEADER_BYTES:
        raise ValueError(f"a safetensors header of {len(body)} bytes exceeds the format's {MAX_HEADER_BYTES}")
    text = struct.pack("<Q", len(body)) + body
    num_dims = numpy.fromiter(map(len, shapes), numpy.int64, len(shapes))
    flat = numpy.fromiter(chain.from_iterable(shapes), numpy.int64)
    columns = Columns(names, dtypes, num_dims, flat, begins, ends)
    return Header(dict(metadata), columns, text, len(text) + int(sizes.sum()))
