"""Python state as JSON plus tensors: nothing is pickled, so nothing runs when it is read.

JSON's own types stand for themselves; every other type is an object with one key that begins with `$`:

==============  ====================================================================
`$int`        integer outside 64 bits, hexadecimal
`$float`      NaN or infinity, the 16 hexadecimal digits of its IEEE double
`$bytes`      base64
`$tuple`      list of items; `$size` for torch.Size
`$set`        list of items, sorted by their JSON
`$dict`       list of [key, value]: keys that are not strings, or that begin with `$`
`$ordered`    the same for an OrderedDict; `$counter` for a collections.Counter
`$tensor`     name of a tensor in the safetensors file beside it
`$dtype`      `float32` and so on; `$device` such as `cuda:0`
`$array`      a numpy array, as the name of a tensor
`$number`     [dtype, hexadecimal little-endian bytes] of a numpy scalar
`$generator`  [device, name of the tensor] of a torch.Generator
`$random`     [class, state] of random.Random, [class, bit generator, state] of numpy's RandomState or Generator
`$ranks`      list of the values of every rank, see am_ckpt.PerRank
==============  ====================================================================

Finite floats are JSON numbers: Python writes the shortest text that reads back to the same bits.
"""

from __future__ import annotations

import base64
import json
import math
import random
import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.distributed.tensor import DTensor

MAX_DEPTH = 64
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


@dataclass(frozen=True)
class Ranks:
    """What every rank had of its own, in their order."""

    values: list[Any]


def encode_ranks(encoded: list[Any]) -> Any:
    """What `decode` gives back as `Ranks`, of data that `encode` has made."""
    return {"$ranks": encoded}


