"""Entries of a state besides model and optimizers: plain data, generators, tensors, and what a rank has alone."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_ckpt._train.module import extra_states, stored_tensors
from am_ckpt._train.pieces import dtype_name

_DICTS = (dict, OrderedDict, Counter)
_GENERATORS = (torch.Generator, numpy.random.RandomState, numpy.random.Generator, random.Random)
# What is filled in place, since others may hold it too.
HELD = (*_DICTS, list, torch.Tensor, numpy.ndarray, *_GENERATORS)
PLAIN = (type(None), bool, int, float, str, bytes, tuple, set, torch.Size, torch.dtype, torch.device, numpy.generic)


class PerRank:
    """State that each rank has for itself, as an entry of what `Checkpointer` saves: `PerRank(generator)`.

    `value` is whatever an entry may be, without sharded tensors; every rank reads that of all, so keep it small. It is
    restored on as many ranks as saved it, each gets its own; on any other number it is refused.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def is_plain(value: Any) -> bool:
    """Whether an entry is data or a generator, and no object with state of its own."""
    return isinstance(value, (*PLAIN, *HELD))


def entry_tensors(value: Any) -> dict[str, torch.Tensor] | None:
    """The tensors by name of an entry that is stored in shards, as the model is; None of any other.

    That is a dict of nothing but tensors, or a module without extra state: averaged weights, for example.
    """
    if isinstance(value, nn.Module):
        return None if extra_states(value) else {item.name: item.tensor for item in stored_tensors(value)}
    if type(value) not in (dict, OrderedDict) or not value:
        return None
    fits = all(type(key) is str and isinstance(item, torch.Tensor) for key, item in value.items())
    return dict(value) if fits else None


def mismatch(entry: str, here: Any, there: Any) -> str | None:
    """Why the stored `there` cannot take the place of the entry `here`."""
    if not isinstance(here, HELD):
        return None
    kinds = [kind for kind in (dict, list, torch.Tensor, numpy.ndarray, *_GENERATORS) if isinstance(here, kind)]
    if not isinstance(there, kinds[0]):
        one, other = (type(value).__name__ for value in (here, there))
        return f"state[{entry!r}] is a {one} here, {'an' if other[0] in 'aeiou' else 'a'} {other} in the checkpoint"
    if isinstance(here, torch.Tensor | numpy.ndarray) and not _same_kind(here, there):
        return f"state[{entry!r}] is {_described(here)} here, {_described(there)} in the checkpoint"
    return None


def put_back(here: Any, there: Any) -> Any:
    """`there` in place of `here`: into it where it is filled in place, and `there` itself otherwise."""
    if isinstance(here, _DICTS) and isinstance(there, _DICTS):
        values = {key: put_back(here[key], value) if key in here else value for key, value in there.items()}
        here.clear()
        here.update(values)
    elif isinstance(here, list) and isinstance(there, list):
        here[:] = there
    elif isinstance(here, torch.Generator) and isinstance(there, torch.Generator):
        here.set_state(there.get_state())
    elif isinstance(here, random.Random) and isinstance(there, random.Random):
        here.setstate(there.getstate())
    elif isinstance(here, numpy.random.RandomState) and isinstance(there, numpy.random.RandomState):
        here.set_state(there.get_state(legacy=False))
    elif isinstance(here, numpy.random.Generator) and isinstance(there, numpy.random.Generator):
        here.bit_generator.state = there.bit_generator.state
    elif isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor) and _same_kind(here, there):
        with torch.no_grad():
            here.copy_(there)
    elif isinstance(here, numpy.ndarray) and isinstance(there, numpy.ndarray) and _same_kind(here, there):
        here[...] = there
    else:
        return there
    return here


def _same_kind(here: Any, there: Any) -> bool:
    sharded = isinstance(here, DTensor)
    return not sharded and (here.dtype, tuple(here.shape)) == (there.dtype, tuple(there.shape))


def _described(value: Any) -> str:
    dtype = dtype_name(value.dtype, "it") if isinstance(value, torch.Tensor) else value.dtype.name
    return f"{'a sharded ' if isinstance(value, DTensor) else ''}{dtype} {list(value.shape)}"
