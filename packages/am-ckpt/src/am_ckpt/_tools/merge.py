"""Shards of a training run into a Hugging Face folder: byte ranges from file to file.

Planned from headers alone, with every element accounted for, before a byte is written; copied through small buffers
into a staging folder beside the destination; fsynced and renamed. No model, no GPU, no tensor in memory.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from am_ckpt._copy.mapping import Record, output_shape, records_by_parameter
from am_ckpt._copy.plan import Output, parts_of
from am_ckpt._copy.transfer import Transfer, require_free, transfer
from am_ckpt._copy.values import TensorReader
from am_ckpt._dtypes import CAST_TO, CASTABLE, ITEM_BYTES
from am_ckpt._files.hf_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    DIGESTS,
    EXPORT_KEY,
    INDEX,
    SINGLE,
    byte_count,
    hf_files,
    weight_files,
    weight_index,
)
from am_ckpt._files.model_config import HEAD, config_problems, read_config, tied_embedding
from am_ckpt._files.safetensors import Header, build_header, read_header
from am_ckpt._files.step import MAX_SMALL_BYTES, read_file
from am_ckpt._files.torchtitan import OWN_NAMES, as_published, is_torchtitan, published_aliases
from am_ckpt._sources import Source, hf_sources, paused_collector, whole_sources
from am_ckpt._tools.inspect import inspect
from am_ckpt._tools.inventory import Inventory
from am_ckpt._tools.unchanged import require_unchanged
from am_ckpt._torch import require_torch
from am_ckpt.errors import ArgumentError, IncompleteError

_NUMBERS = re.compile(r"(\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: `num_bytes` of tensors, `resumed_bytes` of them from the run before, wall `seconds`."""

    source: str
    kind: str
    destination: str
    num_tensors: int
    num_bytes: int
    resumed_bytes: int
    seconds: float
    files: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


