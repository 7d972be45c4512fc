"""How far a run is, what it draws there, and when it is told to stop."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType

import torch

import am_mesh


class Progress:
    """How far a run is: optimizer steps done. Checkpointed beside the model."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


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


def seed_everything(seed: int, *coordinates: int) -> None:
    """Seed torch on every device from `seed` and where in the run we are."""
    digest = hashlib.blake2b(repr((seed, *coordinates)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