def encode(value: Any, path: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """`value` as JSON-able data, and its tensors by name.

    `path` says where the value comes from. A type outside the table raises `TypeError` with the path of the item,
    so that a checkpoint which could not be read back is never written.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(value, path, tensors, 0), tensors


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"{path} is nested deeper than {MAX_DEPTH} levels")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"$device": str(value)}
    if kind is list:
        return [_encode(item, f"{path}[{index}]", tensors, depth + 1) for index, item in enumerate(value)]
    if kind is tuple or kind is torch.Size:
        items = [_encode(item, f"{path}[{index}]", tensors, depth + 1) for index, item in enumerate(value)]
        return {"$tuple" if kind is tuple else "$size": items}
    if kind is set:
        items = [_encode(item, f"{path}{{{item!r}}}", tensors, depth + 1) for item in value]
        return {"$set": sorted(items, key=json.dumps)}
    if kind is dict or kind is OrderedDict or kind is Counter:
        return _encode_dict(value, path, tensors, depth)
    if isinstance(value, torch.Tensor):
        return {"$tensor": _add_tensor(value, path, tensors)}
    if kind is torch.Generator:
        return {"$generator": [str(value.device), _add_tensor(value.get_state(), path, tensors)]}
    if isinstance(value, numpy.generic | numpy.ndarray) and value.dtype.kind in "biufc" and value.dtype.itemsize <= 8:
        return _encode_numpy(value, path, tensors)
    state = _state_of_random(value)
    if state is not None:
        return {"$random": _encode(state, path, tensors, depth + 1)}
    raise TypeError(
        f"{path} has type {kind.__module__}.{kind.__qualname__}{_dtype_of(value)}, which cannot be stored without "
        "pickle; return None, bool, int, float, str, bytes, list, tuple, set, dict, tensors, numpy arrays of numbers "
        "or generators of random numbers from state_dict()"
    )


def _dtype_of(value: Any) -> str:
    return f" of {value.dtype}" if isinstance(value, numpy.generic | numpy.ndarray) else ""


def _encode_numpy(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, numpy.generic):
        return {"$number": [value.dtype.name, value.astype(value.dtype.newbyteorder("<")).tobytes().hex()]}
    native = numpy.array(value, value.dtype.newbyteorder("="), order="C")
    return {"$array": _add_tensor(torch.from_numpy(native), path, tensors)}


def _state_of_random(value: Any) -> list[Any] | None:
    """Class and state of a generator of random numbers that is not torch's."""
    if type(value) is random.Random:
        return ["Random", value.getstate()]
    if type(value) is numpy.random.RandomState:
        state: Any = value.get_state(legacy=False)
        return ["RandomState", state["bit_generator"], state]
    if type(value) is numpy.random.Generator:
        return ["Generator", value.bit_generator.state["bit_generator"], value.bit_generator.state]
    return None


def _encode_dict(value: dict[Any, Any], path: str, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    plain = type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value)
    encoded = [(key, _encode(item, f"{path}[{key!r}]", tensors, depth + 1)) for key, item in value.items()]
    if plain:
        return dict(encoded)
    pairs = [[_encode(key, f"{path}, key {key!r}", tensors, depth + 1), item] for key, item in encoded]
    return {{dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}[type(value)]: pairs}


def _add_tensor(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> str:
    if isinstance(value, DTensor):
        raise TypeError(
            f"{path} is a sharded tensor (DTensor); only the model and its optimizers are stored in shards, so give a "
            "plain tensor here, for example value.full_tensor()"
        )
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{path} is a {type(value).__qualname__}, a tensor subclass that safetensors cannot describe")
    if value.is_meta:
        raise ValueError(f"{path} is on the meta device and has no values to store")
    tensors[path] = value
    return path


def decode(value: Any, tensors: Mapping[str, torch.Tensor], path: str) -> Any:
    """The inverse of `encode`. Unknown tags and tensors that are not there raise `ValueError` with the path."""
    if isinstance(value, list):
        return [decode(item, tensors, f"{path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item, tensors, f"{path}[{key!r}]") for key, item in value.items()}
    try:
        return _decode_tag(tag, value[tag], tensors, path)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path}: {json.dumps(value)[:100]} is not a value this version can read") from error


def _decode_tag(tag: str, body: Any, tensors: Mapping[str, torch.Tensor], path: str) -> Any:
    if tag == "$tensor":
        return tensors[body]
    if tag == "$array":
        return tensors[body].numpy()
    if tag == "$number":
        return numpy.frombuffer(bytes.fromhex(body[1]), numpy.dtype(body[0]).newbyteorder("<"))[0]
    if tag == "$generator":
        return torch.Generator(body[0]).set_state(tensors[body[1]])
    if tag == "$random":
        return _random(*decode(body, tensors, path))
    if tag == "$ranks":
        return Ranks([decode(item, tensors, f"{path}[rank {rank}]") for rank, item in enumerate(body)])
    if tag == "$int":
        return int(body, 16)
    if tag == "$float":
        return struct.unpack(">d", bytes.fromhex(body))[0]
    if tag == "$bytes":
        return base64.b64decode(body, validate=True)
    if tag == "$dtype":
        dtype = torch.__dict__[body]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(body)
        return dtype
    if tag == "$device":
        return torch.device(body)
    if tag in ("$dict", "$ordered", "$counter"):
        kind = {"$dict": dict, "$ordered": OrderedDict, "$counter": Counter}[tag]
        pairs = {decode(key, tensors, path): decode(item, tensors, f"{path}[{key!r}]") for key, item in body}
        return kind(pairs)
    sequence = {"$tuple": tuple, "$size": torch.Size, "$set": set}[tag]
    return sequence(decode(item, tensors, path) for item in body)


def _random(kind: str, *state: Any) -> Any:
    if kind == "Random":
        generator = random.Random()
        generator.setstate(state[0])
        return generator
    name, values = state
    if name not in _BIT_GENERATORS or kind not in ("RandomState", "Generator"):
        raise TypeError(name)
    bits = numpy.random.__dict__[name]()
    if kind == "Generator":
        bits.state = values
        return numpy.random.Generator(bits)
    legacy = numpy.random.RandomState(bits)
    legacy.set_state(values)
    return legacy
