"""The seed of what tests draw at random: another one with every commit, and the same for everyone who has that commit.

A failure is drawn again on its commit, or anywhere with `AM_TEST_SEED` set to the seed that the failing run printed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Where no commit can be asked for: no git, or no checkout.
WITHOUT_COMMIT = 20_260_101


def commit_seed() -> int:
    """`AM_TEST_SEED` where it is set; else the first 32 bits of HEAD's hash; else `WITHOUT_COMMIT`."""
    if "AM_TEST_SEED" in os.environ:
        return int(os.environ["AM_TEST_SEED"])
    git = shutil.which("git")
    if git is None:
        return WITHOUT_COMMIT
    folder = Path(__file__).resolve().parent
    asked = subprocess.run([git, "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return int(asked.stdout[:8], 16) if asked.returncode == 0 else WITHOUT_COMMIT


def drawn_from(items: Sequence[T], share: int, seed: int | str) -> list[T]:
    """One of every `share` items that follow one another: all parts of the sequence are among what is drawn."""
    chance = random.Random(seed)
    return [chance.choice(items[start : start + share]) for start in range(0, len(items), share)]
