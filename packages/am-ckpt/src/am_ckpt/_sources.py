"""Tensors on disk: dtype, global shape, and the chunks of files that hold their boxes. Without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from am_ckpt._boxes import Box, Shape
from am_ckpt._errors import UnsafeError
from am_ckpt._format import Header, parse_json, read_header
from am_ckpt._layout import read_file
from am_ckpt._names import INDEX, SINGLE

_MAX_INDEX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Chunk:
    """``box`` of a tensor from byte ``begin`` of ``path``.

    Row-major, unless ``strides`` (in elements) say otherwise. With ``archive_bytes``, what begins there is an archive
    of that many bytes written by ``torch.save``; the values lie inside it.
    """

    path: Path
    begin: int
    box: Box
    strides: Shape | None = None
    archive_bytes: int | None = None


@dataclass
class Source:
    """A tensor on disk."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


def whole_sources(path: Path, header: Header) -> dict[str, Source]:
    """The tensors of an ordinary safetensors file, each whole."""
    return {
        name: Source(entry.dtype, entry.shape, [Chunk(path, entry.begin, Box((0,) * len(entry.shape), entry.shape))])
        for name, entry in header.entries.items()
    }


def hf_sources(folder: Path) -> dict[str, Source]:
    """The tensors of a Hugging Face folder by name; every header is checked, no data is read."""
    if (folder / INDEX).is_file():
        return _indexed_sources(folder)
    if (folder / SINGLE).is_file():
        return whole_sources(folder / SINGLE, read_header(folder / SINGLE, follow_symlinks=True))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give the local folder of a model, not the name of one on a hub"
        )
    there = sorted(path.name for path in folder.iterdir())
    advice = ""
    if any(name.startswith("shard-") for name in there):
        advice = "; it holds the shards of a training checkpoint: load them with Checkpointer.load, or merge them"
    elif any(name.endswith((".bin", ".pt", ".pth")) for name in there):
        advice = "; it holds pickled weights, which can run code: convert them to safetensors first"
    raise FileNotFoundError(
        f"{folder} has neither {SINGLE} nor {INDEX}{advice} (found {', '.join(there[:8]) or 'nothing'})"
    )


def read_weight_map(where: Path, suffix: str) -> dict[str, str]:
    """Tensor -> file of an index of a Hugging Face folder; every file is in the folder and ends in ``suffix``."""
    try:
        index = parse_json(read_file(where, _MAX_INDEX_BYTES, follow_symlinks=True), str(where))
    except UnsafeError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; copy the file again or write it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{where} has no weight_map of names to file names; copy it again or write it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or not name.endswith(suffix):
            raise UnsafeError(f"{where} names {name!r}; only {suffix[1:]} files of the folder itself are read")
        if not (where.parent / name).is_file():
            raise FileNotFoundError(f"{where.parent / name} is missing; {where.name} expects {len(names)} files")
    return weight_map


def _indexed_sources(folder: Path) -> dict[str, Source]:
    where = folder / INDEX
    weight_map = read_weight_map(where, ".safetensors")
    files = {
        name: whole_sources(folder / name, read_header(folder / name, follow_symlinks=True))
        for name in sorted(set(weight_map.values()))
    }
    absent = [tensor for tensor, name in weight_map.items() if tensor not in files[name]]
    if absent:
        raise ValueError(
            f"{where} places {absent[0]!r} in {weight_map[absent[0]]}, which lacks it ({len(absent)} such); copy both "
            "again"
        )
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}
