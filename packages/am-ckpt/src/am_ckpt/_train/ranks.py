"""All ranks do a step together, and all of them learn how it ended.

`agree` runs an action on every rank and exchanges the outcomes: either every rank gets all results, or every rank
raises the same error, the one of the lowest rank that failed. So no rank waits in a collective for one that gave up,
and none goes on with a checkpoint that another could not write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from am_ckpt.errors import ArgumentError, IncompleteError, NewerError, UnsafeError

T = TypeVar("T")

# Rebuilt by name on the other ranks; whatever else happens arrives as RuntimeError.
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        TimeoutError,
        FileNotFoundError,
        FileExistsError,
        ArgumentError,
        IncompleteError,
        NewerError,
        UnsafeError,
    )
}

# What ranks tell each other of an error: the name of its type, its errno, its text.
Failure = tuple[str, int | None, str]


def describe(error: BaseException) -> Failure:
    """`error` as plain data for other ranks."""
    return type(error).__name__, error.errno if isinstance(error, OSError) else None, str(error)


def rebuild(failure: Failure, context: str = "") -> Exception:
    """The error that a rank described, of its type, its text after `context`."""
    name, number, text = failure
    return OSError(number, context + text) if number is not None else _ERRORS.get(name, RuntimeError)(context + text)


def rank_and_size() -> tuple[int, int]:
    """This process's global rank and the world size; `(0, 1)` without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def agree(context: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank (all must call this) and return every rank's result, in rank order.

    Where it raises on any rank, every rank raises the same error: `context`, the rank, and the cause. `OSError`
    keeps its errno. Results must be picklable.
    """
    _, size = rank_and_size()
    failure: Exception | None = None
    outcome: tuple[bool, T | Failure]
    try:
        outcome = (True, action())
    except Exception as error:  # noqa: BLE001 - whatever happened here, the other ranks wait to hear of it
        failure = error
        outcome = (False, describe(error))
    outcomes: list = [outcome]
    if size > 1:
        outcomes = [None] * size
        dist.all_gather_object(outcomes, outcome)
    failed = [index for index, (succeeded, _) in enumerate(outcomes) if not succeeded]
    if not failed:
        return [value for _, value in outcomes]
    where = f"rank {failed[0]} of {size}: " if size > 1 else ""
    raise rebuild(outcomes[failed[0]][1], f"{context}: {where}") from failure


def compute(context: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's own result, which is not sent to the others."""
    kept: list[T] = []
    agree(context, lambda: kept.append(action()))
    return kept[0]


def rank_zero(context: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone (all ranks must call this); every rank gets its result or raises its error."""
    rank, _ = rank_and_size()
    return agree(context, lambda: action() if rank == 0 else None)[0]  # type: ignore[return-value]
