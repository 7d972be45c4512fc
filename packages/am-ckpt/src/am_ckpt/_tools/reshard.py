"""A checkpoint's tensors cut for another number of ranks, offline: every rank of the next run reads one file.

Nothing needs it to resume (a load reads whatever it needs from any layout); it makes that load touch fewer files, and
gives tools that insist on it the shards of their own layout.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from am_ckpt._boxes import Box, Shape
from am_ckpt._copy.mapping import Record
from am_ckpt._copy.plan import Output, parts_of
from am_ckpt._copy.transfer import Transfer, require_free, transfer
from am_ckpt._copy.values import TensorReader
from am_ckpt._dtypes import ITEM_BYTES
from am_ckpt._files.hf_folder import INDEX
from am_ckpt._files.safetensors import Header, build_header, element_count, read_header
from am_ckpt._files.step import MANIFEST, read_file, read_manifest, require_own_number, seal
from am_ckpt._io import block_digests, digest
from am_ckpt._sources import Source, paths_of, paused_collector, whole_sources
from am_ckpt._tools.inspect import inspect
from am_ckpt._tools.inventory import Inventory
from am_ckpt._tools.merge import MergeReport
from am_ckpt._tools.unchanged import require_unchanged
from am_ckpt._tools.verify import VerifyReport, check_manifest
from am_ckpt.errors import ArgumentError

_AXES = ("dp", "tp")
_MAX_RANKS = 2**16


def reshard(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    mesh: Mapping[str, int],
    placements: Mapping[str, int] | None = None,
    model_only: bool = False,
    section: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    fsync: bool = True,
    assume_complete: bool = False,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the tensors of checkpoint `source` as one shard file a rank; one process, no collective.

    A step of the Checkpointer becomes such a step, with model, optimizer and state, whose digests are those of a source
    that was found undamaged; it can take the place of the old one. Any other kind becomes a folder of shards as torch's
    Hugging Face writer names them, with the model alone, under the names of the step's files (published ones where
    `layout="direct"` has applied a mapping). The destination must not exist; it appears complete or not at all.
    Errors are those of `merge`.

    Args:
        mesh: ranks of each axis, `{"dp": 4}` or `{"dp": 4, "tp": 2}`, outer first. Along `dp` every part is cut on dim
            0, as FSDP2 does. Pieces are those of `torch.chunk`; ranks beyond them hold nothing of a tensor.
        placements: pattern of names -> the dim that `tp` cuts; the first that matches, of an optimizer's tensors by the
            name of their parameter. Other tensors are in the files of `tp` rank 0.
        model_only: of a step of the Checkpointer, too, the model alone.
        section: see `inspect`.
        threads: see `merge`; as `resume`, `fsync`, `assume_complete`, `verify` (a step that stays one: always) and
            `progress`.
    """
    started = time.monotonic()
    dp, tp = _ranks(mesh)
    if resume and not fsync:
        raise ArgumentError("resume=True needs fsync=True: without it, what was copied before may not be on the disk")
    target = Path(destination).absolute()
    inventory = inspect(source, section=section)
    require_free(target, inventory.path, False)
    inventory.require_whole()
    inventory.require_shapes(inventory.files.get("config.json"), assume_complete)
    _require_cuttable(inventory, placements or ())
    layout = _Layout(dp, tp, dict(placements or {}))
    whole = inventory.kind == "am-ckpt" and not model_only
    _require_unchanged(inventory, whole, threads, verify)
    with paused_collector():
        plan = _step(inventory, layout, target) if whole else _folder(inventory, layout)
    resumed = transfer(plan, target, threads=threads, resume=resume, fsync=fsync, progress=progress)
    return MergeReport(
        str(inventory.path),
        inventory.kind,
        str(target),
        len({output.name for output in plan.outputs}),
        plan.num_bytes,
        resumed,
        time.monotonic() - started,
        sorted([*plan.headers, *plan.small]),
        plan.notes,
    )


def _require_cuttable(inventory: Inventory, patterns: Iterable[str]) -> None:
    if inventory.adapter:
        raise ArgumentError(f"{inventory.path} is an adapter, which is stored as one file; there is nothing to reshard")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in inventory.tensors):
            names = ", ".join(list(inventory.tensors)[:3])
            raise ArgumentError(f"placements: no tensor has a name like {pattern!r}; there are {names}, ...")


