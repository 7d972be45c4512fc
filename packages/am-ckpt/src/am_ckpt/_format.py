"""The safetensors container: a bounded, strict header parser and an aligned header writer.

A safetensors file is ``<u64 header length><JSON header><data>``. The parser allocates no more than the header's own
size (at most 100 MB, never more than the file holds) and refuses what the format forbids or what hides trouble:
duplicate keys, holes, overlaps, trailing bytes, sizes that disagree with shapes. The writer pads the header with
spaces so that data starts on a multiple of 4096 bytes, and puts tensors whose size is a multiple of 4096 first: ranges
can then be cloned or read with direct I/O. Reference: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from am_ckpt._io import open_for_reading, read_exactly

ALIGNMENT = 4096
MAX_HEADER_BYTES = 100_000_000

# Bytes per element. Sub-byte types are left out: a tensor of them cannot be cut at an element.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: ``begin`` and ``end`` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header. ``text`` is its exact bytes including the length prefix, ``data_start`` their number."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    text: bytes
    file_bytes: int

    @property
    def data_start(self) -> int:
        return len(self.text)


def element_count(shape: Iterable[int]) -> int:
    """Number of elements of a tensor of this shape (1 for a 0-d tensor)."""
    count = 1
    for size in shape:
        count *= size
    return count


def is_sizes(value: Any) -> bool:
    """Whether ``value`` is a list of integers that can be sizes or offsets."""
    if not isinstance(value, list):
        return False
    # A loop takes half the time of all(), and headers hold millions.
    for item in value:  # noqa: SIM110
        if type(item) is not int or not 0 <= item < 2**63:
            return False
    return True


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for :func:`json.loads`: two values under one key are an error, not the last one."""
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
    """Strict JSON: UTF-8, no duplicate keys, no NaN. ``where`` begins every error message."""
    try:
        # Decoded here, since json would take UTF-16 and UTF-32 too.
        return json.loads(text.decode(), object_pairs_hook=refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error or 'nested too deeply'}") from error


def parse_header(text: bytes, file_bytes: int, where: str) -> Header:
    """Check and decode ``text``, the length prefix and the header of a file of ``file_bytes`` bytes."""
    raw = parse_json(text[8:], where)
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: the header is {type(raw).__name__}, not an object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: __metadata__ must map strings to strings")
    entries: dict[str, Entry] = {}
    for name, value in raw.items():
        entries[name] = _entry(name, value, len(text), where)
    position = len(text)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise ValueError(f"{where}: tensor {name!r} {kind} (begins at byte {entry.begin}, expected {position})")
        position = entry.end
    if position != file_bytes:
        state = "truncated" if position > file_bytes else "followed by bytes that belong to no tensor"
        raise ValueError(f"{where}: {state}: the header describes {position} bytes, the file has {file_bytes}")
    return Header(metadata, entries, text, file_bytes)


def _entry(name: str, value: Any, data_start: int, where: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{where}: tensor {name!r} has dtype {dtype!r}; supported are {', '.join(ITEM_BYTES)}")
    for field in (shape, offsets):
        if not is_sizes(field):
            raise ValueError(f"{where}: tensor {name!r}: {field!r} is not a list of non-negative integers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != element_count(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{where}: tensor {name!r}: offsets {offsets} do not fit {dtype} {shape}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def read_header(path: Path, *, follow_symlinks: bool = False) -> Header:
    """Read and check the header of ``path``; ``ValueError`` names the file, ``OSError`` where it cannot be read."""
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
            return parse_header(bytes(text), file_bytes, str(path))
        except ValueError as error:
            raise ValueError(f"{error}; copy the file again, or write it again") from error
    finally:
        os.close(descriptor)


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """The header of a file that will hold ``tensors`` (name -> safetensors dtype, shape); data starts aligned.

    ``entries`` are in file order: tensors of a multiple of 4096 bytes first, then larger items before smaller ones,
    so that every tensor starts on a multiple of its item size.
    """
    sizes = {name: element_count(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in tensors.items()}
    order = sorted(tensors, key=lambda name: (sizes[name] % ALIGNMENT != 0, -ITEM_BYTES[tensors[name][0]], name))
    raw: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + sizes[name]]}
        position += sizes[name]
    body = json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-(8 + len(body)) % ALIGNMENT)
    if len(body) > MAX_HEADER_BYTES:
        raise ValueError(f"a safetensors header of {len(body)} bytes exceeds the format's {MAX_HEADER_BYTES}")
    text = struct.pack("<Q", len(body)) + body
    start = len(text)
    entries = {
        name: Entry(
            raw[name]["dtype"],
            tensors[name][1],
            start + raw[name]["data_offsets"][0],
            start + raw[name]["data_offsets"][1],
        )
        for name in order
    }
    return Header(dict(metadata), entries, text, start + position)
