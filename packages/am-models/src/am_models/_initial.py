"""The first value of a parameter, as its family draws it, whole and without any other parameter.

transformers builds a model with memory and then visits its modules from the leaves to the root, each with
`_init_weights(module)` of the nearest `PreTrainedModel`; a module further out may draw again what one below it drew:
GPT-2 scales `c_proj` with the depth of the model, Mamba sets the bias of `dt_proj`. So whoever visits last decides, and
that is what is looked for here, from the root down to the module that holds the parameter: code of transformers runs on
the modules themselves while every other parameter is on the meta device, where drawing costs nothing and changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class _Resets(Protocol):
    def reset_parameters(self) -> None: ...


@torch.no_grad()
def initial_value(model: nn.Module, name: str) -> torch.Tensor:
    """The first value of the parameter or buffer `name` of `model` (as `named_parameters` says it): whole, on the CPU.

    Its distribution is what transformers gives the parameter when it builds the model with memory: the `_init_weights`
    of the family, and for what that leaves alone the `reset_parameters` of the module. A module of another package
    inside the model (an adapter) is asked for its own `reset_parameters`. Drawn from torch's default CPU generator:
    after `torch.manual_seed`, the value depends on the seed and the model's configuration alone. Made to be
    `am_ckpt.load_hf(initialiser=am_models.initial_value, seed=seed)`, which seeds with the parameter's name.

    The model may be on the meta device, sharded or loaded: nothing of it is read or changed. Costs memory for what the
    one module holds itself.

    Raises ValueError where nothing sets the value.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        # What is tied starts as its source does: an embedding has a row of zeros for padding, a head has not.
        name = model.all_tied_weights_keys.get(name, name)
    path = _path(model, name)
    key = name.rpartition(".")[2]
    with _others_on_meta(model, path[-1]):
        tensors = {**path[-1]._buffers, **path[-1]._parameters}
        value = tensors[key]
        assert value is not None
        if any(_fills(step, value) for step in _steps(path)):
            return value.detach()
    raise ValueError(
        f"nothing sets the first value of {name!r}: neither _init_weights of {type(model).__name__} nor a "
        f"reset_parameters of {type(path[-1]).__name__}; load it from files, or build the model off the meta device"
    )


def _fills(step: Callable[[], None], value: torch.Tensor) -> bool:
    """Whether `step` sets all of `value`: what it leaves alone shows as NaN, of integers as a difference."""
    if value.is_floating_point():
        value.fill_(torch.nan)
        step()
        return not bool(value.isnan().any())
    value.fill_(1)
    step()
    first = value.clone()
    value.fill_(0)
    step()
    return torch.equal(first, value)


def _path(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the root to the one that holds `name`."""
    path = [model]
    for part in name.split(".")[:-1]:
        path.append(path[-1].get_submodule(part))
    return path


def _steps(path: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Ways to set what the last module of `path` holds, each for what the ones before it leave alone."""
    from transformers import PreTrainedModel

    # Who visits which module: a model inside a model has its own say.
    visits: list[tuple[PreTrainedModel, nn.Module]] = []
    for module in path:
        if isinstance(module, PreTrainedModel):
            visits.append((module, module))
        elif visits:
            visits.append((visits[-1][0], module))
    family = _package(visits[-1][0]) if visits else ""
    adapters = [module for module in path if _resets(module) and _reset_package(module) not in (family, "torch")]
    if adapters:
        yield adapters[-1].reset_parameters
        return

    def visit(since: int) -> None:
        for pretrained, module in reversed(visits[since:]):
            pretrained._init_weights(module)

    for since in range(len(visits)):
        yield partial(visit, since)
    last = path[-1]
    if _resets(last):
        reset = last.reset_parameters

        def build() -> None:
            reset()
            visit(0)

        yield build


def _resets(module: nn.Module) -> TypeGuard[_Resets]:
    return isinstance(module, _Resets)


def _reset_package(module: _Resets) -> str:
    return type(module).reset_parameters.__module__.partition(".")[0]


def _package(module: nn.Module) -> str:
    """Of the class, below what FSDP2 makes of it."""
    packages = [cls.__module__.partition(".")[0] for cls in type(module).__mro__]
    return next(package for package in packages if package != "torch")


@contextmanager
def _others_on_meta(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Meanwhile `module` holds whole CPU tensors, and all other modules hold tensors on the meta device."""
    held = [(each, dict(each._parameters), dict(each._buffers)) for each in model.modules()]
    try:
        for each, parameters, buffers in held:
            device = "cpu" if each is module else "meta"
            for name, parameter in parameters.items():
                if parameter is not None:
                    # Of the global shape, where it is a shard.
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    each._parameters[name] = nn.Parameter(empty, requires_grad=False)
            for name, buffer in buffers.items():
                if buffer is not None:
                    each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        yield
    finally:
        for each, parameters, buffers in held:
            each._parameters.update(parameters)
            each._buffers.update(buffers)
