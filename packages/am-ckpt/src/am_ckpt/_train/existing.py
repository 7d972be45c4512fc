"""What is in a directory already when a step is to be saved there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from am_ckpt._files.step import check_step, read_manifest, step_name
from am_ckpt._files.step_digests import Problem, twice
from am_ckpt._train.ranks import rank_zero
from am_ckpt._train.retention import newer_steps, set_damaged_aside
from am_ckpt._train.verified import changed_files
from am_ckpt.errors import NewerError


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
