"""Which step is loaded: the newest or best that is whole, or the one that is named; and whether its bytes are right."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from am_ckpt._files.step import Best, check_step, rank_best, read_manifest, step_name, steps
from am_ckpt._files.step_digests import Problem, found_in, twice
from am_ckpt._train.ranks import rank_zero
from am_ckpt._train.retention import manifests_of
from am_ckpt._train.verified import changed_files


@dataclass
class Choice:
    """What `load` has looked at: the step that it takes, and what is wrong with those that it does not.

    `skipped`: names of folders that look whole and in which bytes are not those that were written, or that could not be
    read, and what is wrong with each. Rank 0 has all of it, and `problems`; `path` is equal on all ranks.
    """

    path: Path | None = None
    problems: list[Problem] = field(default_factory=list)
    skipped: dict[str, Problem] = field(default_factory=dict)

    @property
    def unread(self) -> set[str]:
        """The names of those that were skipped and of which no damage is known."""
        return {name for name, problem in self.skipped.items() if not problem.is_damage}


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
        problems = changed_files(found, sections) if found is not None and verify else []
        if found is None or not problems:
            return choice
        if not is_searched(which):
            raise problems[0].error(f"{context}: ")
        if not rank_zero(context, partial(was_deleted, found)):
            choice.skipped[found.name] = problems[0]


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
            what, hint = "a damaged checkpoint", ""
            if not problem.is_damage:
                what, hint = "a checkpoint that could not be read", "; it stays as it is, another load may read it"
            warnings.warn(f"SKIPPED {what}, going back to {choice.path.name}: {problem.text}{hint}", stacklevel=3)


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
            problem = choice.skipped.get(path.name) or _problem(path)
            if problem is None:
                return path
            if was_deleted(path):
                gone = True
            elif not problem.is_damage:
                choice.skipped[path.name] = problem
            choice.problems.append(problem)
        # Deleted since the directory was listed, as a newer one was saved: look again.
        if gone:
            continue
        if choice.problems:
            raise _none_of(choice.problems)
        return None


def _none_of(problems: list[Problem]) -> Exception:
    unread = [problem for problem in problems if not problem.is_damage]
    what, hint = ("is whole and can be read", "try again, or move") if unread else ("is whole", "move")
    text = (
        f"none of the {len(problems)} checkpoints {what}: {'; '.join(problem.text for problem in problems[:3])}. "
        f"Starting over must be your decision: {hint} them away or use another directory"
    )
    return Problem(text, unread[0].errno if unread else None).error()


def _problem(path: Path) -> Problem | None:
    def check() -> list[Problem]:
        check_step(path)
        return []

    return next(iter(found_in(path, check)), None)


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
    twice(partial(check_step, path))
    return path
