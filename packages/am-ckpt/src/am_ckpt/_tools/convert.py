"""A checkpoint's model in another kind of folder: Hugging Face files, shards, or torch's `.distcp`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from am_ckpt._copy.transfer import require_free, written_folder
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._tools.inspect import inspect
from am_ckpt._tools.inventory import Inventory, source_bytes
from am_ckpt._tools.merge import MergeReport, merge
from am_ckpt._tools.reshard import reshard
from am_ckpt._tools.unchanged import require_unchanged
from am_ckpt._torch import require_torch
from am_ckpt.errors import ArgumentError

KINDS = ("hf", "sharded", "dcp")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str,
    section: str | None = None,
    threads: int | None = None,
    fsync: bool = True,
    assume_complete: bool = False,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model of `source`, of any kind that `inspect` recognises, as a folder of kind `to`.

    Config and tokenizer are carried along. Optimizers are left behind: each framework names their state in its own way.
    A mapping stored in the checkpoint is applied by `"hf"` alone; the others keep the names of the module. In a step
    with `layout="direct"` it is applied already, so all kinds have the published names. The destination must not exist;
    it appears complete or not at all. Errors are those of `merge`.

    Args:
        to: `"hf"`: what `merge` writes; an adapter becomes a PEFT folder. `"sharded"`: a file of torch's Hugging Face
            writer, which training frameworks read with `HuggingFaceStorageReader`; `reshard` writes several. `"dcp"`:
            `.distcp` and `.metadata` of `torch.distributed.checkpoint`, the state dict below `"model"`, for frameworks
            that resume from nothing else; written by torch itself, which is imported, with one tensor in memory at a
            time.
        section: see `inspect`.
        threads: see `merge`; as `fsync`, `assume_complete`, `verify` and `progress`.
    """
    if to == "hf":
        return merge(
            source,
            destination,
            section=section,
            threads=threads,
            fsync=fsync,
            assume_complete=assume_complete,
            verify=verify,
            progress=progress,
        )
    if to not in KINDS:
        raise ArgumentError(f"to={to!r}; choose {', '.join(KINDS)}")
    if to == "sharded":
        one = {"dp": 1}
        return reshard(
            source,
            destination,
            mesh=one,
            model_only=True,
            section=section,
            threads=threads,
            fsync=fsync,
            assume_complete=assume_complete,
            verify=verify,
            progress=progress,
        )
    return _to_dcp(source, Path(destination).absolute(), section, threads, fsync, assume_complete, verify, progress)


def _to_dcp(
    source: str | os.PathLike[str],
    target: Path,
    section: str | None,
    threads: int | None,
    fsync: bool,
    assume_complete: bool,
    verify: bool,
    progress: Callable[[int, int], None] | None,
) -> MergeReport:
    require_torch("to='dcp' (--to dcp), which torch itself writes,")
    started = time.monotonic()
    inventory = inspect(source, section=section)
    require_free(target, inventory.path, False)
    inventory.require_whole()
    inventory.require_shapes(inventory.files.get("config.json"), assume_complete)
    if inventory.adapter:
        raise ArgumentError(f"{inventory.path} is an adapter, which peft reads as it is; there is nothing to convert")
    unreadable = [(name, item.dtype) for name, item in inventory.tensors.items() if item.dtype not in ITEM_BYTES]
    if unreadable:
        name, dtype = unreadable[0]
        raise ValueError(f"{name!r} is {dtype}, which cannot be copied; leave it out of the model")
    if verify:
        require_unchanged(inventory, threads)
    files = written_folder(target, inventory.num_bytes, fsync, lambda folder: _write_dcp(inventory, folder, progress))
    return MergeReport(
        str(inventory.path),
        inventory.kind,
        str(target),
        len(inventory.tensors),
        inventory.num_bytes,
        0,
        time.monotonic() - started,
        files,
        list(inventory.notes),
    )


def _write_dcp(inventory: Inventory, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    import numpy
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.state_dict_saver import save

    from am_ckpt._copy.values import TensorReader
    from am_ckpt._train.pieces import TORCH_DTYPES, as_bytes

    done = 0

    class Planner(DefaultSavePlanner):
        """Plans with tensors that have no values, and reads each when it is written."""

        def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
            nonlocal done
            name = index.fqn.removeprefix("model.")
            source = inventory.tensors[name]
            tensor = torch.empty(source.shape, dtype=TORCH_DTYPES[source.dtype])
            memory, position = as_bytes(tensor), 0
            for _, values in reader.blocks(name, source):
                memory[position : position + values.nbytes] = values.reshape(-1).view(numpy.uint8).data
                position += values.nbytes
            done += source_bytes(source)
            if progress is not None:
                progress(done, inventory.num_bytes)
            return tensor

    empty = {
        name: torch.empty(source.shape, dtype=TORCH_DTYPES[source.dtype], device="meta")
        for name, source in inventory.tensors.items()
    }
    with TensorReader(follow_symlinks=inventory.follow_symlinks) as reader:
        try:
            save({"model": empty}, storage_writer=FileSystemWriter(folder), planner=Planner(), no_dist=True)
        except CheckpointException as error:
            # A BaseException, around the one that matters; torch's archives raise RuntimeError where writing fails.
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, RuntimeError):
                raise OSError(f"torch could not write to {folder.parent}: {cause}") from error
            raise cause from error
    for name, content in inventory.small_files().items():
        (folder / name).write_bytes(content)
