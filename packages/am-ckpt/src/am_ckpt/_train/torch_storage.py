"""Storage for `torch.distributed.checkpoint.save` and `load`: their planning, our files and commit.

What `save` writes is a folder as the Checkpointer's steps are: safetensors shards and a manifest, without pickle,
published by one rename. `load` reads such folders, the Checkpointer's and Hugging Face folders into any layout.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from am_ckpt._boxes import Box, require_exact_cover
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.cover import cover_problem
from am_ckpt._files.safetensors import element_count
from am_ckpt._files.step import STAGING, check_step
from am_ckpt._files.step_digests import require_unchanged_files
from am_ckpt._io import fsync_directory
from am_ckpt._sources import Source
from am_ckpt._tools.inspect import inspect
from am_ckpt._train.job import TensorFile, file_metadata
from am_ckpt._train.pieces import TORCH_DTYPES, Piece, dtype_name
from am_ckpt._train.read import Reader, num_threads
from am_ckpt._train.restore import module_sources, read_state
from am_ckpt._train.state import SECTIONS, encoded_state
from am_ckpt._train.state_json import encode
from am_ckpt._train.write import (
    create_staging,
    discard,
    new_manifest,
    seal_step,
    write_files,
)

_log = logging.getLogger("am_ckpt")

_MODEL = "model"


class StorageWriter(storage.StorageWriter):
    """`torch.distributed.checkpoint.save(state_dict, storage_writer=am_ckpt.StorageWriter(path))`, and async_save.

    `path`: the folder to write, which must not exist yet; on a file system that all ranks share. `step` is noted in
    its manifest. What the state dict nests under `"model"` goes to `model/`, everything else to `optim/` and
    `state/`; a state dict that nests nothing is the model's. So `am-ckpt inspect`, `verify` and `merge`, and
    torch's `HuggingFaceStorageReader` on `model/`, read the folder.

    Values that are no tensors must be of the types that a checkpoint can hold without pickle; others raise
    `TypeError` with their name. torch raises what happens on any rank as `CheckpointException` on all.
    """

    def __init__(self, path: str | os.PathLike[str], *, step: int = 0) -> None:
        self._path = Path(path).absolute()
        self._step = step
        self._staging: Path | None = None
        # torch does not tell that another rank has failed: then this happens when the writer is no longer used.
        self._discard: Callable[[], object] = lambda: None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id).absolute()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # torch tells newer arguments to those who take any.
        if not kwargs.get("use_collectives", True):
            raise ValueError("use_collectives=False would publish each rank's part alone; save with collectives")
        # Of a save that failed.
        self._discard()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Check that everything is written once, and create the staging folder. On the coordinator alone."""
        if self._path.is_dir() and any(self._path.iterdir()):
            raise FileExistsError(f"{self._path} exists and is never overwritten; choose another path, or delete it")
        described = _described_tensors(plans)
        paths: dict[str, Sequence[str | int]] = {}
        for plan in plans:
            paths |= plan.planner_data or {}
        nested = {name for name in described if len(paths.get(name, ())) > 1 and paths[name][0] == _MODEL}
        model, prefix = (nested, f"{_MODEL}.") if nested else (set(described), "")
        tensors: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, (dtype, shape) in described.items():
            section, key = _place(name, prefix, model)
            tensors[section][key] = {"dtype": dtype, "shape": list(shape)}
        save_id = secrets.token_hex(8)
        # Saves to other paths may be under way, and what a failed one leaves is not held: the next to the same path
        # removes it, at the latest.
        prefix_of_folder = f"{STAGING}{self._path.name}-"
        self._staging = self._path.with_name(prefix_of_folder + save_id)
        planned = sum(element_count(shape) * ITEM_BYTES[dtype] for dtype, shape in described.values())
        planned += 2**16 * (1 + len(plans)) + 512 * len(described)
        self._discard = weakref.finalize(self, discard, self._staging)
        create_staging(self._staging, planned, prefix_of_folder, held=False)
        for name in ("step", *(f"step/{section}" for section in (*SECTIONS, "state"))):
            os.mkdir(self._staging / name)
        names = {"prefix": prefix, "paths": {name: list(path) for name, path in paths.items()}}
        state = [
            _entry(rank)
            for rank, plan in enumerate(plans)
            if any(item.type == WriteItemType.BYTE_IO for item in plan.items)
        ]
        self._manifest = new_manifest(self._step, save_id, len(plans), tensors, {"state": state, "dcp": names})
        shared = {"staging": str(self._staging), "save_id": save_id, "prefix": prefix, "model": sorted(model)}
        return [
            replace(plan, storage_data={**shared, "rank": rank, "size": len(plans)}) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what `plan` gives this rank, durably."""
        try:
            return self._write(plan, planner)
        except BaseException:
            self._discard()
            raise

    def _write(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shared = plan.storage_data
        rank, prefix, model = shared["rank"], shared["prefix"], set(shared["model"])
        # By section, one for each file: a name occurs once in a safetensors file.
        groups: dict[str, list[dict[str, tuple[torch.Tensor, dict[str, list[int]]]]]] = {name: [] for name in SECTIONS}
        values: dict[str, Any] = {}
        for item in plan.items:
            name = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                values[name] = _value(name, planner.resolve_data(item))
                continue
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            box = _box(item)
            if not box.count:
                continue
            section, key = _place(name, prefix, model)
            group = next((group for group in groups[section] if key not in group), {})
            if not group:
                groups[section].append(group)
            where = {"saved_offsets": list(box.offset), "global_shape": list(_described(item)[1])}
            group[key] = (tensor.detach(), where)
        metadata = file_metadata(shared["save_id"], rank, shared["size"])
        tensor_files = [
            TensorFile(
                f"{section}/shard-{rank + 1:05d}-model-{index:05d}-of-{len(files):05d}.safetensors",
                metadata,
                {key: tensor for key, (tensor, _) in group.items()},
                {key: where for key, (_, where) in group.items()},
            )
            for section, files in groups.items()
            for index, group in enumerate(files, start=1)
        ]
        texts = {}
        if values:
            text, tensors = encoded_state(values, _entry(rank))
            texts[f"state/{_entry(rank)}.json"] = text
            if tensors:
                tensor_files.append(TensorFile(f"state/{_entry(rank)}.safetensors", metadata, tensors))
        folder = Path(shared["staging"]) / "step"
        records = write_files(folder, rank, tensor_files, texts, threading.Event())
        for section in (*SECTIONS, "state"):
            fsync_directory(folder / section)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(record["path"]), record["bytes"], record) for record in records])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and publish. On the coordinator alone."""
        assert self._staging is not None
        seal_step(self._staging / "step", self._manifest, [result.storage_data for part in results for result in part])
        os.rename(self._staging / "step", self._path)
        fsync_directory(self._path.parent)
        self._discard()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._path)


