"""The launchers of several machines meet before anything is started, and tell each other how their ranks ended.

They use the store that torchrun serves at the same endpoint, which would wait for the others without a word, deaf to
Ctrl-C, and name nobody. Every process of it is torchrun's; this is what a person is told.
"""

from __future__ import annotations

import datetime
import errno
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist

# torch.distributed has it by a star import, which type checkers do not count as public.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from am_recipes.launch.nodes import PREEMPTED, SECONDS_TO_MEET, Nodes

# After this long it is said for whom a machine waits.
_SECONDS_OF_SILENCE = 10
# How long one answer of the store may take, and the last words of a machine that has lost its peers.
_SECONDS_TO_ANSWER = 10
_PAUSE = 0.2
# How often a machine, once a second, finds its place taken before that is no earlier start that is just ending.
_ATTEMPTS = 5


class Disagreement(ValueError):
    """The commands of two machines do not belong together."""


class Meeting:
    """The other machines, once all have come. Every machine makes one, with `meet`."""

    def __init__(self, nodes: Nodes, store: TCPStore, hosts: list[str]) -> None:
        self._nodes, self._store, self._hosts = nodes, store, hosts

    def ended(self, status: int) -> list[str]:
        """Tell the others that the ranks here have ended with `status`; after a failure, which others to look at.

        Number 0 serves the store, so it stays until the others have told theirs, or 10 seconds.
        """
        is_failure = status not in (0, PREEMPTED)
        others = [number for number in range(self._nodes.count) if number != self._nodes.rank]
        if self._nodes.rank and not _answers(self._nodes):
            return [self._gone(0)] if is_failure else []
        try:
            order = self._store.add("automodel/ended", 1)
            self._store.set(f"automodel/ended/{self._nodes.rank}", json.dumps([order, status]))
            if self._nodes.rank and not is_failure:
                return []
            endings = self._endings(others)
            self._leave(sum(1 for _, ended in endings.values() if ended not in (0, PREEMPTED)))
        except dist.DistError:
            return [self._gone(0)] if is_failure else []
        if not is_failure:
            return []
        lines = [self._gone(number) for number in others if number not in endings]
        return lines + [
            f"node {number} ({self._hosts[number]}) ended before, with exit status {ending}: its own output says why"
            for number, (place, ending) in endings.items()
            if place < order
        ]

    def _endings(self, others: list[int]) -> dict[int, tuple[int, int]]:
        """How the others have ended, of those that say so within 10 seconds."""
        endings: dict[int, tuple[int, int]] = {}
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        while len(endings) < len(others) and time.monotonic() < deadline:
            for number in others:
                key = f"automodel/ended/{number}"
                if number not in endings and self._store.check([key]):
                    order, status = json.loads(self._store.get(key))
                    endings[number] = (order, status)
            time.sleep(_PAUSE / 4)
        return endings

    def _leave(self, readers: int) -> None:
        """Number 0 waits for the others that read how all have ended, those that failed."""
        if self._nodes.rank:
            self._store.add("automodel/left", 1)
            return
        deadline = time.monotonic() + _SECONDS_TO_ANSWER / 2
        while self._store.add("automodel/left", 0) < readers and time.monotonic() < deadline:
            time.sleep(_PAUSE / 4)

    def _gone(self, number: int) -> str:
        return (
            f"node {number} ({self._hosts[number]}) is gone: its command was killed or has ended before, which its own "
            "output says, or the machine is down or cannot be reached; the same command on every machine continues "
            "from the latest checkpoint"
        )


def meet(nodes: Nodes, processes: int, seconds: float = SECONDS_TO_MEET) -> Meeting:
    """Wait until every machine has started the command with `processes` ranks, at most `seconds`.

    Raises TimeoutError, which names who has not come, ConnectionError where the endpoint cannot serve, and, on every
    machine that has come by then, Disagreement where they were given different numbers.
    """
    deadline = time.monotonic() + seconds
    mine = {"nnodes": nodes.count, "nproc-per-node": processes, "host": socket.gethostname()}
    store = _serve(nodes) if nodes.rank == 0 else _join(nodes, deadline, seconds)
    store.set(f"automodel/node/{nodes.rank}", json.dumps(mine))
    others = _all(nodes, store, deadline, seconds)
    for number, other in others.items():
        for name in _differ(others[0], other):
            # Until the others have read it too.
            time.sleep(10 * _PAUSE * (nodes.rank == 0))
            raise Disagreement(
                f"--{name} is {others[0][name]} on node 0 ({others[0]['host']}) and {other[name]} on node {number} "
                f"({other['host']}); it must be the same on every machine"
            )
    return Meeting(nodes, store, [other["host"] for other in others.values()])


