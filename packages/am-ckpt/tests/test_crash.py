"""A process killed at any moment of a save leaves a directory from which training resumes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import am_ckpt

CHILD = Path(__file__).with_name("crash_child.py")


def state(value: int) -> dict[str, Any]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=float(value))}


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
    """Children forked from a small server that has imported torch once: a kill point then costs milliseconds."""

    def __init__(self) -> None:
        code = (
            "import os, runpy, sys\n"
            "import am_ckpt._checkpointer, torch\n"
            # The first optimizer imports torch._dynamo, which takes a second.
            "torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)\n"
            "print('ready', flush=True)\n"
            "for line in sys.stdin:\n"
            "    child, *arguments = line.rstrip().split('\\t')\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            "        sys.argv = [child, *arguments]\n"
            "        runpy.run_path(child, run_name='__main__')\n"
            "        sys.stdout.flush()\n"
            "        os._exit(0)\n"
            "    print('pid', pid, flush=True)\n"
            "    print('status', os.waitpid(pid, 0)[1], flush=True)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, directory: Path, last: int, layout: str = "sharded") -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{CHILD}\t{directory}\t{last}\t{layout}\n")
        self.process.stdin.flush()
        return int(self.line().removeprefix("pid "))

    def finish(self) -> tuple[int, str]:
        """Wait status, and what the child printed."""
        printed = ""
        while not (line := self.line()).startswith("status "):
            printed = line
        return int(line.removeprefix("status ")), printed

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def forks() -> Any:
    server = Forks()
    yield server
    server.close()


@pytest.mark.parametrize("layout", ["sharded", "direct"])
def test_killed_before_every_change_to_the_file_system(layout: str, forks: Forks, tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path / "all").save(1, state(1))
    forks.start(tmp_path / "all", 0, layout)
    status, printed = forks.finish()
    assert status == 0
    total = int(printed)
    assert total > 50
    seen = set()
    for last in range(1, total + 1):
        directory = tmp_path / str(last)
        am_ckpt.Checkpointer(directory).save(1, state(1))
        forks.start(directory, last, layout)
        assert forks.finish()[0] == signal.SIGKILL
        seen.add(require_whole(directory))
        if last % 10 == 0:
            am_ckpt.Checkpointer(directory, keep_last=1).save(4, state(4))
            left = {path.name for path in directory.iterdir() if not path.name.startswith(".staging-")}
            assert left == {"step_000004", "latest"}
    assert seen == {1, 2, 3}


def test_killed_at_random_moments(forks: Forks, tmp_path: Path) -> None:
    random.seed(0)
    killed = 0
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        am_ckpt.Checkpointer(directory).save(1, state(1))
        pid = forks.start(directory, 0)
        time.sleep(random.uniform(0, 0.03))
        # On a machine that stalls here, the child may be done before.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += forks.finish()[0] == signal.SIGKILL
        require_whole(directory)
    assert killed >= 5, "the kills came too late to show anything"


def test_the_staging_folder_of_a_dead_process_is_removed_by_the_next_save(forks: Forks, tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, state(1))
    forks.start(tmp_path, 12)
    assert forks.finish()[0] == signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".staging-")]
    am_ckpt.Checkpointer(tmp_path).save(5, state(5))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
