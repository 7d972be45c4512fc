"""Which steps stay, and how the others go."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_ckpt._files.step import Best, rank_best, read_complete, step_name, steps
from am_ckpt._io import point, remove


@dataclass(frozen=True)
class Keep:
    """The newest `last`, every multiple of `every`, the best by a metric; all steps where all three are None."""

    last: int | None
    every: int | None
    best: Best | None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.last), ("keep_every", self.every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")

    def chosen(self, manifests: dict[int, dict[str, Any]]) -> set[int]:
        """The steps to keep, of those with a manifest. The newest is always among them."""
        if self == Keep(None, None, None):
            return set(manifests)
        kept = set(sorted(manifests, reverse=True)[: self.last or 1])
        if self.every is not None:
            kept.update(step for step in manifests if step % self.every == 0)
        if self.best is not None:
            kept.update(rank_best(list(manifests.values()), self.best)[: self.best.count])
        return kept


def pin_path(directory: Path, step: int) -> Path:
    """The empty file that keeps a step from being deleted."""
    return directory / f"{step_name(step)}.pin"


def manifests_of(directory: Path, read: Callable[[Path], dict[str, Any]] = read_complete) -> dict[int, dict[str, Any]]:
    """Manifests of the steps that `read` accepts (default: those whose files are all there), newest first."""
    manifests = {}
    for step, path in steps(directory):
        try:
            manifests[step] = read(path)
        except (ValueError, OSError):
            # Not counted and not deleted: a person may want to look at it.
            continue
    return manifests


def tidy(directory: Path, keep: Keep, saved: int) -> None:
    """Point `latest` and `best`, then delete the complete steps that nothing keeps.

    `saved`, just committed, stays. What goes wrong here is a warning: the step is saved.
    """
    try:
        manifests = manifests_of(directory)
    except OSError as error:
        warnings.warn(f"step {saved} is saved; {directory} could not be listed: {error}", stacklevel=2)
        return
    best = rank_best(list(manifests.values()), keep.best) if keep.best is not None else []
    try:
        point(directory / "latest", step_name(max(manifests, default=saved)))
        if best:
            point(directory / "best", step_name(best[0]))
    except OSError as error:
        warnings.warn(f"step {saved} is saved; the links in {directory} could not be set: {error}", stacklevel=2)
    for step in sorted(set(manifests) - keep.chosen(manifests) - {saved}):
        try:
            path = directory / step_name(step)
            # What a link leads to is not ours to delete.
            if not pin_path(directory, step).exists() and not path.is_symlink():
                remove(path)
        except OSError as error:
            warnings.warn(f"step {saved} is saved; {step_name(step)} could not be deleted: {error}", stacklevel=2)