def _require_unchanged(inventory: Inventory, whole: bool, threads: int | None, verify: bool) -> None:
    """Raise `ValueError` for damage of what is copied; of a `whole` step always, for it gets new digests."""
    if not whole:
        if verify:
            require_unchanged(inventory, threads)
        return
    if not verify:
        raise ArgumentError(
            "verify=False (--no-verify): new digests must not vouch for old damage, so that a step that stays one is "
            "verified; model_only=True (--model-only) writes shards without digests"
        )
    report = VerifyReport(str(inventory.path), inventory.kind, True)
    check_manifest(inventory.path, True, report)
    if report.problems:
        raise ValueError(report.problems[0])


def _ranks(mesh: Mapping[str, int]) -> tuple[int, int]:
    unknown = [axis for axis in mesh if axis not in _AXES]
    sizes = [mesh.get(axis, 1) for axis in _AXES]
    if not mesh or unknown or not all(type(size) is int and size >= 1 for size in sizes):
        raise ArgumentError(f"mesh={dict(mesh)}: give sizes of at least 1 for {' and '.join(_AXES)}, such as dp=4,tp=2")
    if list(mesh) == ["tp", "dp"]:
        raise ArgumentError(f"mesh={dict(mesh)}: tp is the inner axis; give dp first")
    if sizes[0] * sizes[1] > _MAX_RANKS:
        raise ArgumentError(f"mesh={dict(mesh)} has {sizes[0] * sizes[1]} ranks, more than {_MAX_RANKS}")
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class _Layout:
    dp: int
    tp: int
    placements: dict[str, int]

    @property
    def size(self) -> int:
        return self.dp * self.tp

    def boxes(self, name: str, shape: Shape) -> Iterator[tuple[int, Box]]:
        """(rank, box) of every rank that holds some of a tensor; `name`: for `placements`, none if it is empty."""
        dim = next((dim for pattern, dim in self.placements.items() if name and fnmatchcase(name, pattern)), None)
        whole = Box((0,) * len(shape), shape)
        columns = [whole]
        if dim is not None and self.tp > 1:
            if not -len(shape) <= dim < len(shape):
                raise ArgumentError(f"placements cut {name!r} {list(shape)} on dim {dim}, which it does not have")
            columns = list(_chunks(whole, dim % len(shape), self.tp))
        if not whole.count:
            yield 0, whole
            return
        for column, part in enumerate(columns):
            rows = _chunks(part, 0, self.dp) if shape else [part]
            for row, box in enumerate(rows):
                yield row * self.tp + column, box


