"""Hugging Face folders: weights straight into shards, and shards straight into a folder.

Loading compares the files with the model first, then every rank reads only the bytes of its own shards. Saving lays out
the files first, then every rank writes its own ranges of them: no rank holds a whole model, or a whole tensor.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from am_ckpt._boxes import Box
from am_ckpt._copy.mapping import Record, records_by_parameter, without_ones
from am_ckpt._copy.publish import is_filled, publish_folder, put_back
from am_ckpt._dtypes import CASTABLE
from am_ckpt._files.hf_folder import EXPORT_KEY, INDEX, byte_count, hf_files, require_replaceable, weight_index
from am_ckpt._files.safetensors import Header
from am_ckpt._files.step import MAX_SMALL_BYTES, read_file, require_file_name
from am_ckpt._io import fsync_directory, write_bytes
from am_ckpt._sources import Chunk, Source, hf_sources
from am_ckpt._train.differences import nearest
from am_ckpt._train.initialise import Initialiser, initialise_parameters, matches, materialise, recompute_buffers
from am_ckpt._train.module import Stored, stored_tensors, unwrap
from am_ckpt._train.pieces import Held, Piece, assign, dtype_name, held, pieces
from am_ckpt._train.ranks import agree, compute, rank_and_size, rank_zero
from am_ckpt._train.read import Reader
from am_ckpt._train.shared_files import WeightFiles, create_files, file_piece
from am_ckpt._train.write import create_staging, discard

# In the staging folder, beside its lease.
_FOLDER = "folder"


def load_hf(
    model: nn.Module,
    folder: str | os.PathLike[str] | None,
    *,
    mapping: Sequence[Mapping[str, Any]] | None = None,
    initialise: Sequence[str] = (),
    device: torch.device | str | None = None,
    ignore: Sequence[str] = (),
    initialiser: Initialiser | None = None,
    seed: int = 0,
) -> None:
    """Fill `model` with the weights of a Hugging Face folder, in place. Collective: every rank calls it.

    Each rank reads only the byte ranges of its own shards. Values are cast to the parameter's dtype where both are
    floating point; tied weights stay tied. Buffers that no file holds (rotary frequencies) are recomputed by the
    modules themselves.

    Args:
        model: may be on the meta device, whole or sharded (DTensor): tensors on meta get memory, real ones keep theirs.
        folder: holds `model.safetensors`, or the files that `model.safetensors.index.json` names. None reads nothing:
            everything must match `initialise`.
        mapping: where files and module differ: `{"file": name in the file, "parameter": name in the module, "slice":
            [[start, stop] or None per dim] or None for all, "transpose": whether the last two dims are swapped in the
            file}`. Dims of size one may be absent in the file. Parameters without a record have the same name in both.
        initialise: shell-style patterns of parameters that are initialised instead of loaded, by `initialiser` if
            given, else by the `reset_parameters` of their module (or of a class of the model's own that it is in).
        device: where tensors on meta get memory; None: the mesh's device for shards, the CPU for the rest.
        ignore: patterns of names in the files that the model does without.
        initialiser: `initialiser(model, name)` gives the whole first value, on the CPU, of the parameter that `model`
            holds as `name`; drawn from torch's default CPU generator, which is seeded before. What a transformers model
            starts from is for its family to say: `am_models.initial_value` does, without one it is an error. It is also
            asked for buffers that no module recomputes.
        seed: with the parameter's name, all that initialised values depend on.

    Raises:
        ValueError: any other name is missing or left over, or a shape or dtype does not fit: one error with counts and
            nearest names, before anything is touched. Or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    path = Path(folder) if folder is not None else None
    context = f"{path} was not loaded" if path is not None else "the model was not initialised"
    bare = unwrap(model)
    patterns = (initialise,) if isinstance(initialise, str) else tuple(initialise)
    plan = compute(context, lambda: _LoadPlan(bare, path, mapping, patterns))
    wanted = agree(context, plan.wanted)
    agree(context, lambda: plan.check(set().union(*wanted), ignore))
    with Reader(follow_symlinks=True) as reader:
        agree(
            f"{path or 'the model'} was loaded in part, the model is not usable",
            lambda: _fill(bare, plan, reader, torch.device(device) if device is not None else None, initialiser, seed),
        )


def _fill(
    model: nn.Module,
    plan: _LoadPlan,
    reader: Reader,
    device: torch.device | None,
    initialiser: Initialiser | None,
    seed: int,
) -> None:
    buffers = materialise(model, device)
    recompute_buffers(model, buffers, initialiser)
    # Before the weights: initialisation code may touch more than the parameter it is asked for.
    initialise_parameters(model, plan.patterns, seed, initialiser)
    tensors = stored_tensors(model)
    wanted = [
        (source, part)
        for stored in tensors
        for record, source in plan.reads(stored)
        for piece in pieces(stored.tensor, stored.name)
        if (part := file_piece(record, piece)) is not None
    ]
    reader.read_all(wanted)
    for stored in tensors:
        _require_equal_ties(stored, plan, reader)


def _require_equal_ties(stored: Stored, plan: _LoadPlan, reader: Reader) -> None:
    """A file may hold a tied tensor under both names; then both must hold the same."""
    for name, source in plan.repeated(stored):
        for piece in pieces(stored.tensor, stored.name):
            again = torch.empty_like(piece.values)
            reader.read(source, Piece(piece.box, again))
            if not torch.equal(again, piece.values):
                raise ValueError(
                    f"{stored.name!r} and {name!r} are one tied tensor in the model, but the file holds different "
                    "values; set tie_word_embeddings to what the weights say"
                )


class _LoadPlan:
    """What this rank's model needs from the files, and whether they have it."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None,
        mapping: Sequence[Mapping[str, Any]] | None,
        patterns: tuple[str, ...],
    ) -> None:
        self.patterns = patterns
        self._sources = hf_sources(folder) if folder is not None else {}
        self._stored = stored_tensors(model)
        self._records = records_by_parameter(
            mapping, {p.name: tuple(s.tensor.shape) for s in self._stored for p in s.places}
        )
        self._mapped = {str(record["parameter"]) for record in mapping or ()}

    def _needs(self, stored: Stored) -> list[Record]:
        """The records of a tensor: those of the mapping, or the file's tensor of the same name (tied: of any name)."""
        names = [place.name for place in stored.places]
        for name in names:
            if name in self._records:
                return self._records[name]
        name = next((name for name in names if name in self._sources), names[0])
        shape = tuple(stored.tensor.shape)
        return [Record(name, stored.name, Box((0,) * len(shape), shape), False)]

    def reads(self, stored: Stored) -> list[tuple[Record, Source]]:
        if matches(stored, self.patterns):
            return []
        return [(record, _squeezed(self._sources[record.file])) for record in self._needs(stored)]

    def repeated(self, stored: Stored) -> list[tuple[str, Source]]:
        """Other names under which the files hold the same tied tensor."""
        if matches(stored, self.patterns) or len(stored.places) == 1:
            return []
        used = {record.file for record in self._needs(stored)}
        others = [place.name for place in stored.places if place.name not in used and place.name not in self._records]
        return [(name, self._sources[name]) for name in others if name in self._sources]

    def wanted(self) -> set[str]:
        """Names in the files, and `parameter:` names of the model, that this rank knows what to do with."""
        names = {place.name for stored in self._stored for place in stored.places}
        files = {record.file for stored in self._stored for record in self._needs(stored)}
        return names | files | {f"parameter:{name}" for name in names}

    def check(self, wanted: set[str], ignore: Sequence[str]) -> None:
        """Raise one `ValueError` with all differences; `wanted` is the union over ranks (of pipeline stages)."""
        missing, shapes = [], []
        for stored in self._stored:
            if not matches(stored, self.patterns):
                for record in self._needs(stored):
                    if record.file not in self._sources:
                        missing.append(record.file)
                    else:
                        shapes += _mismatch(record, self._sources[record.file], stored.tensor)
        unexpected = [
            name
            for name in self._sources
            if name not in wanted and not any(fnmatchcase(name, pattern) for pattern in ignore)
        ]
        unknown = sorted(name for name in self._mapped if f"parameter:{name}" not in wanted)
        here = [name for name in wanted if not name.startswith("parameter:")]
        problems = _listed("missing in the files", missing, unexpected or self._sources)
        problems += _listed("in the files only", unexpected, missing or here)
        problems += _listed("named by mapping, but no parameter", unknown, here)
        if shapes:
            problems.append(f"{len(shapes)} of other shape or dtype: {'; '.join(shapes[:5])}")
        if problems:
            raise ValueError(f"the model does not match the files: {'. '.join(problems)}")


def _listed(what: str, names: Sequence[str], candidates: Any) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what}: {', '.join(name + nearest(name, candidates) for name in names[:5])}"]


