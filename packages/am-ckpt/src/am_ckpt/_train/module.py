"""A module's tensors under the names they are stored by.

Names are those of the bare module: the prefixes that DDP, torch.compile and activation checkpointing add are dropped,
so a checkpoint does not depend on how the model was wrapped. A tensor that occurs under several names (tied weights)
is one entry: the first name is the one it is stored by, the others are aliases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from am_ckpt._files.hf_folder import WRAPPERS


@dataclass
class Place:
    """One name of a tensor: `module` holds it as attribute `key`; `name` is the full name.

    path: what `get_parameter` of the model finds it by, wrappers included.
    """

    name: str
    module: nn.Module
    key: str
    path: str


@dataclass
class Stored:
    """One tensor of a module: all its places, the storing one first."""

    tensor: torch.Tensor
    places: list[Place]
    is_parameter: bool
    is_persistent: bool = True

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def aliases(self) -> list[str]:
        return [place.name for place in self.places[1:]]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or `model`."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def reshard(model: nn.Module) -> None:
    """Make FSDP2 put its shards back in place of parameters it still holds whole after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _bare(prefix: str) -> list[str]:
    return [part for part in prefix.split(".") if part and part not in WRAPPERS]


def named_places(model: nn.Module) -> Iterator[tuple[Place, torch.Tensor, bool, bool]]:
    """Every name of every parameter and buffer: (place, tensor, is a parameter, is stored in state dicts)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        base, dot = ".".join(_bare(prefix)), "." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield Place(f"{base}.{key}" if base else key, module, key, f"{prefix}{dot}{key}"), parameter, True, True
        for key, buffer in module._buffers.items():
            if buffer is not None:
                persistent = key not in module._non_persistent_buffers_set
                yield (
                    Place(f"{base}.{key}" if base else key, module, key, f"{prefix}{dot}{key}"),
                    buffer,
                    False,
                    persistent,
                )


def stored_tensors(model: nn.Module) -> list[Stored]:
    """Parameters and persistent buffers of the bare module, each tensor once, in registration order."""
    bare = unwrap(model)
    reshard(bare)
    found: dict[int, Stored] = {}
    for place, tensor, is_parameter, persistent in named_places(bare):
        if not persistent:
            continue
        if id(tensor) not in found:
            found[id(tensor)] = Stored(tensor, [], is_parameter)
        if all(place.name != other.name for other in found[id(tensor)].places):
            found[id(tensor)].places.append(place)
    return list(found.values())


def extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have state of their own kind (`get_extra_state`), by the names that it has in state dicts."""
    return {
        ".".join([*_bare(prefix), "_extra_state"]): module
        for prefix, module in unwrap(model).named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def mesh_axes(tensors: list[torch.Tensor]) -> dict[str, int]:
    """Names and sizes of the device mesh axes over which `tensors` are laid out."""
    axes: dict[str, int] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            names = mesh.mesh_dim_names or tuple(f"axis_{index}" for index in range(mesh.ndim))
            axes.update(zip(names, mesh.shape, strict=True))
    return axes
