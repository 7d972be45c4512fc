"""Loading a step into live objects: everything is compared first, then bytes are read into place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from am_ckpt._boxes import Box, row_major
from am_ckpt._copy.mapping import Record, dropped_dims, output_shape, records_by_parameter, whole_record
from am_ckpt._files.hf_folder import ADAPTER
from am_ckpt._files.safetensors import parse_json
from am_ckpt._files.step import checked_header, read_file, read_manifest
from am_ckpt._sources import Chunk, Source, whole_sources
from am_ckpt._tools.inspect import inspect
from am_ckpt._train.differences import name_differences, raise_differences, shape_difference
from am_ckpt._train.entries import HELD, PerRank, entry_tensors, mismatch, put_back
from am_ckpt._train.module import extra_states, stored_tensors
from am_ckpt._train.optimizer import apply, joined_groups, match_groups, named_groups, new_slot
from am_ckpt._train.pieces import TORCH_DTYPES, Piece, pieces
from am_ckpt._train.ranks import agree, rank_and_size
from am_ckpt._train.read import Reader, require_readable
from am_ckpt._train.state import MODEL, SECTIONS, Adapter, Stateful, parameter_names, require_entries
from am_ckpt._train.state_json import Ranks, decode

_MAX_STATE_BYTES = 2**30


def restore(folder: Path, state: Mapping[str, Any], fingerprints: Mapping[str, Any], *, strict: bool) -> int:
    """Load the checkpoint `folder` into `state` and return its step; see `Checkpointer.load`. Collective."""
    with Reader() as reader:
        # A rank that is a stage of a pipeline has some of the model.
        names = agree(f"{folder} was not loaded, nothing was changed", lambda: _names(state))
        step = _Step(folder, reader, names, strict)
        # Per rank: comparing may find differences on one rank only, and must stop all of them before any byte changes.
        actions: list[Callable[[], None]] = []
        agree(
            f"{folder} was not loaded, nothing was changed", lambda: actions.extend(step.prepare(state, fingerprints))
        )
        agree(
            f"{folder} was loaded in part, the state is not usable", lambda: [action() for action in actions] and None
        )
        if step.left_out and rank_and_size()[0] == 0:
            warnings.warn(f"loaded a part of {folder.name}: {'; '.join(step.left_out)}", stacklevel=3)
        return step.number


@dataclass(frozen=True)
class _Names:
    """On one rank, of the tensors of the model and of other entries, and in the groups of optimizers."""

    tensors: list[str]
    groups: dict[str, list[list[str]]]
    entries: dict[str, list[str]]


def _names(state: Mapping[str, Any]) -> _Names:
    require_entries(state)
    entries = {entry: [*(entry_tensors(value) or ())] for entry, value in state.items() if entry != MODEL}
    if MODEL not in state:
        return _Names([], {}, entries)
    model, parameters = state[MODEL], parameter_names(state[MODEL])
    tensors = []
    if isinstance(model, nn.Module):
        tensors = [place.name for stored in stored_tensors(model) for place in stored.places] + [*extra_states(model)]
    optimizers = {entry: value for entry, value in state.items() if isinstance(value, Optimizer)}
    return _Names(
        tensors, {entry: named_groups(entry, value, parameters) for entry, value in optimizers.items()}, entries
    )


class _Step:
    """One checkpoint folder opened for loading; `names` are those of every rank.

    `left_out`: what only one side has, where that is allowed.
    """

    def __init__(self, folder: Path, reader: Reader, names: Sequence[_Names], strict: bool) -> None:
        self._folder = folder
        self._strict = strict
        self.left_out: list[str] = []
        self._names = names
        self._anywhere = {name for rank in names for name in rank.tensors}
        self._reader = reader
        self._manifest: dict[str, Any] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._sections: dict[str, dict[str, Source]] = {}

    @property
    def number(self) -> int:
        return int(self._manifest["step"])

    def prepare(self, state: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> list[Callable[[], None]]:
        """Compare `state` with the checkpoint and return what must be done, in order."""
        self._manifest = read_manifest(self._folder)
        self._records = {record["path"]: record for record in self._manifest["files"]}
        self._sections = inspect(self._folder).sections
        saved = self._manifest["fingerprints"]
        different = {
            key: (saved[key], value) for key, value in fingerprints.items() if key in saved and saved[key] != value
        }
        if different:
            lines = "; ".join(f"{key}: checkpoint {there!r}, here {here!r}" for key, (there, here) in different.items())
            raise ValueError(f"the checkpoint belongs to another run: {lines}")
        there = {*self._manifest["state"], MODEL, *self._manifest["tensors"].keys() - {*SECTIONS}}
        missing = [entry for entry in state if entry not in there]
        if missing:
            self._differ(f"the checkpoint has no state {missing}; it holds {sorted(there)}")
        actions = []
        if MODEL in state:
            model = state[MODEL]
            actions.append(self._module(model) if isinstance(model, nn.Module) else self._adapter(model))
        for entry, value in state.items():
            if entry != MODEL and entry in there:
                actions.append(self._entry(entry, value, state))
        return actions

    def _differ(self, difference: str) -> None:
        """Raise, or take note where parts may be loaded."""
        if self._strict:
            raise ValueError(difference)
        self.left_out.append(difference)

    def _entry(self, entry: str, value: Any, state: Mapping[str, Any]) -> Callable[[], None]:
        is_optimizer = entry in self._manifest["optimizers"]
        if is_optimizer != isinstance(value, Optimizer):
            raise ValueError(
                f"state[{entry!r}] is {type(value).__name__}, the checkpoint's {entry!r} is "
                f"{'an optimizer' if is_optimizer else 'no optimizer'}"
            )
        if entry in self._sections and not is_optimizer:
            return self._tensors(entry, value)
        data = read_state(self._folder, self._records, entry, self._reader)
        if isinstance(value, Optimizer):
            return self._optimizer(entry, value, parameter_names(state[MODEL]), data)
        if isinstance(value, PerRank) != isinstance(data, Ranks):
            kind, fix = ("that of each rank", "PerRank") if isinstance(data, Ranks) else ("one for all ranks", "")
            advice = f"give it as am_ckpt.{fix}(...)" if fix else "give it without PerRank"
            raise ValueError(f"state[{entry!r}] is {kind} in the checkpoint; {advice}")
        if isinstance(value, PerRank):
            rank, size = rank_and_size()
            if len(data.values) != size:
                raise ValueError(
                    f"state[{entry!r}] is that of each of {len(data.values)} ranks, and cannot be divided among the "
                    f"{size} here; resume on as many, or leave {entry!r} out of `state`"
                )
            data = data.values[rank]
        return _put(entry, value, data, state)

    def _tensors(self, entry: str, value: Any) -> Callable[[], None]:
        """An entry of nothing but tensors, which are in shards."""
        here, there = entry_tensors(value), self._sections[entry]
        if here is None:
            raise ValueError(f"state[{entry!r}] is {type(value).__name__}; in the checkpoint it is a dict of tensors")
        anywhere = {name for rank in self._names for name in rank.entries[entry]}
        self._require_names(
            f"state[{entry!r}]",
            name_differences(
                [name for name in here if name not in there],
                [name for name in there if name not in anywhere],
                here,
                there,
            ),
        )
        common = {name: tensor for name, tensor in here.items() if name in there}
        raise_differences(
            f"state[{entry!r}]",
            [line for name, tensor in common.items() for line in shape_difference(name, there[name], tensor)],
        )
        ready = [
            (there[name], piece) for name, tensor in common.items() for piece in _readable(name, there[name], tensor)
        ]
        return lambda: self._reader.read_all(ready)

    def _require_names(self, what: str, differences: list[str]) -> None:
        if differences and self._strict:
            raise_differences(what, differences)
        self.left_out += [f"{what}: {difference}" for difference in differences]

    def _model_sources(self) -> dict[str, Source]:
        """The model's tensors by the names that they have in the module."""
        return module_sources(self._manifest, self._sections["model"])

    def _module(self, model: nn.Module) -> Callable[[], None]:
        if self._manifest["model"] != "module":
            raise ValueError("the checkpoint holds an adapter; give the adapter as state['model'], over its base model")
        sources = self._model_sources()
        stored = stored_tensors(model)
        aliases = self._manifest["aliases"]
        known = {name: aliases.get(name, name) for name in [*sources, *aliases]}
        problems = []
        origin: dict[str, str] = {}
        pairs: list[tuple[str, Source, torch.Tensor]] = []
        for item in stored:
            names = [place.name for place in item.places]
            found = sorted({known[name] for name in names if name in known})
            if len(found) > 1:
                problems.append(f"{names} are one tied tensor here, but separate in the checkpoint")
            elif found and found[0] in origin:
                problems.append(f"{item.name} and {origin[found[0]]} are separate here, but tied in the checkpoint")
            elif found:
                origin[found[0]] = item.name
                pairs.append((item.name, sources[found[0]], item.tensor))
        here = {place.name for item in stored for place in item.places}
        names = name_differences(
            [item.name for item in stored if not any(place.name in known for place in item.places)],
            sorted({*sources} - {known[name] for name in self._anywhere if name in known}),
            here,
            set(known),
        )
        problems += [line for name, source, tensor in pairs for line in shape_difference(name, source, tensor)]
        modules = extra_states(model)
        extra = read_state(self._folder, self._records, MODEL, self._reader) if MODEL in self._manifest["state"] else {}
        names += name_differences(
            [name for name in modules if name not in extra],
            [name for name in extra if name not in self._anywhere],
            modules,
            extra,
        )
        if self._strict:
            problems = names + problems
        elif names and stored and not pairs:
            raise ValueError(f"nothing of the model is in the checkpoint: {'; '.join(names)}")
        else:
            self._require_names("the model", names)
        raise_differences("the model", problems)
        ready = [(source, piece) for name, source, tensor in pairs for piece in _readable(name, source, tensor)]

        def load() -> None:
            self._reader.read_all(ready)
            for name, module in modules.items():
                if name in extra:
                    module.set_extra_state(extra[name])

        return load

    def _adapter(self, model: Adapter) -> Callable[[], None]:
        if self._manifest["model"] != "adapter":
            raise ValueError("the checkpoint holds a whole model, state['model'] is an adapter")
        path = self._folder / "model" / ADAPTER
        sources = self._sections["model"]
        now = model.state_dict()
        problems = name_differences(
            [n for n in now if n not in sources], [n for n in sources if n not in now], now, sources
        )
        for name in now.keys() & sources.keys():
            problems += shape_difference(name, sources[name], now[name])
        raise_differences("the adapter", problems)
        tensors = _whole_tensors(path, self._records[f"model/{ADAPTER}"], self._reader)

        def load() -> None:
            model.load_state_dict(tensors)

        return load

    def _optimizer(self, entry: str, optimizer: Optimizer, names: dict[int, str], saved: Any) -> Callable[[], None]:
        groups = joined_groups(entry, [rank.groups[entry] for rank in self._names])
        options = match_groups(entry, optimizer, groups, saved)
        by_parameter: dict[str, dict[str, Source]] = {}
        for key, source in self._sections["optim"].items():
            slot, _, name = key.partition("/")
            by_parameter.setdefault(name, {})[slot] = source
        plan: list[tuple[torch.Tensor, str, dict[str, Any], dict[str, Source]]] = []
        for group, chosen in zip(optimizer.param_groups, options, strict=True):
            for parameter in group["params"]:
                name = names[id(parameter)]
                slots = by_parameter.get(name, {})
                for slot, source in slots.items():
                    boxes = (
                        [piece.box for piece in pieces(parameter, name)]
                        if source.shape == tuple(parameter.shape)
                        else []
                    )
                    require_readable(f"{slot}/{name}", source, boxes)
                plan.append((parameter, name, chosen, slots))

        def load() -> None:
            # The old state goes first: both at once would double the optimizer's memory.
            optimizer.state.clear()
            values: dict[str, dict[str, Any]] = {name: dict(slots) for name, slots in saved["values"].items()}
            wanted: list[tuple[Source, Piece]] = []
            with torch.no_grad():
                for parameter, name, chosen, slots in plan:
                    for slot, source in slots.items():
                        tensor = new_slot(slot, parameter, source.shape, TORCH_DTYPES[source.dtype], chosen)
                        wanted += [(source, piece) for piece in _readable(f"{slot}/{name}", source, tensor)]
                        values.setdefault(name, {})[slot] = tensor
            self._reader.read_all(wanted)
            apply(optimizer, names, options, values)

        return load


