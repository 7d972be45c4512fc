"""What a checkpoint holds, seen from one rank: collected from live objects, without writing anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer

from am_ckpt._files.safetensors import require_storable
from am_ckpt._files.step import require_file_name
from am_ckpt._train.entries import PerRank, entry_tensors, is_plain
from am_ckpt._train.lease import own_lease
from am_ckpt._train.module import extra_states, mesh_axes, stored_tensors
from am_ckpt._train.optimizer import OptimizerState, joined_groups, optimizer_contents
from am_ckpt._train.pieces import Held, Piece, assign, byte_blocks, dtype_name, held, pieces
from am_ckpt._train.ranks import rank_and_size
from am_ckpt._train.state_json import decode, encode, encode_ranks

MODEL = "model"
SECTIONS = ("model", "optim")
# Of every step, beside those of entries that are tensors.
_FOLDERS = (*SECTIONS, "state")


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives and takes its state, as data like that of torch's schedulers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@runtime_checkable
class Adapter(Stateful, Protocol):
    """A small model beside a frozen one: its state is full plain tensors by the names of the adapter file.

    `state_dict()` may be collective: every rank calls it. `named_parameters()` yields the same names with the
    parameters being trained, so that optimizer state is stored under them.
    """

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


@dataclass
class Contents:
    """What this rank holds: tensors by section (`model`, `optim`) and name, and the other state by entry."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {name: {} for name in SECTIONS})
    state: dict[str, tuple[bytes, dict[str, torch.Tensor]]] = field(default_factory=dict)
    adapter: dict[str, torch.Tensor] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    optimizers: dict[str, OptimizerState] = field(default_factory=dict)
    # Of modules, by name: see join_extra_states.
    extra: dict[str, Any] = field(default_factory=dict)
    # Of this rank alone, by entry: data of JSON and tensors. See join_per_rank.
    per_rank: dict[str, tuple[Any, dict[str, torch.Tensor]]] = field(default_factory=dict)
    # Entries whose plain tensors are equal on all ranks that have them.
    equal: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Description:
    """What ranks tell each other about their contents: plain data, no tensors but those of modules' `extra` state.

    Of optimizers `groups` and `values` are apart: ranks that are stages of a pipeline have other parameters, and
    other modules.
    """

    held: dict[str, dict[str, Held]]
    aliases: dict[str, str]
    groups: dict[str, list[list[str]]]
    values: dict[str, dict[str, dict[str, Any]]]
    extra: dict[str, Any]
    per_rank: dict[str, tuple[Any, dict[str, torch.Tensor]]]
    state_digests: dict[str, str]
    state_bytes: int
    axes: dict[str, int]
    lease: dict[str, Any]

    @property
    def machine(self) -> str:
        """What is equal for ranks on one machine."""
        return str(self.lease["boot_id"] or self.lease["host"])


@dataclass(frozen=True)
class Plan:
    """The agreed contents: every tensor with its boxes, and the boxes each rank writes, by section."""

    merged: dict[str, dict[str, Held]]
    shares: dict[str, list[dict[str, list[Any]]]]


def parameter_names(model: nn.Module | Adapter) -> dict[int, str]:
    """`id(parameter)` -> name for `state["model"]`, a module or an adapter."""
    if isinstance(model, nn.Module):
        return {id(stored.tensor): stored.name for stored in stored_tensors(model) if stored.is_parameter}
    return {id(parameter): name for name, parameter in model.named_parameters()}


def require_entries(state: Mapping[str, Any]) -> None:
    """Raise for entry names that cannot be file names and values that have no state."""
    for entry, value in state.items():
        require_file_name(entry, "state:")
        if entry == MODEL:
            if not isinstance(value, nn.Module | Adapter):
                raise TypeError(
                    f"state['model'] is {type(value).__name__}; give an nn.Module, or an object with state_dict(), "
                    "load_state_dict() and named_parameters()"
                )
        elif isinstance(value, Optimizer):
            if MODEL not in state:
                raise ValueError(f"state[{entry!r}] is an optimizer, stored by parameter name: state needs 'model' too")
        else:
            inner = value.value if isinstance(value, PerRank) else value
            if not is_plain(inner) and not isinstance(inner, Stateful):
                raise TypeError(
                    f"state[{entry!r}] is {type(inner).__name__}; it needs state_dict() and load_state_dict() to be "
                    "resumed, or to be plain data, tensors or a generator of random numbers"
                )
            if entry in _FOLDERS and entry_tensors(value) is not None:
                raise ValueError(f"state: {entry!r} is a folder of every step; give these tensors another name")