def _chunks(box: Box, dim: int, count: int) -> Iterator[Box]:
    """The pieces of `torch.chunk`: equal but for the last, and fewer than `count` where there are too few rows."""
    step = -(-box.size[dim] // count)
    for start in range(0, box.size[dim], step):
        offset, size = list(box.offset), list(box.size)
        offset[dim] += start
        size[dim] = min(step, box.size[dim] - start)
        yield Box(tuple(offset), tuple(size))


def _shards(
    tensors: Mapping[str, Source],
    layout: _Layout,
    folder: str,
    metadata: Mapping[str, str],
    reader: TensorReader,
    placed_as: Callable[[str], str],
) -> tuple[dict[str, Header], list[Output]]:
    """The headers of one file a rank, and all that is copied into them."""
    by_rank: list[dict[str, Box]] = [{} for _ in range(layout.size)]
    for name, source in tensors.items():
        if source.dtype not in ITEM_BYTES:
            raise ValueError(f"{name!r} is {source.dtype}, which safetensors cannot hold; leave it out of the model")
        for rank, box in layout.boxes(placed_as(name), source.shape):
            by_rank[rank][name] = box
    located = reader.all_located(tensors)
    headers: dict[str, Header] = {}
    outputs: list[Output] = []
    for rank, boxes in enumerate(by_rank):
        if not boxes:
            continue
        sharding = {
            name: {"saved_offsets": list(box.offset), "global_shape": list(tensors[name].shape)}
            for name, box in boxes.items()
        }
        file = f"{folder}shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        own = {"rank": str(rank), "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
        headers[file] = build_header(
            {name: (tensors[name].dtype, box.size) for name, box in boxes.items()}, {**metadata, **own}
        )
        for name, entry in headers[file].entries.items():
            part = parts_of(Record(name, name, boxes[name], False), located[name])
            outputs.append(Output(name, file, entry.begin, entry.dtype, part))
    return headers, outputs


def _metadata(inventory: Inventory, layout: _Layout) -> dict[str, str]:
    """Of every file. The same source and layout give the same, so that an interrupted run can be resumed."""
    files = paths_of(source for tensors in inventory.sections.values() for source in tensors.values())
    times = sorted((str(path), os.stat(path).st_mtime_ns) for path in files)
    save_id = digest(repr((times, layout)).encode())[:16]
    return {"format": "pt", "am_ckpt_save_id": save_id, "world_size": str(layout.size)}


def _folder(inventory: Inventory, layout: _Layout) -> Transfer:
    """The model's shards, beside its small files."""
    small = inventory.small_files()
    with TensorReader(follow_symlinks=inventory.follow_symlinks) as reader:
        headers, outputs = _shards(inventory.tensors, layout, "", _metadata(inventory, layout), reader, str)
    return Transfer(headers, small, outputs, list(inventory.notes), inventory.follow_symlinks)


def _step(inventory: Inventory, layout: _Layout, target: Path) -> Transfer:
    """A step with the same content in other shards, and a manifest of its own."""
    folder = inventory.path
    old = read_manifest(folder)
    require_own_number(target, old["step"])
    metadata = _metadata(inventory, layout)
    model = inventory.sections["model"]

    def optimizer_placed_as(name: str) -> str:
        # exp_avg/layers.0.weight is cut as layers.0.weight, if it has its shape: a step count has not.
        parameter = name.partition("/")[2]
        return parameter if parameter in model and model[parameter].shape == optim[name].shape else ""

    optim = inventory.sections["optim"]
    headers: dict[str, Header] = {}
    outputs: list[Output] = []
    with TensorReader(follow_symlinks=False) as reader:
        for section, tensors in inventory.sections.items():
            filled = {name: tensor for name, tensor in tensors.items() if element_count(tensor.shape)}
            placed_as: Callable[[str], str] = str if section == "model" else optimizer_placed_as
            found = _shards(filled, layout, f"{section}/", metadata, reader, placed_as)
            headers |= found[0]
            outputs += found[1]
    replaced = {
        record["path"]
        for record in old["files"]
        if "header_xxh3_128" in record and record["path"].partition("/")[0] in inventory.sections
    }
    # Of a model that was not in shards; what is written is.
    replaced.add(f"model/{INDEX}")
    kept = [{**record, "rank": 0} for record in old["files"] if record["path"] not in replaced]
    small: dict[str, bytes] = {}
    shards = dict(headers)
    for record in kept:
        path = record["path"]
        if "header_xxh3_128" not in record:
            small[path] = read_file(folder / path, record["bytes"])
            continue
        # Tensors of the state can be large: copied as they are.
        headers[path] = read_header(folder / path)
        for name, source in whole_sources(folder / path, headers[path]).items():
            outputs.append(Output(name, path, source.chunks[0].begin, source.dtype, source))

    def finish(staging: Path) -> dict[str, bytes]:
        records = kept + [_record(staging / path, path, header) for path, header in shards.items()]
        axes = {"dp": layout.dp, **({"tp": layout.tp} if layout.tp > 1 else {})}
        files = sorted(records, key=lambda record: str(record["path"]))
        own = {"save_id": metadata["am_ckpt_save_id"], "world_size": layout.size, "axes": axes, "files": files}
        # Whoever cuts a step anew wants to have it.
        kept_anyway = {key: value for key, value in old.items() if key != "ephemeral"}
        return {MANIFEST: seal({**kept_anyway, **own})}

    return Transfer(headers, small, outputs, list(inventory.notes), False, finish)


def _record(file: Path, path: str, header: Header) -> dict[str, Any]:
    """The entry of the manifest for a file that was written."""
    return {
        "path": path,
        "rank": int(header.metadata["rank"]),
        "bytes": header.file_bytes,
        "header_xxh3_128": digest(header.text),
        "blocks_xxh3_128": block_digests(file, header.data_start),
    }
