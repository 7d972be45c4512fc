"""The weight files of a Hugging Face folder, each written by many ranks at once: every rank its own ranges.

Which tensors are in which file, under which names, follows from what all ranks hold, so every rank knows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from am_ckpt._boxes import Box, runs, split
from am_ckpt._copy.mapping import Record, output_shape, records_by_parameter, whole_record, without_ones
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.hf_folder import weight_files
from am_ckpt._files.safetensors import Entry, Header, build_header
from am_ckpt._io import PIECE_BYTES, create, digest, open_file, write_all
from am_ckpt._train.pieces import TORCH_DTYPES, Held, Piece, cut, plain_bytes


def require_mapped(mapping: Sequence[Mapping[str, Any]] | None, merged: Mapping[str, Held]) -> None:
    """Raise `ValueError` where `mapping` does not fit the parameters `merged`, or names what is none."""
    records_by_parameter(mapping, {name: item.shape for name, item in merged.items()})
    unknown = sorted({str(record["parameter"]) for record in mapping or ()} - set(merged)) if merged else []
    if unknown:
        raise ValueError(f"mapping names {unknown[0]!r} ({len(unknown)} such), which is no parameter of the model")


def require_one_machine(machines: Sequence[str]) -> None:
    """Raise `ValueError` where ranks that write the same files are on several machines."""
    for rank, machine in enumerate(machines):
        if machine != machines[0]:
            raise ValueError(
                f"layout='direct' needs all ranks on one machine, ranks 0 and {rank} are on two: over a network, "
                "ranges of one file that several machines write are not safe; use layout='sharded' and am-ckpt "
                "merge"
            )


class WeightFiles:
    """Names and contents of the files for the parameters `merged`, with the records of `mapping` applied."""

    def __init__(
        self, merged: Mapping[str, Held], mapping: Sequence[Mapping[str, Any]] | None, max_shard_bytes: int
    ) -> None:
        by_parameter = records_by_parameter(mapping, {name: item.shape for name, item in merged.items()})
        self._records = {
            name: by_parameter.get(name, [whole_record(name, item.shape)]) for name, item in merged.items()
        }
        described: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, records in self._records.items():
            for record in records:
                if record.file in described:
                    raise ValueError(f"two parts of the model are mapped to {record.file!r}")
                described[record.file] = (merged[name].dtype, output_shape(record, merged[name].shape))
        self.files = weight_files(described, max_shard_bytes)
        self._home = {tensor: name for name, group in self.files.items() for tensor in group}

    def headers(self, metadata: Mapping[str, str]) -> dict[str, Header]:
        """The header of every file; equal on ranks that give equal metadata."""
        return {name: build_header(group, metadata) for name, group in self.files.items()}

    def shares(self, headers: Mapping[str, Header], pieces: Iterable[tuple[str, Piece]]) -> list[FileShare]:
        """What a rank with these pieces of parameters writes, for every file."""
        tensors: dict[str, dict[tuple[str, Box], torch.Tensor]] = {name: {} for name in headers}
        for parameter, piece in pieces:
            for record in self._records[parameter]:
                part = file_piece(record, piece)
                if part is not None:
                    tensors[self._home[record.file]][record.file, part.box] = part.values
        return [FileShare(name, headers[name], values) for name, values in tensors.items()]


@dataclass(frozen=True)
class FileShare:
    """What one rank writes of a file: values by tensor of the file and box of it, without dims of size one."""

    path: str
    header: Header
    tensors: Mapping[tuple[str, Box], torch.Tensor]

    def write(self, folder: Path, give_up: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Write into the file that `create_files` has made, durably; returns the file's record.

        The record: `bytes`, `header_xxh3_128` and `boxes_xxh3_128`: by tensor, the (offset, size, digest) of what
        was written here. `give_up` is called between blocks, and may raise.
        """
        with open_file(folder / self.path) as descriptor:
            digests = self.digests(descriptor, give_up)
        return {"bytes": self.header.file_bytes, "header_xxh3_128": digest(self.header.text), **digests}

    def copied(self, copies: Iterator[torch.Tensor]) -> FileShare:
        """The same with the next of `copies` for each of its tensors."""
        return replace(self, tensors={key: next(copies) for key in self.tensors})

    def digests(self, descriptor: int | None = None, give_up: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """`boxes_xxh3_128` alone; written on the way where a descriptor is given."""
        found: dict[str, list[list[Any]]] = {}
        for (name, box), values in self.tensors.items():
            for block, hexdigest in _blocks(self.header.entries[name], Piece(box, values), descriptor):
                found.setdefault(name, []).append([list(block.offset), list(block.size), hexdigest])
                give_up()
        return {"boxes_xxh3_128": found}


def create_files(folder: Path, headers: Mapping[str, Header]) -> None:
    """Create the files with their full size and their headers. One process does so, before any writes its parts."""
    for name, header in headers.items():
        descriptor = create(folder / name, header.file_bytes)
        try:
            os.ftruncate(descriptor, header.file_bytes)
            write_all(descriptor, header.text, 0, folder / name)
        finally:
            os.close(descriptor)


def file_piece(record: Record, piece: Piece) -> Piece | None:
    """The part of a local piece that a record covers, in the coordinates of the file's tensor without dims of one."""
    region = piece.box.intersect(record.box)
    if region is None:
        return None
    inside = Box(tuple(a - b for a, b in zip(region.offset, piece.box.offset, strict=True)), region.size)
    values = cut(piece.values, inside)
    offset = [a - b for a, b in zip(region.offset, record.box.offset, strict=True)]
    size, full = list(region.size), list(record.box.size)
    if record.transpose:
        values = values.transpose(-1, -2)
        for row in (offset, size, full):
            row[-1], row[-2] = row[-2], row[-1]
    kept = [dim for dim, total in enumerate(full) if total != 1]
    box = Box(tuple(offset[dim] for dim in kept), tuple(size[dim] for dim in kept))
    return Piece(
        box, values.squeeze([dim for dim, total in enumerate(full) if total == 1]) if len(kept) < len(full) else values
    )


def _blocks(entry: Entry, part: Piece, descriptor: int | None) -> Iterator[tuple[Box, str]]:
    """Write a part of the tensor `entry` in blocks of at most about 16 MiB, after each yield its box and xxh3-128.

    The values are rounded to the entry's dtype. The digest is of the block's values in row-major order. Shards along
    later dims lie in short runs, each of which is a write of its own. `descriptor`: of the file; None writes nothing.
    """
    item = ITEM_BYTES[entry.dtype]
    shape = without_ones(entry.shape)
    whole = Box((0,) * len(shape), shape)
    for block in split(part.box.size, item):
        memory = plain_bytes(cut(part.values, block).to(TORCH_DTYPES[entry.dtype]))
        region = Box(tuple(a + b for a, b in zip(part.box.offset, block.offset, strict=True)), block.size)
        hasher = xxhash.xxh3_128()
        for outer, inner, count in runs(region, whole, region):
            run = memory[inner * item : (inner + count) * item]
            for start in range(0, len(run), PIECE_BYTES):
                piece = run[start : start + PIECE_BYTES]
                hasher.update(piece)
                if descriptor is not None:
                    write_all(descriptor, piece, entry.begin + outer * item + start)
        yield _with_ones(region, entry.shape), hasher.hexdigest()


def _with_ones(box: Box, shape: tuple[int, ...]) -> Box:
    rows = iter(zip(box.offset, box.size, strict=True))
    pairs = [(0, 1) if size == 1 else next(rows) for size in shape]
    return Box(tuple(offset for offset, _ in pairs), tuple(size for _, size in pairs))
