"""Pickles read without running what they say: by an unpickler that knows the globals a checkpoint needs.

Each of them is mapped to an inert stand-in; any other is refused by name.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar

from am_ckpt._boxes import Shape
from am_ckpt._files.safetensors import element_count
from am_ckpt.errors import UnsafeError

# Elements of a tuple and of those in it. A few bytes can name a tuple of tuples that takes years to hash.
_MAX_TUPLE = 1000
# numpy and torch have no tensors of more.
_MAX_DIMS = 64


class _Unpickler(pickle._Unpickler):
    """Knows `allowed` globals and no other. The Python class: the C one allocates what a memo index claims."""

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


def _refuse(self: Any) -> None:
    """Byte arrays are allocated before they are read, sets of sets take as long to compare as tuples of tuples to hash,
    and integers of many digits are hashed anew each time: checkpoints have none of them."""
    raise UnsafeError(
        f"{self._where}: the pickle has a set, a byte array or an integer of many digits, which a checkpoint does not "
        "need; nothing was executed"
    )


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """The step of an unpickler that makes a tuple, held to `_MAX_TUPLE`."""

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
for _code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.FROZENSET, pickle.LONG4):
    _Unpickler.dispatch[_code[0]] = _refuse
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = _bounded(_Unpickler.dispatch[_code[0]])


def unpickle(content: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> Any:
    """What a pickle describes, of `allowed` globals, (module, name) -> stand-in; a persistent id stands for itself.

    Raises `UnsafeError` for any other global, `ValueError` where it is damaged.
    """
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
        raise ValueError(
            f"{where} is damaged: its pickle cannot be read ({error or type(error).__name__}); copy it again or take "
            "another step"
        ) from error


def unused(*values: Any) -> str:
    """Stand-in for paths, devices and enumerations, on which nothing here depends."""
    return ""


def ordered_dict() -> OrderedDict[Any, Any]:
    """Stand-in for `OrderedDict`, which is pickled empty and then filled: a copy could be made by a few bytes."""
    return OrderedDict()


def torch_size(values: Any = ()) -> Shape:
    """Stand-in for `torch.Size`."""
    if not is_shape(tuple(values)):
        raise ValueError("a torch.Size that no tensor has")
    return tuple(values)


def is_shape(value: Any) -> bool:
    """Whether this can be the shape of a tensor, or a place in one: what comes after computes with it in int64."""
    if not isinstance(value, tuple) or len(value) > _MAX_DIMS:
        return False
    return all(type(size) is int and 0 <= size < 2**59 for size in value) and element_count(value) < 2**59
