"""trackers.json: how far a run has been delivered to each of its trackers, so that a later launch goes on there."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from am_recipes.sinks import files

NAME = "trackers.json"
# Of the threads of the trackers, which share the file; the training thread never takes it.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Delivered:
    """What a service has of a run.

    Args:
        id: of the run there; None before it was begun.
        began: when it was, in seconds since 1970.
        step: of the last row it has; None where it has none.
        validation: whether that row is a validation's, which comes after the step's own.
        status: how the run ended, where the service was told so since the last row.
        files: when each file or folder that it has was changed, and its bytes.
    """

    id: str | None = None
    began: float = 0.0
    step: int | None = None
    validation: bool = False
    status: str | None = None
    files: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def has(self, step: int, validation: bool) -> bool:
        """Whether the service has that row."""
        return self.step is not None and (step, validation) <= (self.step, self.validation)


def load(run_dir: Path, tracker: str) -> Delivered:
    """What the service of `tracker` has. Raises ValueError where the file is damaged."""
    try:
        return Delivered(**_load(run_dir).get(tracker, {}))
    except TypeError as error:
        raise _damaged(run_dir, error) from error


def save(run_dir: Path, tracker: str, delivered: Delivered) -> None:
    with _LOCK:
        content = _load(run_dir) | {tracker: asdict(delivered)}
        files.replace(run_dir / NAME, [(json.dumps(content, indent=2) + "\n").encode()])


def _load(run_dir: Path) -> dict[str, dict[str, Any]]:
    file = run_dir / NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _damaged(run_dir, error) from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise _damaged(run_dir, "no mapping of trackers")
    return content


def _damaged(run_dir: Path, why: object) -> ValueError:
    return ValueError(
        f"{run_dir / NAME} does not say what trackers have ({why}); remove it, and they get the whole run as a new one"
    )