def _mismatch(record: Record, source: Source, parameter: torch.Tensor) -> list[str]:
    name = dtype_name(parameter.dtype, record.parameter)
    if without_ones(record.file_shape) != without_ones(source.shape):
        return [f"{record.parameter}: model {list(record.file_shape)}, file {list(source.shape)} ({record.file})"]
    if name != source.dtype and not {name, source.dtype} <= CASTABLE:
        return [f"{record.parameter}: model {name}, file {source.dtype}; convert or dequantise the file first"]
    return []


def _squeezed(source: Source) -> Source:
    """The same bytes, described without dims of size one."""
    (chunk,) = source.chunks
    shape = without_ones(source.shape)
    return Source(source.dtype, shape, [Chunk(chunk.path, chunk.begin, Box((0,) * len(shape), shape))])


def save_hf(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    mapping: Sequence[Mapping[str, Any]] | None = None,
    files_from: str | os.PathLike[str] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `model`, whole or sharded, as a Hugging Face folder. Collective: every rank calls it.

    Every rank writes the ranges of its own shards, so memory stays bounded. Tied weights are written once. The folder
    appears complete or not at all. One that is there is replaced if it is empty or an export of this function with
    nothing added; otherwise `FileExistsError`.

    Args:
        folder: on a file system that all ranks share. Weights go to `model.safetensors` in it, or to several files with
            an index where they exceed `max_shard_size`.
        mapping: see `load_hf`; applied in reverse.
        files_from: a folder whose config, tokenizer, chat template and code are copied (`hf_files`).
        files: the contents of such files by name, which come first. Where neither has a config.json, a transformers
            model writes its own; other models get weights alone.
        dtypes: what parameters are rounded to in the files, by their name in the model (float32 master weights of a
            bfloat16 model); the others are written in their own.
        max_shard_size: of a file: bytes, or text such as `"5GB"`.
    """
    target = Path(folder).absolute()
    context = f"{target} was not written"
    bare = unwrap(model)
    rank = rank_and_size()[0]
    tensors: dict[str, Stored] = {}
    described = agree(context, lambda: _described(bare, tensors, dtypes or {}))
    merged, shares = compute(context, lambda: assign(described))
    weights = compute(context, lambda: WeightFiles(merged, mapping, byte_count(max_shard_size)))
    extra = rank_zero(context, lambda: _extra_files(bare, files_from, files, tensors))
    listed = sorted([*weights.files, *extra, *([INDEX] if len(weights.files) > 1 else [])])
    headers = weights.headers({"format": "pt", EXPORT_KEY: json.dumps(listed)})
    if len(headers) > 1:
        extra[INDEX] = weight_index(headers)
    export_id = rank_zero(context, lambda: secrets.token_hex(8))
    prefix = f".{target.name}-staging-"
    staging = target.with_name(prefix + export_id)
    try:
        rank_zero(context, lambda: _stage(target, staging, prefix, headers, extra))
        parts = weights.shares(headers, _owned(tensors, shares[rank]))
        agree(context, lambda: [part.write(staging / _FOLDER) for part in parts] and None)
        rank_zero(context, lambda: _publish(staging / _FOLDER, target))
    finally:
        if rank == 0:
            discard(staging)


def _described(model: nn.Module, tensors: dict[str, Stored], dtypes: Mapping[str, torch.dtype]) -> dict[str, Held]:
    described = {}
    for stored in stored_tensors(model):
        if stored.tensor.is_meta:
            raise ValueError(f"{stored.name!r} is on the meta device and has no values to write")
        tensors[stored.name] = stored
        described[stored.name] = held(stored.tensor, stored.name)
    for name, dtype in dtypes.items():
        if name not in described or not (dtype.is_floating_point and tensors[name].tensor.is_floating_point()):
            raise ValueError(
                f"dtypes: {name!r} cannot be written as {dtype}; name floating-point parameters of the model"
                f"{nearest(name, described)}"
            )
        described[name] = replace(described[name], dtype=dtype_name(dtype, name))
    return described


def _extra_files(
    model: nn.Module,
    files_from: str | os.PathLike[str] | None,
    files: Mapping[str, str | bytes] | None,
    tensors: Mapping[str, Stored],
) -> dict[str, bytes]:
    """The files beside the weights, checked against the model where config.json speaks of tied weights."""
    extra: dict[str, bytes] = {}
    transformers = sys.modules.get("transformers.modeling_utils")
    if files_from is not None:
        extra = {
            name: read_file(path, MAX_SMALL_BYTES, follow_symlinks=True) for name, path in hf_files(files_from).items()
        }
        if "config.json" not in extra:
            raise FileNotFoundError(f"files_from={files_from} has no config.json")
    for name, content in (files or {}).items():
        require_file_name(name, "files:")
        extra[name] = content.encode() if isinstance(content, str) else content
    if "config.json" not in extra and transformers is not None and isinstance(model, transformers.PreTrainedModel):
        config = json.loads(model.config.to_json_string())
        # FSDP2 puts a class of its own in front.
        names = [kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP")]
        config["architectures"] = config.get("architectures") or names[:1]
        extra["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        if model.can_generate():
            extra["generation_config.json"] = model.generation_config.to_json_string().encode()
    if "config.json" in extra:
        _require_same_ties(json.loads(extra["config.json"]).get("tie_word_embeddings"), tensors)
    return extra


def _require_same_ties(tied: bool | None, tensors: Mapping[str, Stored]) -> None:
    head = "lm_head.weight"
    if tied is False and any(head in stored.aliases for stored in tensors.values()):
        raise ValueError(f"{head} is tied in the model, config.json says tie_word_embeddings=false: it would be lost")
    if tied is True and head in tensors and not tensors[head].aliases:
        raise ValueError(
            f"{head} is separate in the model, config.json says tie_word_embeddings=true: it would be ignored"
        )


def _stage(target: Path, staging: Path, prefix: str, headers: Mapping[str, Header], extra: Mapping[str, bytes]) -> None:
    """Create the folder with its small files, and the weight files with their headers and full size."""
    total = sum(header.file_bytes for header in headers.values())
    create_staging(staging, total + sum(map(len, extra.values())), prefix, held=True)
    put_back(target)
    if target.exists():
        if not target.is_dir():
            raise FileExistsError(f"{target} exists and is not a folder")
        require_replaceable(target)
    os.mkdir(staging / _FOLDER)
    for name, content in extra.items():
        write_bytes(staging / _FOLDER / name, content)
    create_files(staging / _FOLDER, headers)


def _owned(tensors: Mapping[str, Stored], share: Mapping[str, Sequence[Box]]) -> Iterator[tuple[str, Piece]]:
    for name, boxes in share.items():
        here = {piece.box: piece for piece in pieces(tensors[name].tensor, name)}
        yield from ((name, here[box]) for box in boxes)


def _publish(folder: Path, target: Path) -> None:
    fsync_directory(folder)
    if is_filled(target):
        # Something may have been put there while this was written.
        require_replaceable(target)
    # What was there is then in the staging folder, and goes with it.
    publish_folder(folder, target)
    fsync_directory(target.parent)
