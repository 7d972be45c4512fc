"""Copies planned beforehand, into a folder that appears complete or not at all, and that can be resumed.

Beside the destination stands a staging folder, signed by its process::

    .NAME.merging/lease.json      the process
    .NAME.merging/journal.jsonl   which copies are on the disk
    .NAME.merging/folder/         what is written; fsynced, then renamed to NAME
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from am_ckpt._copy import Copier, Job, Output, plan_jobs
from am_ckpt._errors import ArgumentError
from am_ckpt._format import Header
from am_ckpt._inventory import paused_collector
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
from am_ckpt._names import ADAPTER_CONFIG, DIGESTS, INDEX, hf_files

_LEASE = "lease.json"
_JOURNAL = "journal.jsonl"
_FOLDER = "folder"
_MAX_JOURNAL_BYTES = 256 * 2**20
# A killed merge repeats at most about this much.
_JOURNAL_EVERY = 2**30
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class Transfer:
    """What a folder will hold: tensors of the files in ``headers``, and the content of ``small`` files.

    Names of files are paths in the folder. ``seal``: called with the staging folder when all of that is in it; what it
    returns is written last. ``notes`` are for the report; more are added on the way.
    """

    headers: dict[str, Header]
    small: dict[str, bytes]
    outputs: list[Output]
    notes: list[str]
    follow_symlinks: bool
    seal: Callable[[Path], dict[str, bytes]] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors."""
        return sum(output.num_bytes for output in self.outputs)


def require_free(target: Path, source: Path, overwrite: bool) -> None:
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
    own = {*hf_files(target), INDEX, ADAPTER_CONFIG, DIGESTS, ".gitattributes", "README.md"}
    weights = [entry.name for entry in entries if entry.suffix == ".safetensors" and entry.is_file()]
    strangers = sorted({entry.name for entry in entries} - {*weights, *own})
    if strangers or not weights:
        found = strangers[0] if strangers else "no safetensors files"
        raise FileExistsError(
            f"{target} does not look like a model ({found} in it) and is not overwritten; move it away or choose "
            "another folder"
        )


def transfer(
    plan: Transfer,
    target: Path,
    *,
    threads: int | None,
    resume: bool,
    fsync: bool,
    progress: Callable[[int, int], None] | None,
    digests: bool = False,
) -> int:
    """Make the folder ``target``; returns the bytes that were there from an interrupted run.

    ``threads``: default the number of cores, at most 8. ``progress``: called with bytes done and all bytes.
    ``digests``: add the file ``DIGESTS``.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads={threads} must be at least 1")
    with paused_collector():
        jobs = plan_jobs(plan.outputs)
    staging = _staging(target)
    folder = staging / _FOLDER
    fingerprint = _fingerprint(plan, digests)
    target.parent.mkdir(parents=True, exist_ok=True)
    folders = sorted({name.partition("/")[0] for name in (*plan.headers, *plan.small) if "/" in name})
    done = _take_over(staging, fingerprint, len(jobs), resume, plan.notes)
    hashes = [done.get(index, "") for index in range(len(jobs))] if digests else None
    before = sum(jobs[index].count for index in done)
    if not done:
        total = sum(header.file_bytes for header in plan.headers.values()) + sum(map(len, plan.small.values()))
        _stage(staging, total)
        for name in folders:
            os.mkdir(folder / name)
    _allow_open_files(len(plan.headers) + len({part.path for output in plan.outputs for part in output.parts}))
    targets: dict[str, int] = {}
    try:
        for name, header in plan.headers.items():
            if not done:
                targets[name] = create(folder / name, header.file_bytes)
                os.ftruncate(targets[name], header.file_bytes)
                write_all(targets[name], header.text, 0)
            else:
                targets[name] = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        journal = _Journal(staging / _JOURNAL, fingerprint, targets, new=not done) if fsync else None
        threads = threads or min(os.cpu_count() or 1, 8)
        copier = Copier(targets, threads=threads, follow_symlinks=plan.follow_symlinks, digest=digests)
        _copy(jobs, set(done), copier, journal, hashes, progress)
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
    _write_small(folder, plan.small)
    if hashes is not None:
        _write_small(folder, {DIGESTS: _digests_json(plan.headers, jobs, hashes)})
    if plan.seal is not None:
        _write_small(folder, plan.seal(folder))
    if fsync:
        for name in folders:
            fsync_directory(folder / name)
    _publish(staging, target, fsync)
    return before


def _digests_json(headers: Mapping[str, Header], jobs: list[Job], hashes: list[str]) -> bytes:
    """What every byte of the weight files must be."""
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in headers}
    for job, value in zip(jobs, hashes, strict=True):
        ranges[job.file].append((job.target, job.target + job.count, value))
    files = {
        name: {
            "bytes": header.file_bytes,
            "header_xxh3_128": digest(header.text),
            "ranges_xxh3_64": sorted(ranges[name]),
        }
        for name, header in headers.items()
    }
    return (json.dumps({"format": "am-ckpt digests", "version": 1, "files": files}) + "\n").encode()


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.merging")


def _stage(staging: Path, num_bytes: int) -> None:
    require_space(staging.parent, num_bytes)
    os.mkdir(staging)
    write_bytes(staging / _LEASE, json.dumps(own_lease()).encode())
    os.mkdir(staging / _FOLDER)


def written_folder(target: Path, num_bytes: int, fsync: bool, write: Callable[[Path], None]) -> list[str]:
    """Make the folder ``target`` of what ``write`` puts into the folder that it is given; the names of the files."""
    staging = _staging(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _take_over(staging, "", 0, False, [])
    _stage(staging, num_bytes)
    folder = staging / _FOLDER
    try:
        write(folder)
        names = sorted(path.name for path in folder.iterdir())
        for name in names if fsync else ():
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _publish(staging, target, fsync)
    return names


def _fingerprint(plan: Transfer, digests: bool) -> str:
    """Of everything that decides the result's bytes: to resume only the same merge."""
    sources = sorted({part.path for output in plan.outputs for part in output.parts})
    # Times only ever make two states of a source differ; equal ones are not trusted on their account.
    stats = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in sources]
    headers = {name: digest(header.text) for name, header in plan.headers.items()}
    small = {name: digest(content) for name, content in plan.small.items()}
    # The jobs follow from the outputs.
    hasher = xxhash.xxh3_128(json.dumps([stats, headers, small, digests]).encode())
    for output in plan.outputs:
        hasher.update(repr(output).encode())
    fingerprint: str = hasher.hexdigest()
    return fingerprint


