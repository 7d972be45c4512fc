"""Several machines: who waits for whom, what is said of one that does not come or is killed, what must agree."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest

from am_recipes import launch
from am_recipes.launch import meeting, nodes
from am_testing import free_port

# A rank that ends with status 1 when one of another machine is gone, as a collective would have it; or by a signal.
WORKER = """\
import os, signal, sys, time
from am_recipes import launch

def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with open(f"part{rank}", "w") as file:
        file.write(f"{os.getpid()} {os.environ['GROUP_RANK']}")
    signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(75))
    os.rename(f"part{rank}", f"rank{rank}")

    def pid(other):
        while not os.path.exists(f"rank{other}"):
            time.sleep(0.05)
        return open(f"rank{other}").read().split()[0]

    others = [pid(other) for other in range(world)]
    if sys.argv[1] == "after":
        while rank and not os.path.exists("go"):
            time.sleep(0.05)
        sys.exit(int(sys.argv[2 + rank]))
    while sys.argv[1] == "wait" and all(os.path.exists(f"/proc/{other}/cmdline") for other in others):
        time.sleep(0.05)
    sys.exit(int(sys.argv[1] == "wait"))

sys.exit(launch.as_worker(main))
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.run", "am_recipes.launch.meeting"])


def meeting_answers(port):
    """Whether the launcher with number 0 serves its port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def node(rank, count=2, port=None, host="127.0.0.1"):
    return launch.Nodes(count, rank, host, port)


def _launcher(folder, arguments, variables, processes, nodes):
    os.chdir(folder)
    os.environ.update(variables)
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(f"errors{nodes.rank}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    raise SystemExit(launch.run(str(folder / "worker.py"), arguments, processes, nodes))


class Machines:
    """The launchers of some machines, all here, and their folder."""

    def __init__(self, folder, arguments, *machines, **variables):
        (folder / "worker.py").write_text(WORKER)
        self.folder = folder
        self.processes = [
            SERVER.Process(target=_launcher, args=(folder, arguments.split(), variables, processes, nodes))
            for processes, nodes in machines
        ]
        for process in self.processes:
            process.start()

    def wait_for_ranks(self, number):
        deadline = time.monotonic() + 60
        while not all((self.folder / f"rank{rank}").exists() for rank in range(number)):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self):
        """Exit statuses, and what each has said."""
        for process in self.processes:
            process.join(60)
        texts = [path.read_text() for path in sorted(self.folder.glob("errors*"))]
        return [process.exitcode for process in self.processes], texts


def test_ranks_are_in_the_order_of_the_machines_whoever_comes_first(tmp_path):
    port = free_port()
    machines = Machines(tmp_path, "end", *((2, node(rank, 3, port)) for rank in (2, 1, 0)))
    statuses, texts = machines.end()
    assert statuses == [0, 0, 0], texts
    assert [(tmp_path / f"rank{rank}").read_text().split()[1] for rank in range(6)] == ["0", "0", "1", "1", "2", "2"]
    assert "error" not in "".join(texts)


@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_is_75_on_every_machine(tmp_path, told):
    """Here both get the signal; ranks of a run agree on it (integration_tests/test_nodes.py)."""
    port = free_port()
    machines = Machines(tmp_path, "wait", (1, node(0, 2, port)), (1, node(1, 2, port)))
    machines.wait_for_ranks(2)
    for process in machines.processes[:: 1 if told else -1]:
        os.kill(process.pid, signal.SIGUSR1)
    statuses, texts = machines.end()
    assert statuses == [75, 75], texts
    assert "error" not in "".join(texts)


@pytest.mark.parametrize("statuses", [[3, 75], [0, 0]])
def test_a_signal_after_the_ranks_of_a_machine_have_ended_changes_nothing(tmp_path, statuses):
    port = free_port()
    machines = Machines(tmp_path, f"after {statuses[0]} {statuses[1]}", (1, node(0, 2, port)), (1, node(1, 2, port)))
    machines.wait_for_ranks(2)
    first = (tmp_path / "rank0").read_text().split()[0]
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{first}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(machines.processes[0].pid, signal.SIGTERM)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    found, texts = machines.end()
    assert found == statuses, texts


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_is_gone_is_named(tmp_path, killed):
    port = free_port()
    machines = Machines(tmp_path, "wait", (1, node(0, 2, port)), (1, node(1, 2, port)))
    machines.wait_for_ranks(2)
    os.kill(machines.processes[killed].pid, signal.SIGKILL)
    began = time.monotonic()
    statuses, texts = machines.end()
    assert time.monotonic() - began < 30
    assert statuses[1 - killed] == 1, texts
    host = socket.gethostname()
    assert f"error: node {killed} ({host}) is gone: its command was killed or has ended before" in texts[1 - killed]
    assert "the same command on every machine continues from the latest checkpoint" in texts[1 - killed]
    assert "Traceback" not in texts[1 - killed]


def test_a_machine_whose_rank_fails_is_named_by_the_other(tmp_path):
    port = free_port()
    machines = Machines(tmp_path, "wait", (1, node(0, 2, port)), (1, node(1, 2, port)))
    machines.wait_for_ranks(2)
    os.kill(int((tmp_path / "rank1").read_text().split()[0]), signal.SIGKILL)
    statuses, texts = machines.end()
    assert statuses == [1, 137], texts
    assert f"error: node 1 ({socket.gethostname()}) ended before, with exit status 137: its own output" in texts[0]
    assert "error: rank 1 was killed by SIGKILL" in texts[1]
    assert "error: node" not in texts[1]


def test_other_numbers_of_processes_are_refused_on_every_machine(tmp_path):
    port = free_port()
    statuses, texts = Machines(tmp_path, "end", (1, node(0, 2, port)), (2, node(1, 2, port))).end()
    assert statuses == [2, 2]
    for text in texts:
        assert text.startswith("error: --nproc-per-node is 1 on node 0 (")
        assert "and 2 on node 1 (" in text
    assert not (tmp_path / "rank0").exists()


@pytest.mark.parametrize("numbers", [(2, 3), (3, 2)])
def test_other_numbers_of_machines_are_refused_on_every_machine(tmp_path, numbers):
    port = free_port()
    began = time.monotonic()
    statuses, texts = Machines(tmp_path, "end", *((1, node(n, count, port)) for n, count in enumerate(numbers))).end()
    assert statuses == [2, 2]
    told = f"error: --nnodes is {numbers[0]} on node 0", f"and {numbers[1]} on node 1"
    assert all(words in text for words in told for text in texts), texts
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_wait_for_the_others(tmp_path, number):
    port = free_port()
    machines = Machines(tmp_path, "end", (1, node(0, 2, port)))
    (process,) = machines.processes
    # It serves the port once it handles signals.
    deadline = time.monotonic() + 60
    while not meeting_answers(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert machines.end() == ([75], [""])


@pytest.mark.parametrize(
    ("seconds", "status", "told"),
    [("1", 1, "did not come within 1 s"), ("soon", 2, "AUTOMODEL_MEETING_TIMEOUT=soon is no whole number of seconds")],
)
def test_how_long_machines_wait_is_in_the_environment(tmp_path, seconds, status, told):
    machines = Machines(tmp_path, "end", (1, node(0, 2, free_port())), AUTOMODEL_MEETING_TIMEOUT=seconds)
    statuses, (text,) = machines.end()
    assert statuses == [status]
    assert told in text


def test_without_a_word_of_it_machines_wait_ten_minutes():
    assert nodes.seconds_to_meet({}) == nodes.seconds_to_meet({nodes.MEETING_TIMEOUT: ""}) == 600


def test_a_machine_that_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"nodes 1, 2 of 3 at 127.0.0.1:\d+ did not come within 1 s; start the same"):
        meeting.meet(node(0, 3, free_port()), 1, seconds=1)


def test_an_endpoint_where_nobody_answers():
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"nobody has answered at --rdzv-endpoint 127.0.0.1:{port} for 1 s; start"):
        meeting.meet(node(1, 2, port), 1, seconds=1)


def test_a_port_that_is_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"port {port} of this machine cannot be served \(in use\); choose"):
            meeting.meet(node(0, 2, port), 1)


def test_an_endpoint_that_is_another_machine():
    with pytest.raises(ConnectionError, match=r"nosuchhost.invalid:\d+ is not this machine, which has --node-rank 0"):
        meeting.meet(node(0, 2, free_port(), "nosuchhost.invalid"), 1)


def test_two_machines_with_one_number(tmp_path):
    port = free_port()
    machines = Machines(tmp_path, "end", *((1, node(rank, 3, port)) for rank in (0, 1, 1)))
    deadline = time.monotonic() + 60
    while all(process.is_alive() for process in machines.processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in machines.processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    statuses, texts = machines.end()
    assert sorted(statuses) == [1, 75, 75]
    assert statuses[0] == 75
    assert "another command has come as --node-rank 1; every machine has a number of its own" in texts[1]
