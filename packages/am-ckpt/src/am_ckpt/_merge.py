"""Shards of a training run into a folder that transformers, vLLM and peft open: byte ranges from file to file.

Planned from headers alone, with every element accounted for, before a byte is written; copied through small buffers
into a staging folder beside the destination; fsynced and renamed. No model, no GPU, no tensor in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from am_ckpt._config import HEAD, config_problems, read_config, tied_embedding
from am_ckpt._copy import Copier, Job, Output, parts_of, plan_jobs
from am_ckpt._errors import ArgumentError, IncompleteError
from am_ckpt._format import ITEM_BYTES, Header, build_header, parse_json, read_header
from am_ckpt._inventory import Inventory, inspect, paused_collector
from am_ckpt._io import (
    create,
    digest,
    fsync_directory,
    lease_state,
    own_lease,
    remove,
    require_space,
    write_all,
    write_bytes,
)
from am_ckpt._layout import read_file
from am_ckpt._mapping import Record, output_shape, records_by_parameter, whole_record
from am_ckpt._names import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE, byte_count, hf_files, weight_files
from am_ckpt._sources import Source, hf_sources, whole_sources
from am_ckpt._tensors import TensorReader

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CASTABLE = {"F16", "BF16", "F32", "F64"}
_LEASE = "lease.json"
_JOURNAL = "journal.jsonl"
_MAX_JOURNAL_BYTES = 256 * 2**20
# A killed merge repeats at most about this much.
_JOURNAL_EVERY = 2**30
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: ``num_bytes`` of tensors, ``resumed_bytes`` of them from the run before, wall ``seconds``."""

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
        """Plain data for ``json.dumps``."""
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
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model of checkpoint ``source`` as the Hugging Face folder ``destination``; one process, no collective.

    ``source``: any folder that :func:`inspect` recognises; it is only read. Weights go to ``model.safetensors``, or to
    files of at most ``max_shard_size`` (bytes, or ``"5GB"``) with an index; an adapter stays one file. A mapping stored
    in the checkpoint is applied, a tied head that equals its embedding is written once.

    ``like``: a folder whose config, tokenizer, chat template and code are carried along, before those of the source;
    weights in it are compared by name and shape. ``dtype``: ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the
    floating-point tensors of 16 bits and more (config.json is changed accordingly); default: as stored.
    ``section``: see :func:`inspect`. ``threads``: default the number of cores, at most 8.

    The destination appears complete or not at all; an existing one raises ``FileExistsError``, unless ``overwrite`` and
    it holds nothing but a model's files. After an interruption ``resume`` goes on where the last merge to the
    destination stopped; if source or arguments have changed since, it starts from zero and says so. ``fsync=False``
    does not wait for the disk: a power cut may then lose the result, and nothing can be resumed.
    ``progress(done, total)`` is called with numbers of bytes, from several threads.

    Memory: headers, and less than 8 MiB a thread. Raises ``ValueError`` where parts are missing, overlapping, damaged
    or unsafe, ``FileNotFoundError`` where files are, ``OSError`` where reading or writing fails.
    """
    started = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r}; choose {', '.join(DTYPES)}, or None to keep what is stored")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads={threads} must be at least 1")
    if resume and not fsync:
        raise ArgumentError("resume=True needs fsync=True: without it, what was copied before may not be on the disk")
    limit = byte_count(max_shard_size)
    target = Path(destination).absolute()
    inventory = inspect(source, section=section)
    _require_free(target, inventory.path, overwrite)
    inventory.require_whole()
    with paused_collector():
        plan = _Plan(inventory, Path(like).absolute() if like is not None else None, limit, dtype)
    staging = target.with_name(f".{target.name}.merging")
    resumed = _run(plan, staging, target, threads or min(os.cpu_count() or 1, 8), resume, fsync, progress)
    return MergeReport(
        str(inventory.path),
        inventory.kind,
        str(target),
        len(plan.outputs),
        sum(output.num_bytes for output in plan.outputs),
        resumed,
        time.monotonic() - started,
        sorted([*plan.headers, *plan.small]),
        plan.notes,
    )


def _require_free(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse destinations that would change the source or lose something."""
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ArgumentError(f"{target} and the source {source} contain one another; choose a folder beside it")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder; choose another name")
    entries = list(target.iterdir())
    if not entries:
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder, or overwrite it with overwrite=True "
            "(--overwrite)"
        )
    if any(entry.is_dir() for entry in entries) or not any(entry.suffix == ".safetensors" for entry in entries):
        raise FileExistsError(
            f"{target} does not look like a model (no safetensors files, or folders in it) and is not "
            "overwritten; move "
            "it away or choose another folder"
        )


