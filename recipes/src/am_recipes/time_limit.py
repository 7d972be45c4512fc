"""When a launch has to stop so that its time suffices to commit: its own limit, and the scheduler's.

All ranks are asked together after each step, or after the validation that follows it. A launch that goes on there must
come to the next question and still commit, so it stops where less is left than

- the longest time from one question to the next so far, saves aside: a step, with a validation if it had one;
- the longest save so far, until it was durable, for the one to come, for one that is under way, which it waits for,
  and for one before the next question. Before any was measured it is an estimate (`estimated_save`);
- `ENDING_SECONDS`, for what follows the save.

The first step of a launch may compile for minutes: it counts until the second was measured, and then no more.
Nothing here but `LaunchTime`, which a run asks, knows a clock that it is not given; what this process knows of its own
time is in `job_time`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import am_ckpt
from am_recipes.job_time import JOB_END, process_age
from am_recipes.sections import StepScheduler, seconds

ENDING_SECONDS = 15.0
"""For the record, the page, what trackers have not delivered (10 s at most), and processes that end one by one."""

SAVE_BYTES_PER_SECOND = 50e6
"""Of one rank. A local disk takes ten times as much; a file system over a network that hundreds of ranks write to at
once may leave no more to each of them. Too low a rate ends the first launch early, too high a one loses it.
"""

SAVE_SECONDS = 10.0
"""Of any save, however small: names, syncs, and ranks that wait for each other over a slow file system."""


@dataclass(frozen=True)
class End:
    """An end of the time of a launch: who sets it, as it is shown, how to change it, and when, of the clock in use."""

    name: str
    fix: str
    at: float


def ends(max_time: str | None, job_end: float | None, *, now: float, epoch: float, age: float) -> list[End]:
    """The ends of a launch whose process is `age` seconds old, at `now` of its clock and `epoch` since the epoch.

    `max_time` is a `sections.Time`, `job_end` what `job_time.job_end` returns.
    """
    found = []
    if max_time is not None:
        fix = "raise it, or set it to null"
        found.append(End(f"step_scheduler.max_time={max_time}", fix, now - age + (seconds(max_time) or 0)))
    if job_end is not None:
        fix = "give the job more time, or unset it where it is of another job"
        found.append(End(f"{JOB_END}={job_end:.0f}", fix, now + job_end - epoch))
    return found


@dataclass(frozen=True)
class Save:
    """How long a save takes: measured, or estimated from the bytes that this rank writes."""

    seconds: float
    basis: str


def measured_save(longest: float) -> Save:
    """The longest one of this launch."""
    return Save(longest, "the longest so far")


def estimated_save(num_bytes: int) -> Save:
    """Of a launch that has saved nothing yet."""
    rate = SAVE_BYTES_PER_SECOND
    basis = f"estimated: {SAVE_SECONDS:.0f} s, and {num_bytes:,} bytes at {rate / 1e6:.0f} MB/s"
    return Save(SAVE_SECONDS + num_bytes / rate, basis)


class TimeLimit:
    """Asked by a `Run` at each question to all ranks, on every rank: the vote of any of them counts.

    Args:
        ends: of this launch; none: there is always time.
        clock: seconds that only grow.
    """

    def __init__(self, ends: Sequence[End], clock: Callable[[], float]) -> None:
        self._end = min(ends, key=lambda end: end.at, default=None)
        self._clock = clock
        self._num_questions = 0
        self._longest = 0.0
        self._began = clock()

    @property
    def is_set(self) -> bool:
        """Whether there is an end at all."""
        return self._end is not None

    def begin(self) -> None:
        """The time to the next question counts from here: the first step begins, or a save has returned."""
        self._began = self._clock()

    def over_before_a_step(self) -> str | None:
        """Why no step can be done any more, asked before the first one of the launch; None where there is time."""
        left = self._left()
        if self._end is None or left > 0:
            return None
        return (
            f"{self._end.name} was over {-left:.0f} s before the first step of this launch, which would never train; "
            f"{self._end.fix}. Nothing was lost"
        )

    def asked(self, save: Save, *, others: int) -> str | None:
        """Take this question; why the run has to stop here, None where it can go on to the next one.

        `others`: saves that are under way, or come before the next question.
        """
        taken = self._clock() - self._began
        self.begin()
        self._longest = taken if self._num_questions <= 1 else max(self._longest, taken)
        self._num_questions += 1
        saves = (1 + others) * save.seconds
        needed, left = self._longest + saves + ENDING_SECONDS, self._left()
        if self._end is None or left >= needed:
            return None
        return (
            f"out of time: {self._end.name} leaves {left:.1f} s, and to go on takes {needed:.1f} s: "
            f"{self._longest:.1f} s to the next step (the longest so far), {saves:.1f} s for "
            f"{f'{1 + others} saves' if others else 'a save'} ({save.basis}), {ENDING_SECONDS:.0f} s to end"
        )

    def _left(self) -> float:
        return float("inf") if self._end is None else self._end.at - self._clock()


class LaunchTime:
    """What a run asks about time, on every rank: whether it is over, and whether a save is due by it.

    Args:
        scheduler: says `max_time` and `ckpt_every_minutes`.
        job_end: as `job_time.job_end` has it.
        checkpoints: they know how long a save took.
        state: what they save, `model` and `optimizer` among it.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        job_end: float | None,
        checkpoints: am_ckpt.Checkpointer,
        state: Mapping[str, Any],
    ) -> None:
        self._saved_at = time.monotonic()
        found = ends(scheduler.max_time, job_end, now=self._saved_at, epoch=time.time(), age=process_age())
        self.limit = TimeLimit(found, time.monotonic)
        self._minutes = scheduler.ckpt_every_minutes
        self._checkpoints, self._state = checkpoints, state
        self._estimate: Save | None = None

    def saved(self) -> None:
        """A save has returned."""
        self._saved_at = time.monotonic()
        self.limit.begin()

    def save_is_due(self) -> bool:
        """Whether `ckpt_every_minutes` have gone since the last save."""
        return self._minutes is not None and time.monotonic() - self._saved_at >= 60 * self._minutes

    def asked(self, *, saves: bool) -> str | None:
        """Why the run has to stop here, None where it can go on; `saves`: whether it saves here in any case."""
        if not self.limit.is_set:
            return None
        return self.limit.asked(self._save_to_come(), others=int(self._checkpoints.is_saving) + int(saves))

    def _save_to_come(self) -> Save:
        """As the longest of this launch, or, before any, by its bytes."""
        if self._checkpoints.longest_save is not None:
            return measured_save(self._checkpoints.longest_save)
        if self._estimate is None:
            self._estimate = estimated_save(_saved_bytes(self._state))
        return self._estimate


def _saved_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the model and optimizer that this rank holds: at least what it writes of them."""
    slots = state["optimizer"].state_dict()["state"].values()
    tensors = [parameter for _, parameter in state["model"].named_parameters()]
    tensors += [value for values in slots for value in values.values() if isinstance(value, torch.Tensor)]
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)
