"""Memory and first values for a model that was built on the meta device.

Three questions, in this order: which tensors get memory (those on meta, real ones are left alone), what the buffers
that no file holds contain (rotary frequencies, embedding scales), and what new parameters start from.

Buffers are asked of the module's own code, so the values are those of a model that was built with memory: a class of
the model's own with `reset_parameters()` first, also when the buffer sits in a child of it; then the nearest
`transformers.PreTrainedModel` above, through `_init_weights(module)`, like `from_pretrained`; then `reset_parameters()`
of torch's own modules.

What a new parameter starts from is the business of an `Initialiser`, given by the caller: a distribution belongs to a
family of models, not to a file. It is called with a generator seeded by the parameter's name, and gives the whole
value, so that this does not depend on the layout. The one that stands here is for modules with `reset_parameters()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol, TypeGuard, runtime_checkable

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

from am_ckpt._train.module import Place, Stored, named_places, stored_tensors
from am_ckpt._train.pieces import cut, pieces

# `initialiser(model, name)`: the whole first value, on the CPU, of the parameter or buffer that `model` holds as `name`
# (in `model.named_parameters()`). It draws from torch's default CPU generator and changes nothing of the model.
Initialiser = Callable[[nn.Module, str], torch.Tensor]


@runtime_checkable
class _Resets(Protocol):
    def reset_parameters(self) -> None: ...


class _Pretrained(Protocol):
    def _init_weights(self, module: nn.Module) -> None: ...


def matches(stored: Stored, patterns: Sequence[str]) -> bool:
    """Whether one of the tensor's names matches one of the shell-style patterns."""
    return any(fnmatchcase(place.name, pattern) for place in stored.places for pattern in patterns)


