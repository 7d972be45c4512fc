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
==============  ====================================================================

Finite floats are JSON numbers: Python writes the shortest text that reads back to the same bits.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

MAX_DEPTH = 64


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
    raise TypeError(
        f"{path} has type {kind.__module__}.{kind.__qualname__}, which cannot be stored without pickle; return None, "
        "bool, int, float, str, bytes, list, tuple, set, dict or tensors from state_dict()"
    )


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
    except (KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: {json.dumps(value)[:100]} is not a value this version can read") from error


def _decode_tag(tag: str, body: Any, tensors: Mapping[str, torch.Tensor], path: str) -> Any:
    if tag == "$tensor":
        return tensors[body]
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
