"""Save and resume training state: every rank writes its part, one rename commits.

A save is planned in full before a byte is written (names, types, coverage, space), written into a staging folder that
nothing reads, checked, and renamed. A load is checked in full (names, shapes, dtypes, groups) before a byte of the
model changes. Between the steps all ranks exchange outcomes, so they succeed or raise together.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from am_ckpt._contents import SECTIONS, Contents, Description, Plan, collect, make_plan, owned_pieces
from am_ckpt._format import ITEM_BYTES, Header, build_header, element_count
from am_ckpt._io import (
    clean_stale,
    digest,
    fsync_directory,
    own_lease,
    point,
    remove,
    require_space,
    write_bytes,
    write_file,
)
from am_ckpt._layout import (
    FORMAT,
    MANIFEST,
    STAGING,
    VERSION,
    Best,
    check_step,
    rank_best,
    read_manifest,
    require_file_name,
    seal,
    step_name,
    steps,
)
from am_ckpt._names import ADAPTER
from am_ckpt._ranks import agree, compute, rank_and_size, rank_zero
from am_ckpt._restore import restore
from am_ckpt._shards import byte_blocks, dtype_name


class Checkpointer:
    """Checkpoints of one run under ``directory``. Every rank builds one with equal arguments and calls every method.

    ``keep_last``: how many of the newest steps to keep. ``keep_best``: ``(metric, "min" | "max", count)``, the best by
    a metric given to :meth:`save`. With neither, nothing is ever deleted; with ``keep_best`` alone, the newest step is
    kept besides the best.

    ``files``: more files for ``model/`` (config, tokenizer, adapter config): file name -> text, bytes, or the path of
    a file to copy; :func:`am_ckpt.hf_files` lists those of a Hugging Face folder. ``mapping``: records of how the
    module's parameters relate to the published files (see :func:`am_ckpt.load_hf`), stored for tools that export later.
    ``fingerprints``: JSON data; loading a checkpoint that has another value under the same key is refused.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_best: tuple[str, str, int] | None = None,
        files: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
        mapping: Sequence[Mapping[str, Any]] | None = None,
        fingerprints: Mapping[str, Any] | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1, or None to keep every step")
        if keep_best is not None and (keep_best[1] not in ("min", "max") or keep_best[2] < 1):
            raise ValueError(f"keep_best={keep_best!r} must be (metric name, 'min' or 'max', count of at least 1)")
        self.directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._best = Best(*keep_best) if keep_best is not None else None
        self._files = dict(files or {})
        for name in self._files:
            require_file_name(name, "files:")
            if name.endswith(".safetensors"):
                raise ValueError(f"files: {name!r}: weights in model/ are written from the state, not copied")
        self._mapping = [dict(record) for record in mapping] if mapping is not None else None
        self._fingerprints = dict(fingerprints or {})
        # Refused here, not at the first save after hours of training.
        json.dumps([self._mapping, self._fingerprints], allow_nan=False)

    def save(self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Commit ``state`` as ``step_{step:06d}``; on return it is durable. Collective: every rank calls it.

        ``state["model"]`` is an ``nn.Module`` (parameters and persistent buffers, plain or DTensor, tied ones once), or
        an adapter: an object with ``state_dict()`` and ``load_state_dict()`` of full plain tensors and
        ``named_parameters()``. Values that are ``torch.optim.Optimizer`` are stored by parameter name. All others have
        ``state_dict()`` of plain data and tensors, equal on every rank: state that differs between ranks could not be
        resumed by another number of ranks, and is refused. Plain tensors of the model are taken to be replicas.

        Saving a step that exists with the same content and ranks (a stop right after a resume) does nothing; with other
        content it raises ``FileExistsError``. A damaged folder of that name is set aside as ``.damaged-*``.

        Any failure on any rank (no space, I/O error, unsupported type) raises the same error on every rank, leaves
        earlier checkpoints as they are and publishes nothing. ``metrics`` are floats such as ``{"val_loss": 1.25}``.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"step={step!r} must be an integer of at least 0")
        scores = {name: float(value) for name, value in (metrics or {}).items()}
        if self._best is not None and metrics is not None and self._best.metric not in scores:
            raise ValueError(f"metrics {sorted(scores)} lack {self._best.metric!r}, by which keep_best chooses")
        context = f"step {step} was not saved in {self.directory}, nothing was published"
        contents = Contents()
        described = agree(context, lambda: collect(state, contents))
        plan = compute(context, lambda: make_plan(described))
        if rank_zero(context, lambda: self._exists(step)):
            found = agree(context, lambda: _data_digests(contents, plan))
            rank_zero(context, lambda: self._require_same(step, found))
            return
        save_id = rank_zero(context, lambda: secrets.token_hex(8))
        staging = self.directory / f"{STAGING}{step_name(step)}-{save_id}"
        try:
            rank_zero(context, lambda: self._stage(staging, described, plan))
            records = agree(context, lambda: self._write(staging, save_id, contents, plan))
            manifest = self._manifest(step, save_id, scores, contents, described, plan, records)
            rank_zero(context, lambda: self._commit(staging, manifest))
        except BaseException:
            if rank_and_size()[0] == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        rank_zero(f"step {step} is saved, but older steps could not be tidied", lambda: self._tidy(step))

    def load(self, state: Mapping[str, Any], which: str | os.PathLike[str] = "latest") -> int | None:
        """Restore ``state`` in place and return its step, or None where the directory has no checkpoint. Collective.

        ``which``: ``"latest"``, ``"best"`` (needs ``keep_best``), the name of a step, or a path. Damaged steps are
        skipped with a warning where the newest or best is looked for; a named one raises ``ValueError``. Where every
        step is damaged: ``RuntimeError``. The number of ranks and the layout may differ from those that saved.

        Strict: the entries of ``state`` must be in the checkpoint, with the same parameter names, shapes, dtypes,
        tied weights and optimizer groups; otherwise one ``ValueError`` lists the differences, and nothing has been
        changed. Entries of the checkpoint that ``state`` does not name are left out. Optimizers that have not stepped
        yet get their state as torch would have laid it out.
        """
        found = rank_zero(f"no checkpoint was loaded from {self.directory}", lambda: self._choose(which))
        if found is None:
            return None
        restore(found, state, self._fingerprints)
        return int(read_manifest(found)["step"])

    def wait(self) -> None:
        """Return when every save is durable: :meth:`save` returns only then, so at once."""

    # What follows runs inside the agreed steps of save and load; methods that touch the directory run on rank 0 alone.

    def _exists(self, step: int) -> bool:
        """Whether the step is there and whole; a damaged one is moved aside."""
        path = self.directory / step_name(step)
        if not path.exists():
            return False
        try:
            check_step(path)
        except ValueError as error:
            aside = self.directory / f".damaged-{path.name}-{secrets.token_hex(4)}"
            os.rename(path, aside)
            warnings.warn(f"set a damaged checkpoint aside as {aside.name}: {error}", stacklevel=2)
            return False
        return True

    def _require_same(self, step: int, found: list[dict[str, str]]) -> None:
        path = self.directory / step_name(step)
        there = {
            record["path"]: record.get("data_xxh3_128", record["xxh3_128"])
            for record in read_manifest(path)["files"]
            if record["path"].split("/")[-1] not in self._files
        }
        if {name: value for part in found for name, value in part.items()} != there:
            raise FileExistsError(
                f"{path} exists with other content (or was written by another number of ranks) and is never "
                "overwritten; "
                "delete it, save another step, or use another directory"
            )

    def _stage(self, staging: Path, described: list[Description], plan: Plan) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        alive = clean_stale(self.directory, (STAGING,))
        if alive:
            raise RuntimeError(
                f"another process is saving to this directory (its folder is {alive[0]}); use one directory a run"
            )
        planned = described[0].state_bytes
        for held in plan.merged.values():
            planned += sum(element_count(item.shape) * ITEM_BYTES[item.dtype] for item in held.values())
        planned += sum(len(_file_bytes(source)) for source in self._files.values())
        # Headers, manifest and folder entries.
        planned += 2**16 * (1 + len(described)) + 512 * sum(len(held) for held in plan.merged.values())
        require_space(self.directory, planned)
        os.mkdir(staging)
        write_bytes(staging / "lease.json", json.dumps(own_lease()).encode())
        for name in (*SECTIONS, "state"):
            os.mkdir(staging / name)
        fsync_directory(staging)
        fsync_directory(self.directory)

    def _write(self, staging: Path, save_id: str, contents: Contents, plan: Plan) -> list[dict[str, Any]]:
        """Write this rank's files and return their records."""
        rank, size = rank_and_size()
        records = []
        for file in _tensor_files(contents, plan, rank):
            metadata = {"format": "pt", "am_ckpt_save_id": save_id, "rank": str(rank), "world_size": str(size)}
            header = file.header(metadata)
            record = write_file(staging / file.path, header.text, header.file_bytes, file.blocks(header))
            records.append({"path": file.path, "rank": rank, "header_xxh3_128": digest(header.text), **record})
        if rank == 0:
            for entry, (text, _) in contents.state.items():
                records.append(
                    {"path": f"state/{entry}.json", "rank": 0, **write_bytes(staging / f"state/{entry}.json", text)}
                )
            for name, source in self._files.items():
                records.append(
                    {"path": f"model/{name}", "rank": 0, **write_bytes(staging / "model" / name, _file_bytes(source))}
                )
        for name in (*SECTIONS, "state"):
            fsync_directory(staging / name)
        return records

    def _manifest(
        self,
        step: int,
        save_id: str,
        scores: dict[str, float],
        contents: Contents,
        described: list[Description],
        plan: Plan,
        records: list[list[dict[str, Any]]],
    ) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "save_id": save_id,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "world_size": len(records),
            "axes": {name: size for description in described for name, size in description.axes.items()},
            "versions": {"am_ckpt": version("am-ckpt"), "torch": str(torch.__version__)},
            # JSON has no NaN; float() reads both forms.
            "metrics": {name: value if math.isfinite(value) else str(value) for name, value in scores.items()},
            "fingerprints": self._fingerprints,
            "mapping": self._mapping,
            "model": "module" if contents.adapter is None else "adapter",
            "aliases": contents.aliases,
            "tensors": {
                section: {name: {"dtype": held.dtype, "shape": list(held.shape)} for name, held in tensors.items()}
                for section, tensors in plan.merged.items()
            },
            "optimizers": contents.optimizers,
            "state": sorted(contents.state),
            "files": sorted((record for part in records for record in part), key=lambda record: record["path"]),
        }

    def _commit(self, staging: Path, manifest: dict[str, Any]) -> None:
        for record in manifest["files"]:
            path = staging / record["path"]
            if not path.exists():
                raise FileNotFoundError(
                    f"{path}, written by rank {record['rank']}, is not visible to rank 0; the directory must be "
                    "on a file system that all ranks share"
                )
            if path.stat().st_size != record["bytes"]:
                raise OSError(f"{path} has {path.stat().st_size} bytes, rank {record['rank']} wrote {record['bytes']}")
        os.unlink(staging / "lease.json")
        write_bytes(staging / MANIFEST, seal(manifest))
        fsync_directory(staging)
        # A folder that is not empty is never replaced by rename: a step that appeared meanwhile raises.
        os.rename(staging, self.directory / step_name(manifest["step"]))
        fsync_directory(self.directory)

    def _whole_steps(self) -> dict[int, dict[str, Any]]:
        """Manifests of the steps that have a valid one, newest first."""
        manifests = {}
        for step, path in steps(self.directory):
            try:
                manifests[step] = read_manifest(path)
            except ValueError:
                # Not counted and not deleted: a person may want to look at it.
                continue
        return manifests

    def _tidy(self, saved: int) -> None:
        """Point ``latest`` and ``best``, then delete the steps that no rule keeps."""
        manifests = self._whole_steps()
        best = rank_best(list(manifests.values()), self._best) if self._best is not None else []
        try:
            point(self.directory / "latest", step_name(max(manifests)))
            if best:
                point(self.directory / "best", step_name(best[0]))
        except OSError as error:
            warnings.warn(
                f"step {saved} is saved; the links in {self.directory} could not be set: {error}", stacklevel=2
            )
        if self._keep_last is None and self._best is None:
            return
        keep = {saved, *sorted(manifests, reverse=True)[: self._keep_last or 1]}
        if self._best is not None:
            keep.update(best[: self._best.count])
        for step in sorted(set(manifests) - keep):
            try:
                remove(self.directory / step_name(step))
            except OSError as error:
                warnings.warn(f"step {saved} is saved; {step_name(step)} could not be deleted: {error}", stacklevel=2)

    def _choose(self, which: str | os.PathLike[str]) -> Path | None:
        if which not in ("latest", "best"):
            return self._named(which)
        if which == "best" and self._best is None:
            raise ValueError("which='best' needs keep_best=(metric, 'min' or 'max', count) to say what is best")
        found = steps(self.directory)
        if which == "best" and self._best is not None:
            ranked = rank_best(list(self._whole_steps().values()), self._best)
            if found and not ranked:
                raise ValueError(f"no step in {self.directory} has the metric {self._best.metric!r}")
            found = [(step, self.directory / step_name(step)) for step in ranked]
        problems = []
        for _, path in found:
            try:
                check_step(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"SKIPPED a damaged checkpoint, going back to {path.name}: {problem}", stacklevel=2)
            return path
        if problems:
            raise RuntimeError(
                f"none of the {len(problems)} checkpoints is whole: {'; '.join(problems[:3])}. Starting over must be "
                "your decision: move them away or use another directory"
            )
        return None

    def _named(self, which: str | os.PathLike[str]) -> Path:
        path = Path(which)
        if not path.exists() and not path.is_absolute():
            path = self.directory / path
        if not path.is_dir():
            there = ", ".join(entry.name for _, entry in steps(self.directory)[:10]) or "none"
            raise FileNotFoundError(f"{which} is not a checkpoint folder; steps in {self.directory}: {there}")
        path = path.resolve()
        check_step(path)
        return path