def _differ(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The options that two machines were given differently."""
    return [name for name in ("nnodes", "nproc-per-node") if first[name] != other[name]]


def _serve(nodes: Nodes) -> TCPStore:
    """The store, served here: torchrun then finds it in this process."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        # Found out here first: torch would print the stack of its own code.
        with socket.create_server(("", nodes.port), family=family, dualstack_ipv6=dual):
            reachable = _answers(nodes)
    except OSError as error:
        reason = "in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConnectionError(
            f"--rdzv-endpoint {nodes.endpoint}: port {nodes.port} of this machine cannot be served ({reason}); "
            "choose another one on every machine"
        ) from None
    if not reachable:
        raise ConnectionError(
            f"--rdzv-endpoint {nodes.endpoint} is not this machine, which has --node-rank 0 and cannot reach itself "
            "there; give every machine the name or address of this one"
        )
    return _store(nodes, serves=True)


def _store(nodes: Nodes, *, serves: bool) -> TCPStore:
    timeout = datetime.timedelta(seconds=_SECONDS_TO_ANSWER)
    host = nodes.host.strip("[]")
    return TCPStore(host, nodes.port, nodes.count, serves, timeout, wait_for_workers=False, multi_tenant=serves)


def _join(nodes: Nodes, deadline: float, seconds: float) -> TCPStore:
    """The store of number 0, once that is there; a place in one that is about to end is given up for the next."""
    refused = 0
    for _ in _until(deadline, lambda: f"node 0 at {nodes.endpoint}"):
        if not _answers(nodes):
            continue
        try:
            store = _store(nodes, serves=False)
            if store.add(f"automodel/joined/{nodes.rank}", 1) == 1:
                return store
            problem = f"another command has come as --node-rank {nodes.rank}; every machine has a number of its own"
        except dist.DistError:
            problem = "what listens there is no command with --node-rank 0; choose another port"
        refused += 1
        if refused == _ATTEMPTS:
            raise ConnectionError(f"--rdzv-endpoint {nodes.endpoint}: {problem}")
        time.sleep(1)
    raise TimeoutError(
        f"nobody has answered at --rdzv-endpoint {nodes.endpoint} for {seconds:.0f} s; start the same command with "
        "--node-rank 0 on that machine, and see that its port is open to this one"
    )


def _all(nodes: Nodes, store: TCPStore, deadline: float, seconds: float) -> Mapping[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}

    def missing() -> str:
        numbers = [str(number) for number in range(nodes.count) if number not in found]
        return f"node{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {nodes.count} at {nodes.endpoint}"

    for _ in _until(deadline, missing):
        try:
            for number in range(nodes.count):
                key = f"automodel/node/{number}"
                if number not in found and store.check([key]):
                    found[number] = json.loads(store.get(key))
        except dist.DistError:
            raise ConnectionError(
                f"node 0 at --rdzv-endpoint {nodes.endpoint} has ended before all had come; its output says why"
            ) from None
        # Where two were told different numbers, nobody is waited for any more: who else would have to come?
        if len(found) == nodes.count or (0 in found and any(_differ(found[0], other) for other in found.values())):
            return dict(sorted(found.items()))
    raise TimeoutError(
        f"{missing()} did not come within {seconds:.0f} s; start the same command there, with its own --node-rank"
    )


def _until(deadline: float, whom: Callable[[], str]) -> Iterator[None]:
    """Again and again until `deadline`; who is waited for is said once, on stderr."""
    silent_until = time.monotonic() + _SECONDS_OF_SILENCE
    while time.monotonic() < deadline:
        yield
        if time.monotonic() > silent_until:
            print(f"waiting for {whom()}; Ctrl-C ends that", file=sys.stderr, flush=True)
            silent_until = deadline
        time.sleep(_PAUSE)


def _answers(nodes: Nodes) -> bool:
    """Whether anybody listens at the endpoint."""
    try:
        with socket.create_connection((nodes.host.strip("[]"), nodes.port), timeout=_SECONDS_TO_ANSWER / 5):
            return True
    except OSError:
        return False
