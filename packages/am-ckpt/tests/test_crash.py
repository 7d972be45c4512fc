"""A process killed at any moment of a save leaves a directory from which training resumes."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import crash_child
import pytest
from commit_seed import commit_seed, drawn_from
from crash_child import state
from torch_processes import torch_processes

import am_ckpt


def require_whole(directory: Path) -> int:
    """Whatever was interrupted: the newest step loads, with its own values, and the next save works and tidies up."""
    loaded = state(9)
    step = am_ckpt.Checkpointer(directory).load(loaded)
    assert step in (1, 2, 3)
    assert set(loaded["model"].weight.unique().tolist()) == {float(step)}
    assert set(loaded["model"].bias.unique().tolist()) == {float(step)}
    assert loaded["optimizer"].param_groups[0]["lr"] == float(step)
    return step


class Forks:
    """Children of a process that has imported torch: a kill point then costs milliseconds."""

    def __init__(self) -> None:
        context = torch_processes()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=crash_child.serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def run(
        self, directory: Path, last: int, layout: str = "sharded", *, kill_after: float | None = None
    ) -> tuple[int, int | None]:
        """The child's status, and how many changes it made."""
        self.connection.send(((str(directory), last, layout), kill_after))
        status, count = self.connection.recv()
        return status, count

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()
        self.connection.close()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory with step 1."""
    am_ckpt.Checkpointer(tmp_path / "base").save(1, state(1))
    return tmp_path / "base"


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["sharded", "direct"])
def test_killed_before_every_change_to_the_file_system(
    layout: str, share: int, base: Path, forks: Forks, drawn: list[str], tmp_path: Path
) -> None:
    """Before one of every `share` changes: with each commit, before others."""
    shutil.copytree(base, tmp_path / "all", symlinks=True)
    status, total = forks.run(tmp_path / "all", 0, layout)
    assert status == 0
    assert total is not None
    assert total > 50
    seed = commit_seed()
    points = drawn_from(range(1, total + 1), share, seed)
    line = f"kills before changes, {layout}: seed {seed}, {len(points)} of {total} points"
    print(line)
    drawn.append(line)
    seen = set()
    for index, last in enumerate(points):
        directory = tmp_path / str(last)
        shutil.copytree(base, directory, symlinks=True)
        assert forks.run(directory, last, layout)[0] == signal.SIGKILL
        seen.add(require_whole(directory))
        if index % 3 == 0:
            am_ckpt.Checkpointer(directory, keep_last=1).save(4, state(4))
            left = {path.name for path in directory.iterdir() if not path.name.startswith(".staging-")}
            assert left == {"step_000004", "latest"}
    assert seen == {1, 2, 3}


def test_killed_at_random_moments(base: Path, forks: Forks, tmp_path: Path) -> None:
    random.seed(0)
    killed = 0
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        shutil.copytree(base, directory, symlinks=True)
        killed += forks.run(directory, 0, kill_after=random.uniform(0, 0.03))[0] == signal.SIGKILL
        require_whole(directory)
    assert killed >= 5, "the kills came too late to show anything"


def test_the_staging_folder_of_a_dead_process_is_removed_by_the_next_save(forks: Forks, tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, state(1))
    assert forks.run(tmp_path, 12)[0] == signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".staging-")]
    am_ckpt.Checkpointer(tmp_path).save(5, state(5))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