def merge(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    section: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fsync: bool = True,
    digest: bool = False,
    assume_complete: bool = False,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model of checkpoint `source` as the Hugging Face folder `destination`; one process, no collective.

    Weights go to `model.safetensors`, or to several files with an index; an adapter stays one file. A mapping stored in
    the checkpoint is applied, a tied head that equals its embedding is written once. The destination appears complete
    or not at all. Memory: headers, and less than 8 MiB a thread (16 MiB more to verify a step with `layout="direct"`).

    Args:
        source: any folder that `inspect` recognises; it is only read.
        like: a folder whose config, tokenizer, chat template and code are carried along, before those of the source;
            weights in it are compared by name and shape.
        max_shard_size: of a file: bytes, or text such as `"5GB"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"` for the floating-point tensors of 16 bits and more (config.json
            is changed accordingly); None: as stored.
        section: see `inspect`.
        threads: None: the number of cores, at most 8.
        resume: after an interruption, go on where the last merge to the destination stopped; if source or arguments
            have changed since, start from zero and say so.
        overwrite: replace a destination that holds an export of `merge` or `save_hf` and nothing else.
        fsync: False does not wait for the disk: a power cut may lose the result, and nothing can be resumed.
        digest: hash what is written and add `am_ckpt_digests.json`, by which `verify` finds a flipped bit wherever the
            folder goes.
        assume_complete: no file of the last ranks is missing. Shards of torch's Hugging Face writer do not say how
            large the whole tensors are; without this, the weights of `like` or a config.json must show it.
        verify: before anything is written, hold what is read of a step of the Checkpointer, or of a folder with
            `am_ckpt_digests.json`, against the digests in it: it is read once more. Other kinds have none that are
            looked at here: `verify(source, full=True)` knows the CRC-32 of `.distcp` and `.bin` files.
        progress: called with bytes done and all bytes, from several threads.

    Raises:
        ValueError: parts are missing, overlapping, damaged or unsafe.
        FileNotFoundError: files are missing.
        FileExistsError: the destination is there, and is not to be, or cannot be, replaced.
        OSError: reading or writing fails.
        MissingTorchError: `dtype` is given, and torch is not installed.
    """
    started = time.monotonic()
    _require_arguments(dtype, resume, fsync, digest, verify)
    limit = byte_count(max_shard_size)
    target = Path(destination).absolute()
    inventory = inspect(source, section=section)
    require_free(target, inventory.path, overwrite)
    inventory.require_whole()
    if verify:
        require_unchanged(inventory, threads)
    with paused_collector():
        plan = _Plan(inventory, like, limit, dtype, digest, assume_complete)
    resumed = transfer(
        plan.transfer, target, threads=threads, resume=resume, fsync=fsync, progress=progress, digests=digest
    )
    return MergeReport(
        str(inventory.path),
        inventory.kind,
        str(target),
        len(plan.transfer.outputs),
        plan.transfer.num_bytes,
        resumed,
        time.monotonic() - started,
        plan.files,
        plan.notes,
    )


def _require_arguments(dtype: str | None, resume: bool, fsync: bool, digest: bool, verify: bool) -> None:
    if dtype is not None and dtype not in CAST_TO:
        raise ArgumentError(f"dtype={dtype!r}; choose {', '.join(CAST_TO)}, or None to keep what is stored")
    if resume and not fsync:
        raise ArgumentError("resume=True needs fsync=True: without it, what was copied before may not be on the disk")
    if digest and not verify:
        raise ArgumentError(
            "verify=False (--no-verify): new digests must not vouch for old damage; leave out digest=True (--digest)"
        )
    if dtype is not None:
        require_torch(f"dtype={dtype!r} (--dtype), a cast of values,")


class _Plan:
    """Everything about a merge that is decided before the first write."""

    def __init__(
        self,
        inventory: Inventory,
        folder: str | os.PathLike[str] | None,
        limit: int,
        dtype: str | None,
        digest: bool,
        assume_complete: bool,
    ) -> None:
        like = Path(folder).absolute() if folder is not None else None
        self.inventory = inventory
        self.notes = list(inventory.notes)
        like_files = _like_files(like, inventory.adapter) if like is not None else {}
        files = {**inventory.files, **like_files}
        self.small = inventory.small_files()
        for name, path in like_files.items():
            self.small[name] = read_file(path, MAX_SMALL_BYTES, follow_symlinks=True)
        tensors = dict(inventory.tensors)
        self.aliases = inventory.aliases
        # A mapping says itself how the tensors are published.
        if "config.json" in files and inventory.mapping is None and is_torchtitan(tensors):
            where = files["config.json"]
            with TensorReader(follow_symlinks=inventory.follow_symlinks) as reader:
                tensors = as_published(tensors, read_config(where), where, reader.located)
            self.aliases = published_aliases(inventory.aliases)
            self.notes = [note for note in inventory.notes if note != OWN_NAMES]
            self.notes.append(f"torchtitan's names and layout became those of transformers, for the model of {where}")
        for name, item in tensors.items():
            if item.dtype not in ITEM_BYTES:
                raise ValueError(f"{name!r} is {item.dtype}, which safetensors cannot hold; leave it out of the model")
        mapping = inventory.mapping or ()
        records = records_by_parameter(mapping, {name: item.shape for name, item in tensors.items()} if mapping else {})
        unknown = sorted({name for item in mapping if (name := str(item["parameter"])) not in tensors})
        if unknown:
            raise ValueError(
                f"the mapping of {inventory.path} speaks of {unknown[0]!r} ({len(unknown)} such), which is not in it"
            )
        self._check_config(files, tensors)
        shapes = {name: source.shape for name, source in tensors.items() if name not in records}
        # Of what is not the parameter of the same name as it is.
        origin: dict[str, Record] = {}
        for name in records.keys() & tensors:
            for record in records[name]:
                if record.file in shapes:
                    raise ValueError(f"two tensors of {inventory.path} would be named {record.file!r}")
                shapes[record.file] = output_shape(record, tensors[name].shape)
                origin[record.file] = record
        casts = dict.fromkeys(CASTABLE, CAST_TO[dtype]) if dtype is not None else {}
        described: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in sorted(shapes, key=_natural):
            kept = tensors[origin[file].parameter if file in origin else file].dtype
            described[file] = (casts.get(kept, kept), shapes[file])
        if like is None or not self._compare(like, described):
            inventory.require_shapes(files.get("config.json"), assume_complete)
        self._build(tensors, described, origin, limit, digest)
        if dtype is not None and "config.json" in self.small and not inventory.adapter:
            self._note_dtype(dtype)
        self.transfer = Transfer(self.headers, self.small, self.outputs, self.notes, inventory.follow_symlinks)

    def _build(
        self,
        tensors: Mapping[str, Source],
        described: Mapping[str, tuple[str, tuple[int, ...]]],
        origin: Mapping[str, Record],
        limit: int,
        digest: bool,
    ) -> None:
        groups = {ADAPTER: dict(described)} if self.inventory.adapter else weight_files(described, limit)
        indexed = list(groups) != [SINGLE] and not self.inventory.adapter
        beside = [*self.small, *([INDEX] if indexed else []), *([DIGESTS] if digest else [])]
        self.files = sorted([*groups, *beside])
        metadata = {"format": "pt", EXPORT_KEY: json.dumps(self.files)}
        self.headers: dict[str, Header] = {name: build_header(group, metadata) for name, group in groups.items()}
        if indexed:
            self.small[INDEX] = weight_index(self.headers)
        with TensorReader(follow_symlinks=self.inventory.follow_symlinks) as reader:
            located = reader.all_located(tensors)
        self.outputs: list[Output] = []
        for file, header in self.headers.items():
            columns = header.columns
            begins = (columns.begins + header.data_start).tolist()
            sources = [
                parts_of(origin[name], located[origin[name].parameter]) if name in origin else located[name]
                for name in columns.names
            ]
            self.outputs += map(Output, columns.names, repeat(file), begins, columns.dtypes, sources)

    def _check_config(self, files: Mapping[str, Path], tensors: dict[str, Source]) -> None:
        """Hold the tensors against config.json; drop a tied head that is the same as its embedding."""
        if self.inventory.adapter:
            if ADAPTER_CONFIG not in files:
                self.notes.append(f"no {ADAPTER_CONFIG} was found: peft cannot open the result; give --like")
            return
        if "config.json" not in files:
            self.notes.append("no config.json was found: transformers cannot open the result; give --like")
            return
        config = read_config(files["config.json"])
        problems = config_problems(config, tensors) if self.inventory.mapping is None else []
        if problems:
            raise IncompleteError(
                f"{self.inventory.path} does not fit {files['config.json']}: {'; '.join(problems)}. Copy the "
                "files of all ranks and stages, or give the config of this model with --like"
            )
        tied = config.get("tie_word_embeddings")
        if tied is False and HEAD in self.aliases:
            raise ValueError(
                f"{HEAD} is tied to {self.aliases[HEAD]} in {self.inventory.path}, but "
                f"{files['config.json']} says tie_word_embeddings=false: it would be lost; give the config of this "
                "model with --like"
            )
        embedding = tied_embedding(config, tensors)
        if embedding is not None and self.inventory.mapping is None:
            with TensorReader(follow_symlinks=self.inventory.follow_symlinks) as reader:
                if not reader.equal(HEAD, tensors[HEAD], embedding, tensors[embedding]):
                    raise ValueError(
                        f"{files['config.json']} says tie_word_embeddings=true, but {HEAD} and {embedding} of "
                        f"{self.inventory.path} hold different values: {HEAD} would be ignored; set "
                        "tie_word_embeddings to false in the config given with --like"
                    )
            del tensors[HEAD]
            self.notes.append(f"{HEAD} is tied and equals {embedding}: written once")

    def _compare(self, like: Path, described: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
        """Compare names and shapes with the weights in `like`, where it has any; whether it has all of these shapes."""
        if (like / ADAPTER).is_file() and self.inventory.adapter:
            theirs = whole_sources(like / ADAPTER, read_header(like / ADAPTER, follow_symlinks=True))
        elif (like / INDEX).is_file() or (like / SINGLE).is_file():
            theirs = hf_sources(like)
        else:
            return False
        shapes = [
            f"{name!r} is {list(described[name][1])}, there {list(item.shape)}"
            for name, item in theirs.items()
            if name in described and described[name][1] != item.shape
        ]
        if shapes and not self.inventory.exact_shapes:
            raise IncompleteError(
                f"{self.inventory.path} does not fit {like}: {'; '.join(shapes[:3])} ({len(shapes)} such): the "
                "files of the last ranks are missing; copy them too"
            )
        common = [name for name in theirs if name in described]
        if theirs and not common:
            raise ValueError(
                f"no tensor of {self.inventory.path} has a name that {like} has ({next(iter(described))!r} here, "
                f"{next(iter(theirs))!r} there): they are of different models, or the names are of a training "
                "framework's own; give the folder of the model that was trained"
            )
        if len(shapes) == len(common) > 1:
            raise ValueError(
                f"every tensor of {self.inventory.path} that {like} has too is of another shape: "
                f"{'; '.join(shapes[:3])}: they are of different models; give the folder of the model that was trained"
            )
        missing = [name for name in theirs if name not in described and name != HEAD]
        extra = [name for name in described if name not in theirs and name != HEAD]
        for what, names in (("of other shape than in", shapes), ("only in", missing), ("not in", extra)):
            if names:
                self.notes.append(f"{len(names)} tensors {what} {like}: {', '.join(names[:3])}")
        return not shapes and not extra

    def _note_dtype(self, dtype: str) -> None:
        config = json.loads(self.small["config.json"])
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or "dtype" in part or "torch_dtype" in part):
                part["torch_dtype" if "torch_dtype" in part else "dtype"] = dtype
        self.small["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _natural(name: str) -> list[Any]:
    """Layer 2 before layer 10."""
    return list(map(_natural_part, name.split(".")))


@functools.lru_cache(2**18)
def _natural_part(part: str) -> tuple[str | int, ...]:
    # Names have few parts that differ.
    return tuple(int(run) if index % 2 else run for index, run in enumerate(_NUMBERS.split(part)))


def _like_files(like: Path, adapter: bool) -> dict[str, Path]:
    if not like.is_dir():
        raise ArgumentError(f"like={like} is not a folder; give the folder of the model that was trained")
    files = hf_files(like)
    if adapter and (like / ADAPTER_CONFIG).is_file():
        files[ADAPTER_CONFIG] = like / ADAPTER_CONFIG
    if not files:
        raise ArgumentError(
            f"like={like} has no config or tokenizer files; give the folder of the model that was trained"
        )
    return files
