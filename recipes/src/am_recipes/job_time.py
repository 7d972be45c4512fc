"""What a process knows of its time: when its job ends, and how old it is itself."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from am_recipes.launch import is_whole

JOB_END = "SLURM_JOB_END_TIME"
"""The environment variable with the end of the job: seconds since the epoch."""

_IMPORTED = time.monotonic()


def job_end(environment: Mapping[str, str]) -> float | None:
    """When the scheduler ends this job, in seconds since the epoch; None where it does not say.

    Raises ValueError where what it says is no time.
    """
    text = environment.get(JOB_END)
    if not text:
        return None
    if not is_whole(text):
        raise ValueError(f"{JOB_END}={text} is not a number of seconds since the epoch; correct or unset it")
    return float(text)


def process_age() -> float:
    """Seconds since this process began; where the system does not tell, since this module was imported."""
    try:
        # The command name is in parentheses and may hold spaces; field 22 is the start in ticks since boot.
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