def collect(state: Mapping[str, Any], contents: Contents) -> Description:
    """Fill `contents` from the live objects of `state` and describe them to the other ranks."""
    require_entries(state)
    names: dict[int, str] = {}
    if MODEL in state:
        model = state[MODEL]
        names = parameter_names(model)
        if isinstance(model, nn.Module):
            for stored in stored_tensors(model):
                contents.tensors["model"][stored.name] = stored.tensor
                contents.aliases.update(dict.fromkeys(stored.aliases, stored.name))
            for name, module in extra_states(model).items():
                data, tensors_of_value = encode(module.get_extra_state(), f"{MODEL}[{name!r}]")
                on_cpu = {key: tensor.detach().cpu() for key, tensor in tensors_of_value.items()}
                contents.extra[name] = decode(data, on_cpu, name)
        else:
            contents.adapter = _adapter_tensors(model.state_dict())
    for entry, value in state.items():
        if isinstance(value, Optimizer):
            tensors, own = optimizer_contents(entry, value, names)
            twice = sorted(set(tensors) & set(contents.tensors["optim"]))
            if twice:
                raise ValueError(
                    f"state[{entry!r}] and another optimizer both hold {twice[:3]}; give each its own parameters"
                )
            contents.tensors["optim"].update(tensors)
            contents.optimizers[entry] = own
            # What must be equal on all ranks; join_optimizers adds the rest. Tensors among values are compared here.
            tensors_of_values = encode(own.values, f"state[{entry!r}].state")[1]
            contents.state[entry] = encoded_state([own.type, own.options, tensors_of_values], entry)
        elif entry != MODEL:
            _collect_entry(entry, value, contents)
    return _describe(contents)


def _collect_entry(entry: str, value: Any, contents: Contents) -> None:
    tensors = entry_tensors(value)
    if isinstance(value, PerRank):
        data, own = encode(_plain(value.value), f"{entry}[rank {rank_and_size()[0]}]")
        contents.per_rank[entry] = data, {name: tensor.detach().cpu().clone() for name, tensor in own.items()}
    elif tensors is not None:
        contents.tensors[entry] = tensors
        if not isinstance(value, nn.Module):
            contents.equal.add(entry)
    else:
        contents.state[entry] = encoded_state(_plain(value), entry)


def _plain(value: Any) -> Any:
    return value.state_dict() if isinstance(value, Stateful) else value