class StorageReader(storage.StorageReader):
    """`torch.distributed.checkpoint.load(state_dict, storage_reader=am_ckpt.StorageReader(path))`.

    `path`: a folder written with `StorageWriter`, whose names are then those that were saved; or the model of
    a step of the Checkpointer, of torch's `HuggingFaceStorageWriter` or of a Hugging Face folder. `prefix` is put
    before the names of these, `"model."` where the state dict to load is `{"model": model.state_dict()}`.

    Folders in which an element of a tensor is missing raise `ValueError` before anything is read; values are cast to
    the dtype of the tensor to load. `verify`: in folders of ours, each rank first holds the files that it reads from
    against their digests.
    """

    def __init__(self, path: str | os.PathLike[str], *, prefix: str = "", verify: bool = True) -> None:
        self._path = Path(path).absolute()
        self._verify = verify
        self._step: Path | None = None
        self._prefix = prefix
        self._sources: dict[str, Source] = {}
        self._values: dict[str, Any] = {}
        self._follow_symlinks = False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id).absolute()
        self._sources, self._values, self._step = {}, {}, None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return self._read_metadata()
        except Exception as error:
            # load() of torch 2.11 goes on without metadata and does not say why.
            _log.error("%s", error)
            raise

    def _read_metadata(self) -> Metadata:
        inventory = inspect(self._path)
        if inventory.kind == "dcp":
            raise ValueError(f"{self._path} holds .distcp files; torch's FileSystemReader reads them")
        inventory.require_whole()
        self._follow_symlinks = inventory.follow_symlinks
        paths = None
        self._sources = {self._prefix + name: source for name, source in inventory.tensors.items()}
        if inventory.kind == "am-ckpt":
            manifest = check_step(inventory.path)
            self._step = inventory.path
            own = module_sources(manifest, inventory.tensors)
            self._sources = {self._prefix + name: source for name, source in own.items()}
            if "dcp" in manifest:
                paths = {name: tuple(path) for name, path in manifest["dcp"]["paths"].items()}
                self._read_own(inventory.path, manifest, inventory.sections)
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: BytesStorageMetadata() for name in self._values
        }
        for name, source in self._sources.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk.box.offset), torch.Size(chunk.box.size))
                for chunk in source.chunks
            ]
            properties = TensorProperties(dtype=TORCH_DTYPES[source.dtype])
            described[name] = TensorStorageMetadata(properties, torch.Size(source.shape), chunks)
        return Metadata(described, planner_data=paths)

    def _read_own(self, folder: Path, manifest: dict[str, Any], sections: dict[str, dict[str, Source]]) -> None:
        """The names under which the tensors were saved, and the values that are no tensors."""
        prefix = manifest["dcp"]["prefix"]
        self._sources = {prefix + name: source for name, source in sections["model"].items()} | sections["optim"]
        for name, source in sections["optim"].items():
            problem = cover_problem(name, source)
            if problem is not None:
                raise problem
        records = {record["path"]: record for record in manifest["files"]}
        with Reader() as reader:
            for entry in manifest["state"]:
                self._values |= read_state(folder, records, entry, reader)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read byte ranges straight into the tensors of the state dict."""
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        if self._verify and self._step is not None:
            paths = {path for item in tensors for path in self._paths(item)}
            require_unchanged_files(self._step, paths, num_threads())
        with Reader(follow_symlinks=self._follow_symlinks) as reader, torch.no_grad():
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    # Made here and now, so that what torch unpickles is ours.
                    value = io.BytesIO()
                    torch.save(self._values[item.storage_index.fqn], value)
                    value.seek(0)
                    planner.load_bytes(item, value)
                    continue
                target = planner.resolve_tensor(item).detach()
                reader.read(self._sources[item.storage_index.fqn], Piece(_read_box(item), target))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _paths(self, item: ReadItem) -> Iterator[Path]:
        box = _read_box(item)
        for chunk in self._sources[item.storage_index.fqn].rows.chunks_in(box):
            if chunk.box.intersect(box) is not None:
                yield chunk.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in str(checkpoint_id)


def _entry(rank: int) -> str:
    return f"values-{rank + 1:05d}"


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def _described_tensors(plans: list[SavePlan]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor; `ValueError` unless the plans write each of its elements once."""
    boxes: dict[str, list[Box]] = {}
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    for item in (item for plan in plans for item in plan.items if item.type != WriteItemType.BYTE_IO):
        name, box, here = item.index.fqn, _box(item), _described(item)
        if described.setdefault(name, here) != here:
            raise ValueError(f"{name!r} differs between ranks: {described[name]} and {here}")
        boxes.setdefault(name, []).extend([box] if box.count else [])
    for name, (_, shape) in described.items():
        require_exact_cover(repr(name), shape, boxes[name])
    return described


def _place(name: str, prefix: str, model: Set[str]) -> tuple[str, str]:
    """The section that a tensor of the state dict goes to, and its name there."""
    return ("model", name.removeprefix(prefix)) if name in model else ("optim", name)


def _described(item: WriteItem) -> tuple[str, tuple[int, ...]]:
    assert item.tensor_data is not None
    return dtype_name(item.tensor_data.properties.dtype, repr(item.index.fqn)), tuple(item.tensor_data.size)


def _read_box(item: ReadItem) -> Box:
    begin = item.storage_index.offset or (0,) * len(item.lengths)
    offset = tuple(a + b for a, b in zip(begin, item.storage_offsets, strict=True))
    return Box(offset, tuple(item.lengths))


def _value(name: str, data: torch.Tensor | io.BytesIO) -> Any:
    """What a planner has pickled, if it is of the types that a checkpoint can hold."""
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    try:
        value = torch.load(data, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"{name!r} has a type which cannot be stored without pickle; give None, bool, int, float, str, bytes, "
            "list, tuple, set, dict or tensors"
        ) from error
    encode(value, name)
    return value