class _TensorFile:
    """One safetensors file of a save: its place, its tensors and, for shards, where in the global tensors they are."""

    def __init__(
        self, path: str, tensors: dict[str, torch.Tensor], boxes: dict[str, dict[str, list[int]]] | None
    ) -> None:
        self.path = path
        self._tensors = tensors
        self._boxes = boxes

    def header(self, metadata: dict[str, str]) -> Header:
        if self._boxes is not None:
            # Read by torch's HuggingFaceStorageReader; torch ignores global_shape.
            metadata = {**metadata, "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(self._boxes)}
        described = {name: (dtype_name(t.dtype, name), tuple(t.shape)) for name, t in self._tensors.items()}
        return build_header(described, metadata)

    def blocks(self, header: Header) -> Iterator[memoryview]:
        for name in header.entries:
            yield from byte_blocks(self._tensors[name])


def _tensor_files(contents: Contents, plan: Plan, rank: int) -> Iterator[_TensorFile]:
    """The safetensors files that ``rank`` writes."""
    for section in SECTIONS:
        parts = owned_pieces(contents, plan, section, rank)
        for index, part in enumerate(parts, start=1):
            yield _TensorFile(
                f"{section}/shard-{rank + 1:05d}-model-{index:05d}-of-{len(parts):05d}.safetensors",
                {name: piece.values for name, piece in part.items()},
                {
                    name: {
                        "saved_offsets": list(piece.box.offset),
                        "global_shape": list(plan.merged[section][name].shape),
                    }
                    for name, piece in part.items()
                },
            )
    if rank == 0:
        if contents.adapter is not None:
            yield _TensorFile(f"model/{ADAPTER}", contents.adapter, None)
        for entry, (_, tensors) in contents.state.items():
            if tensors:
                yield _TensorFile(f"state/{entry}.safetensors", tensors, None)


def _data_digests(contents: Contents, plan: Plan) -> dict[str, str]:
    """What this rank would write, by file, as digests of the data after the headers."""
    rank, _ = rank_and_size()
    digests = {}
    for file in _tensor_files(contents, plan, rank):
        hasher = xxhash.xxh3_128()
        for block in file.blocks(file.header({})):
            hasher.update(block)
        digests[file.path] = hasher.hexdigest()
    if rank == 0:
        digests.update({f"state/{entry}.json": digest(text) for entry, (text, _) in contents.state.items()})
    return digests


def _file_bytes(source: str | bytes | os.PathLike[str]) -> bytes:
    """Text and bytes as they are, a path by its content."""
    if isinstance(source, bytes):
        return source
    return source.encode() if isinstance(source, str) else Path(source).read_bytes()