def _allow_open_files(count: int) -> None:
    """Every file is opened once; there may be more than a process may open unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 128
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _write_small(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        write_bytes(folder / name, content)


def _copy(
    jobs: list[Job],
    done: set[int],
    copier: Copier,
    journal: _Journal | None,
    hashes: list[str] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Copy what is not ``done``; ``hashes`` gets those of the jobs."""
    total = sum(job.count for job in jobs)
    copied = sum(jobs[index].count for index in done)
    lock = threading.Lock()

    def finished(index: int, job: Job, value: str) -> None:
        nonlocal copied
        if hashes is not None:
            hashes[index] = value
        if journal is not None:
            journal.add(index, value, job.count)
        with lock:
            copied += job.count
            if progress is not None:
                progress(copied, total)

    try:
        copier.run(((index, job) for index, job in enumerate(jobs) if index not in done), finished)
    except BaseException:
        if journal is not None:
            # What is there may be resumed; the first error is the one to report.
            with contextlib.suppress(OSError):
                journal.write()
        raise


class _Journal:
    """Which jobs are on the disk, with the digests of their bytes: a line per sync, written after the data."""

    def __init__(self, path: Path, fingerprint: str, targets: Mapping[str, int], *, new: bool) -> None:
        self._path = path
        self._targets = targets
        self._new: list[tuple[int, str]] = []
        self._bytes = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        if new:
            path.unlink(missing_ok=True)
            write_bytes(path, (json.dumps({"merge": fingerprint}) + "\n").encode())

    def add(self, index: int, value: str, count: int) -> None:
        """Note a finished job; every GiB, make all of them durable."""
        with self._lock:
            self._new.append((index, value))
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


def _take_over(staging: Path, fingerprint: str, num_jobs: int, resume: bool, notes: list[str]) -> dict[int, str]:
    """The finished jobs of an interrupted merge to the same place, or none after its folder is removed."""
    if not os.path.lexists(staging):
        if resume:
            notes.append("nothing to resume: started from zero")
        return {}
    if lease_state(staging / _LEASE) != "dead":
        raise FileExistsError(
            f"another process is merging to the same destination (its folder is {staging}); wait for it, or remove "
            "that folder if it is not running"
        )
    if resume:
        done = _journalled(staging / _JOURNAL, fingerprint, num_jobs)
        if done and (staging / _LEASE).is_file() and (staging / _FOLDER).is_dir():
            (staging / _LEASE).unlink()
            write_bytes(staging / _LEASE, json.dumps(own_lease()).encode())
            return done
        notes.append("the interrupted merge was of another source or with other arguments: started from zero")
    remove(staging)
    return {}


def _journalled(path: Path, fingerprint: str, num_jobs: int) -> dict[int, str]:
    """Digests of finished jobs by number; none where the journal is of another merge."""
    try:
        lines = read_file(path, _MAX_JOURNAL_BYTES).split(b"\n")
        if json.loads(lines[0]) != {"merge": fingerprint}:
            return {}
        # The last line is empty, or was cut off by what interrupted the merge.
        done = {index: value for line in lines[1:-1] for index, value in json.loads(line)}
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    known = all(type(index) is int and 0 <= index < num_jobs and type(value) is str for index, value in done.items())
    return done if known else {}


def _publish(staging: Path, target: Path, fsync: bool) -> None:
    folder = staging / _FOLDER
    if fsync:
        fsync_directory(folder)
    filled = target.exists() and any(target.iterdir())
    if not (filled and _exchange(folder, target)):
        if filled:
            remove(target)
        os.rename(folder, target)
    if fsync:
        fsync_directory(target.parent)
        # With the lease, and what was in the way.
        remove(staging)
    else:
        shutil.rmtree(staging)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that there is no moment without either; False where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        rename = library.renameat2
    except AttributeError:
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0
