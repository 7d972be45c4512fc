"""Runs a module or file on several local processes through torchrun, and says how that ended in one exit status.

    python -m am_recipes.launch 4 am_recipes.sft -c CONFIG
    python -m am_recipes.launch 4 mysft.py -c CONFIG

torchrun itself exits with 1 whatever its workers returned; here the workers' own statuses decide. SIGTERM and Ctrl-C
are passed on to the workers, which get ten minutes to finish their step and commit it; a second Ctrl-C kills them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from am_recipes.launch.nodes import Nodes

PREEMPTED = 75
"""Exit status of a run that was told to stop and can be continued (EX_TEMPFAIL)."""

_USAGE = "usage: python -m am_recipes.launch PROCESSES MODULE|FILE.py [ARGUMENT ...]"
# How long torchrun waits for workers after a signal, in seconds, before it kills them; its own default of 30 is shorter
# than a training step and a checkpoint of a large model.
_STOP_SECONDS = "600"
# Those that torchrun handles itself.
_TORCHRUNS = "SIGTERM,SIGHUP,SIGQUIT"


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
    """Run `program`, a module or a file that ends in .py, on `processes` local ranks and return the exit status of all.

    0 when every rank returned 0, otherwise the worst status of the ranks (see `worst_status`); 75 after a SIGTERM or a
    Ctrl-C, however far the workers came: what they committed stands. A second Ctrl-C kills them: 130. Call it from the
    main thread. Sets `OMP_NUM_THREADS` to this machine's cores divided by the ranks where it is not set.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    # torch costs seconds to import; whoever only builds the command line does not pay.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _STOP_SECONDS)
    replaced = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in replaced]
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        if len(interrupts) == 1:
            # torchrun passes it on; a second such exception it would let through, past workers that go on alone.
            raise SignalException("Ctrl-C", signal.SIGINT)
        for child in _children():
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGINT, interrupt)
    try:
        torchrun(
            parse_args([f"--signals-to-handle={_TORCHRUNS}", *torchrun_arguments(program, arguments, processes, nodes)])
        )
    except ChildFailedError as error:
        _tell_killed({rank: failure.exitcode for rank, failure in error.failures.items()})
        return worst_status(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        if len(interrupts) > 1:
            return 128 + signal.SIGINT
        return PREEMPTED if error.sigval in (signal.SIGTERM, signal.SIGINT) else 128 + error.sigval
    finally:
        # torchrun installs its own and leaves them behind.
        for number, handler in zip(replaced, handlers, strict=True):
            signal.signal(number, handler)
    return 0


def _children() -> list[int]:
    """The processes that this one has started and that still run; none where the system does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except FileNotFoundError:
        return []


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
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        print(_USAGE, file=sys.stderr)
        return 2
    return run(sys.argv[2], sys.argv[3:], int(sys.argv[1]))
