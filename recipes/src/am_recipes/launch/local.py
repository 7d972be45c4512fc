"""Runs a module or file on several local processes through torchrun, and says how that ended in one exit status.

    python -m am_recipes.launch 4 am_recipes.sft -c CONFIG
    python -m am_recipes.launch 4 mysft.py -c CONFIG

torchrun itself exits with 1 whatever its workers returned; here the workers' own statuses decide. SIGTERM, SIGUSR1 and
Ctrl-C are passed on to the workers, which get ten minutes to finish their step and commit it; a second Ctrl-C kills
them. Workers do not outlive their launcher.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from am_recipes.launch.nodes import PREEMPTED, Nodes, is_whole, seconds_to_meet

_USAGE = "usage: python -m am_recipes.launch PROCESSES MODULE|FILE.py [ARGUMENT ...]"
# How long workers have after a signal, in seconds, before they are killed; torchrun's own default of 30 is shorter than
# a training step and a checkpoint of a large model.
_TIMEOUT, _STOP_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"
# Asks for an orderly stop. torchrun would pass SIGTERM on and forget what became of the workers.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Those that torchrun handles itself, and leaves its handlers behind: they end the workers.
_TORCHRUNS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
# The process of the launcher, for its workers.
_LAUNCHER = "AUTOMODEL_LAUNCHER"


def torchrun_arguments(program: str, arguments: Sequence[str], processes: int, nodes: Nodes | None = None) -> list[str]:
    """The torchrun command line that runs `program` on local ranks: a module, or a file that ends in .py.

    Several machines meet statically: their ranks are in the order of the machines, so that rank 0, which prints and
    commits, is on the one that was given number 0, at each start. torchrun's other backend numbers them as they come.
    """
    if nodes is None:
        # Said also where it is the default: a cluster's own environment (PET_NNODES) may say otherwise.
        place = ["--standalone", "--nnodes=1"]
    else:
        place = [f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}", "--rdzv-backend=static"]
        place.append(f"--rdzv-endpoint={nodes.endpoint}")
    run = [program] if program.endswith(".py") else ["-m", program]
    return [*place, f"--nproc-per-node={processes}", *run, *arguments]


def run(program: str, arguments: Sequence[str], processes: int, nodes: Nodes | None = None) -> int:
    """Run `program`, a module or a file that ends in .py, on `processes` ranks here and return the exit status of all.

    0 when every rank returned 0, otherwise the worst status of the ranks of this machine (see `worst_status`); 75 after
    SIGTERM, SIGUSR1 or Ctrl-C for ranks that it ended, however far they came: what they committed stands. A second
    Ctrl-C kills them: 130. A signal that comes when they have ended changes nothing. Call it from the main thread. Sets
    `OMP_NUM_THREADS` to the cores that this process may use divided by the ranks where it is not set.

    With `nodes` it waits for the other machines first, ten minutes (`AUTOMODEL_MEETING_TIMEOUT`, in seconds): 1 where
    one does not come, 2 where they were given different numbers.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    with _Stops() as stops:
        try:
            command = torchrun_arguments(program, arguments, processes, nodes)
            return _torchrun(command, stops) if nodes is None else _with_others(nodes, processes, command, stops)
        except _Stopped:
            return PREEMPTED


