"""Worker processes through torchrun: exit statuses, signals, and a launcher that imports nothing of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from am_recipes import launch

WORKER = """\
import os, signal, sys, time
rank = int(os.environ["RANK"])
with open(f"rank{rank}.part", "w") as file:
    file.write(" ".join([os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]))
os.rename(f"rank{rank}.part", f"rank{rank}.txt")
# torchrun stops the others as soon as one has failed, also one that has not come this far.
while not all(os.path.exists(f"rank{other}.txt") for other in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.05)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda number, frame: (open(f"stopped{rank}", "w").close(), sys.exit(75)))
    open(f"ready{rank}", "w").close()
    time.sleep(60)
sys.exit(int(sys.argv[1 + rank]))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "worker_for_launch.py").write_text(WORKER)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    }

    def start(*arguments):
        command = [sys.executable, "-m", "am_recipes.launch", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(("statuses", "expected"), [(("0", "0"), 0), (("75", "75"), 75), (("2", "2"), 2)])
def test_the_exit_status_is_that_of_the_workers(start, tmp_path, statuses, expected):
    process = start("2", "worker_for_launch", *statuses)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == expected, errors
    assert "Traceback" not in errors
    threads = str(max(1, os.cpu_count() // 2))
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == [" ".join(["2", threads, *statuses])] * 2


def test_sigterm_reaches_the_workers_and_says_that_the_run_can_be_continued(start, tmp_path):
    process = start("2", "worker_for_launch", "wait")
    deadline = time.monotonic() + 120
    while not ((tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert (tmp_path / "stopped0").exists()
    assert (tmp_path / "stopped1").exists()


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 1], 1),
        ([2, 1, 0], 2),
        ([-9, 1], 137),
        ([-15, 75], 75),
        ([-15, 2], 2),
        ([0, -15], 143),
        ([-15, -9], 137),
    ],
)
def test_worst_status(statuses, worst):
    assert launch.worst_status(statuses) == worst


def test_the_command_line_is_torchruns():
    local = ["--standalone", "--nnodes=1", "--nproc-per-node=3", "-m", "a.b", "-c", "x.yaml"]
    assert launch.torchrun_arguments("a.b", ["-c", "x.yaml"], 3) == local
    file = ["--standalone", "--nnodes=1", "--nproc-per-node=2", "/a/b.py", "-c"]
    assert launch.torchrun_arguments("/a/b.py", ["-c"], 2) == file
    place = ["--nnodes=4", "--node-rank=1", "--rdzv-backend=static", "--rdzv-endpoint=host:29400"]
    several = launch.torchrun_arguments("a.b", ["-c"], 2, launch.Nodes(4, 1, "host", 29400))
    assert several == [*place, "--nproc-per-node=2", "-m", "a.b", "-c"]


def test_impossible_numbers_of_processes():
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        launch.run("worker", [], 0)
    for arguments in ([], ["2"], ["none", "module"], ["0", "module"]):
        result = subprocess.run([sys.executable, "-m", "am_recipes.launch", *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("usage: python -m am_recipes.launch PROCESSES MODULE")


def test_it_imports_nothing_of_ours():
    script = (
        "import sys, am_recipes.launch; print(sorted(n for n in sys.modules if n.startswith(('am_', 'torch', 'yaml'))))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (
        result.stdout.strip()
        == "['am_recipes', 'am_recipes.launch', 'am_recipes.launch.local', 'am_recipes.launch.nodes']"
    )
