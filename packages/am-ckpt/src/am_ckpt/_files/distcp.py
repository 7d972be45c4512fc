"""torch's `.distcp` checkpoints without torch, and without running what their pickles say.

`.metadata` is a pickle of dataclasses. Every tensor chunk is an archive of `torch.save` inside a `.distcp` file.
Format: metadata.py and filesystem.py in torch's `distributed/checkpoint` folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from am_ckpt._boxes import Box, Shape
from am_ckpt._dtypes import FROM_TORCH, ITEM_BYTES
from am_ckpt._files.archive import StateDict
from am_ckpt._files.pickles import is_shape, ordered_dict, torch_size, unpickle, unused
from am_ckpt._files.step import read_file
from am_ckpt._io import open_for_reading
from am_ckpt._sources import Chunk, Source
from am_ckpt.errors import IncompleteError, UnsafeError

METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")
_MAX_METADATA_BYTES = 512 * 2**20
_CHECKPOINT = "torch.distributed.checkpoint."
# Where TensorProperties was until torch 2.2.
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"


class _Properties:
    """Stand-in for `TensorProperties`, whose pickled state is a tuple that starts with the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


@dataclass
class _File:
    """A file that `.metadata` names: its size (None: it is missing), where the last entry ends, and one of them."""

    size: int | None
    entry: str
    end: int = 0
    num_entries: int = 0


def metadata_files(folder: Path) -> list[Path]:
    """`.metadata`; or `__0.metadata`, `__1.metadata`, ... of ranks that saved without collectives; or nothing."""
    if (folder / METADATA).exists():
        return [folder / METADATA]
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _RANK_METADATA.fullmatch(entry.name))}
    return [found[rank] for rank in sorted(found)]


def read_metadata(folder: Path) -> StateDict:
    """Read the `metadata_files` of a folder; archives are not read yet.

    Where every rank has metadata of its own, a part that several ranks have written is taken from the first.

    Raises `UnsafeError` for pickles that refer to anything a checkpoint does not need and for paths that lead
    out of the folder, `ValueError` where it is damaged, `IncompleteError` where files are missing.
    """
    result = StateDict()
    files: dict[str, _File] = {}
    found = metadata_files(folder)
    for where in found:
        _read_one(where, files, result)
    for source in result.tensors.values() if len(found) > 1 else ():
        first_of: dict[Box, Chunk] = {}
        for chunk in source.chunks:
            first_of.setdefault(chunk.box, chunk)
        source.chunks = list(first_of.values())
    missing = {name: file for name, file in files.items() if file.size is None}
    if missing:
        first = "; ".join(
            f"{name} with {file.num_entries} entries such as {file.entry!r}" for name, file in list(missing.items())[:5]
        )
        raise IncompleteError(
            f"{folder}: {len(missing)} files that {METADATA} names are missing: {first}. Copy them from the machines "
            "of the ranks that wrote them"
        )
    longer = [(name, file) for name, file in files.items() if file.size is not None and file.size > file.end]
    if longer:
        name, file = longer[0]
        result.notes.append(
            f"{len(longer)} files are longer than what {METADATA} names in them, such as {name} with {file.size} bytes "
            f"instead of {file.end}: they may be of another save"
        )
    return result


def _globals() -> tuple[dict[str, type], dict[tuple[str, str], Any]]:
    """Inert classes in place of torch's by their names, and what metadata may refer to.

    New ones each time: a pickle can set attributes of those it is given.
    """
    names = (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    )
    kinds: dict[str, type] = {name: type(name, (), {}) for name in names}
    allowed: dict[tuple[str, str], Any] = {(_CHECKPOINT + "metadata", name): kind for name, kind in kinds.items()}
    allowed |= {("torch", name): dtype for name, dtype in FROM_TORCH.items()}
    allowed |= {("torch", name): f"torch.{name}" for name in ("complex32", "complex128")}
    allowed |= {(module, "PosixPath"): unused for module in ("pathlib", "pathlib._local")}
    allowed |= {(module, "WindowsPath"): unused for module in ("pathlib", "pathlib._local")}
    kinds["_StorageInfo"] = type("_StorageInfo", (), {})
    kinds["TensorProperties"] = type("TensorProperties", (_Properties,), {})
    allowed |= {
        (_CHECKPOINT + "metadata", "TensorProperties"): kinds["TensorProperties"],
        (_CHECKPOINT + "metadata", "_MEM_FORMAT_ENCODING"): unused,
        (_SHARDED_TENSOR, "TensorProperties"): kinds["TensorProperties"],
        (_SHARDED_TENSOR, "MEM_FORMAT_ENCODING"): unused,
        (_CHECKPOINT + "filesystem", "_StorageInfo"): kinds["_StorageInfo"],
        ("torch", "Size"): torch_size,
        ("torch", "device"): unused,
        ("torch.serialization", "_get_layout"): unused,
        ("collections", "OrderedDict"): ordered_dict,
    }
    return kinds, allowed