def _with_others(nodes: Nodes, processes: int, command: Sequence[str], stops: _Stops) -> int:
    from am_recipes.launch import meeting

    try:
        met = meeting.meet(nodes, processes, seconds_to_meet(os.environ))
    except (ConnectionError, TimeoutError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    status = _torchrun(command, stops)
    for line in met.ended(status):
        print(f"error: {line}", file=sys.stderr)
    return status


def _torchrun(arguments: Sequence[str], stops: _Stops) -> int:
    # torch costs seconds to import; whoever only builds the command line does not pay.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    # What it says of workers that were told to stop looks like an error.
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    logger.addFilter(_is_news)
    # Who types `nohup` means it.
    handled = ",".join(number.name for number in _TORCHRUNS if signal.getsignal(number) != signal.SIG_IGN)
    os.environ[_LAUNCHER] = str(os.getpid())
    stops.begin()
    try:
        torchrun(parse_args([f"--signals-to-handle={handled}", *arguments]))
    except ChildFailedError as error:
        own = stops.without_own({rank: failure.exitcode for rank, failure in error.failures.items()})
        _tell_killed(own)
        if stops.quit:
            return 128 + signal.SIGINT
        return worst_status(own.values()) or PREEMPTED
    except SignalException as error:
        return 128 + error.sigval
    finally:
        logger.removeFilter(_is_news)
        del os.environ[_LAUNCHER]
    return 0


def _is_news(entry: logging.LogRecord) -> bool:
    text = entry.getMessage()
    return f"failed (exitcode: {PREEMPTED})" not in text and "closing signal" not in text


class _Stopped(BaseException):
    """A signal came where there were no workers to pass it on to; as with Ctrl-C, nobody is to take it for an error."""


class _Stops:
    """While entered, signals that ask for a stop are passed on to the workers, and their end is waited for.

    Without workers yet they end the launcher; where these have ended, their statuses stand. A second Ctrl-C kills the
    workers, and so does the end of their time.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._overdue = False
        self._waited_before: float | None = None
        self._seconds = int(os.environ.setdefault(_TIMEOUT, _STOP_SECONDS))
        self._timer = threading.Timer(self._seconds, self._end)

    @property
    def quit(self) -> bool:
        """Whether a second Ctrl-C came."""
        return self._received.count(signal.SIGINT) > 1

    def __enter__(self) -> _Stops:
        self._previous = {number: signal.getsignal(number) for number in (*_STOPS, *_TORCHRUNS)}
        for number in _STOPS:
            signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """Workers are started from here on."""
        self._waited_before = _seconds_of_ended_children()

    def without_own(self, statuses: Mapping[int, int]) -> dict[int, int]:
        """The statuses by rank, without those of ranks that ended by a signal which they got from here."""
        if not self._received:
            return dict(statuses)
        # torchrun sends SIGTERM to the others as soon as one has ended.
        own = {-number for number in (*self._received, signal.SIGTERM)}
        # Python ends with 130 or by the signal itself where Ctrl-C comes before anybody handles it.
        own |= {130} if signal.SIGINT in self._received else set()
        if self.quit or self._overdue:
            own.add(-signal.SIGKILL)
        return {rank: status for rank, status in statuses.items() if status not in own}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        workers = _children()
        if not workers and (self._waited_before is None or self._waited_before == _seconds_of_ended_children()):
            raise _Stopped
        if not workers:
            return
        _kill(workers, signal.SIGKILL if self.quit else number)
        if len(self._received) == 1:
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self._overdue = True
        print(f"error: ranks have not ended within {self._seconds} s of the signal; killing them", file=sys.stderr)
        _kill(_children(), signal.SIGKILL)


def as_worker(function: Callable[[], int]) -> int:
    """What `function` returns, in a process that `run` may have started: then it ends with the launcher, and as itself.

    The system kills it as soon as the launcher has died, as the ranks would train on alone (Linux). After the threads
    and exit functions of Python it leaves at once, as processes of multiprocessing do: threads of torch, which outlive
    `destroy_process_group`, abort a process that takes its interpreter apart while they free a tensor
    (pytorch/pytorch#190489). A process that another program has started is left alone.
    """
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None:
        return function()
    if os.getppid() == int(launcher) and sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    # It may have died before that; where it lives and is no parent of this one, somebody between them decides.
    if os.getppid() != int(launcher):
        if sys.platform == "linux" and not Path(f"/proc/{launcher}").exists():
            raise SystemExit(1)
        return function()
    status: int | None = None

    def leave() -> None:
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    # The first to be registered is the last to be called.
    atexit.register(leave)
    try:
        status = function()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else None
        raise
    return status


def _kill(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _children() -> list[int]:
    """The processes that this one has started and that still run; none where the system does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _seconds_of_ended_children() -> float:
    """CPU time of the processes that this one has waited for: it grows with each, and says whether there was one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cores() -> int:
    """The cores that this process may use: of a shared node, a scheduler gives some."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _tell_killed(statuses: Mapping[int, int]) -> None:
    """Say which ranks a signal has killed: nobody else does, and the others only miss them."""
    for rank, status in statuses.items():
        if status < 0 and -status != signal.SIGTERM:
            reason = " (out of memory?)" if -status == signal.SIGKILL else ""
            print(
                f"error: rank {rank} was killed by {signal.Signals(-status).name}{reason}; the same command continues "
                "from the latest checkpoint",
                file=sys.stderr,
            )


def worst_status(statuses: Iterable[int]) -> int:
    """One exit status for several ranks: a failure outranks 75 (stopped, can be continued), which outranks 0.

    Ranks that a signal killed count as failures with 128 + its number, as a shell reports them; SIGTERM only where
    nothing else happened, because torchrun sends it to the other ranks once one has failed.
    """
    positive = [128 - status if status < 0 else status for status in statuses]
    own = [status for status in positive if status not in (0, 128 + signal.SIGTERM)]
    failures = [status for status in own if status != PREEMPTED]
    return max(failures or own or positive, default=0)


def main() -> int:
    if len(sys.argv) < 3 or not is_whole(sys.argv[1], 1):
        print(_USAGE, file=sys.stderr)
        return 2
    return run(sys.argv[2], sys.argv[3:], int(sys.argv[1]))
