"""How far a run is, what its validations say, what it draws there, and when it is told to stop."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch

import am_mesh
from am_recipes import time_limit
from am_recipes.launch import PREEMPTED

_NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
# A terminal gives one Ctrl-C to every process of a job, and torchrun passes it on to its workers once more.
_SECONDS_OF_ONE_INTERRUPT = 1.0


class Progress:
    """How far a run is: optimizer steps done, and what its validations have said. Checkpointed beside the model.

    `best`: (loss, step) of the lowest losses, lowest first; of equal ones the later first, as am-ckpt has it.
    `waited`: validations in a row since a loss last counted for early stopping, and `counted` that loss.
    """

    def __init__(self) -> None:
        self.step = 0
        self.best: list[tuple[float, int]] = []
        self.last: tuple[float, int] | None = None
        self.counted = math.inf
        self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)

    def validated(self, loss: float, keep: int, min_delta: float) -> bool:
        """Take the loss of the first validation set; whether it is among the `keep` lowest."""
        self.last = (loss, self.step)
        self.best = sorted([*self.best, self.last], key=lambda entry: (entry[0], -entry[1]))[:keep]
        if loss < self.counted - min_delta:
            self.counted, self.waited = loss, 0
        else:
            self.waited += 1
        return self.last in self.best


@dataclass
class Step:
    """What is known of the step under way; `Run.done` logs it."""

    began: float
    epoch: int
    targets: int = 0
    tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = math.nan
    lr: float = math.nan


class StopSignal:
    """While entered, Ctrl-C (SIGINT), SIGTERM and SIGUSR1 ask for an orderly stop instead of ending the process.

    SIGUSR1 is what schedulers send some time before the end, where they are asked to, and SIGTERM shortly before it.
    Before the first step there is nothing to commit: these two end the process with `PREEMPTED`, Ctrl-C interrupts it.
    Where less of the job's time is left than has gone without a step, they end it with 1: it would be no better again.
    `doing` then says what is finished before the process ends. A second Ctrl-C interrupts at once. The two are never
    the second: torchrun may send SIGTERM for the same Ctrl-C, and so do schedulers, again and again.
    """

    def __init__(self) -> None:
        self.doing: str | None = None
        self.received: str | None = None
        self.job_end = time_limit.job_end(os.environ)
        self._interrupted: float | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in _NAMES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def heard(self) -> None:
        """Another rank got the signal: say so, once."""
        if self.received is None:
            self.received = "signal to another rank"
            _say(f"another rank was told to stop: {self.doing}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name, now = _NAMES[number], time.monotonic()
        if self.doing is None:
            if number == signal.SIGINT:
                _say(f"{name} before the first step: ending, nothing is lost")
                raise KeyboardInterrupt
            left = math.inf if self.job_end is None else self.job_end - time.time()
            if left < time_limit.process_age():
                _say(
                    f"error: {name} before the first step, {left:.0f} s before the end of the job "
                    f"({time_limit.JOB_END}), and more has gone: such a launch never trains; give the job more time"
                )
                raise SystemExit(1)
            _say(f"{name} before the first step: ending, nothing is lost")
            raise SystemExit(PREEMPTED)
        again = self._interrupted is not None and now - self._interrupted > _SECONDS_OF_ONE_INTERRUPT
        if number == signal.SIGINT and again:
            _say(f"{name} again: quitting at once; the same command continues from the latest checkpoint")
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self._interrupted = now
        if self.received is None:
            self.received = name
            _say(f"{name} received: {self.doing}. Ctrl-C {'again ' * (number == signal.SIGINT)}quits at once")


def any_rank(dims: am_mesh.ParallelDims, *flags: bool) -> list[bool]:
    """Which of `flags` any rank of the world gives as true; every rank calls it, so that all do the same."""
    votes = torch.tensor([int(flag) for flag in flags], device=dims.all_ranks.device_type)
    return [count > 0 for count in am_mesh.sum_over(dims.all_ranks, votes).tolist()]


def first_told(text: str | None) -> str:
    """The `text` of the first rank that has one; every rank calls it, and one of them has."""
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return next(other for other in texts if other is not None)


def _say(text: str) -> None:
    """One line on stderr, of the first rank of a machine; a signal may come in the middle of a print."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


def seed_everything(seed: int, *coordinates: int) -> None:
    """Seed torch on every device from `seed` and where in the run we are."""
    digest = hashlib.blake2b(repr((seed, *coordinates)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
