"""One planned save, from the first byte to the commit, on every rank.

There are no collectives here, so this runs in a background thread, no communicator times out while a disk is slow, and
a rank that dies is noticed: by its process on the same machine, otherwise after a time limit. Ranks tell each other
through small files::

    STAGING/lease.json           the writer, see am_ckpt._train.lease
    STAGING/step/                what is written; one rename makes it a step
    STAGING/ranks/00000.json     rank 0 has written its files
    STAGING/ranks/00001.json     what rank 1 wrote, or why it could not
    STAGING/ranks/outcome.json   how the save ended, from rank 0
    STAGING/ranks/00001.read     rank 1 knows
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from am_ckpt import __version__
from am_ckpt._files.box_digests import require_digested
from am_ckpt._files.safetensors import parse_json
from am_ckpt._files.step import FORMAT, MANIFEST, STAGING, VERSION, checked_header, read_file, seal, step_name
from am_ckpt._io import fsync_directory, require_space, write_bytes
from am_ckpt._train.job import Job, TensorFile
from am_ckpt._train.lease import clean_stale, release, sign
from am_ckpt._train.ranks import Failure, describe, rebuild
from am_ckpt._train.shared_files import FileShare, create_files

# Of what a rank reports: a record of some hundred bytes a file, and digests of every 16 MiB.
_MAX_REPORT_BYTES = 2**30
# How long rank 0 waits until all ranks have read the outcome, before it leaves the folder to the next save.
_READ_SECONDS = 10.0


def stage(job: Job, planned_bytes: int) -> None:
    """Create the staging folder; `OSError` without room for it, `RuntimeError` beside another live writer.

    Rank 0 only. Ends in `run`, or in `discard` where it comes to nothing.
    """
    create_staging(job.staging, planned_bytes, STAGING, held=True)
    for name in ("ranks", "step", *(f"step/{section}" for section in (*job.manifest["tensors"], "state"))):
        os.mkdir(job.staging / name)
    create_files(job.staging / "step" / "model", job.headers)


def create_staging(staging: Path, planned_bytes: int, prefix: str, *, held: bool) -> None:
    """Create and sign a folder for `planned_bytes`, beside no live writer's whose name begins with `prefix`.

    `held`: see `am_ckpt._train.lease.sign`.
    """
    staging.parent.mkdir(parents=True, exist_ok=True)
    require_space(staging.parent, planned_bytes)
    os.mkdir(staging)
    sign(staging, held=held)
    alive = clean_stale(staging.parent, prefix, staging)
    if alive:
        raise RuntimeError(
            f"another process is saving to this directory (its folder is {alive[0]}); use one directory a run"
        )


def new_manifest(
    step: int, save_id: str, world_size: int, tensors: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a step without its files; `own`: fields that are not as they are in the simplest one."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "save_id": save_id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": world_size,
        "axes": {},
        "versions": {"am_ckpt": __version__, "torch": str(torch.__version__)},
        "metrics": {},
        "fingerprints": {},
        "mapping": None,
        "model": "module",
        "aliases": {},
        "tensors": tensors,
        "optimizers": [],
        "state": [],
        **own,
    }


def discard(staging: Path) -> None:
    """Remove the staging folder, as far as that works."""
    release(staging)
    shutil.rmtree(staging, ignore_errors=True)


def run(job: Job, require_unchanged: Callable[[], None], tidy: Callable[[], None]) -> None:
    """Write this rank's files, and publish the step once all ranks have. Every rank calls it; all succeed or raise.

    `require_unchanged` raises where the tensors were changed while they were written; `tidy` runs on rank 0 after
    the commit. Raises the same error on every rank that is alive: the first that rank 0 learns of, or a
    `TimeoutError` naming the ranks that it heard nothing of.
    """
    if job.rank == 0:
        try:
            _lead(job, require_unchanged, tidy)
        finally:
            release(job.staging)
    else:
        _follow(job, require_unchanged)


def _lead(job: Job, require_unchanged: Callable[[], None], tidy: Callable[[], None]) -> None:
    context, where = job.not_saved, job.where
    failure: Failure | None = None
    try:
        records = _write(job, require_unchanged)
        if job.size > 1:
            _put(job.staging / "ranks" / "00000.json", {})
        for rank, report in _gather(job).items():
            if "failure" in report:
                failure, where = report["failure"], f"rank {rank} of {job.size}: "
                raise rebuild(failure)
            records += report["records"]
        seal_step(job.staging / "step", job.manifest, records)
        if job.stop.is_set():
            raise _given_up()
        # A folder that is not empty is never replaced by rename: a step that appeared meanwhile raises.
        os.rename(job.staging / "step", job.directory / step_name(job.step))
        context = f"step {job.step} is in place, but it is not known whether it survives a power cut"
        fsync_directory(job.directory)
    except BaseException as error:
        shutil.rmtree(job.staging / "step", ignore_errors=True)
        name, number, text = failure or describe(error)
        failure = (name, number, f"{context}: {where}{text}")
        _announce(job, {"failure": failure}, _READ_SECONDS if not isinstance(error, TimeoutError | _DeadRank) else 1.0)
        if not isinstance(error, Exception):
            raise
        raise rebuild(failure) from error
    try:
        tidy()
    finally:
        _announce(job, {}, _READ_SECONDS)


def _follow(job: Job, require_unchanged: Callable[[], None]) -> None:
    own: BaseException | None = None
    try:
        report: dict[str, Any] = {"records": _write(job, require_unchanged)}
    except BaseException as error:  # noqa: BLE001 - told to rank 0, and raised below
        own = error
        report = {"failure": describe(error)}
        # Where the disk is full, this makes room for the report. The other ranks still write to files that are shared.
        for file in job.files:
            if isinstance(file, TensorFile):
                with suppress(OSError):
                    (job.staging / "step" / file.path).unlink()
    try:
        _put(job.staging / "ranks" / f"{job.rank:05d}.json", report)
        outcome = _await_outcome(job)
    except (OSError, _DeadRank) as error:
        unknown = f"it is not known whether step {job.step} was saved in {job.directory}"
        context = unknown if own is None else job.not_saved
        raise rebuild(describe(own or error), f"{context}: {job.where}") from own or error
    if own is not None and not isinstance(own, Exception):
        raise own
    if "failure" in outcome:
        raise rebuild(outcome["failure"]) from own


class _DeadRank(RuntimeError):
    """A process of this machine has ended that others wait for."""


def _given_up() -> TimeoutError:
    return TimeoutError("given up, since flush() had to return before it was written")


def _write(job: Job, require_unchanged: Callable[[], None]) -> list[dict[str, Any]]:
    folder = job.staging / "step"
    records = write_files(folder, job.rank, job.files, job.texts, job.stop)
    if job.rank:
        # Rank 0 does so when it has seen all files.
        for name in sorted({record["path"].partition("/")[0] for record in records}):
            fsync_directory(folder / name)
    require_unchanged()
    return records


def write_files(
    folder: Path,
    rank: int,
    files: Iterable[TensorFile | FileShare],
    texts: Mapping[str, bytes],
    stop: threading.Event,
) -> list[dict[str, Any]]:
    """Write the files of one rank into `folder`, durably, and return their records."""

    def give_up() -> None:
        if stop.is_set():
            raise _given_up()

    records = [{"path": file.path, "rank": rank, **file.write(folder, give_up)} for file in files]
    for path, content in texts.items():
        records.append({"path": path, "rank": rank, **write_bytes(folder / path, content)})
    return records


def join_records(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for each file, by path, of those of all ranks: what ranks wrote of the same file becomes one."""
    joined: dict[str, dict[str, Any]] = {}
    for record in records:
        shared: dict[str, Any] = {"boxes_xxh3_128": {}} if "boxes_xxh3_128" in record else {}
        boxes = joined.setdefault(record["path"], {**record, **shared}).get("boxes_xxh3_128", {})
        for name, rows in record.get("boxes_xxh3_128", {}).items():
            boxes[name] = sorted([*boxes.get(name, []), *rows])
    return [joined[path] for path in sorted(joined)]