def module_sources(manifest: Mapping[str, Any], sources: dict[str, Source]) -> dict[str, Source]:
    """A step's `sources`, by the names that they have in the module if a mapping was applied to them."""
    if "published" not in manifest:
        return sources
    parameters = manifest["published"]["parameters"]
    shapes = {name: tuple(item["shape"]) for name, item in parameters.items()}
    records = records_by_parameter(manifest["published"]["mapping"], shapes)
    return {
        name: _parameter_source(
            item["dtype"], shapes[name], records.get(name, [whole_record(name, shapes[name])]), sources
        )
        for name, item in parameters.items()
    }


def read_state(folder: Path, records: Mapping[str, dict[str, Any]], entry: str, reader: Reader) -> Any:
    """The decoded state of an entry; `records` by path. The digests of its files are checked by `check_step`."""
    tensors: dict[str, torch.Tensor] = {}
    path = folder / "state" / f"{entry}.safetensors"
    if f"state/{path.name}" in records:
        tensors = _whole_tensors(path, records[f"state/{path.name}"], reader)
    text = folder / "state" / f"{entry}.json"
    return decode(parse_json(read_file(text, _MAX_STATE_BYTES), str(text)), tensors, entry)


def _whole_tensors(path: Path, record: Mapping[str, Any], reader: Reader) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, source in whole_sources(path, checked_header(path, dict(record))).items():
        tensors[key] = torch.empty(source.shape, dtype=TORCH_DTYPES[source.dtype])
        reader.read(source, Piece(source.chunks[0].box, tensors[key]))
    return tensors


