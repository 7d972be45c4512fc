"""Optimizer state by parameter name: independent of group order, of ranks, and of who owned which shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Of the groups, what a process chooses for its own layout and devices, and how it calls its parameters: neither stored
# nor restored. One process may be fused where sharded tensors cannot be.
_OF_THE_PROCESS = frozenset({"params", "param_names", "fused", "foreach", "capturable", "differentiable"})


def named_groups(entry: str, optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Parameter names of each group; `names` maps `id(parameter)` to its name in the model."""
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise ValueError(
                    f"state[{entry!r}]: parameter {position} of group {index}, shape {list(parameter.shape)}, is not a "
                    "parameter of state['model']; build the optimizer after the model has its final parameters "
                    "(sharding, load_hf and adapters replace them)"
                )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def joined_groups(entry: str, ranks: Sequence[list[list[str]]]) -> list[list[str]]:
    """The groups of all ranks as one list: a rank that is a stage of a pipeline has some parameters of each."""
    for rank, groups in enumerate(ranks):
        if len(groups) != len(ranks[0]):
            raise ValueError(
                f"state[{entry!r}] has {len(ranks[0])} parameter groups on rank 0 and {len(groups)} on rank {rank}; "
                "give it the same groups on every rank, empty ones too"
            )
    joined = [list(dict.fromkeys(name for rank in ranks for name in rank[index])) for index in range(len(ranks[0]))]
    seen: set[str] = set()
    for members in joined:
        if not seen.isdisjoint(members):
            raise ValueError(
                f"state[{entry!r}]: {sorted(seen.intersection(members))[:3]} are in another parameter group on another "
                "rank; group them alike on every rank"
            )
        seen.update(members)
    return joined


@dataclass(frozen=True)
class OptimizerState:
    """What of an optimizer is no tensor of a parameter: `values` by parameter name and slot."""

    type: str
    groups: list[list[str]]
    options: list[dict[str, Any]]
    values: dict[str, dict[str, Any]]


def optimizer_contents(
    entry: str, optimizer: Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, torch.Tensor], OptimizerState]:
    """Tensors by `<slot>/<parameter name>`, and everything else."""
    groups = named_groups(entry, optimizer, names)
    options = [
        {key: value for key, value in group.items() if key not in _OF_THE_PROCESS} for group in optimizer.param_groups
    ]
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key, slots in optimizer.state.items():
        if id(key) not in grouped and slots:
            what = f"a tensor of shape {list(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)
            raise ValueError(
                f"state[{entry!r}].state has an entry for {what}, which is in none of its parameter groups and would "
                "be lost; state is stored by parameter: keep it in the groups or per parameter"
            )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for slot, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(slot, str) or "/" in slot:
                    raise TypeError(f"state[{entry!r}]: slot {slot!r} of {name!r} must be a string without '/'")
                if isinstance(value, torch.Tensor):
                    tensors[f"{slot}/{name}"] = value
                else:
                    values.setdefault(name, {})[slot] = value
    return tensors, OptimizerState(type(optimizer).__name__, groups, options, values)


def match_groups(
    entry: str, optimizer: Optimizer, groups: Sequence[list[str]], saved: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each group of `optimizer`, the options of the saved group with the same parameters, on all ranks together.

    What belongs to the process is as `optimizer` has it: flags such as `fused`, and whether a value is a tensor.
    Raises `ValueError` where the type or the grouping differs.
    """
    if saved["type"] != type(optimizer).__name__:
        raise ValueError(f"state[{entry!r}] is {type(optimizer).__name__}, the checkpoint holds {saved['type']}")
    options = {frozenset(group["parameters"]): group["options"] for group in saved["groups"]}
    result = []
    for index, (members, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if frozenset(members) not in options:
            known = {name for group in saved["groups"] for name in group["parameters"]}
            new = [name for name in members if name not in known]
            raise ValueError(
                f"state[{entry!r}]: group {index} ({len(members)} parameters, first {members[:3]}) is none of the "
                f"checkpoint's {len(options)} groups; parameters new to them: {new[:5] or 'none'}. "
                "Group the parameters as in the saved run"
            )
        saved_options = options[frozenset(members)]
        kept = {key: value for key, value in own.items() if key in _OF_THE_PROCESS and key != "params"}
        restored = {key: value for key, value in saved_options.items() if key not in _OF_THE_PROCESS}
        result.append({key: _like(own.get(key), value) for key, value in restored.items()} | kept)
    if len(result) != len(saved["groups"]):
        raise ValueError(f"state[{entry!r}] has {len(result)} parameter groups, the checkpoint {len(saved['groups'])}")
    return result


def _like(own: Any, value: Any) -> Any:
    """`value` as a number or tensor, whichever `own` is: a compiled step wants tensors, others refuse them."""
    if isinstance(own, torch.Tensor):
        return torch.as_tensor(value, dtype=own.dtype, device=own.device)
    if isinstance(own, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value


def new_slot(
    slot: str, parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> torch.Tensor:
    """An uninitialised tensor for a slot that the optimizer has not made yet, laid out as torch would.

    A slot of the parameter's shape is sharded and placed like it. Any other (`step` above all) is a plain tensor: on
    the CPU, or on the parameter's device where the options say `capturable` or `fused`.
    """
    if slot != "step" and shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    on_device = slot != "step" or options.get("capturable") or options.get("fused")
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.empty(shape, dtype=dtype, device=local.device if on_device else "cpu")


def apply(
    optimizer: Optimizer,
    names: Mapping[int, str],
    options: list[dict[str, Any]],
    slots: Mapping[str, dict[str, Any]],
) -> None:
    """Install group options and per-parameter slots (parameter name -> slot -> value)."""
    own_tensors = [
        {key: value for key, value in group.items() if isinstance(value, torch.Tensor)}
        for group in optimizer.param_groups
    ]
    positions = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
    optimizer.load_state_dict(
        {
            "state": {},
            "param_groups": [
                {**saved, "params": [next(positions) for _ in group["params"]]}
                for saved, group in zip(options, optimizer.param_groups, strict=True)
            ],
        }
    )
    # Tensors that others hold too, such as a compiled step, get their values in place.
    for group, tensors in zip(optimizer.param_groups, own_tensors, strict=True):
        for key, tensor in tensors.items():
            if key in group:
                group[key] = tensor.copy_(group[key])
    # Set directly: load_state_dict casts every floating slot to the parameter's dtype, which loses fp32 moments.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[id(parameter)] in slots:
                optimizer.state[parameter] = dict(slots[names[id(parameter)]])
