"""Which step is loaded: the newest or best that is whole, or the one that is named; and whether its bytes are right."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from am_ckpt._files.step import Best, check_step, rank_best, read_manifest, step_name, steps
from am_ckpt._train.ranks import rank_zero
from am_ckpt._train.retention import manifests_of
from am_ckpt._train.verified import changed_files
from am_ckpt.errors import NewerError


@dataclass
class Choice:
    """What `load` has looked at: the step that it takes, and what is wrong with those that it does not.

    `changed`: names of whole folders in which bytes are not those that were written, and what is wrong with each.
    Equal on all ranks, but `problems`, which rank 0 has.
    """

    path: Path | None = None
    problems: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)


def choose(
    directory: Path, which: int | str | os.PathLike[str], best: Best | None, sections: Collection[str], *, verify: bool
) -> Choice:
    """The step in `directory` to load; see `Checkpointer.load`. Collective.

    With `verify`, what is in `sections` of it has been held against its digests, by all ranks together.
    """
    context = f"no checkpoint was loaded from {directory}"
    choice = Choice()
    while True:
        found = rank_zero(context, lambda: _candidate(directory, which, best, choice))
        choice.path = found
        changed = changed_files(found, sections) if found is not None and verify else []
        if found is None or not changed:
            return choice
        if not is_searched(which):
            raise ValueError(f"{context}: {changed[0]}")
        if not rank_zero(context, partial(was_deleted, found)):
            choice.changed[found.name] = changed[0]


def is_searched(which: int | str | os.PathLike[str]) -> bool:
    """Whether any step will do, and not the one that is named."""
    return which in ("latest", "best")


def was_deleted(path: Path) -> bool:
    """Whether a step that was there has gone since: another process saves, and keeps the newest."""
    return not os.path.lexists(path)


def warn_of_skipped(choice: Choice) -> None:
    """Say on rank 0 what was passed over."""
    if choice.path is not None:
        for problem in choice.problems:
            warnings.warn(f"SKIPPED a damaged checkpoint, going back to {choice.path.name}: {problem}", stacklevel=3)


def _candidate(directory: Path, which: int | str | os.PathLike[str], best: Best | None, choice: Choice) -> Path | None:
    """The step that nothing speaks against so far. On rank 0."""
    if isinstance(which, int):
        return _named(directory, step_name(which))
    if not is_searched(which):
        return _named(directory, which)
    if which == "best" and best is None:
        raise ValueError("which='best' needs keep_best=(metric, 'min' or 'max', count) to say what is best")
    while True:
        choice.problems = []
        found = _in_order(directory, best if which == "best" else None)
        if found is None:
            continue
        gone = False
        for path in found:
            problem = choice.changed.get(path.name) or _problem(path)
            if problem is None:
                return path
            gone = gone or was_deleted(path)
            choice.problems.append(problem)
        # Deleted since the directory was listed, as a newer one was saved: look again.
        if gone:
            continue
        if choice.problems:
            raise ValueError(
                f"none of the {len(found)} checkpoints is whole: {'; '.join(choice.problems[:3])}. Starting over must "
                "be your decision: move them away or use another directory"
            )
        return None


def _problem(path: Path) -> str | None:
    try:
        check_step(path)
    except NewerError:
        raise
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _in_order(directory: Path, best: Best | None) -> list[Path] | None:
    """Steps, the newest or best first; None where those that were listed have gone."""
    found = [path for _, path in steps(directory)]
    if best is None or not found:
        return found
    ranked = rank_best(list(manifests_of(directory, read_manifest).values()), best)
    if ranked:
        return [directory / step_name(step) for step in ranked]
    if all(was_deleted(path) for path in found):
        return None
    raise ValueError(f"no step in {directory} has the metric {best.metric!r}")


def _named(directory: Path, which: str | os.PathLike[str]) -> Path:
    # Of a name that is in both, this directory's step and not that of the folder where the process runs.
    path = directory / which
    if not path.is_dir():
        path = Path(which)
    if not path.is_dir():
        there = ", ".join(entry.name for _, entry in steps(directory)[:10]) or "none"
        raise FileNotFoundError(f"{which} is not a checkpoint folder; steps in {directory}: {there}")
    path = path.resolve()
    check_step(path)
    return path
