"""What tests draw at random: another part with every commit, the same one again on request."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from commit_seed import __file__ as module
from commit_seed import drawn_from


@pytest.fixture
def seed_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the module, in a folder that no checkout is around."""
    monkeypatch.delenv("AM_TEST_SEED", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return shutil.copy(module, tmp_path)


def test_the_seed_is_that_of_the_commit(seed_of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = runpy.run_path(seed_of)
    assert functions["commit_seed"]() == functions["WITHOUT_COMMIT"]
    if shutil.which("git") is not None:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        seeds = []
        for message in "ab":
            for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "--no-verify", "-m", message]):
                subprocess.run([*git, *command], check=True)
            head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
            seeds.append(functions["commit_seed"]())
            assert head.startswith(f"{seeds[-1]:08x}")
        assert seeds[0] != seeds[1]
    monkeypatch.setenv("AM_TEST_SEED", "17")
    assert functions["commit_seed"]() == 17


def test_all_parts_are_among_what_is_drawn() -> None:
    items = list(range(10))
    drawn = [drawn_from(items, 4, seed) for seed in range(200)]
    assert all([number // 4 for number in chosen] == [0, 1, 2] for chosen in drawn)
    assert {number for chosen in drawn for number in chosen} == set(items)
    assert drawn_from(items, 4, 7) == drawn[7]
    assert drawn_from(items, 1, 0) == items
