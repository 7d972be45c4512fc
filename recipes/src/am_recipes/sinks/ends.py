"""How a log ends: what its status begins with, for who writes one and for who reads it."""

from __future__ import annotations

FINISHED, STOPPED, _FAILED = "finished", "stopped", "failed: "


def failed(error: BaseException) -> str:
    """The status of a log that `error` ended."""
    return f"{_FAILED}{type(error).__name__}: {error}"


def is_finished(status: str) -> bool:
    return status.startswith(FINISHED)


def is_stopped(status: str) -> bool:
    """Whether somebody wanted it to end: a signal, or whatever leaves Python without an error."""
    quits = tuple(f"{_FAILED}{kind.__name__}:" for kind in (KeyboardInterrupt, SystemExit))
    return status.startswith((STOPPED, *quits))
