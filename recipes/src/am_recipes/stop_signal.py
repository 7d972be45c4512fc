"""A run that is told to stop by a signal. Imports no torch: it also listens while that is imported."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType, TracebackType

from am_recipes import job_time
from am_recipes.launch import PREEMPTED

_NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}
# A terminal gives one Ctrl-C to every process of a job, and torchrun passes it on to its workers once more.
_SECONDS_OF_ONE_INTERRUPT = 1.0


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
        self.job_end = job_time.job_end(os.environ)
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
            if left < job_time.process_age():
                _say(
                    f"error: {name} before the first step, {left:.0f} s before the end of the job "
                    f"({job_time.JOB_END}), and more has gone: such a launch never trains; give the job more time"
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


def _say(text: str) -> None:
    """One line on stderr, of the first rank of a machine; a signal may come in the middle of a print."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