class _Plan:
    """Everything about a merge that is decided before the first write."""

    def __init__(self, inventory: Inventory, like: Path | None, limit: int, dtype: str | None) -> None:
        self.inventory = inventory
        self.notes = list(inventory.notes)
        files = {**inventory.files, **(_like_files(like, inventory.adapter) if like is not None else {})}
        self.small = {name: path.read_bytes() for name, path in files.items()}
        tensors = dict(inventory.tensors)
        for name, item in tensors.items():
            if item.dtype not in ITEM_BYTES:
                raise ValueError(f"{name!r} is {item.dtype}, which safetensors cannot hold; leave it out of the model")
        records = records_by_parameter(inventory.mapping, {name: item.shape for name, item in tensors.items()})
        unknown = sorted({str(item["parameter"]) for item in inventory.mapping or ()} - set(tensors))
        if unknown:
            raise ValueError(
                f"the mapping of {inventory.path} speaks of {unknown[0]!r} ({len(unknown)} such), which it does "
                "not hold"
            )
        self._check_config(files, tensors)
        described: dict[str, tuple[str, tuple[int, ...]]] = {}
        origin: dict[str, Record] = {}
        for name in sorted(tensors, key=_natural):
            shape = tensors[name].shape
            for record in records.get(name, [whole_record(name, shape)]):
                if record.file in described:
                    raise ValueError(f"two tensors of {inventory.path} would be named {record.file!r}")
                kept = tensors[name].dtype
                described[record.file] = (
                    DTYPES[dtype] if dtype is not None and kept in _CASTABLE else kept,
                    output_shape(record, shape),
                )
                origin[record.file] = record
        if like is not None:
            self._compare(like, described)
        self._build(tensors, described, origin, limit)
        if dtype is not None and "config.json" in self.small and not inventory.adapter:
            self._note_dtype(dtype)

    def _build(
        self,
        tensors: Mapping[str, Source],
        described: Mapping[str, tuple[str, tuple[int, ...]]],
        origin: Mapping[str, Record],
        limit: int,
    ) -> None:
        groups = {ADAPTER: dict(described)} if self.inventory.adapter else weight_files(described, limit)
        self.headers: dict[str, Header] = {
            name: build_header(group, {"format": "pt"}) for name, group in groups.items()
        }
        if list(groups) != [SINGLE] and not self.inventory.adapter:
            size = sum(header.file_bytes - header.data_start for header in self.headers.values())
            home = {tensor: name for name, group in groups.items() for tensor in group}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(home.items()))}
            self.small[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
        self.outputs: list[Output] = []
        with TensorReader(follow_symlinks=self.inventory.follow_symlinks) as reader:
            located: dict[str, Source] = {}
            for file, header in self.headers.items():
                for name, entry in header.entries.items():
                    record = origin[name]
                    if record.parameter not in located:
                        located[record.parameter] = reader.located(record.parameter, tensors[record.parameter])
                    source = located[record.parameter]
                    parts = parts_of(record, source)
                    self.outputs.append(
                        Output(name, file, entry.begin, entry.shape, entry.dtype, source.dtype, tuple(parts))
                    )
        self.jobs = plan_jobs(self.outputs)

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
                "files of all "
                "ranks and stages, or give the config of this model with --like"
            )
        tied = config.get("tie_word_embeddings")
        if tied is False and HEAD in self.inventory.aliases:
            raise ValueError(
                f"{HEAD} is tied to {self.inventory.aliases[HEAD]} in {self.inventory.path}, "
                f"{files['config.json']} says "
                "tie_word_embeddings=false: it would be lost; give the config of this model with --like"
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

    def _compare(self, like: Path, described: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Compare names and shapes with the weights in ``like``, where it has any."""
        if (like / ADAPTER).is_file() and self.inventory.adapter:
            theirs = whole_sources(like / ADAPTER, read_header(like / ADAPTER, follow_symlinks=True))
        elif (like / INDEX).is_file() or (like / SINGLE).is_file():
            theirs = hf_sources(like)
        else:
            return
        shapes = [
            f"{name!r} is {list(described[name][1])}, there {list(item.shape)}"
            for name, item in theirs.items()
            if name in described and described[name][1] != item.shape
        ]
        if shapes and not self.inventory.exact_shapes:
            raise IncompleteError(
                f"{self.inventory.path} does not fit {like}: {'; '.join(shapes[:3])} ({len(shapes)} such): the "
                "files of "
                "the last ranks are missing; copy them too"
            )
        missing = [name for name in theirs if name not in described and name != HEAD]
        extra = [name for name in described if name not in theirs and name != HEAD]
        for what, names in (("of other shape than in", shapes), ("only in", missing), ("not in", extra)):
            if names:
                self.notes.append(f"{len(names)} tensors {what} {like}: {', '.join(names[:3])}")

    def _note_dtype(self, dtype: str) -> None:
        config = json.loads(self.small["config.json"])
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or "dtype" in part or "torch_dtype" in part):
                part["torch_dtype" if "torch_dtype" in part else "dtype"] = dtype
        self.small["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    def digest(self) -> str:
        """Of everything that decides the result's bytes: to resume only the same merge."""
        sources = sorted({part.path for output in self.outputs for part in output.parts})
        # Times only ever make two states of a source differ; equal ones are not trusted on their account.
        stats = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in sources]
        headers = {name: digest(header.text) for name, header in self.headers.items()}
        small = {name: digest(content) for name, content in self.small.items()}
        return digest(json.dumps([stats, headers, small, digest(repr(self.jobs).encode())]).encode())


def _natural(name: str) -> list[Any]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


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


def _run(
    plan: _Plan,
    staging: Path,
    target: Path,
    threads: int,
    resume: bool,
    fsync: bool,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Copy into ``staging`` and publish it; returns the bytes that were there from before."""
    fingerprint = plan.digest()
    target.parent.mkdir(parents=True, exist_ok=True)
    done = _take_over(staging, fingerprint, len(plan.jobs), resume, plan.notes)
    before = sum(plan.jobs[index].count for index in done)
    if not done:
        total = sum(header.file_bytes for header in plan.headers.values()) + sum(map(len, plan.small.values()))
        require_space(target.parent, total)
        os.mkdir(staging)
        write_bytes(staging / _LEASE, json.dumps(own_lease()).encode())
    targets: dict[str, int] = {}
    try:
        for name, header in plan.headers.items():
            if not done:
                targets[name] = create(staging / name, header.file_bytes)
                os.ftruncate(targets[name], header.file_bytes)
                write_all(targets[name], header.text, 0)
            else:
                targets[name] = os.open(staging / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        journal = _Journal(staging / _JOURNAL, fingerprint, done, targets) if fsync else None
        _copy(plan, targets, threads, journal, progress)
        if fsync:
            for descriptor in targets.values():
                os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(staging, ignore_errors=True)
        raise
    except ValueError:
        # A source that changed or ended while it was read.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        for descriptor in targets.values():
            os.close(descriptor)
    for name, content in plan.small.items():
        (staging / name).unlink(missing_ok=True)
        write_bytes(staging / name, content)
    _publish(staging, target, fsync)
    return before


def _copy(
    plan: _Plan,
    targets: dict[str, int],
    threads: int,
    journal: _Journal | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = set(journal.done) if journal is not None else set()
    total = sum(job.count for job in plan.jobs)
    copied = sum(plan.jobs[index].count for index in done)
    lock = threading.Lock()

    def finished(index: int, job: Job) -> None:
        nonlocal copied
        if journal is not None:
            journal.add(index, job.count)
        with lock:
            copied += job.count
            if progress is not None:
                progress(copied, total)

    copier = Copier(targets, threads=threads, follow_symlinks=plan.inventory.follow_symlinks)
    try:
        copier.run(((index, job) for index, job in enumerate(plan.jobs) if index not in done), finished)
    except BaseException:
        if journal is not None:
            # What is there may be resumed; the first error is the one to report.
            with contextlib.suppress(OSError):
                journal.write()
        raise


class _Journal:
    """Which jobs are on the disk: a line per sync, written after the data."""

    def __init__(self, path: Path, fingerprint: str, done: set[int], targets: Mapping[str, int]) -> None:
        self.done = done
        self._path = path
        self._targets = targets
        self._new: list[int] = []
        self._bytes = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        if not done:
            path.unlink(missing_ok=True)
            write_bytes(path, (json.dumps({"merge": fingerprint}) + "\n").encode())

    def add(self, index: int, count: int) -> None:
        """Note a finished job; every GiB, make all of them durable."""
        with self._lock:
            self._new.append(index)
            self._bytes += count
            due = self._bytes >= _JOURNAL_EVERY
            if due:
                self._bytes = 0
        if due:
            self.write()

    def write(self) -> None:
        """Sync the data, then say which jobs are done."""
        with self._writing:
            with self._lock:
                new, self._new = self._new, []
            for descriptor in self._targets.values():
                os.fdatasync(descriptor)
            with open(self._path, "ab") as file:
                file.write(json.dumps(new).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def _take_over(staging: Path, fingerprint: str, num_jobs: int, resume: bool, notes: list[str]) -> set[int]:
    """The finished jobs of an interrupted merge to the same place, or none after its folder is removed."""
    if not os.path.lexists(staging):
        if resume:
            notes.append("nothing to resume: started from zero")
        return set()
    if lease_state(staging / _LEASE) != "dead":
        raise FileExistsError(
            f"another process is merging to the same destination (its folder is {staging}); wait for it, or "
            "remove that "
            "folder if it is not running"
        )
    if resume:
        done = _journalled(staging / _JOURNAL, fingerprint, num_jobs)
        if done is not None and (staging / _LEASE).is_file():
            (staging / _LEASE).unlink()
            write_bytes(staging / _LEASE, json.dumps(own_lease()).encode())
            return done
        notes.append("the interrupted merge was of another source or with other arguments: started from zero")
    remove(staging)
    return set()


def _journalled(path: Path, fingerprint: str, num_jobs: int) -> set[int] | None:
    """Job numbers of a journal; None where it is of another merge or nothing was finished."""
    try:
        lines = read_file(path, _MAX_JOURNAL_BYTES).split(b"\n")
        if json.loads(lines[0]) != {"merge": fingerprint}:
            return None
    except (FileNotFoundError, ValueError):
        return None
    done: set[int] = set()
    # The last line is empty, or was cut off by what interrupted the merge.
    for line in lines[1:-1]:
        row = parse_json(line, str(path))
        if not isinstance(row, list) or not all(type(index) is int and 0 <= index < num_jobs for index in row):
            return None
        done.update(row)
    return done or None


def _publish(staging: Path, target: Path, fsync: bool) -> None:
    (staging / _LEASE).unlink()
    (staging / _JOURNAL).unlink(missing_ok=True)
    if fsync:
        fsync_directory(staging)
    if target.exists() and any(target.iterdir()):
        if _exchange(staging, target):
            fsync_directory(target.parent)
            remove(staging)
            return
        remove(target)
    os.rename(staging, target)
    if fsync:
        fsync_directory(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        rename = library.renameat2
    except AttributeError:
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0
