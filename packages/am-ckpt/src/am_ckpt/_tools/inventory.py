"""What was found in a checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.model_config import read_config, shows_shapes
from am_ckpt._files.safetensors import element_count
from am_ckpt._files.step import MAX_SMALL_BYTES, read_file
from am_ckpt._sources import Source, paths_of
from am_ckpt.errors import IncompleteError


@dataclass
class Inventory:
    """What a checkpoint folder holds: see `inspect`.

    `kind`: `"am-ckpt"`, `"dcp"` (`.distcp` files), `"dcp-safetensors"` (shards of torch's Hugging Face
    writer), `"torch_checkpointing"`, `"huggingface"`, `"torch"` (`pytorch_model.bin`) or `"adapter"`. `tensors` are
    those of the model by name; `sections` those of every part, `section` the part that is the model. `others`: entries
    that are no tensors. `files`: small files that belong to the model. `problems`: everything by which the model's
    tensors are not whole. `ephemeral`: a save of a newer step deletes it. `notes`: what a reader should know and cannot
    be checked.
    """

    path: Path
    kind: str
    section: str
    sections: dict[str, dict[str, Source]]
    adapter: bool = False
    others: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    mapping: list[dict[str, Any]] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    ephemeral: bool = False
    exact_shapes: bool = True
    follow_symlinks: bool = False
    notes: list[str] = field(default_factory=list)
    problems: list[ValueError] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Source]:
        """The model's tensors by name."""
        return self.sections[self.section]

    def small_files(self) -> dict[str, bytes]:
        """The content of `files`."""
        return {
            name: read_file(path, MAX_SMALL_BYTES, follow_symlinks=self.follow_symlinks)
            for name, path in self.files.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's tensors."""
        return sum(source_bytes(source) for source in self.tensors.values())

    def require_whole(self) -> None:
        """Raise the first problem, with the number of the others."""
        if self.problems:
            first = self.problems[0]
            more = f" (and {len(self.problems) - 1} more: am-ckpt inspect lists them)" if len(self.problems) > 1 else ""
            raise type(first)(f"{first}{more}")

    def require_shapes(self, config: Path | None, assume_complete: bool) -> None:
        """Raise `IncompleteError` where neither the files nor `config` say how large the whole tensors are.

        `assume_complete`: they are as large as the files make them; nothing of the last ranks is missing.
        """
        if self.exact_shapes or assume_complete:
            return
        if config is None or not shows_shapes(read_config(config), self.tensors):
            last = max(path.name for path in paths_of(self.tensors.values()))
            raise IncompleteError(
                f"{self.path}: nothing shows that the files of the last ranks are there, after {last}: those of "
                "torch's Hugging Face writer do not say how large the whole tensors are. Give merge the weights of the "
                "model that was trained (--like), or say that all are there: assume_complete=True (--assume-complete)"
            )

    def to_json(self, *, chunks: bool = True) -> dict[str, Any]:
        """Plain data for `json.dumps`; `chunks=False` leaves out where the bytes are."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "step": self.step,
            "ephemeral": self.ephemeral,
            "adapter": self.adapter,
            "bytes": self.num_bytes,
            "section": self.section,
            "sections": {name: len(tensors) for name, tensors in self.sections.items()},
            "others": self.others,
            "files": sorted(self.files),
            "mapping": self.mapping is not None,
            "aliases": self.aliases,
            "notes": self.notes,
            "problems": [str(problem) for problem in self.problems],
            "tensors": {name: _source_json(source, chunks) for name, source in self.tensors.items()},
        }


def source_bytes(source: Source) -> int:
    """Bytes of a whole tensor; 0 for dtypes that safetensors does not know."""
    return element_count(source.shape) * ITEM_BYTES.get(source.dtype, 0)


def _source_json(source: Source, chunks: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {"dtype": source.dtype, "shape": list(source.shape)}
    if chunks:
        plain["chunks"] = [
            {
                "file": chunk.path.name,
                "begin": chunk.begin,
                "end": chunk.begin + (chunk.archive_bytes or chunk.box.count * ITEM_BYTES.get(source.dtype, 0)),
                "offset": list(chunk.box.offset),
                "size": list(chunk.box.size),
            }
            for chunk in source.chunks
        ]
    return plain