def materialise(model: nn.Module, device: torch.device | None) -> list[Place]:
    """Give memory to every tensor of `model` that is on meta, uninitialised; keep ties; leave real tensors alone.

    `device=None`: the mesh's device for sharded tensors, the CPU for the others. Returns the places of the buffers
    that no file holds and that therefore must be recomputed.
    """
    groups: dict[int, list[Place]] = {}
    buffers: list[Place] = []
    on_meta = False
    for place, tensor, _, persistent in named_places(model):
        groups.setdefault(id(tensor), []).append(place)
        on_meta = on_meta or tensor.is_meta
        if tensor.is_meta and not persistent:
            buffers.append(place)
    if not on_meta:
        return []

    def with_memory(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        target = device
        if target is None:
            target = torch.device(tensor.device_mesh.device_type if isinstance(tensor, DTensor) else "cpu")
        return torch.empty_like(tensor, device=target)

    # As to_empty() does it, so that FSDP2 takes note of its new shards.
    model._apply(with_memory)
    for places in groups.values():
        first = places[0]
        for other in places[1:]:
            if first.key in first.module._parameters:
                other.module._parameters[other.key] = first.module._parameters[first.key]
            if first.key in first.module._buffers:
                other.module._buffers[other.key] = first.module._buffers[first.key]
    return buffers


def recompute_buffers(model: nn.Module, places: Sequence[Place], initialiser: Initialiser | None) -> None:
    """Let the modules fill the buffers at `places`, else `initialiser`; `ValueError` names one that nothing fills."""
    by_module: dict[int, list[Place]] = {}
    for place in places:
        by_module.setdefault(id(place.module), []).append(place)
    for group in by_module.values():
        if any(_fills(group, source) for source in _sources(model, group[0])):
            continue
        if initialiser is None:
            raise ValueError(
                f"the buffer {group[0].name!r} of {type(group[0].module).__name__} is in no file and the module "
                "cannot recompute it; build the model off the meta device, give it a reset_parameters() that fills "
                "its buffers, or pass initialiser="
            )
        for place in group:
            place.module.get_buffer(place.key).copy_(initialiser(model, place.path))


def _fills(group: Sequence[Place], source: Callable[[], object]) -> bool:
    """Whether `source` fills all the buffers of one module: what it leaves out differs between two starts."""
    buffers = [place.module.get_buffer(place.key) for place in group]
    results = []
    for start in (0, 1):
        for buffer in buffers:
            buffer.fill_(start)
        with (
            _temporary_parameters([group[0].module], buffers=False),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
        ):
            source()
        results.append([buffer.clone() for buffer in buffers])
    return all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def initialise_parameters(
    model: nn.Module, patterns: Sequence[str], seed: int, initialiser: Initialiser | None
) -> None:
    """Initialise the parameters (and stored buffers) that match `patterns`, each from (its name, `seed`) alone."""
    draw = initialiser or reset_value
    for stored in stored_tensors(model):
        if not matches(stored, patterns):
            continue
        place = stored.places[0]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # The CPU generator alone: torch.manual_seed would also reset the accelerator's.
            torch.default_generator.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:{place.name}".encode()) >> 1)
            value = draw(model, place.path)
        if value.shape != stored.tensor.shape:
            raise ValueError(
                f"the initialiser gave {list(value.shape)} for {place.name!r}, which is {list(stored.tensor.shape)}; "
                "it gives the whole value, whatever shard a rank holds"
            )
        for piece in pieces(stored.tensor, place.name):
            piece.values.copy_(cut(value, piece.box))


def reset_value(model: nn.Module, name: str) -> torch.Tensor:
    """The `Initialiser` where none is given: what `reset_parameters()` of the module draws, or of one that it is in.

    A class of the model's own goes before torch's. Raises ValueError for a module without either, and for one of a
    transformers model that has only torch's: the family decides there, and draws otherwise.
    """
    path = _path(model, name)
    module, key = path[-1], name.rpartition(".")[2]
    own = [index for index, ancestor in enumerate(path) if _has_own_reset(ancestor)]
    pretrained = _pretrained(path)
    if pretrained and not own:
        raise ValueError(
            f"what {name!r} starts from is for its family to say, {type(pretrained[0]).__name__} of transformers; "
            "pass initialiser=am_models.initial_value, or a function of your own (model, name) -> value"
        )
    holder = path[own[-1]] if own else module
    if isinstance(holder, _Resets):
        with _temporary_parameters(path[own[-1] :] if own else [module], buffers=True) as temporary:
            holder.reset_parameters()
            value = temporary[id(module), key].detach()
        if not value.isnan().any():
            return value
    raise ValueError(
        f"nothing initialises the parameter {name!r} of {type(module).__name__}; give its module a "
        "reset_parameters(), or pass initialiser="
    )


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the root to the one that holds `name`."""
    path = [model]
    for part in name.split(".")[:-1]:
        path.append(path[-1].get_submodule(part))
    return path


def _pretrained(path: Sequence[nn.Module]) -> list[_Pretrained]:
    """Those that are transformers models. One being there means that it is loaded; it is not imported here."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return [module for module in path if transformers is not None and isinstance(module, transformers.PreTrainedModel)]


def _has_own_reset(module: nn.Module) -> TypeGuard[_Resets]:
    return isinstance(module, _Resets) and not type(module).reset_parameters.__module__.startswith("torch.")


def _sources(model: nn.Module, place: Place) -> Iterator[Callable[[], object]]:
    """The ways to fill the buffers of `place.module`, most specific first."""
    module = place.module
    path = _path(model, place.path)
    own: list[_Resets] = [ancestor for ancestor in path if _has_own_reset(ancestor)]
    if own:
        yield own[-1].reset_parameters
    pretrained = _pretrained(path)
    if pretrained:
        yield lambda: pretrained[-1]._init_weights(module)
    if isinstance(module, _Resets) and not _has_own_reset(module):
        yield module.reset_parameters


@contextmanager
def _temporary_parameters(
    modules: Sequence[nn.Module], *, buffers: bool
) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Replace what `modules` hold directly by whole CPU tensors, so that initialisation code can run without touching
    shards, other devices or loaded values. Floating point starts as NaN: what is not initialised shows."""
    kept = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    temporary: dict[tuple[int, str], torch.Tensor] = {}

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        value = torch.empty(tensor.shape, dtype=tensor.dtype)
        return value.fill_(torch.nan) if value.is_floating_point() else value.zero_()

    try:
        for module, parameters, held_buffers in kept:
            for key, parameter in parameters.items():
                if parameter is not None:
                    value = whole(parameter)
                    module._parameters[key] = nn.Parameter(value, requires_grad=value.is_floating_point())
                    temporary[id(module), key] = value
            for key, buffer in held_buffers.items():
                if buffers and buffer is not None:
                    module._buffers[key] = temporary[id(module), key] = whole(buffer)
        yield temporary
    finally:
        for module, parameters, held_buffers in kept:
            module._parameters.update(parameters)
            module._buffers.update(held_buffers)
