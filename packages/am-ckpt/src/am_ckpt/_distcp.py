"""torch's ``.distcp`` checkpoints without torch, and without running what their pickles say.

``.metadata`` is a pickle of dataclasses. It is read by an unpickler that knows the globals such a file needs and maps
each to an inert stand-in; any other global is refused by name. Every tensor chunk is an archive of ``torch.save`` (a
zip file whose members are stored, not compressed) inside a ``.distcp`` file; its ``data.pkl``, read in the same way,
says which bytes of the member ``data/0`` are the tensor's. Format: metadata.py and filesystem.py in torch's
``distributed/checkpoint`` folder.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from types import FunctionType
from typing import Any, ClassVar

from am_ckpt._boxes import Box, Shape
from am_ckpt._errors import IncompleteError, UnsafeError
from am_ckpt._format import ITEM_BYTES, element_count
from am_ckpt._io import open_for_reading, read_exactly
from am_ckpt._layout import read_file
from am_ckpt._sources import Chunk, Source

METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")
_MAX_METADATA_BYTES = 512 * 2**20
_MAX_TENSOR_PICKLE_BYTES = 2**20

# torch's dtype names, and those of its older typed storages, to safetensors' names.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "ComplexFloatStorage": "C64",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
}
_CHECKPOINT = "torch.distributed.checkpoint."
# Where TensorProperties was until torch 2.2.
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"


# Elements of a tuple and of those in it. A few bytes can name a tuple of tuples that takes years to hash.
_MAX_TUPLE = 1000


class _Unpickler(pickle._Unpickler):
    """Knows ``allowed`` globals and no other. The Python class: the C one allocates what a memo index claims."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(io.BytesIO(content))
        self._allowed = allowed
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise UnsafeError(
                f"{self._where}: the pickle refers to {module}.{name}, which a checkpoint does not need; nothing was "
                "executed. Do not load this file with torch either unless you trust who wrote it"
            )
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def get_extension(self, code: int) -> None:
        raise UnsafeError(f"{self._where}: the pickle uses extension code {code}; nothing was executed")


def _build(self: Any) -> None:
    """The step of an unpickler that sets attributes, which must not be those of our own functions and classes."""
    if isinstance(self.stack[-2], type | FunctionType):
        raise UnsafeError(f"{self._where}: the pickle changes {self.stack[-2].__name__}; nothing was executed")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](self)


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """The step of an unpickler that makes a tuple, held to ``_MAX_TUPLE``."""

    def load_tuple(self: Any) -> None:
        load(self)
        count = 0
        left = [self.stack[-1]]
        while left:
            item = left.pop()
            count += len(item)
            if count > _MAX_TUPLE:
                raise ValueError(f"tuples of more than {_MAX_TUPLE} elements")
            left += [inner for inner in item if type(inner) is tuple]

    return load_tuple


_Unpickler.dispatch[pickle.BUILD[0]] = _build
# Byte arrays are allocated before they are read.
del _Unpickler.dispatch[pickle.BYTEARRAY8[0]]
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = _bounded(_Unpickler.dispatch[_code[0]])


def _unpickle(content: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> Any:
    try:
        return _Unpickler(content, allowed, where).load()
    except UnsafeError:
        raise
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
        OverflowError,
        RecursionError,
        struct.error,
    ) as error:
        raise ValueError(f"{where} is damaged: its pickle cannot be read ({error or type(error).__name__})") from error


