"""Is what is about to be copied what was written, by the digests that were stored with it. Without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import xxhash

from am_ckpt._copy.transfer import num_threads
from am_ckpt._files.block_digests import changed_bytes
from am_ckpt._files.hf_folder import DIGESTS, INDEX
from am_ckpt._files.ranges import file_pieces
from am_ckpt._files.safetensors import is_sizes, parse_json, read_header
from am_ckpt._files.step import MAX_SMALL_BYTES, read_file
from am_ckpt._files.step_digests import require_unchanged_files
from am_ckpt._io import digest, linked_file
from am_ckpt._sources import paths_of
from am_ckpt._tools.inventory import Inventory
from am_ckpt.errors import IncompleteError, NewerError

_MAX_DIGESTS_BYTES = 256 * 2**20


def require_unchanged(inventory: Inventory, threads: int | None) -> None:
    """Raise `ValueError` where the model or a small file beside it does not have its stored digest; all is read.

    Of steps of ours and of what `merge(digest=True)` wrote; nothing is known of other kinds. `OSError` where a file
    cannot be read. `threads`: as of `merge`.
    """
    if inventory.kind == "am-ckpt":
        paths = {*inventory.files.values(), *paths_of(inventory.tensors.values())}
        require_unchanged_files(inventory.path, paths, num_threads(threads))
    for problem in export_problems(inventory, True):
        raise problem


def export_problems(inventory: Inventory, full: bool) -> Iterator[Exception]:
    """Hold files against what `merge(digest=True)` wrote, if it did; all data of weight files with `full`."""
    where = inventory.path / DIGESTS
    if not os.path.lexists(where):
        return
    said = parse_json(read_file(where, _MAX_DIGESTS_BYTES, follow_symlinks=inventory.follow_symlinks), str(where))
    known = isinstance(said, dict) and said.get("format") == "am-ckpt digests" and type(said.get("version")) is int
    if known and said["version"] > 1:
        raise NewerError(f"{where} was written by a newer am_ckpt; take the release that wrote it to verify the folder")
    known = known and said["version"] == 1
    files, small = (said.get("files"), said.get("small_xxh3_128")) if known else (None, None)
    if not isinstance(files, dict) or not isinstance(small, dict) or not all(map(_is_digested, files.values())):
        raise ValueError(f"{where} is damaged; copy it again, or remove it to do without")
    used = {chunk.path.name: chunk.path for source in inventory.tensors.values() for chunk in source.chunks}
    for name in sorted(files.keys() - used.keys()):
        yield IncompleteError(f"{where} has digests of {name!r}, which is not there or not used; copy it again")
    for name in sorted(used.keys() - files.keys()):
        yield ValueError(f"{where} has no digests of {name!r}: it is of another merge")
    there = {**inventory.files, INDEX: inventory.path / INDEX}
    for name, expected in sorted(small.items()):
        if name not in there or not there[name].is_file():
            yield IncompleteError(f"{inventory.path} lacks {name!r}, which {DIGESTS} has a digest of; copy it again")
        elif digest(read_file(there[name], MAX_SMALL_BYTES, follow_symlinks=inventory.follow_symlinks)) != expected:
            yield ValueError(
                f"{there[name]} is not what merge wrote: it is damaged, or was edited since; copy it again"
            )
    for name in sorted(files.keys() & used.keys()):
        header = read_header(used[name], follow_symlinks=inventory.follow_symlinks)
        ranges = sorted(files[name]["ranges_xxh3_64"])
        # Every range ends where the next begins, the last one with the file.
        ends = [header.data_start, *(row[1] for row in ranges)]
        tiled = ends == [*(row[0] for row in ranges), header.file_bytes]
        about = (files[name].get("bytes"), files[name].get("header_xxh3_128"))
        if not tiled or about != (header.file_bytes, digest(header.text)):
            yield ValueError(f"{used[name]}: its header is not the one of {DIGESTS}; copy both again")
            continue
        for begin, end, expected in ranges if full else ():
            hasher = xxhash.xxh3_64()
            for piece in file_pieces(linked_file(used[name]), begin, end):
                hasher.update(piece)
            if hasher.hexdigest() != expected:
                yield ValueError(changed_bytes(used[name], header, begin, end, hasher.hexdigest(), expected))


def _is_digested(record: Any) -> bool:
    rows = record.get("ranges_xxh3_64") if isinstance(record, dict) else None
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 3 and is_sizes(row[:2]) and isinstance(row[2], str) for row in rows
    )
