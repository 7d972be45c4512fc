"""Checkpoints of torch_checkpointing (0.1), without torch and without running what their pickles say.

Every rank writes a file of each item of the state: `torch.save` of its local parts, or safetensors. `metadata.pkl`,
written where an item has a resharder, says of every tensor how it was cut over which ranks; it is a pickle of plain
dicts, lists, tuples, numbers and text.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from am_ckpt._boxes import Box, Shape
from am_ckpt._dtypes import FROM_TORCH
from am_ckpt._files.archive import StateDict, read_local_parts
from am_ckpt._files.pickles import is_shape, unpickle
from am_ckpt._files.safetensors import parse_json, read_header
from am_ckpt._files.step import read_file
from am_ckpt._sources import Chunk, Source, whole_sources
from am_ckpt.errors import IncompleteError, UnsafeError

METADATA = "metadata.pkl"
_MAX_METADATA_BYTES = 512 * 2**20
_VERSION = "2.0"
_MAX_RANKS = 2**20


def read_torch_checkpointing(folder: Path) -> StateDict:
    """The tensors of all items; names and paths begin with the item's. No data is read.

    Raises `UnsafeError` for pickles that refer to anything but tensors and their layout and for paths out of the
    folder, `IncompleteError` where a file is missing, `ValueError` where something is damaged or cannot be copied.
    """
    where = folder / METADATA
    root = unpickle(read_file(where, _MAX_METADATA_BYTES), {}, str(where))
    version = _get(root, "version", where, str)
    if version != _VERSION:
        raise ValueError(f"{where} has version {version!r:.40}; this release reads version {_VERSION}")
    result = StateDict()
    files = _Files(folder, result)
    for item, about in _get(root, "metadata", where, dict).items():
        layouts = _get(about, "rank_to_layout_info", where, dict)
        for text, groups in _get(about, "nested_path_to_metadata", where, dict).items():
            keys = parse_json(str(text).encode(), f"{where}, {item!r}")
            if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
                raise ValueError(f"{where} is damaged: {brief(text)} is no list of keys")
            inner = ".".join(map(str, keys))
            name = f"{item}.{inner}" if keys else str(item)
            if name in result.tensors:
                raise ValueError(f"{where} is damaged: it describes {name!r} twice")
            result.tensors[name] = _tensor(str(item), inner, name, groups, layouts, files, where)
            result.paths[name] = (str(item), *map(str, keys))
    return result


def _get(value: Any, key: str, where: Path, kind: type) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{where} is damaged: {key} is {brief(found)}; copy it again or take another step")
    return found


class _Files:
    """The tensors of every file that is asked for, each read once."""

    def __init__(self, folder: Path, result: StateDict) -> None:
        self._folder, self._result = folder, result
        self._found: dict[str, dict[str, Source]] = {}

    def tensor(self, item: str, inner: str, rank: int, layouts: Mapping[Any, Any]) -> Source | None:
        """What `rank` holds of a tensor."""
        layout = layouts.get(rank)
        place, kind = f"{item}_{rank}.pt", "TorchSerialization"
        where = self._folder / METADATA
        if layout is not None:
            place = _get(layout, "file_path", where, str)
            kind = _get(_get(layout, "serialization_format", where, dict), "type", where, str)
        if place not in self._found:
            self._found[place] = self._read(place, kind)
        return self._found[place].get(inner)

    def _read(self, place: str, kind: str) -> dict[str, Source]:
        parts = place.split("/")
        if any(part in ("", ".", "..") or not part.isprintable() for part in parts):
            raise UnsafeError(f"{self._folder / METADATA} names the file {place!r}; only files of the folder are read")
        path = self._folder.joinpath(*parts)
        for parent in list(path.parents)[: len(parts) - 1]:
            if parent.is_symlink():
                raise UnsafeError(f"{parent} is a symbolic link; put the folder itself there")
        if not os.path.lexists(path):
            raise IncompleteError(f"{path}, which {METADATA} names, is missing: copy it from the machine that wrote it")
        if kind == "SafetensorsSerialization":
            return whole_sources(path, read_header(path))
        if kind != "TorchSerialization":
            raise ValueError(f"{path} is stored as {kind!r:.40}, which holds no tensors; {METADATA} is damaged")
        found = read_local_parts(path)
        self._result.others += [f"{place}: {name}" for name in found.others]
        return found.tensors


def _tensor(
    item: str, inner: str, name: str, groups: Any, layouts: Mapping[Any, Any], files: _Files, where: Path
) -> Source:
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{where} is damaged: {name!r} is described by {brief(groups)}")
    described: set[tuple[Any, Any]] = set()
    # Of equal parts, which replicas hold, that of the first rank.
    first: dict[Box, int] = {}
    for group in groups:
        metadata = _get(group, "sharding_metadata", where, dict)
        data = _get(metadata, "data", where, dict)
        shape = tuple(_get(data, "global_shape", where, list))
        dtype = FROM_TORCH.get(str(data.get("dtype")).removeprefix("torch."), str(data.get("dtype")))
        if not is_shape(shape):
            raise ValueError(f"{where} is damaged: {name!r} has the shape {brief(shape)}")
        described.add((dtype, shape))
        if metadata.get("type") != "DTensorShardingMetadata":
            raise ValueError(
                f"{name!r} is described by {brief(metadata.get('type'))} in {where}, a layout of another program; only "
                "DTensors and plain tensors can be put together"
            )
        for rank in sorted(_ranks(group.get("ranks"), name, where)):
            box = _box(shape, data, rank, name, where)
            if box.count:
                first.setdefault(box, rank)
    if len(described) != 1:
        raise ValueError(f"{where} is damaged: {name!r} is described in {len(described)} ways")
    ((dtype, shape),) = described
    chunks = []
    for box, rank in first.items():
        part = files.tensor(item, inner, rank, layouts)
        if part is None:
            raise ValueError(f"the file of rank {rank} lacks {name!r}, which {where} places there; copy both again")
        if (part.dtype, part.shape) != (dtype, box.size):
            raise ValueError(
                f"{name!r} of rank {rank} is {part.dtype} {list(part.shape)}, {where} says {dtype} {list(box.size)}: "
                "the files are of different saves; copy all of them again"
            )
        (chunk,) = part.chunks
        chunks.append(Chunk(chunk.path, chunk.begin, box, chunk.strides))
    return Source(dtype, shape, chunks)


def _ranks(value: Any, name: str, where: Path) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(rank) is int and 0 <= rank < _MAX_RANKS for rank in value):
        raise ValueError(f"{where} is damaged: {name!r} is on the ranks {brief(value)}")
    return tuple(value)


def _box(shape: Shape, data: Mapping[str, Any], rank: int, name: str, where: Path) -> Box:
    """What a rank of the mesh holds of a DTensor: as torch cuts it, outer axes of the mesh first."""
    mesh = _get(data, "mesh_spec", where, dict)
    sizes, members = mesh.get("mesh_shape"), _ranks(mesh.get("mesh_data"), name, where)
    placements = _get(data, "placements", where, list)
    fits = is_shape(sizes) and math.prod(sizes) == len(members) and len(placements) == len(sizes)
    if not fits or rank not in members:
        raise ValueError(f"{where} is damaged: {name!r} is on the mesh {brief(mesh)}, rank {rank}")
    if not all(isinstance(placement, dict) for placement in placements):
        raise ValueError(f"{where} is damaged: {name!r} is placed as {brief(placements)}")
    place = members.index(rank)
    cuts: list[tuple[int, int, int]] = []
    inner_first: list[tuple[int, int, int]] = []
    for axis, placement in enumerate(placements):
        kind, dim = placement.get("type"), placement.get("dim")
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "StridedShard") or type(dim) is not int or not 0 <= dim < len(shape):
            raise ValueError(f"{where}: {name!r} {list(shape)} is placed as {brief(placement)}, which is no cut of it")
        cut = (dim, sizes[axis], place // math.prod(sizes[axis + 1 :]) % sizes[axis])
        if kind == "Shard":
            cuts.append(cut)
            continue
        # Torch's FSDP over tensor parallel on one dim: the inner axis has cut it first.
        later = [
            sizes[other]
            for other in range(axis + 1, len(sizes))
            if placements[other].get("type") != "Replicate" and placements[other].get("dim") == dim
        ]
        if placement.get("split_factor") != math.prod(later):
            raise ValueError(
                f"{where}: {name!r} is placed as {brief(placements)}, whose split_factor is not known here"
            )
        inner_first.insert(0, cut)
    offset, size = [0] * len(shape), list(shape)
    for dim, count, index in (*cuts, *inner_first):
        step = -(-size[dim] // count)
        start = min(index * step, size[dim])
        offset[dim] += start
        size[dim] = min(step, size[dim] - start)
    return Box(tuple(offset), tuple(size))