def _read_one(where: Path, files: dict[str, _File], result: StateDict) -> None:
    """Add what one metadata file says."""
    kinds, allowed = _globals()
    root = unpickle(read_file(where, _MAX_METADATA_BYTES), allowed, str(where))
    if type(root) is not kinds["Metadata"]:
        raise ValueError(f"{where} is damaged: it holds {type(root).__name__} instead of torch's Metadata")
    fields = vars(root)
    described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise ValueError(f"{where} is damaged: state_dict_metadata or storage_data is missing")
    places: dict[tuple[str, Shape | None], tuple[Path, int, int]] = {}
    for index, place in stored.items():
        if type(index) is not kinds["MetadataIndex"] or type(place) is not kinds["_StorageInfo"]:
            raise ValueError(f"{where} is damaged: storage_data holds {type(index).__name__}, {type(place).__name__}")
        name, offset = vars(index).get("fqn"), vars(index).get("offset")
        if not isinstance(name, str):
            raise ValueError(f"{where} is damaged: storage_data has an entry without a name")
        key = (name, None if offset is None else _shape(offset, where, name))
        places[key] = _place(where, vars(place), name, files)
    others = set(result.others)
    seen: set[int] = set()
    for name, item in described.items():
        if not isinstance(name, str):
            raise ValueError(f"{where} is damaged: state_dict_metadata has a key that is not text")
        if type(item) is kinds["BytesStorageMetadata"]:
            if name not in others:
                result.others.append(name)
        elif type(item) is kinds["TensorStorageMetadata"]:
            # A list that a pickle has in many places would be gone through for each of them.
            if id(vars(item).get("chunks")) in seen:
                raise ValueError(f"{where} is damaged: {name!r} and another tensor have the same chunks")
            seen.add(id(vars(item).get("chunks")))
            source = _tensor(name, vars(item), kinds, places, where)
            known = result.tensors.setdefault(name, source)
            if known is not source:
                _join(name, known, source, where)
        else:
            raise ValueError(f"{where} is damaged: {name!r} is described by {type(item).__name__}")
    planner = fields.get("planner_data")
    if isinstance(planner, dict):
        for name, path in planner.items():
            if isinstance(name, str) and isinstance(path, tuple) and all(isinstance(part, str | int) for part in path):
                result.paths[name] = tuple(map(str, path))


def _join(name: str, known: Source, more: Source, where: Path) -> None:
    """Add what another rank's metadata says of the same tensor."""
    if (known.dtype, known.shape) != (more.dtype, more.shape):
        raise ValueError(
            f"{where}: {name!r} is {more.dtype} {list(more.shape)}, for earlier ranks {known.dtype} "
            f"{list(known.shape)}: the files are of different saves; remove the stale ones"
        )
    known.chunks = [*known.chunks, *more.chunks]


def _shape(value: Any, where: Path, name: str) -> Shape:
    if not is_shape(value):
        raise ValueError(f"{where} is damaged: {name!r}: {brief(value)} is not a list of sizes")
    sizes: Shape = value
    return sizes


def _place(where: Path, fields: dict[str, Any], name: str, files: dict[str, _File]) -> tuple[Path, int, int]:
    """The file, first byte and number of bytes of one stored item."""
    file, begin, count = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if not isinstance(file, str) or type(begin) is not int or type(count) is not int or begin < 0 or count < 0:
        raise ValueError(f"{where} is damaged: the place of {name!r} is {brief(fields)}")
    if file != os.path.basename(file) or file in ("", ".", ".."):
        raise UnsafeError(f"{where} places {name!r} in {file!r}; only files of the folder itself are read")
    if fields.get("transform_descriptors"):
        raise ValueError(
            f"{name!r} was written through {brief(fields['transform_descriptors'])}; such streams cannot be copied as "
            "bytes: save without extensions"
        )
    path = where.parent / file
    if file not in files:
        try:
            descriptor = open_for_reading(path)
        except FileNotFoundError:
            files[file] = _File(None, name)
        else:
            files[file] = _File(os.fstat(descriptor).st_size, name)
            os.close(descriptor)
    found = files[file]
    found.num_entries += 1
    found.end = max(found.end, begin + count)
    if found.size is not None and found.end > found.size:
        raise ValueError(
            f"{path} is truncated: it has {found.size} bytes, {name!r} is at bytes {begin} to {begin + count}; copy it "
            "again or take another step"
        )
    return path, begin, count


def _tensor(
    name: str,
    fields: dict[str, Any],
    kinds: dict[str, type],
    places: dict[tuple[str, Shape | None], tuple[Path, int, int]],
    where: Path,
) -> Source:
    described, chunks = fields.get("properties"), fields.get("chunks")
    if type(described) is not kinds["TensorProperties"] or not isinstance(chunks, list):
        raise ValueError(f"{where} is damaged: the description of {name!r} is incomplete")
    state = vars(described).get("state")
    if not isinstance(state, tuple) or not state or not isinstance(state[0], str):
        raise ValueError(f"{where} is damaged: {name!r} has no dtype")
    shape = _shape(fields.get("size"), where, name)
    found: list[Chunk] = []
    for chunk in chunks:
        if type(chunk) is not kinds["ChunkStorageMetadata"]:
            raise ValueError(f"{where} is damaged: {name!r} has a chunk of {type(chunk).__name__}")
        box = Box(
            _shape(vars(chunk).get("offsets"), where, name),
            _shape(vars(chunk).get("sizes"), where, name),
        )
        if len(box.offset) != len(shape) or len(box.size) != len(shape):
            raise ValueError(f"{where} is damaged: {name!r} has {len(shape)} dims, a chunk of it has others")
        if not box.count:
            continue
        place = places.get((name, box.offset))
        if place is None:
            raise IncompleteError(f"{where} says nowhere in which file {name!r} from {list(box.offset)} on is")
        if box.count * ITEM_BYTES.get(state[0], 1) > place[2]:
            raise ValueError(f"{where} is damaged: {name!r} {list(box.size)} of {state[0]} is in {place[2]} bytes")
        found.append(Chunk(place[0], place[1], box, archive_bytes=place[2]))
    return Source(state[0], shape, found)
