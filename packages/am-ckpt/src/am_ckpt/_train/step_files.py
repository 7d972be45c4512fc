"""What a rank writes of a step, as files: tensors, texts, and what tells equal content from other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from am_ckpt._files.hf_folder import ADAPTER
from am_ckpt._files.safetensors import Header
from am_ckpt._io import digest
from am_ckpt._train.job import TensorFile
from am_ckpt._train.pieces import Piece
from am_ckpt._train.shared_files import FileShare, WeightFiles
from am_ckpt._train.state import Contents, Plan, owned_pieces


def tensor_files(
    contents: Contents,
    plan: Plan,
    rank: int,
    metadata: Mapping[str, str],
    weights: WeightFiles | None,
    headers: Mapping[str, Header],
) -> Iterator[TensorFile | FileShare]:
    """What `rank` writes to safetensors files."""
    for section in contents.tensors:
        owned = owned_pieces(contents, plan, section, rank)
        if section == "model" and weights is not None:
            for share in weights.shares(headers, ((name, piece) for name, parts in owned for piece in parts)):
                yield replace(share, path=f"model/{share.path}")
            continue
        # One dict per file: a name occurs once in a safetensors file.
        groups: list[dict[str, Piece]] = []
        for name, parts in owned:
            groups += [{} for _ in range(len(groups), len(parts))]
            for group, piece in zip(groups, parts, strict=False):
                group[name] = piece
        for index, group in enumerate(groups, start=1):
            yield TensorFile(
                f"{section}/shard-{rank + 1:05d}-model-{index:05d}-of-{len(groups):05d}.safetensors",
                metadata,
                {name: piece.values for name, piece in group.items()},
                {
                    name: {
                        "saved_offsets": list(piece.box.offset),
                        "global_shape": list(plan.merged[section][name].shape),
                    }
                    for name, piece in group.items()
                },
            )
    if rank == 0:
        if contents.adapter is not None:
            yield TensorFile(f"model/{ADAPTER}", metadata, contents.adapter, None)
        for entry, (_, tensors) in contents.state.items():
            if tensors:
                yield TensorFile(f"state/{entry}.safetensors", metadata, tensors, None)


def data_records(files: list[TensorFile | FileShare], contents: Contents, rank: int) -> list[dict[str, Any]]:
    """What this rank would write, by file: digests of the data after the headers."""
    records = [{"path": file.path, "rank": rank, **file.digests()} for file in files]
    if rank == 0:
        for entry, (text, _) in contents.state.items():
            records.append({"path": f"state/{entry}.json", "rank": rank, "xxh3_128": digest(text)})
    return records


def content_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record is equal for equal content."""
    keys = ("path", "blocks_xxh3_128", "boxes_xxh3_128", "xxh3_128")
    return {key: record[key] for key in keys if key in record}


def file_bytes(source: str | bytes | os.PathLike[str]) -> bytes:
    """Text and bytes as they are, a path by its content."""
    if isinstance(source, bytes):
        return source
    return source.encode() if isinstance(source, str) else Path(source).read_bytes()
