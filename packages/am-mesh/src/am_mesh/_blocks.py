"""Finding a model's repeated layers: the unit of sharding and of recomputation."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn


def find_blocks(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """The blocks of `model` by name, in registration order.

    By default: the members of the outermost `nn.ModuleList`s whose members are all of one class and have parameters and
    submodules of their own (so a list of experts inside a block and a list of plain linear heads are not blocks).
    `patterns` names them instead: `"model.layers.*"`, where `*` matches within one name between dots.

    Raises `ValueError` for a pattern that matches no module, for blocks inside one another and for a parameter shared
    between a block and anything outside it, which could not be sharded with both.
    """
    blocks = _repeated(model) if patterns is None else _matching(model, patterns)
    for name in blocks:
        outer = [other for other in blocks if name.startswith(f"{other}.")]
        if outer:
            raise ValueError(f"block {name!r} is inside block {outer[0]!r}; choose one of the two levels")
    _check_sharing(model, blocks)
    return blocks


def _repeated(model: nn.Module) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(list_name.startswith(f"{name}.") for name in blocks):
            continue
        members = list(module)
        if len({type(member) for member in members}) == 1 and all(_is_block(member) for member in members):
            blocks.update(
                {f"{list_name}.{name}" if list_name else name: member for name, member in module.named_children()}
            )
    return blocks


def _is_block(module: nn.Module) -> bool:
    container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not container and next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(patterns, str):
        raise TypeError(f"blocks={patterns!r} is one string; give a sequence of patterns, such as ({patterns!r},)")
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in modules if name and name_matches(name, pattern)}
        if not matches:
            lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
            raise ValueError(f"blocks pattern {pattern!r} matches no module; the model's module lists are {lists}")
        chosen |= matches
    return {name: module for name, module in modules.items() if name in chosen}


def name_matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts, wanted))


def _check_sharing(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    owners: dict[int, tuple[str | None, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        other_block, other_name = owners.setdefault(id(parameter), (block, name))
        if other_block != block:
            raise ValueError(
                f"parameter {name!r} is the same as {other_name!r}, but in different blocks; choose blocks= that "
                "keep shared parameters together or outside every block"
            )
