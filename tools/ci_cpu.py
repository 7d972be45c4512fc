"""Run a command and say what it cost: CPU-seconds of all its descendants, and wall seconds.

    python tools/ci_cpu.py [--json FILE] COMMAND ...

The kernel adds the CPU time of a process to the parent that waits for it; where the parent has ended first, init waits
and the time is lost. So this process becomes the one that such orphans are given to (`PR_SET_CHILD_SUBREAPER`) and
waits for all of them: what it counts is exact, but for children of a process that ignores SIGCHLD, for which nobody
waits.

What still runs `GRACE` seconds after the command has ended is killed, counted and named.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
GRACE = 10.0


@dataclass(frozen=True)
class Usage:
    """What a command cost: its exit status as a shell gives it, seconds, and what it left running."""

    command: list[str]
    status: int
    cpu: float
    wall: float
    left_running: list[str]

    def __str__(self) -> str:
        left = "".join(f"\n  left running: {command}" for command in self.left_running)
        return f"{self.cpu:.1f} CPU-s, {self.wall:.1f} s, exit status {self.status}: {' '.join(self.command)}{left}"


def run(command: list[str]) -> Usage:
    """Run `command` with this process's environment, folder and streams, and wait for all of its descendants."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; it needs Linux 3.4 or newer")
    cpu, wall = _cpu_of_children(), time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ)
    # A terminal sends SIGINT to the command as well; this process lives on to count.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: _send(pid, signal.SIGTERM))
    ended = 0
    while ended != pid:
        ended, status = os.wait()
    left_running = _wait_for_the_rest()
    seconds = _cpu_of_children() - cpu, time.monotonic() - wall
    code = os.waitstatus_to_exitcode(status)
    return Usage(command, 128 - code if code < 0 else code, *seconds, left_running)


def _wait_for_the_rest() -> list[str]:
    """Wait for orphans; kill and name those that outlive `GRACE`, and their own children as they come here."""
    deadline, killed = time.monotonic() + GRACE, []
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() > deadline:
                for pid in _children():
                    killed.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
                    _send(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            time.sleep(0.05)
    return killed


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: list[str]) -> int:
    file = None
    if arguments[:1] == ["--json"]:
        file, arguments = Path(arguments[1]), arguments[2:]
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    usage = run(arguments)
    print(usage, file=sys.stderr)
    if file is not None:
        file.write_text(json.dumps(asdict(usage)))
    return usage.status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
