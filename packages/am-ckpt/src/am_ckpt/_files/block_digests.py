"""Digests of every 16 MiB of a file's data, as a manifest has them. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from am_ckpt._files.ranges import file_pieces
from am_ckpt._files.safetensors import Header
from am_ckpt._io import BLOCK_BYTES


def changed_blocks(path: Path, header: Header, blocks: list[str], numbers: Iterable[int]) -> Iterator[str]:
    """What to say of every block, of those with `numbers`, whose bytes do not have their digest in `blocks`."""
    count = len(range(header.data_start, header.file_bytes, BLOCK_BYTES))
    if len(blocks) != count:
        yield f"{path}: the manifest has {len(blocks)} digests for {count} blocks"
        return
    for number in numbers:
        begin = header.data_start + number * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, header.file_bytes)
        hasher = xxhash.xxh3_128()
        for piece in file_pieces(path, begin, end):
            hasher.update(piece)
        if hasher.hexdigest() != blocks[number]:
            yield changed_bytes(path, header, begin, end, hasher.hexdigest(), blocks[number])


def changed_bytes(path: Path, header: Header, begin: int, end: int, found: str, expected: str) -> str:
    """What to say of bytes that are not those that were written."""
    inside = [name for name, entry in header.entries.items() if entry.begin < end and begin < entry.end]
    named = ", ".join(repr(name) for name in inside[:5]) + (" and more" if len(inside) > 5 else "")
    return (
        f"{path} is damaged: bytes {begin} to {end} have digest {found} instead of {expected}; they hold {named}: copy "
        "the file again or take another step"
    )
