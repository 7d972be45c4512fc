"""The contract between a run and a service that keeps its numbers, and what such a service is told of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

# `step`, `time` (seconds since 1970) and further numbers by name; None where one is not finite.
TrackedRow: TypeAlias = Mapping[str, float | int | None]
Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]


class Incomplete(Exception):
    """Raised by `end`: the run has ended, and the service lacks what no later call brings.

    The message is what, and what to do: "rows that ...; upload them with ...".
    """


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker is told of it.

    Args:
        name: of the run directory.
        run_dir: where the run is kept, absolute.
        params: the resolved config by dotted key, scalars and lists; secrets and what came from the environment are
            references, as in config.yaml.
        tags: facts of this launch in words: recipe, git commit, versions, device.
        id: of the run at the service, where an earlier launch began it there; None otherwise.
        resume_step: the step of the checkpoint that this launch continues from; None where it begins anew.
    """

    name: str
    run_dir: Path
    params: Mapping[str, object]
    tags: Mapping[str, str]
    id: str | None = None
    resume_step: int | None = None

    @property
    def config(self) -> dict[str, object]:
        """All that is known before the first row, for a service that has one place for it: `params`, and `tags` as
        `launch.NAME`.
        """
        return {**self.params, **{f"launch.{name}": value for name, value in self.tags.items()}}


@runtime_checkable
class Tracker(Protocol):
    """A run at a service. One thread of rank 0, that is not the training thread, calls it, one call at a time.

    Any method may raise anything, and take as long as it likes: what failed is tried again, the same call with the same
    arguments, with growing pauses, and the run never waits for it before its end. Import the client's package in
    `begin`, or before the training begins (`reach` of the section): an import in the thread holds up the training.
    """

    def begin(self, run: Tracked) -> str:
        """Open the run, or continue `run.id`; its id at the service.

        Where that is another one than `run.id`, the service gets every row of metrics.jsonl, from the first on.
        """
        ...

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        """Take rows in the order of the run: a step has `loss`, a validation does not.

        `time` of a validation is that of the step before it. A row comes again only where this call has failed, or the
        process was killed within it.
        """
        ...

    def artifact(self, path: Path) -> None:
        """Take a file or a folder of the run directory. It comes again when it has changed."""
        ...

    def end(self, status: Status) -> None:
        """The launch ends: as asked, with an error, or stopped by a signal; a later one may continue the run.

        Raises Incomplete where the service has not got everything, and will not by trying again.
        """
        ...

    def abandon(self) -> str | None:
        """The process ends, and a call hangs: see to it that nothing of the client's holds up that end.

        Called in another thread than the others, perhaps while one of them runs; it returns at once. What the service
        may lack of what `rows` has taken, in the words of `Incomplete`; None where nothing.
        """
        ...

    @property
    def where(self) -> str:
        """Where people find the run, once it was begun: an address, or a folder and the command that shows it."""
        ...


def row_key(row: Mapping[str, object]) -> tuple[int, bool]:
    """Where a row stands in the order of the run: its step, and whether it is the validation after it."""
    return int(cast(float, row["step"])), "loss" not in row


def numbers(row: TrackedRow) -> dict[str, float | int]:
    """What a row says beside its step and time; NaN where it is not finite."""
    return {name: math.nan if value is None else value for name, value in row.items() if name not in ("step", "time")}
