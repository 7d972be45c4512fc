"""One run at a time owns a run directory.

The lock is `flock` on RUN/run.lock, so the system releases it when its process dies, however that happens. The file
says who holds it, and is there only while somebody does; one that a killed process left is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from am_recipes.settings import command_line

NAME = "run.lock"
# Of file systems that know no such locks, as some parallel ones are mounted.
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Refused(ValueError):
    """A run directory that this run may not use; nothing in it was changed."""


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Own `run_dir` while entered; it is created, and removed again where nothing was put into it.

    Raises Refused, which names the holder, where another process has it.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    file = run_dir / NAME
    descriptor = _acquire(file)
    try:
        # A lock is one without a name too, on a full disk say; what cannot be written there is the run's to tell.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_me()).encode())
            # Ranks on other machines read it.
            os.fsync(descriptor)
        yield
    finally:
        # While it is locked, so that nobody else has it.
        if _is_at(file, descriptor):
            file.unlink()
        os.close(descriptor)
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(file: Path) -> int:
    """The descriptor of the locked file. A holder that ends removes it: what was locked may not be there any more."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Refused(_in_use(file)) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(descriptor)
                raise
            print(f"WARNING {file.parent} is on a file system without locks: start no other run in it", file=sys.stderr)
        if _is_at(file, descriptor):
            return descriptor
        os.close(descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _me() -> dict[str, str | int]:
    command = command_line([sys.executable, *sys.argv])
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T"), "command": command}


def _in_use(file: Path) -> str:
    # The holder locks first and then says who it is.
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, ValueError):
            holder = json.loads(file.read_bytes())
            who = "process {process} on {host} since {since}: {command}".format(**holder)
            return (
                f"{file.parent} is in use by {who}\n"
                "Two runs would mix in it. Stop that one or wait for it, or give this one its own run_dir."
            )
        time.sleep(0.05)
    return f"{file.parent} was in use by a run that has just begun or ended; try again, or choose another run_dir"
