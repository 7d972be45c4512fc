"""What is said about an exception that ends a command, and the exit status it means.

A message alone is for mistakes that a person can mend by reading it: a wrong config, value or file. Everything else
shows where it happened. Once a run has begun, whatever ends it is also written with its traceback into the run
directory.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from am_recipes import lock
from am_recipes.settings import ConfigError
from am_recipes.sinks import record

# FloatingPointError: a loss that is no number, see `am_recipes.checks.require_finite`.
MESSAGES = (ValueError, OSError, FloatingPointError)
# What a first rank may need to import and look at before it can report: seconds.
_SECONDS_TO_REPORT = 15


def reported(function: Callable[[], int], *, debug: bool, run_dir: Path | None = None) -> int:
    """Run `function` and return its exit status; turn what went wrong into a message and a status.

    Ranks of one machine see the same config and environment, so the first of them reports a config error and torchrun
    stops the others meanwhile; anything else may differ and is reported by every rank under its number.

    Args:
        debug: show the traceback of a message too.
        run_dir: where error.txt goes, error.rank3.txt for another rank than the first. A refusal before the run has
            begun leaves no trace there, nor does a bug before that where a run is already; success removes what an
            earlier attempt has left.
    """
    rank = os.environ.get("RANK", "0")
    file = None if run_dir is None else run_dir / ("error.txt" if rank == "0" else f"error.rank{rank}.txt")
    before = _launches(run_dir)
    try:
        status = function()
    except KeyboardInterrupt:
        print(f"{_prefix(rank)}interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - here the program ends, and every exception is reported
        is_message = isinstance(error, MESSAGES)
        # A launch that came in the meantime is another run's where the directory was refused.
        refused = isinstance(error, lock.Refused) or isinstance(error.__cause__, lock.Refused)
        begun = _launches(run_dir) != before and not refused
        is_free = not is_message and not before
        written = file if file is not None and (begun or is_free) and _write(file) else None
        if debug or not is_message:
            traceback.print_exc()
        if isinstance(error, ConfigError):
            if debug:
                return 2
            if os.environ.get("LOCAL_RANK", "0") != "0":
                # Were this rank to end first, torchrun would stop the first one before it has said anything.
                time.sleep(_SECONDS_TO_REPORT)
            print(error, file=sys.stderr)
            return 2
        what = str(error) if is_message else f"{type(error).__name__}: {error}"
        where = f" (traceback: {written})" if written else " (--debug shows where)" if is_message and not debug else ""
        print(f"{_prefix(rank)}{what}{where}", file=sys.stderr)
        return 1
    if file is not None:
        file.unlink(missing_ok=True)
    return status


def _prefix(rank: str) -> str:
    return "error: " if rank == "0" else f"[rank {rank}] error: "


def _launches(run_dir: Path | None) -> list[record.Launch]:
    """The launches of the run that have begun: where this changes, this run is one of them."""
    if run_dir is None or not (run_dir / record.NAME).is_file():
        return []
    try:
        return record.load(run_dir).launches
    except (ValueError, OSError):
        return []


def _write(file: Path) -> bool:
    """Write the traceback of the exception at hand; False where that cannot be written either."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return False
    return True