def encoded_state(value: Any, entry: str) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The text of `state/<entry>.json`, and the tensors of the safetensors file beside it."""
    data, tensors = encode(value, entry)
    return _text_of(data), tensors


def _text_of(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _adapter_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    for name, tensor in state.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta:
            raise TypeError(
                f"state['model'].state_dict()[{name!r}] must be a full plain tensor, it is {type(tensor).__name__}"
            )
        dtype_name(tensor.dtype, name)
    require_storable(state)
    return state


def _describe(contents: Contents) -> Description:
    described: dict[str, dict[str, Held]] = {}
    for section, tensors in contents.tensors.items():
        described[section] = {}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"{section} tensor {name!r} is on the meta device and has no values to store")
            require_storable([name])
            what = f"{section} tensor {name!r}"
            described[section][name] = held(tensor, what, equal=section in contents.equal)
    digests = {}
    size = sum(tensor.nbytes for tensor in (contents.adapter or {}).values())
    for entry, (text, tensors) in contents.state.items():
        digests[entry] = _state_digest(text, tensors)
        size += len(text) + sum(tensor.nbytes for tensor in tensors.values())
    axes = mesh_axes([tensor for tensors in contents.tensors.values() for tensor in tensors.values()])
    groups = {entry: own.groups for entry, own in contents.optimizers.items()}
    values = {entry: own.values for entry, own in contents.optimizers.items()}
    return Description(
        described, contents.aliases, groups, values, contents.extra, contents.per_rank, digests, size, axes, own_lease()
    )


def _state_digest(text: bytes, tensors: Mapping[str, torch.Tensor]) -> str:
    hasher = xxhash.xxh3_128(text)
    for name in sorted(tensors):
        hasher.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        for block in byte_blocks(tensors[name]):
            hasher.update(block)
    return hasher.hexdigest()


def join_extra_states(contents: Contents, described: Sequence[Description]) -> None:
    """Put into `contents.state` what modules of all ranks hold beside tensors: stages of a pipeline have others."""
    joined: dict[str, Any] = {}
    digests: dict[str, tuple[int, str]] = {}
    for rank, description in enumerate(described):
        for name, value in description.extra.items():
            digest = _state_digest(*encoded_state(value, name))
            first, other = digests.setdefault(name, (rank, digest))
            if digest != other:
                raise ValueError(
                    f"state['model']: {name!r} differs between rank {first} and rank {rank}; one copy is stored, so "
                    "give state that is equal on every rank"
                )
            joined.setdefault(name, value)
    if joined:
        contents.state[MODEL] = encoded_state(joined, MODEL)


def join_per_rank(contents: Contents, described: Sequence[Description]) -> None:
    """Put into `contents.state` what every rank has for itself."""
    for entry in contents.per_rank:
        data = encode_ranks([description.per_rank[entry][0] for description in described])
        tensors = {name: tensor for rank in described for name, tensor in rank.per_rank[entry][1].items()}
        contents.state[entry] = _text_of(data), tensors


def join_optimizers(contents: Contents, described: Sequence[Description]) -> None:
    """Put into `contents.state` what is stored of the optimizers, of the parameters of all ranks."""
    for entry, own in contents.optimizers.items():
        groups = joined_groups(entry, [description.groups[entry] for description in described])
        values: dict[str, dict[str, Any]] = {}
        for rank, description in enumerate(described):
            for name, slots in description.values[entry].items():
                # By their text, since NaN is not equal to itself.
                if repr(values.setdefault(name, slots)) != repr(slots):
                    raise ValueError(
                        f"state[{entry!r}]: what is no tensor of {name!r} is {slots!r:.100} on rank {rank} and "
                        f"{values[name]!r:.100} on another; one copy is stored for all ranks"
                    )
        pairs = zip(groups, own.options, strict=True)
        described_groups = [{"parameters": members, "options": options} for members, options in pairs]
        saved = {"type": own.type, "groups": described_groups, "values": values}
        contents.state[entry] = encoded_state(saved, entry)


def contents_digest(contents: Contents, description: Description) -> dict[str, Any]:
    """Number of tensors, bytes and xxh3-128 of what this rank holds."""
    extra = {name: _state_digest(*encoded_state(value, name)) for name, value in description.extra.items()}
    own = {entry: _state_digest(_text_of(data), tensors) for entry, (data, tensors) in description.per_rank.items()}
    others = sorted([*extra.items(), *own.items()])
    rest = (sorted(description.state_digests.items()), description.groups, description.values, others)
    hasher = xxhash.xxh3_128(repr(rest).encode())
    sections = [*contents.tensors.items(), ("adapter", contents.adapter or {})]
    count, size = 0, 0
    for section, tensors in sections:
        for name in sorted(tensors):
            count += 1
            for piece in pieces(tensors[name], name):
                size += piece.values.nbytes
                hasher.update(f"{section} {name} {piece.values.dtype} {piece.box.offset} {piece.box.size}".encode())
                for block in byte_blocks(piece.values):
                    hasher.update(block)
    return {"tensors": count, "bytes": size, "xxh3_128": hasher.hexdigest()}


def make_plan(described: Sequence[Description]) -> Plan:
    """Every rank's part, computed alike on all ranks; `ValueError` where what they hold does not fit together."""
    first = described[0].state_digests
    for rank, description in enumerate(described[1:], start=1):
        different = sorted(
            entry
            for entry in first.keys() | description.state_digests.keys()
            if first.get(entry) != description.state_digests.get(entry)
        )
        if different:
            raise ValueError(
                f"state {different} differs between rank 0 and rank {rank}; one copy is stored for all ranks, so give "
                "state that is equal on every rank (a global cursor and seed, not a rank's own), or "
                "am_ckpt.PerRank(...), which as many ranks can resume"
            )
    for rank, description in enumerate(described):
        for one, other in ((description.held, described[0].held), (description.per_rank, described[0].per_rank)):
            if one.keys() != other.keys():
                names = sorted(one.keys() ^ other.keys())
                raise ValueError(
                    f"state {names} is of another kind on rank {rank} than on rank 0; give all ranks alike"
                )
    merged, shares = {}, {}
    for section in described[0].held:
        try:
            merged[section], shares[section] = assign([description.held[section] for description in described])
        except ValueError as error:
            advice = "" if section in SECTIONS else ". State of each rank: am_ckpt.PerRank(...)"
            raise ValueError(f"{section}: {error}{advice}") from error
    return Plan(merged, shares)


def owned_pieces(contents: Contents, plan: Plan, section: str, rank: int) -> Iterator[tuple[str, list[Piece]]]:
    """What `rank` writes of a section, by tensor."""
    for name, boxes in plan.shares[section][rank].items():
        here = {piece.box: piece for piece in pieces(contents.tensors[section][name], name)}
        yield name, [here[box] for box in boxes]
