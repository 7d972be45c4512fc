"""How far a run is, what its validations say, what it draws there, and what its ranks agree on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import am_mesh


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


def any_rank(dims: am_mesh.ParallelDims, *flags: bool) -> list[bool]:
    """Which of `flags` any rank of the world gives as true; every rank calls it, so that all do the same."""
    votes = torch.tensor([int(flag) for flag in flags], device=dims.all_ranks.device_type)
    return [count > 0 for count in am_mesh.sum_over(dims.all_ranks, votes).tolist()]


def first_told(text: str | None) -> str:
    """The `text` of the first rank that has one; every rank calls it, and one of them has."""
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return next(other for other in texts if other is not None)


def seed_everything(seed: int, *coordinates: int) -> None:
    """Seed torch on every device from `seed` and where in the run we are."""
    digest = hashlib.blake2b(repr((seed, *coordinates)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
