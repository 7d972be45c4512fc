"""Copies planned beforehand, into a folder that appears complete or not at all, and that can be resumed.

Beside the destination stands a staging folder::

    .NAME.merging/lock            held by the process that writes here, with flock()
    .NAME.merging/journal.jsonl   which copies are on the disk
    .NAME.merging/folder/         what is written; fsynced, then renamed to NAME

It is deleted under another name, so that whoever comes next makes a new one, with a lock of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from am_ckpt._copy.engine import Copier
from am_ckpt._copy.plan import Job, Jobs, Output, plan_jobs
from am_ckpt._copy.publish import discard, is_filled, publish_folder, staging_folder, was_cut_short
from am_ckpt._files.hf_folder import DIGESTS, require_replaceable
from am_ckpt._files.safetensors import Header
from am_ckpt._files.step import read_file
from am_ckpt._io import create, digest, fsync_directory, open_file, require_space, write_all, write_bytes
from am_ckpt._sources import paused_collector
from am_ckpt.errors import ArgumentError

_JOURNAL = "journal.jsonl"
_FOLDER = "folder"
_MAX_JOURNAL_BYTES = 256 * 2**20
# A killed merge repeats at most about this much.
_JOURNAL_EVERY = 2**30


@dataclass(frozen=True)
class Transfer:
    """What a folder will hold: tensors of the files in `headers`, and the content of `small` files.

    Names of files are paths in the folder. `seal`: called with the staging folder when all of that is in it; what it
    returns is written last. `notes` are for the report; more are added on the way.
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
        return sum(header.file_bytes - header.data_start for header in self.headers.values())


