"""The contract between a run and what listens to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias, runtime_checkable

# Names and numbers; a loss that is not finite comes as it is.
Row: TypeAlias = Mapping[str, float | int]


@runtime_checkable
class Sink(Protocol):
    """What a `Log` tells of a run. Rank 0 alone calls it, from the training thread, which waits for it.

    Implement all four methods; a class needs no base. Calls come in the order of the run: facts, steps and validations
    as they happen, then `close`. What a method raises is not caught: it ends the run with its traceback, like any error
    of the loop, and every sink is closed. A sink that may fail without ending the run catches its own errors.
    """

    def note(self, fact: str) -> None:
        """Take a fact in words: what was chosen or counted before training, a warning, an answer of the model."""
        ...

    def step(self, row: Row) -> None:
        """Take an optimizer step: the numbers that `metrics.jsonl` gets, under the same names."""
        ...

    def validation(self, row: Row) -> None:
        """Take `step` (0: before training) and the losses `val_loss` or `val_loss_<name>`."""
        ...

    def close(self, status: str) -> None:
        """End, once, also where the run failed: `finished`, `stopped ...` or `failed: ...`."""
        ...