def _parameter_source(
    dtype: str, shape: tuple[int, ...], records: Iterable[Record], published: Mapping[str, Source]
) -> Source:
    """A parameter of the module, put together from the published tensors that are its parts."""
    chunks: list[Chunk] = []
    for record in records:
        there = published.get(record.file)
        if there is None or (there.dtype, there.shape) != (dtype, output_shape(record, shape)):
            raise ValueError(f"{record.file!r} is not the part of {record.parameter!r} that the manifest describes")
        dropped = dropped_dims(record, shape)
        for chunk in there.chunks:
            dims = zip(chunk.box.offset, chunk.box.size, row_major(chunk.box.size, 1), strict=True)
            rows = [(0, 1, 0) if dim in dropped else next(dims) for dim in range(len(shape))]
            if record.transpose:
                rows[-1], rows[-2] = rows[-2], rows[-1]
            offset = tuple(a + row[0] for a, row in zip(record.box.offset, rows, strict=True))
            box = Box(offset, tuple(row[1] for row in rows))
            chunks.append(Chunk(chunk.path, chunk.begin, box, tuple(row[2] for row in rows)))
    return Source(dtype, shape, chunks)


def _put(entry: str, value: Any, data: Any, state: Mapping[str, Any]) -> Callable[[], None]:
    """What puts `data` into an entry that is no tensors in shards; it fits, or `ValueError`."""
    holder = value if isinstance(value, PerRank) else None
    here = value.value if isinstance(value, PerRank) else value
    if isinstance(here, Stateful):
        return partial(_load_state, here, data)
    problem = mismatch(entry, here, data)
    if problem is not None:
        raise ValueError(f"{problem}; nothing else fits in its place")
    if holder is None and not isinstance(here, HELD) and not isinstance(state, MutableMapping):
        raise TypeError(f"state[{entry!r}] is {here!r:.60}, which is replaced: give `state` as a dict")

    def load() -> None:
        found = put_back(here, data)
        if holder is not None:
            holder.value = found
        elif isinstance(state, MutableMapping):
            state[entry] = found

    return load


def _load_state(value: Stateful, data: Any) -> None:
    value.load_state_dict(data)


def _readable(name: str, source: Source, tensor: torch.Tensor) -> list[Piece]:
    """This rank's pieces of `tensor`, after checking that the source holds each of them completely."""
    parts = pieces(tensor, name)
    require_readable(name, source, [piece.box for piece in parts])
    return parts
