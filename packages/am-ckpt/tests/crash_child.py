"""Used by test_crash.py: processes that save steps 2 and 3, and are killed on the way.

A child kills itself with SIGKILL just before its N-th system call that changes the file system while saving (0: never).
The interpreter's profiling hook sees every call of `os`, so nothing in the library is replaced.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import torch
from torch import nn

import am_ckpt

CHANGING = {
    os.open,
    os.mkdir,
    os.rename,
    os.replace,
    os.symlink,
    os.unlink,
    os.rmdir,
    os.pwrite,
    os.fsync,
    os.posix_fallocate,
}


def state(value: int) -> dict[str, Any]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=float(value))}


def save(directory: str, last: int, layout: Any) -> int:
    """Returns how many such calls there were."""
    count = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal count
        if event == "c_call" and function in CHANGING:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = am_ckpt.Checkpointer(directory, layout=layout, keep_last=2)
    states = [state(2), state(3)]
    sys.setprofile(watch)
    for value, entry in zip((2, 3), states, strict=True):
        checkpoints.save(value, entry)
    sys.setprofile(None)
    return count


def serve(connection: Connection) -> None:
    """For each (arguments of `save`, seconds until a kill or None) that comes in: the child's status, what it returned.

    The children are forks, so each costs milliseconds.
    """
    # The first optimizer imports torch._dynamo, which takes a second, and the first save what it needs: here, once.
    state(1)
    importlib.import_module("am_ckpt._train.checkpointer")
    while request := connection.recv():
        arguments, seconds = request
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write, str(save(*arguments)).encode())
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a child ends here, whatever happened
                traceback.print_exc()
                os._exit(1)
        os.close(write)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as pipe:
            returned = pipe.read()
        connection.send((status, int(returned) if returned else None))
