"""What one rank is to write of a step, planned in full before a byte is written."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from am_ckpt._files.safetensors import Header, build_header
from am_ckpt._files.step import STAGING, step_name
from am_ckpt._io import BlockDigests, write_file
from am_ckpt._train.lease import process_state
from am_ckpt._train.pieces import byte_blocks, dtype_name
from am_ckpt._train.shared_files import FileShare


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its place, metadata and tensors and, for shards, where in the global tensors they are."""

    path: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    boxes: Mapping[str, Mapping[str, list[int]]] | None = None

    def write(self, folder: Path, give_up: Callable[[], None]) -> dict[str, Any]:
        """Write the file durably; its record. `give_up` is called between tensors, and may raise."""
        metadata = self.metadata
        if self.boxes is not None:
            # Read by torch's HuggingFaceStorageReader; torch ignores global_shape.
            metadata = {**metadata, "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(self.boxes)}
        header = self._header(metadata)
        return write_file(folder / self.path, header.text, header.file_bytes, self._blocks(header, give_up))

    def digests(self) -> dict[str, Any]:
        """`blocks_xxh3_128` of the record, which alone is equal for equal content."""
        digests = BlockDigests()
        for block in self._blocks(self._header({}), lambda: None):
            digests.update(block)
        return {"blocks_xxh3_128": digests.hexdigests()}

    def copied(self, copies: Iterator[torch.Tensor]) -> TensorFile:
        """The same file with the next of `copies` for each of its tensors."""
        return replace(self, tensors={name: next(copies) for name in self.tensors})

    def _header(self, metadata: Mapping[str, str]) -> Header:
        described = {name: (dtype_name(t.dtype, name), tuple(t.shape)) for name, t in self.tensors.items()}
        return build_header(described, metadata)

    def _blocks(self, header: Header, give_up: Callable[[], None]) -> Iterator[memoryview]:
        for name in header.entries:
            for block in byte_blocks(self.tensors[name]):
                give_up()
                yield block


def file_metadata(save_id: str, rank: int, size: int) -> dict[str, str]:
    """What every safetensors file of a rank says about itself."""
    return {"format": "pt", "am_ckpt_save_id": save_id, "rank": str(rank), "world_size": str(size)}


@dataclass(frozen=True)
class Job:
    """What one rank writes of a step, and what rank 0 publishes: nothing in it changes while training goes on.

    `headers`: of the files that ranks write together, by name in `model/`; rank 0 makes them. `texts`: other
    files of this rank by path; `manifest`: all of it but the files, on rank 0.
    `leases`: the processes of all ranks. `timeout`: seconds that ranks wait for each other. `stop` is set to give up.
    """

    directory: Path
    step: int
    save_id: str
    rank: int
    leases: Sequence[Mapping[str, Any]]
    files: Sequence[TensorFile | FileShare]
    headers: Mapping[str, Header]
    texts: Mapping[str, bytes]
    manifest: Mapping[str, Any]
    timeout: float
    stop: threading.Event

    @property
    def size(self) -> int:
        return len(self.leases)

    @property
    def staging(self) -> Path:
        return self.directory / f"{STAGING}{step_name(self.step)}-{self.save_id}"

    @property
    def not_saved(self) -> str:
        return f"step {self.step} was not saved in {self.directory}, nothing was published"

    def dead(self, ranks: Iterable[int]) -> list[int]:
        """Which of `ranks` are processes of this machine that have ended."""
        own = self.leases[self.rank]
        return [rank for rank in ranks if process_state(self.leases[rank], own) == "dead"]

    @property
    def where(self) -> str:
        return f"rank {self.rank} of {self.size}: " if self.size > 1 else ""
