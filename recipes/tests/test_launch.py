"""Worker processes through torchrun: exit statuses, signals, and a launcher that imports nothing of ours."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from am_recipes import launch
from am_recipes.launch import local

WORKER = """\
import os, signal, sys, time
from am_recipes import launch

def main():
    rank, statuses = int(os.environ["RANK"]), sys.argv[2:]
    with open(f"rank{rank}.part", "w") as file:
        file.write(" ".join([os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]))
    os.rename(f"rank{rank}.part", f"rank{rank}.txt")
    # torchrun stops the others as soon as one has failed, also one that has not come this far.
    while not all(os.path.exists(f"rank{other}.txt") for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.05)

    def stop(number, frame):
        open(f"stopped{rank}.{number}", "w").close()
        end()

    def end():
        if statuses[rank] == "sleeps":
            time.sleep(60)
        if statuses[rank].startswith("-"):
            os.kill(os.getpid(), -int(statuses[rank]))
        sys.exit(int(statuses[rank]))

    if sys.argv[1] == "ignore" or (sys.argv[1] == "one ignores" and rank == 1):
        signal.signal(signal.SIGINT, lambda number, frame: open(f"stopped{rank}.{number}", "w").close())
    if sys.argv[1] == "wait":
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, stop)
    if sys.argv[1] != "end":
        with open(f"part{rank}", "w") as file:
            file.write(str(os.getpid()))
        os.rename(f"part{rank}", f"ready{rank}")
        time.sleep(60)
    end()

sys.exit(launch.as_worker(main))
"""


# Leaves threads of gloo at work that free tensors of Python; without `as_worker` that mostly aborts a rank.
ABORTING = """\
import atexit, os, sys, time
from am_recipes import launch

def main():
    import torch, torch.distributed as dist

    dist.init_process_group("gloo")
    atexit.register(lambda: open(f"exit{os.environ['RANK']}", "w").close())
    if dist.get_rank() == 1:
        time.sleep(0.5)
    for _ in range(5000):
        dist.all_reduce(torch.ones(1), async_op=True)
    return 0

sys.exit(launch.as_worker(main))
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.run", "am_recipes.launch"])


def _launcher(folder, arguments, variables):
    """A launcher, forked where torch has been imported: to import it is what a launcher costs."""
    os.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    if "CORES" in variables:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(variables["CORES"])])
    # The tests themselves may have been started by nohup.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if "NOHUP" in variables else signal.SIG_DFL)
    with open("errors.txt", "w") as errors:
        os.dup2(errors.fileno(), 2)
    sys.argv = ["launch", *arguments]
    raise SystemExit(local.main())


class Launched:
    """A launcher that runs in a folder, and what it says."""

    def __init__(self, folder, arguments, variables):
        self.process = SERVER.Process(target=_launcher, args=(folder, arguments, variables))
        self.process.start()
        self.errors = folder / "errors.txt"

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """Its exit status, and all that it has said."""
        self.process.join(180)
        return self.process.exitcode, self.errors.read_text()


@pytest.fixture
def start(tmp_path):
    (tmp_path / "worker_for_launch.py").write_text(WORKER)
    return lambda *arguments, **variables: Launched(tmp_path, arguments, variables)


def wait_for(*files):
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.05)


def pid_of(file):
    wait_for(file)
    return int(file.read_text())


def ended(pid):
    """Whether the process is no more, or nobody has asked yet how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("statuses", "expected"), [(("0", "0"), 0), (("75", "75"), 75), (("2", "2"), 2)])
def test_the_exit_status_is_that_of_the_workers(start, tmp_path, statuses, expected):
    process = start("2", "worker_for_launch", "end", *statuses)
    status, errors = process.end()
    assert status == expected, errors
    assert "Traceback" not in errors
    # An orderly stop looks like no failure.
    assert ("failed" in errors) == (expected == 2)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    told = " ".join(["2", threads, "end", *statuses])
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == [told] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a process to some cores")
def test_ranks_share_the_cores_that_are_theirs(start, tmp_path):
    """Not those of the machine, of which a scheduler has given some."""
    assert start("1", "worker_for_launch", "end", "0", CORES="1").end()[0] == 0
    assert (tmp_path / "rank0.txt").read_text().split()[:2] == ["1", "1"]


def test_a_rank_that_was_killed_is_named(start):
    process = start("2", "worker_for_launch", "end", "-9", "0")
    status, errors = process.end()
    assert status == 137
    assert "error: rank 0 was killed by SIGKILL (out of memory?); the same command continues" in errors
    assert "rank 1 was killed" not in errors


@pytest.mark.parametrize(
    ("number", "statuses", "expected"),
    [(signal.SIGTERM, ("75", "75"), 75), (signal.SIGUSR1, ("75", "75"), 75), (signal.SIGUSR1, ("75", "1"), 1)],
)
def test_signals_reach_the_workers_whose_statuses_decide(start, tmp_path, number, statuses, expected):
    process = start("2", "worker_for_launch", "wait", *statuses)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send(number)
    status, errors = process.end()
    assert status == expected, errors
    assert (tmp_path / f"stopped0.{number}").exists()
    assert (tmp_path / f"stopped1.{number}").exists()


@pytest.mark.parametrize(
    ("interrupts", "workers", "expected"), [(1, "deaf", 75), (1, "one ignores", 75), (2, "ignore", 130)]
)
def test_ctrl_c_ends_workers_that_do_not_handle_it_yet_and_a_second_one_all(
    start, tmp_path, interrupts, workers, expected
):
    """torchrun ends the other, by SIGTERM, where one does not handle it: no failure either."""
    process = start("2", "worker_for_launch", workers, "0", "0")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send(signal.SIGINT)
    if interrupts == 2:
        # Sent before the first has come, it would be one with it.
        wait_for(tmp_path / f"stopped0.{signal.SIGINT}")
        process.send(signal.SIGINT)
    status, errors = process.end()
    assert status == expected, errors
    assert "error: rank" not in errors
    assert all(ended(pid_of(tmp_path / f"ready{rank}")) for rank in (0, 1))


@pytest.mark.parametrize("variables", [{}, {"NOHUP": "1"}])
def test_the_end_of_a_terminal_ends_all_but_what_nohup_has_started(start, tmp_path, variables):
    process = start("2", "worker_for_launch", "wait", "75", "75", **variables)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send(signal.SIGHUP)
    if variables:
        time.sleep(0.5)
        process.send(signal.SIGTERM)
    status, errors = process.end()
    assert status == (75 if variables else 128 + signal.SIGHUP), errors
    assert (tmp_path / f"stopped0.{signal.SIGTERM}").exists() == bool(variables)


def test_workers_that_do_not_end_are_killed_after_a_time(start, tmp_path):
    process = start("1", "worker_for_launch", "wait", "sleeps", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    wait_for(tmp_path / "ready0")
    process.send(signal.SIGTERM)
    status, errors = process.end()
    assert status == 75, errors
    assert "error: ranks have not ended within 1 s of the signal; killing them" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_workers_do_not_outlive_their_launcher(start, tmp_path):
    process = start("2", "worker_for_launch", "wait", "0", "0")
    workers = [pid_of(tmp_path / f"ready{rank}") for rank in (0, 1)]
    assert not any(map(ended, workers))
    process.send(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while not all(map(ended, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_has_returned_is_not_aborted_by_threads_of_torch(start, tmp_path):
    (tmp_path / "aborting.py").write_text(ABORTING)
    process = start("2", "aborting.py")
    status, errors = process.end()
    assert status == 0, errors
    assert (tmp_path / "exit0").exists()
    assert (tmp_path / "exit1").exists()


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