def require_free(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse destinations that would change the source or lose something; `overwrite`: but for an export of ours."""
    here, there = target.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ArgumentError(f"{target} and the source {source} contain one another; choose a folder beside it")
    if was_cut_short(target):
        with staging_folder(target):
            # Which puts back what was there.
            pass
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder; choose another name")
    if not is_filled(target):
        return
    while True:
        before = os.stat(target)
        try:
            require_replaceable(target, source)
            break
        except FileExistsError:
            # Another merge may have replaced the folder while it was listed.
            if os.path.samestat(before, os.stat(target)):
                raise
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder, or let merge replace it with overwrite=True "
            "(--overwrite)"
        )


def num_threads(threads: int | None) -> int:
    """`threads`, or the number of cores, at most 8."""
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads={threads} must be at least 1")
    return threads or min(os.cpu_count() or 1, 8)


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
    """Make the folder `target`; returns the bytes that were there from an interrupted run.

    `threads`: see `num_threads`. `progress`: called with bytes done and all bytes.
    `digests`: add the file `DIGESTS`.
    """
    threads = num_threads(threads)
    with paused_collector():
        jobs = plan_jobs(plan.outputs)
    fingerprint = _fingerprint(plan, jobs, digests)
    replace = is_filled(target)
    with staging_folder(target) as staging:
        done = _finished(staging, plan.headers, fingerprint, len(jobs)) if resume else {}
        if resume and not done:
            plan.notes.append("nothing to resume, or of another source or with other arguments: started from zero")
        try:
            hashes = _write(plan, staging, jobs, done, fingerprint, threads, fsync, progress, digests)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                discard(staging)
            raise
        except ValueError:
            # A source that changed or ended while it was read.
            discard(staging)
            raise
        folder = staging / _FOLDER
        if digests:
            _write_small(folder, {DIGESTS: _digests_json(plan, jobs, hashes)})
        if plan.seal is not None:
            _write_small(folder, plan.seal(folder))
        _publish(staging, target, fsync, replace=replace)
    return sum(jobs[index].count for index in done)


def _write(
    plan: Transfer,
    staging: Path,
    jobs: Jobs,
    done: Mapping[int, str],
    fingerprint: str,
    threads: int,
    fsync: bool,
    progress: Callable[[int, int], None] | None,
    digests: bool,
) -> list[str]:
    """Write the files of `plan` but for the jobs that are `done`; return the digests of all jobs."""
    folder = staging / _FOLDER
    if not done:
        small_bytes = sum(map(len, plan.small.values()))
        _empty(staging, small_bytes + sum(header.file_bytes for header in plan.headers.values()))
        for name in {name.partition("/")[0] for name in (*plan.headers, *plan.small) if "/" in name}:
            os.mkdir(folder / name)
    _allow_open_files(len(plan.headers) + len(jobs.paths))
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
        copier = Copier(targets, threads=threads, follow_symlinks=plan.follow_symlinks, digest=digests)
        hashes = _copy(jobs, done, copier, journal, progress)
        if done and any(output.dtype != output.source_dtype for output in plan.outputs):
            plan.notes.append("values too large for the new dtype were counted in what this run copied alone")
        if copier.overflowed:
            listed = ", ".join(f"{name} ({count})" for name, count in copier.overflowed.most_common(5))
            plan.notes.append(
                f"{copier.overflowed.total()} values of {len(copier.overflowed)} tensors are too large for the new "
                f"dtype and are infinite now: {listed}"
            )
        if fsync:
            for descriptor in targets.values():
                os.fsync(descriptor)
    finally:
        for descriptor in targets.values():
            os.close(descriptor)
    _write_small(folder, plan.small)
    return hashes


def _digests_json(plan: Transfer, jobs: Jobs, hashes: list[str]) -> bytes:
    """What every byte of the folder must be."""
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in plan.headers}
    for job, value in zip(jobs, hashes, strict=True):
        ranges[job.file].append((job.target, job.target + job.count, value))
    files = {
        name: {
            "bytes": header.file_bytes,
            "header_xxh3_128": digest(header.text),
            "ranges_xxh3_64": sorted(ranges[name]),
        }
        for name, header in plan.headers.items()
    }
    small = {name: digest(content) for name, content in plan.small.items()}
    content = {"format": "am-ckpt digests", "version": 1, "files": files, "small_xxh3_128": small}
    return (json.dumps(content) + "\n").encode()


def _empty(staging: Path, num_bytes: int) -> None:
    """Make room in the staging folder for `num_bytes`."""
    (staging / _JOURNAL).unlink(missing_ok=True)
    if os.path.lexists(staging / _FOLDER):
        shutil.rmtree(staging / _FOLDER)
    require_space(staging, num_bytes)
    os.mkdir(staging / _FOLDER)


def written_folder(target: Path, num_bytes: int, fsync: bool, write: Callable[[Path], None]) -> list[str]:
    """Make the folder `target` of what `write` puts into the folder that it is given; the names of the files."""
    with staging_folder(target) as staging:
        try:
            _empty(staging, num_bytes)
            write(staging / _FOLDER)
            names = sorted(path.name for path in (staging / _FOLDER).iterdir())
            for name in names if fsync else ():
                descriptor = os.open(staging / _FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except BaseException:
            discard(staging)
            raise
        _publish(staging, target, fsync, replace=False)
    return names


def _fingerprint(plan: Transfer, jobs: Jobs, digests: bool) -> str:
    """Of everything that decides the result's bytes: to resume only the same merge."""
    # Times only ever make two states of a source differ; equal ones are not trusted on their account.
    found = [(str(path), os.stat(path)) for path in jobs.paths]
    stats = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]
    headers = {name: digest(header.text) for name, header in plan.headers.items()}
    small = {name: digest(content) for name, content in plan.small.items()}
    return digest(json.dumps([stats, headers, small, digests, jobs.digest()]).encode())


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
    jobs: Jobs,
    done: Mapping[int, str],
    copier: Copier,
    journal: _Journal | None,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Copy what is not `done`; the digests of all jobs."""
    total = int(jobs.num_bytes.sum())
    copied = sum(jobs[index].count for index in done)
    hashes = [done.get(index, "") for index in range(len(jobs))]
    lock = threading.Lock()

    def finished(index: int, job: Job, value: str) -> None:
        nonlocal copied
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
    return hashes


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
            self._size = write_bytes(path, (json.dumps({"merge": fingerprint}) + "\n").encode())["bytes"]
        else:
            # Without a line that was cut off.
            self._size = read_file(path, _MAX_JOURNAL_BYTES).rfind(b"\n") + 1

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
            line = json.dumps(new).encode() + b"\n"
            with open_file(self._path) as journal:
                os.ftruncate(journal, self._size)
                write_all(journal, line, self._size)
            self._size += len(line)


def _finished(staging: Path, headers: Mapping[str, Header], fingerprint: str, num_jobs: int) -> dict[int, str]:
    """Digests of the finished jobs of an interrupted run by number; none where it was of another plan."""
    try:
        for name, header in headers.items():
            if (staging / _FOLDER / name).lstat().st_size != header.file_bytes:
                return {}
        lines = read_file(staging / _JOURNAL, _MAX_JOURNAL_BYTES).split(b"\n")
        if json.loads(lines[0]) != {"merge": fingerprint}:
            return {}
        # The last line is empty, or was cut off by what interrupted the merge.
        done = {index: value for line in lines[1:-1] for index, value in json.loads(line)}
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    known = all(type(index) is int and 0 <= index < num_jobs and type(value) is str for index, value in done.items())
    return done if known else {}


def _publish(staging: Path, target: Path, fsync: bool, *, replace: bool) -> None:
    """Give the folder its name; one that came there in the meantime is replaced only where there was one before."""
    folder = staging / _FOLDER
    if fsync:
        for inner in [path for path in folder.iterdir() if path.is_dir()]:
            fsync_directory(inner)
        fsync_directory(folder)
    if is_filled(target):
        if not replace:
            raise FileExistsError(
                f"{target} was made by someone else in the meantime; what was to be there is in {folder}"
            )
        # Something may have been put there while this was copied.
        require_replaceable(target)
        if fsync:
            # The older model is in the folder soon, and must not be taken for what the journal speaks of.
            (staging / _JOURNAL).unlink()
            fsync_directory(staging)
    publish_folder(folder, target)
    if fsync:
        fsync_directory(target.parent)
    # With the lock, and with what was in the way.
    discard(staging)
