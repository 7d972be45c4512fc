"""Lets test modules use what others define: pytest's importlib mode does not put test folders on the path.

And says at the end of a session what was drawn at random, of how much, and by which seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from crash_matrix import Server

_DRAWN = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def drawn(request: pytest.FixtureRequest) -> list[str]:
    """Lines to be printed when the session ends."""
    return request.config.stash.setdefault(_DRAWN, [])


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A process that has imported what writers of checkpoints need, and forks: a program costs milliseconds."""
    with Server() as running:
        running.open(Path(__file__).parent / "crash_writers" / "am_ckpt_save.py")
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_DRAWN, []):
        terminalreporter.write_line(line)
