"""Processes that have imported torch when they start: forks of the server that the workers of am_testing come from."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

from am_testing import run_distributed


def nothing() -> None:
    pass


def torch_processes() -> ForkServerContext:
    # Whoever starts the server says what it imports.
    run_distributed(nothing, 1)
    return multiprocessing.get_context("forkserver")
