"""Told to stop: a signal on one rank ends the run of all of them after the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import am_mesh


class StopSignal:
    """While entered, SIGTERM asks for an orderly stop instead of killing the process."""

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def requested(self, dims: am_mesh.ParallelDims) -> bool:
        """Whether any rank of the world got the signal; every rank calls it, so that all stop after the same step."""
        return am_mesh.sum_over(dims.all_ranks, int(self._received)) > 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
