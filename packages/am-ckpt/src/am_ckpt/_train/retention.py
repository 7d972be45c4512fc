"""Which steps stay, and how the others go."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_ckpt._copy.publish import point, remove
from am_ckpt._files.step import MANIFEST, Best, rank_best, read_complete, read_manifest, seal, step_name, steps
from am_ckpt._io import fsync_directory, write_bytes


@dataclass(frozen=True)
class Keep:
    """The newest `last`, every multiple of `every`, the best by a metric; all steps where all three are None.

    An ephemeral step is not counted by `last`, and kept by the others alone, or as the newest of all. Where `every` or
    `best` is set without `last`, the newest step that is not ephemeral is kept too.
    """

    last: int | None
    every: int | None
    best: Best | None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.last), ("keep_every", self.every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")

    def scores(self, metrics: Mapping[str, float] | None) -> dict[str, float]:
        """`metrics` of a step; `ValueError` where there are some, but not the one by which `best` chooses."""
        scores = {name: float(value) for name, value in (metrics or {}).items()}
        if self.best is not None and metrics is not None and self.best.metric not in scores:
            raise ValueError(f"metrics {sorted(scores)} lack {self.best.metric!r}, by which keep_best chooses")
        return scores

    def chosen(self, manifests: dict[int, dict[str, Any]]) -> set[int]:
        """The steps to keep, of those with a manifest. The newest is always among them."""
        permanent = [step for step, manifest in manifests.items() if "ephemeral" not in manifest]
        newest = set(sorted(manifests, reverse=True)[:1])
        if self == Keep(None, None, None):
            return newest.union(permanent)
        kept = newest.union(sorted(permanent, reverse=True)[: self.last or 1])
        if self.every is not None:
            kept.update(step for step in manifests if step % self.every == 0)
        if self.best is not None:
            kept.update(rank_best(list(manifests.values()), self.best)[: self.best.count])
        return kept


def pin_path(directory: Path, step: int) -> Path:
    """The empty file that keeps a step from being deleted."""
    return directory / f"{step_name(step)}.pin"


def manifests_of(
    directory: Path, read: Callable[[Path], dict[str, Any]] = read_complete, *, after: int = -1
) -> dict[int, dict[str, Any]]:
    """Manifests of the steps after `after` that `read` accepts (default: whose files are all there), newest first."""
    manifests = {}
    for step, path in steps(directory):
        try:
            if step > after:
                manifests[step] = read(path)
        except (ValueError, OSError):
            # Not counted and not deleted: a person may want to look at it.
            continue
    return manifests


def set_damaged_aside(path: Path, problem: str) -> None:
    """Rename a step so that it is neither loaded nor counted, and say so."""
    aside = path.with_name(f".damaged-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    warnings.warn(f"set a damaged checkpoint aside as {aside.name}: {problem}", stacklevel=2)


def newer_steps(directory: Path, step: int) -> list[Path]:
    """Complete steps of a higher number than `step`, the newest first."""
    return [directory / step_name(number) for number in manifests_of(directory, after=step)]


def require_disposable(directory: Path, path: Path, skipped: Collection[str]) -> None:
    """Raise `ValueError` where the steps of `directory` that are newer than the one in `path` may not be deleted.

    `skipped`: names of those that were passed over and of which no damage is known.
    """
    if path.resolve().parent != directory.resolve():
        raise ValueError(f"discard_newer=True goes back to a step of {directory}; {path} is elsewhere")
    step = int(read_manifest(path)["step"])
    unread = [newer.name for newer in newer_steps(directory, step) if newer.name in skipped]
    if unread:
        raise ValueError(
            f"discard_newer=True would delete {', '.join(unread)}, which could not be read and may be whole: load "
            f"again, or name the step to go back to, load(state, {step}, discard_newer=True)"
        )
    pinned = [newer.name for newer in newer_steps(directory, step) if newer.with_name(f"{newer.name}.pin").exists()]
    if pinned:
        raise ValueError(f"discard_newer=True would delete {', '.join(pinned)}, which is pinned: unpin it first")


def discard_newer_steps(directory: Path, step: int) -> None:
    """Delete the complete steps after `step`; of one that is a link, the link. `latest` is `step` then."""
    for path in newer_steps(directory, step):
        if path.is_symlink():
            path.unlink()
        else:
            remove(path)
    if (directory / "latest").is_symlink():
        point(directory / "latest", step_name(step))
    if not (directory / "best").exists():
        # Of a step that went; the next save finds the best that is left.
        (directory / "best").unlink(missing_ok=True)


def make_permanent(directory: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """Make `step` as if it had never been saved as ephemeral, with `metrics` where there are some.

    One rename does it: a crash leaves the step whole, and the one or the other. Of a step that is a link, which is
    never deleted, nothing is changed.
    """
    path = directory / step_name(step)
    manifest = read_manifest(path)
    if path.is_symlink() or not manifest.pop("ephemeral", False):
        return
    # One name, so that what a crash leaves here is taken away by the next call.
    temporary = path / f".{MANIFEST}-new"
    temporary.unlink(missing_ok=True)
    write_bytes(temporary, seal({**manifest, **({"metrics": metrics} if metrics else {})}))
    os.replace(temporary, path / MANIFEST)
    fsync_directory(path)


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