class _Properties:
    """Stand-in for ``TensorProperties``, whose pickled state is a tuple that starts with the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def _text(*values: str | int) -> str:
    if not all(isinstance(value, str | int) for value in values):
        raise ValueError("a path or device of something else than text and numbers")
    return "/".join(map(str, values))


def _size(values: Any = ()) -> Shape:
    return tuple(values)


@dataclass
class Distcp:
    """What ``.metadata`` says. ``paths``: name -> keys of the nested state dict; ``others``: other entries."""

    tensors: dict[str, Source] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _File:
    """A file that ``.metadata`` names: its size (None: it is missing), where the last entry ends, and one of them."""

    size: int | None
    entry: str
    end: int = 0
    num_entries: int = 0


def metadata_files(folder: Path) -> list[Path]:
    """``.metadata``; or ``__0.metadata``, ``__1.metadata``, ... of ranks that saved without collectives; or nothing."""
    if (folder / METADATA).exists():
        return [folder / METADATA]
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _RANK_METADATA.fullmatch(entry.name))}
    return [found[rank] for rank in sorted(found)]


def read_metadata(folder: Path) -> Distcp:
    """Read the :func:`metadata_files` of a folder; headers of archives are not read yet: see :func:`locate`.

    Where every rank has metadata of its own, a part that several ranks have written is taken from the first.

    Raises :class:`UnsafeError` for pickles that refer to anything a checkpoint does not need and for paths that lead
    out of the folder, ``ValueError`` where it is damaged, :class:`IncompleteError` where files are missing.
    """
    result = Distcp()
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


def _read_one(where: Path, files: dict[str, _File], result: Distcp) -> None:
    """Add what one metadata file says."""
    # New classes each time: a pickle can set attributes of those it is given.
    kinds = {
        name: type(name, (), {})
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
        )
    }
    info = type("_StorageInfo", (), {})
    properties = type("TensorProperties", (_Properties,), {})
    allowed: dict[tuple[str, str], Any] = {(_CHECKPOINT + "metadata", name): kind for name, kind in kinds.items()}
    allowed |= {("torch", name): dtype for name, dtype in _DTYPES.items()}
    allowed |= {("torch", name): f"torch.{name}" for name in ("complex32", "complex128")}
    allowed |= {(module, "PosixPath"): _text for module in ("pathlib", "pathlib._local")}
    allowed |= {(module, "WindowsPath"): _text for module in ("pathlib", "pathlib._local")}
    allowed |= {
        (_CHECKPOINT + "metadata", "TensorProperties"): properties,
        (_CHECKPOINT + "metadata", "_MEM_FORMAT_ENCODING"): _text,
        (_SHARDED_TENSOR, "TensorProperties"): properties,
        (_SHARDED_TENSOR, "MEM_FORMAT_ENCODING"): _text,
        (_CHECKPOINT + "filesystem", "_StorageInfo"): info,
        ("torch", "Size"): _size,
        ("torch", "device"): _text,
        ("torch.serialization", "_get_layout"): _text,
        ("collections", "OrderedDict"): OrderedDict,
    }
    root = _unpickle(read_file(where, _MAX_METADATA_BYTES), allowed, str(where))
    if type(root) is not kinds["Metadata"]:
        raise ValueError(f"{where} is damaged: it holds {type(root).__name__} instead of torch's Metadata")
    fields = vars(root)
    described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise ValueError(f"{where} is damaged: state_dict_metadata or storage_data is missing")
    places: dict[tuple[str, Shape | None], tuple[Path, int, int]] = {}
    for index, place in stored.items():
        if type(index) is not kinds["MetadataIndex"] or type(place) is not info:
            raise ValueError(f"{where} is damaged: storage_data holds {type(index).__name__}, {type(place).__name__}")
        name, offset = vars(index).get("fqn"), vars(index).get("offset")
        if not isinstance(name, str):
            raise ValueError(f"{where} is damaged: storage_data has an entry without a name")
        key = (name, None if offset is None else _shape(offset, where, name))
        places[key] = _place(where, vars(place), name, files)
    others = set(result.others)
    for name, item in described.items():
        if not isinstance(name, str):
            raise ValueError(f"{where} is damaged: state_dict_metadata has a key that is not text")
        if type(item) is kinds["BytesStorageMetadata"]:
            if name not in others:
                result.others.append(name)
        elif type(item) is kinds["TensorStorageMetadata"]:
            source = _tensor(name, vars(item), properties, kinds, places, where)
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
    known.chunks += more.chunks


def _shape(value: Any, where: Path, name: str) -> Shape:
    if not isinstance(value, tuple) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise ValueError(f"{where} is damaged: {name!r}: {brief(value)} is not a list of sizes")
    return value


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
            f"{path} is truncated: it has {found.size} bytes, {name!r} is at bytes {begin} to {begin + count}"
        )
    return path, begin, count


def _tensor(
    name: str,
    fields: dict[str, Any],
    properties: type,
    kinds: dict[str, type],
    places: dict[tuple[str, Shape | None], tuple[Path, int, int]],
    where: Path,
) -> Source:
    described, chunks = fields.get("properties"), fields.get("chunks")
    if type(described) is not properties or not isinstance(chunks, list):
        raise ValueError(f"{where} is damaged: the description of {name!r} is incomplete")
    state = vars(described).get("state")
    if not isinstance(state, tuple) or not state or not isinstance(state[0], str):
        raise ValueError(f"{where} is damaged: {name!r} has no dtype")
    source = Source(state[0], _shape(fields.get("size"), where, name))
    for chunk in chunks:
        if type(chunk) is not kinds["ChunkStorageMetadata"]:
            raise ValueError(f"{where} is damaged: {name!r} has a chunk of {type(chunk).__name__}")
        box = Box(
            _shape(vars(chunk).get("offsets"), where, name),
            _shape(vars(chunk).get("sizes"), where, name),
        )
        if len(box.offset) != len(source.shape) or len(box.size) != len(source.shape):
            raise ValueError(f"{where} is damaged: {name!r} has {len(source.shape)} dims, a chunk of it has others")
        if not box.count:
            continue
        place = places.get((name, box.offset))
        if place is None:
            raise IncompleteError(f"{where} says nowhere in which file {name!r} from {list(box.offset)} on is")
        source.chunks.append(Chunk(place[0], place[1], box, archive_bytes=place[2]))
    return source


class _Window(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, descriptor: int, begin: int, size: int, path: Path) -> None:
        self._descriptor, self._begin, self._size, self._path = descriptor, begin, size, path
        self._position = 0

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
        buffer = bytearray(left if size is None or size < 0 else min(size, left))
        read_exactly(self._descriptor, buffer, self._begin + self._position, self._path)
        self._position += len(buffer)
        return bytes(buffer)


@dataclass(frozen=True)
class _Saved:
    """A pickled tensor: where in a storage it lies, in elements."""

    storage: Any
    offset: int
    size: Shape
    strides: Shape
    dtype: str | None


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, strides: Any, grad: Any = None, hooks: Any = None, extra: Any = None
) -> _Saved:
    if extra:
        raise ValueError(f"a tensor with {brief(extra)} is not supported")
    return _Saved(storage, offset, size, strides, None)


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
    if extra:
        raise ValueError(f"a tensor with {brief(extra)} is not supported")
    return _Saved(storage, offset, size, strides, dtype)


_TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch.storage", "UntypedStorage"): None,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _size,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def locate(name: str, dtype: str, chunk: Chunk, descriptor: int) -> Chunk:
    """The chunk with the first byte (and strides) of its values, read from its archive; others are returned as is."""
    if chunk.archive_bytes is None:
        return chunk
    where = f"{chunk.path}, {name!r} in the archive at byte {chunk.begin}"
    window = _Window(descriptor, chunk.begin, chunk.archive_bytes, chunk.path)
    try:
        with zipfile.ZipFile(window) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        saved = _unpickle(_member(window, members, "data.pkl", where), _TENSOR_GLOBALS, where)
        if "byteorder" in members and _member(window, members, "byteorder", where) != b"little":
            raise ValueError(f"{where} was written by a big-endian machine")
    except (zipfile.BadZipFile, OSError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if type(saved) is not _Saved or not isinstance(saved.storage, tuple) or len(saved.storage) != 5:
        raise ValueError(f"{where}: a plain tensor was expected, found {type(saved).__name__}")
    kind, stored_dtype, key = saved.storage[0], saved.storage[1] or saved.dtype, saved.storage[2]
    size, strides = (tuple(x) if isinstance(x, tuple) else None for x in (saved.size, saved.strides))
    if kind != "storage" or stored_dtype != dtype or size != chunk.box.size or strides is None:
        raise ValueError(
            f"{where} holds {brief(stored_dtype)} {brief(size)}, {METADATA} describes {dtype} {list(chunk.box.size)}; "
            "one of them is damaged or of another save"
        )
    if len(strides) != len(size) or not all(type(x) is int and x >= 0 for x in (saved.offset, *strides)):
        raise ValueError(f"{where} is damaged: strides {brief(saved.strides)}, offset {brief(saved.offset)}")
    begin, count = _data(window, members, f"data/{key}" if isinstance(key, str) else "data", where)
    last = saved.offset + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
    if (last + 1) * ITEM_BYTES[dtype] > count:
        raise ValueError(f"{where} is truncated: its storage has {count} bytes, element {last} is outside")
    row_major = tuple(element_count(size[dim + 1 :]) for dim in range(len(size)))
    same = all(n == 1 or a == b for n, a, b in zip(size, strides, row_major, strict=True))
    first = chunk.begin + begin + saved.offset * ITEM_BYTES[dtype]
    return Chunk(chunk.path, first, chunk.box, None if same else strides)


def _data(window: _Window, members: dict[str, zipfile.ZipInfo], name: str, where: str) -> tuple[int, int]:
    """First byte, from the archive's start, and size of a stored member."""
    info = members.get(name)
    if info is None:
        raise ValueError(f"{where} is damaged: the archive has no {name}")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(f"{where}: {name} is compressed or encrypted, torch.save stores it plainly")
    window.seek(info.header_offset)
    header = window.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError(f"{where} is damaged: no local header of {name}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    begin = info.header_offset + 30 + name_bytes + extra_bytes
    if begin + info.file_size > window.seek(0, os.SEEK_END):
        raise ValueError(f"{where} is truncated: {name} ends outside the archive")
    return begin, info.file_size


def _member(window: _Window, members: dict[str, zipfile.ZipInfo], name: str, where: str) -> bytes:
    begin, count = _data(window, members, name, where)
    if count > _MAX_TENSOR_PICKLE_BYTES:
        raise ValueError(f"{where}: {name} has {count} bytes, more than {_MAX_TENSOR_PICKLE_BYTES}")
    window.seek(begin)
    return window.read(count)