def seal_step(folder: Path, manifest: Mapping[str, Any], parts: list[dict[str, Any]]) -> None:
    """Check that this process sees what all ranks wrote into `folder`, and write the manifest.

    `parts`: the records of all ranks.
    """
    records = join_records(parts)
    for record in records:
        path = folder / record["path"]
        if not path.exists():
            raise FileNotFoundError(
                f"{path}, written by rank {record['rank']}, is not visible to rank 0; the directory must be on a file "
                "system that all ranks share"
            )
        if path.stat().st_size != record["bytes"]:
            raise OSError(f"{path} has {path.stat().st_size} bytes, rank {record['rank']} wrote {record['bytes']}")
        if "boxes_xxh3_128" in record:
            require_digested(path, checked_header(path, record), record["boxes_xxh3_128"])
    write_bytes(folder / MANIFEST, seal({**manifest, "files": records}))
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            fsync_directory(path)
    fsync_directory(folder)


def _put(path: Path, content: dict[str, Any]) -> None:
    """Write a small file that appears complete. It need not outlive a power cut, since nothing is published then."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(json.dumps(content).encode())
    os.rename(temporary, path)


def _pauses() -> Iterator[float]:
    """Seconds to wait between looks: short at first, at most a quarter of a second."""
    pause = 0.001
    while True:
        yield pause
        pause = min(pause * 1.5, 0.25)


def _gather(job: Job) -> dict[int, dict[str, Any]]:
    """What each other rank reports: of all, or up to the first that failed."""
    reports: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + job.timeout
    for pause in _pauses():
        missing = sorted(set(range(1, job.size)) - set(reports))
        # Asked before: a rank may end as soon as it has reported.
        dead = job.dead(missing)
        for rank in missing:
            path = job.staging / "ranks" / f"{rank:05d}.json"
            if path.exists():
                reports[rank] = parse_json(read_file(path, _MAX_REPORT_BYTES), str(path))
        if len(reports) == job.size - 1 or any("failure" in report for report in reports.values()):
            return reports
        dead = [rank for rank in dead if rank not in reports]
        if dead:
            raise _DeadRank(f"rank {dead[0]} of {job.size} died before it had written its files")
        if job.stop.is_set():
            raise _given_up()
        if time.monotonic() > deadline:
            missing = sorted(set(range(1, job.size)) - set(reports))
            raise TimeoutError(
                f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {job.size} did not report "
                f"within {job.timeout} seconds: dead, hanging, or writing to another file system; raise timeout= if "
                "its disk is slow"
            )
        time.sleep(pause)
    raise AssertionError


def _announce(job: Job, outcome: dict[str, Any], seconds: float) -> None:
    """Tell the other ranks how the save ended, wait up to `seconds` until they know, remove the staging folder."""
    ranks = job.staging / "ranks"
    try:
        if job.size > 1:
            _put(ranks / "outcome.json", outcome)
            deadline = time.monotonic() + seconds
            for pause in _pauses():
                if all((ranks / f"{rank:05d}.read").exists() for rank in range(1, job.size)):
                    break
                if time.monotonic() > deadline:
                    # A rank may be writing still, or be dead. The next save, which all begin, removes the folder.
                    return
                time.sleep(pause)
    except OSError:
        # The ranks that do not hear of it give up by themselves.
        pass
    shutil.rmtree(job.staging, ignore_errors=True)


def _await_outcome(job: Job) -> dict[str, Any]:
    """How rank 0 says that the save ended; it writes its own files for up to `timeout`, and then waits as long."""
    ranks = job.staging / "ranks"
    seconds, has_written = job.timeout, False
    deadline = time.monotonic() + seconds
    for pause in _pauses():
        # Asked before: rank 0 may end as soon as it has said so.
        dead = job.dead([0])
        if (ranks / "outcome.json").exists():
            outcome: dict[str, Any] = parse_json(
                read_file(ranks / "outcome.json", _MAX_REPORT_BYTES), str(ranks / "outcome.json")
            )
            os.rename(ranks / f"{job.rank:05d}.json", ranks / f"{job.rank:05d}.read")
            return outcome
        if dead:
            raise _DeadRank(f"rank 0 of {job.size} died before it said how the save ended")
        if job.stop.is_set():
            raise TimeoutError("flush() had to return before rank 0 said whether the step is complete")
        if not has_written and (ranks / "00000.json").exists():
            # It waits for other ranks, and names those that it hears nothing of.
            has_written, seconds = True, job.timeout + _READ_SECONDS
            deadline = time.monotonic() + seconds
        if time.monotonic() > deadline:
            error = TimeoutError(
                f"rank 0 of {job.size} did not report within {seconds} seconds: dead, hanging, or writing to another "
                "file system; raise timeout= if its disk is slow"
            )
            if has_written:
                raise error
            # In place of the records, so that rank 0, if it lives, does not publish what this rank gives up. It has
            # not read them, unless it has written its files meanwhile.
            _put(ranks / f"{job.rank:05d}.json", {"failure": describe(error)})
            if not (ranks / "00000.json").exists():
                raise error
        time.sleep(pause)
    raise AssertionError
