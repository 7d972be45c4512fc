"""Where the tensors are in files of `torch.save`, found without torch and without running what their pickles say.

Such a file is a zip file whose members are stored, not compressed: `data.pkl`, a pickle that speaks of storages, and
`data/0`, `data/1`, ... with the bytes of these. Format: serialization.py and _utils.py in torch's `torch` folder.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from am_ckpt._boxes import Box, Shape, row_major
from am_ckpt._dtypes import FROM_STORAGE, FROM_TORCH, ITEM_BYTES
from am_ckpt._files.pickles import is_shape, ordered_dict, torch_size, unpickle, unused
from am_ckpt._files.ranges import file_pieces
from am_ckpt._files.safetensors import element_count
from am_ckpt._io import open_for_reading, read_exactly
from am_ckpt._sources import Chunk, Source, read_weight_map
from am_ckpt.errors import UnsafeError

# State dicts of torch.save: of transformers (or with an index), and of accelerate's FULL_STATE_DICT.
PICKLED = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
_MAX_TENSOR_PICKLE_BYTES = 2**20
_MAX_STATE_DICT_PICKLE_BYTES = 256 * 2**20
# Of the members of an archive: name, sizes and place of each.
_MAX_LIST_BYTES = 256 * 2**20
# Of the keys that lead to a tensor. Names are made of them, and a pickle can repeat a key in two bytes.
_MAX_KEYS = 64
_MAX_NAMES = 2**20
# By how much the tensors of an archive may be larger than what is stored of them.
_MAX_EXPANDED_BYTES = 2**20


class _Window(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, descriptor: int, begin: int, size: int, path: Path) -> None:
        self._descriptor, self._begin, self._size, self._path = descriptor, begin, size, path
        self._position = 0
        # zipfile takes every error for a file that is no archive.
        self.error: OSError | None = None

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(f"{self._path}: seek before the start")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if count > max(_MAX_STATE_DICT_PICKLE_BYTES, _MAX_LIST_BYTES):
            raise ValueError(f"{self._path}: its list of members has {count} bytes, more than {_MAX_LIST_BYTES}")
        buffer = bytearray(count)
        try:
            read_exactly(self._descriptor, buffer, self._begin + self._position, self._path)
        except OSError as error:
            self.error = error
            raise
        self._position += len(buffer)
        return bytes(buffer)


@dataclass(eq=False)
class _Saved:
    """A pickled tensor: where in a storage it lies, in elements. `extra`: what else torch noted of it.

    Compared and hashed by identity: a pickle can put one into another again and again.
    """

    storage: Any
    offset: int
    size: Shape
    strides: Shape
    dtype: str | None
    extra: Any


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, strides: Any, grad: Any = None, hooks: Any = None, extra: Any = None
) -> _Saved:
    return _Saved(storage, offset, size, strides, None, extra)


def _rebuild_v3(
    storage: Any,
    offset: Any,
    size: Any,
    strides: Any,
    grad: Any = None,
    hooks: Any = None,
    dtype: Any = None,
    extra: Any = None,
) -> _Saved:
    return _Saved(storage, offset, size, strides, dtype, extra)


def _rebuild_parameter(tensor: Any, requires_grad: Any = None, hooks: Any = None) -> Any:
    return tensor


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch.storage", "UntypedStorage"): None,
    ("collections", "OrderedDict"): ordered_dict,
    ("torch", "Size"): torch_size,
    **{("torch", name): dtype for name, dtype in FROM_TORCH.items()},
    **{("torch", name): dtype for name, dtype in FROM_STORAGE.items()},
    # safetensors has none of this size.
    ("torch", "ComplexDoubleStorage"): "complex128",
}


# Classes and functions of a DTensor and its layout, on which nothing here depends.
_OF_DTENSORS = (
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed.tensor._dtensor_spec", "DTensorSpec"),
    ("torch.distributed.tensor._dtensor_spec", "TensorMeta"),
    ("torch.distributed.tensor._dtensor_spec", "ShardOrderEntry"),
    ("torch.distributed.tensor.placement_types", "Shard"),
    ("torch.distributed.tensor.placement_types", "_StridedShard"),
    ("torch.distributed.tensor.placement_types", "Replicate"),
    ("torch.distributed.device_mesh", "DeviceMesh"),
    ("torch.distributed._mesh_layout", "_MeshLayout"),
    ("torch.distributed._mesh_layout", "_FlatLayout"),
)


class _Ignored:
    """Stand-in for an object of any class."""

    def __new__(cls, *arguments: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """The local part of a DTensor."""
    fields = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    local = fields.get("_local_tensor") if isinstance(fields, dict) else None
    if type(local) is not _Saved:
        raise ValueError("a tensor subclass that is no DTensor")
    return local


def locate(name: str, dtype: str, chunk: Chunk, descriptor: int) -> Chunk:
    """The chunk with the first byte (and strides) of its values, read from its archive; others are returned as is."""
    if chunk.archive_bytes is None:
        return chunk
    where = f"{chunk.path}, {name!r} in the archive at byte {chunk.begin}"
    archive = _Archive(descriptor, chunk.begin, chunk.archive_bytes, chunk.path, where)
    saved = unpickle(archive.member("data.pkl", _MAX_TENSOR_PICKLE_BYTES), _GLOBALS, where)
    if type(saved) is not _Saved:
        raise ValueError(f"{where}: a plain tensor was expected, found {type(saved).__name__}")
    source = archive.source(saved, where)
    (found,) = source.chunks
    if (source.dtype, source.shape) != (dtype, chunk.box.size):
        raise ValueError(
            f"{where} holds {source.dtype} {list(source.shape)}, .metadata describes {dtype} {list(chunk.box.size)}; "
            "one of them is damaged or of another save"
        )
    return Chunk(chunk.path, found.begin, chunk.box, found.strides)


def changed_ranges(path: Path, begin: int, size: int, where: str) -> list[tuple[int, int]]:
    """First byte and end of the members of an archive that do not have the CRC-32 that torch noted.

    Where it noted none (`torch.serialization.set_crc32_options(False)`), nothing is found.
    """
    descriptor = open_for_reading(path)
    try:
        ranges = _Archive(descriptor, begin, size, path, where).ranges()
    finally:
        os.close(descriptor)
    return [(start, end) for start, end, noted in ranges if noted and noted != _crc32(path, start, end)]


def _crc32(path: Path, begin: int, end: int) -> int:
    value = 0
    for piece in file_pieces(path, begin, end):
        value = zlib.crc32(piece, value)
    return value


@dataclass
class StateDict:
    """Tensors of nested dicts by name; `paths`: name -> the keys that lead to it; `others`: what is no tensor."""

    tensors: dict[str, Source] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_pickled_weights(folder: Path) -> StateDict | None:
    """The tensors of `pytorch_model.bin`, its index's files or accelerate's full state dict; None without any."""
    where = folder / f"{PICKLED[0]}.index.json"
    if not where.is_file():
        there = [folder / name for name in PICKLED if (folder / name).is_file()]
        return _read_state_dict(there[0]) if there else None
    weight_map = read_weight_map(where, ".bin")
    parts = {name: _read_state_dict(folder / name) for name in sorted(set(weight_map.values()))}
    result = StateDict()
    for tensor, name in weight_map.items():
        if tensor not in parts[name].tensors:
            raise ValueError(f"{where} places {tensor!r} in {name}, which lacks it; copy both again")
        result.tensors[tensor] = parts[name].tensors[tensor]
        result.paths[tensor] = parts[name].paths[tensor]
    return result


def read_local_parts(path: Path) -> StateDict:
    """The tensors of a file of `torch.save`, and of DTensors what this rank holds of them; links are not followed."""
    # New classes each time: a pickle can set attributes of those it is given.
    layout = {key: type("_Layout", (_Ignored,), {}) for key in _OF_DTENSORS}
    return _read_state_dict(
        path,
        {
            **_GLOBALS,
            **layout,
            ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
            ("torch", "device"): unused,
            ("torch.serialization", "_get_layout"): unused,
        },
        follow_symlinks=False,
    )


def _read_state_dict(
    path: Path, allowed: Mapping[tuple[str, str], Any] = _GLOBALS, *, follow_symlinks: bool = True
) -> StateDict:
    """The tensors of a file that `torch.save` wrote of (nested) dicts; no data is read.

    Raises `UnsafeError` for pickles that refer to anything but tensors and for files of torch before 1.6,
    `ValueError` where it is damaged.
    """
    result = StateDict()
    descriptor = open_for_reading(path, follow_symlinks=follow_symlinks)
    try:
        if os.pread(descriptor, 2, 0) == b"\x80\x02":
            raise UnsafeError(
                f"{path} was written by torch before 1.6, as a bare pickle; where torch.load(path, weights_only=True) "
                "reads it, write it again with torch.save"
            )
        archive = _Archive(descriptor, 0, os.fstat(descriptor).st_size, path, str(path))
        content = archive.member("data.pkl", _MAX_STATE_DICT_PICKLE_BYTES)
        root = unpickle(content, allowed, str(path))
        if not isinstance(root, dict):
            raise ValueError(f"{path} holds {type(root).__name__}, a state dict was expected")
        # A pickle can hold one dict in many places, or in itself.
        seen: set[int] = set()
        name_bytes = _MAX_NAMES + 16 * len(content)
        left: list[tuple[tuple[str, ...], Any]] = [((), root)]
        while left:
            keys, value = left.pop()
            name = ".".join(keys)
            name_bytes -= len(name)
            if len(keys) > _MAX_KEYS or name_bytes < 0:
                raise ValueError(f"{path} is damaged: its dicts are {len(keys)} deep, with {brief(name)} as a name")
            if type(value) is _Saved:
                if name in result.tensors:
                    raise ValueError(f"{path} holds {name!r} twice")
                result.tensors[name] = archive.source(value, f"{path}, {name!r}")
                result.paths[name] = keys
            elif isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
                if id(value) in seen:
                    raise ValueError(f"{path} holds the dict {name!r} in several places")
                seen.add(id(value))
                left += reversed([((*keys, str(key)), item) for key, item in value.items()])
            else:
                result.others.append(name)
    finally:
        os.close(descriptor)
    return result


class _Archive:
    """A file of `torch.save` in bytes `begin` to `begin + size` of another: a zip file of stored members."""

    def __init__(self, descriptor: int, begin: int, size: int, path: Path, where: str) -> None:
        self._begin, self._path, self._where = begin, path, where
        self._left = size + _MAX_EXPANDED_BYTES
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._window = _Window(descriptor, begin, size, path)
        try:
            with zipfile.ZipFile(self._window) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError, struct.error) as error:
            if self._window.error is not None:
                # Of the disk, not of what is on it.
                raise self._window.error from error
            raise ValueError(f"{where} is damaged: {error}; copy the file again or take another step") from error
        for info in members:
            folder, _, name = info.filename.partition("/")
            if name in self._members or folder != members[0].filename.partition("/")[0]:
                # Which of them is read depends on the reader.
                raise ValueError(f"{where} is damaged: its member {brief(info.filename)} is there twice or misplaced")
            self._members[name] = info
        if "byteorder" in self._members and self.member("byteorder", 16) != b"little":
            raise ValueError(f"{where} was written by a big-endian machine")

    def source(self, saved: _Saved, where: str) -> Source:
        """Dtype, shape and place of a tensor, checked against the storage that it is in."""
        if not isinstance(saved.storage, tuple) or len(saved.storage) != 5 or saved.storage[0] != "storage":
            raise ValueError(f"{where} is damaged: its storage is {brief(saved.storage)}")
        dtype, key = saved.storage[1] or saved.dtype, saved.storage[2]
        size, strides = saved.size, saved.strides
        places = (*strides, saved.offset) if isinstance(strides, tuple) else ()
        fits = all(type(place) is int and 0 <= place < 2**63 for place in places)
        if not fits or not is_shape(size) or len(places) != len(size) + 1:
            raise ValueError(
                f"{where} is damaged: size {brief(size)}, strides {brief(strides)}, offset {brief(saved.offset)}"
            )
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(f"{where} holds {brief(dtype)}, which cannot be copied; leave it out of the state dict")
        if saved.extra:
            raise ValueError(
                f"{where} has {brief(saved.extra)}, which cannot be copied; save its resolve_conj().resolve_neg()"
            )
        begin, count = self._place(f"data/{key}" if isinstance(key, str) else "data")
        if not element_count(size):
            return Source(dtype, size, [Chunk(self._path, self._begin + begin, Box((0,) * len(size), size))])
        last = saved.offset + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        if (last + 1) * ITEM_BYTES[dtype] > count:
            raise ValueError(f"{where} is truncated: its storage has {count} bytes, element {last} is outside")
        self._left -= max(0, element_count(size) * ITEM_BYTES[dtype] - count)
        if self._left < 0:
            raise ValueError(
                f"{where} is {dtype} {list(size)}, expanded from {count} bytes: merged files would be much larger than "
                "this one; save its clone() where that is meant"
            )
        same = all(n == 1 or a == b for n, a, b in zip(size, strides, row_major(size, 1), strict=True))
        first = self._begin + begin + saved.offset * ITEM_BYTES[dtype]
        chunk = Chunk(self._path, first, Box((0,) * len(size), size), None if same else strides)
        return Source(dtype, size, [chunk])

    def ranges(self) -> list[tuple[int, int, int]]:
        """First byte in the file, end and noted CRC-32 of every member."""
        places = [(*self._place(name), info.CRC) for name, info in self._members.items()]
        return [(self._begin + begin, self._begin + begin + count, noted) for begin, count, noted in places]

    def member(self, name: str, limit: int) -> bytes:
        """The content of a member of at most `limit` bytes."""
        begin, count = self._place(name)
        if count > limit:
            raise ValueError(f"{self._where}: {name} has {count} bytes, more than {limit}")
        self._window.seek(begin)
        return self._window.read(count)

    def _place(self, name: str) -> tuple[int, int]:
        """First byte, from the archive's start, and size of a stored member."""
        info = self._members.get(name)
        if info is None:
            raise ValueError(f"{self._where} is damaged: the archive has no {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"{self._where}: {name} is compressed or encrypted, torch.save stores it plainly")
        if info.header_offset < 0:
            raise ValueError(f"{self._where} is damaged: {name} begins before the archive")
        self._window.seek(info.header_offset)
        header = self._window.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError(f"{self._where} is damaged: no local header of {name}")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        if begin + info.file_size > self._window.seek(0, os.SEEK_END):
            raise ValueError(f"{self._where} is truncated: {name} ends outside the archive")
        return begin, info.file_size
