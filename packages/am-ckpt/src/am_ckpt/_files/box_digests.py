"""Digests by tensor and box, of files that several ranks wrote together. Without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from am_ckpt._boxes import Box, describe, require_exact_cover, row_major
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.ranges import Buffers, read_box
from am_ckpt._files.safetensors import Header
from am_ckpt._io import digest, open_for_reading

# By tensor: [offset, size, xxh3-128 of the box's values in row-major order].
BoxDigests = Mapping[str, list[list[Any]]]


def require_digested(path: Path, header: Header, digests: BoxDigests) -> None:
    """Raise `ValueError` unless every element of every tensor of the file is in exactly one box."""
    for name in digests.keys() - header.entries.keys():
        raise ValueError(f"{path} is damaged: the manifest has digests of {name!r}, which the file does not hold")
    for name, entry in header.entries.items():
        boxes = [Box(tuple(offset), tuple(size)) for offset, size, _ in digests.get(name, [])]
        for box in boxes:
            if len(box.offset) != len(entry.shape):
                raise ValueError(f"{path}: {name!r} has shape {list(entry.shape)}, a digest is of {describe(box)}")
        require_exact_cover(f"{path}: what was written of {name!r}", entry.shape, boxes)


def changed_boxes(path: Path, header: Header, digests: BoxDigests) -> Iterator[str]:
    """What to say of every box whose values do not have their digest; all of the file's data is read."""
    buffers = Buffers()
    descriptor = open_for_reading(path)
    try:
        for name, rows in digests.items():
            entry = header.entries[name]
            item = ITEM_BYTES[entry.dtype]
            strides = row_major(entry.shape, item)
            for offset, size, expected in rows:
                values = numpy.empty(size, f"u{item}")
                begin = entry.begin + sum(a * b for a, b in zip(offset, strides, strict=True))
                read_box(descriptor, begin, strides, values, buffers, path)
                found = digest(values.reshape(-1).view(numpy.uint8).data)
                if found != expected:
                    box = Box(tuple(offset), tuple(size))
                    end = begin + sum((n - 1) * s for n, s in zip(size, strides, strict=True)) + item
                    yield (
                        f"{path} is damaged: {name!r} {describe(box)}, between bytes {begin} and {end}, has digest "
                        f"{found} instead of {expected}: copy the file again or take another step"
                    )
    finally:
        os.close(descriptor)
