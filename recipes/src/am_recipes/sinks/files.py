"""Writing files so that a reader, or a crash, finds a whole one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def replace(file: Path, parts: Iterable[bytes]) -> None:
    """Write `parts` one after the other so that a reader, or a crash, finds the old file or the new one, whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise not_written(file, error) from error


def not_written(file: Path, error: OSError) -> OSError:
    """The error with what the system leaves out: which file, and how much room there is."""
    free = shutil.disk_usage(file.parent).free
    return OSError(
        error.errno, f"{file} was not written: {error.strerror}, {free} bytes are free; the same command continues"
    )
