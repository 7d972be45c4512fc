"""What is in a directory already when a step is to be saved there."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from am_ckpt._files.hf_folder import INDEX
from am_ckpt._files.step import check_step, read_manifest, step_name
from am_ckpt._files.step_digests import Problem, twice
from am_ckpt._io import fsync_directory
from am_ckpt._train.ranks import rank_zero
from am_ckpt._train.retention import Keep, make_permanent, newer_steps, set_damaged_aside, tidy
from am_ckpt._train.step_files import content_of
from am_ckpt._train.verified import changed_files
from am_ckpt._train.write import join_records
from am_ckpt.errors import NewerError

# What of a manifest says what was saved, beside the bytes.
_CONTENT = ("fingerprints", "mapping", "published", "model", "aliases", "tensors", "optimizers", "state")


def is_there(directory: Path, step: int, skipped: Mapping[str, Problem], context: str) -> bool:
    """Whether `step` is there and all of its bytes are those that were written; what is damaged is set aside.

    Collective. `skipped`: names of steps that the last load passed over, and what is wrong with each. Raises
    `ValueError` where newer steps are there, beside which this one would be lost, and `OSError` where `step` is there
    and cannot be read: it may be whole.
    """
    path = directory / step_name(step)
    if not rank_zero(context, lambda: _make_way(directory, step, skipped)):
        return False
    sections = rank_zero(context, lambda: list(read_manifest(path)["tensors"]))
    problems = changed_files(path, sections)
    if problems and not problems[0].is_damage:
        raise problems[0].error(f"{context}: ")
    if problems:
        rank_zero(context, lambda: set_damaged_aside(path, problems[0].text))
    return not problems


def _make_way(directory: Path, step: int, skipped: Mapping[str, Problem]) -> bool:
    """Whether the step is there, as far as sizes, headers and state tell."""
    for name, problem in skipped.items():
        if problem.is_damage and (directory / name).is_dir():
            set_damaged_aside(directory / name, problem.text)
    # What load skips is in nobody's way.
    newer = [path for path in newer_steps(directory, step) if path.name not in skipped and _is_whole(path)]
    if newer:
        raise ValueError(
            f"{newer[0].name} is newer than step {step} ({len(newer)} such): the next load would take it, and "
            "retention keep it in place of this one. To go on from an older step, load it with "
            "load(state, step, discard_newer=True); or use another directory"
        )
    path = directory / step_name(step)
    return os.path.lexists(path) and _is_whole(path)


def _is_whole(path: Path) -> bool:
    """Whether a step that is there has the sizes, headers and state that it was written with; else it is set aside."""
    try:
        twice(partial(check_step, path))
    except NewerError:
        raise
    except ValueError as error:
        set_damaged_aside(path, str(error))
        return False
    return True


def save_again(
    directory: Path,
    step: int,
    manifest: Mapping[str, Any],
    found: list[list[dict[str, Any]]],
    files: Collection[str],
    keep: Keep,
) -> None:
    """Take a save of `step`, which is there, for the one that is there; `FileExistsError` where it is another one.

    A step that was ephemeral and is now saved for good becomes that. On rank 0. `manifest` and `found`, the records of
    all ranks, are what would be saved; `files` the names in `model/` that are copied.
    """
    path = directory / step_name(step)
    saved = read_manifest(path)
    copied = {f"model/{name}" for name in (*files, INDEX)}
    there = [content_of(record) for record in saved["files"] if record["path"] not in copied]
    here = [content_of(record) for record in join_records(record for part in found for record in part)]
    becomes_permanent = "ephemeral" in saved and "ephemeral" not in manifest
    # An ephemeral step may be older than the validation that it is kept for.
    brings_metrics = becomes_permanent and not saved["metrics"]
    keys = [*_CONTENT, *(["metrics"] if manifest["metrics"] and not brings_metrics else [])]
    # As JSON gives it back.
    described = json.loads(json.dumps({key: manifest.get(key) for key in keys}))
    if (here, described) != (there, {key: saved.get(key) for key in keys}):
        raise FileExistsError(
            f"{path} exists with other content, metrics or number of ranks and is never overwritten; delete it, "
            "save another step, or use another directory"
        )
    if becomes_permanent:
        make_permanent(directory, step, manifest["metrics"])
        tidy(directory, keep, step)
    # Saved by a process that may have been stopped before it could do so.
    fsync_directory(directory)
