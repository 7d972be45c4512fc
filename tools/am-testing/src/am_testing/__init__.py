"""Test helpers of this repository: a pool of gloo worker processes, free ports, and a disk that is full."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

from am_testing._disk import small_files
from am_testing._pool import Pool
from am_testing._ports import free_port

__all__ = ["Pool", "free_port", "run_distributed", "small_files"]

_pool = Pool(4)
atexit.register(_pool.close)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `function(*args)` on `world_size` (at most 4) gloo ranks; return the results in rank order.

    `function` must be defined at the top level of an importable module or of the test file itself. The first call of a
    session costs seconds, later ones 20-80 ms. See `Pool.run` for what is raised.
    """
    return _pool.run(function, world_size, *args, timeout=timeout)
