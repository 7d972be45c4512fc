"""Run by test_crash.py as a process of its own: saves steps 2 and 3, and is killed on the way.

`python crash_child.py DIRECTORY N LAYOUT` kills itself with SIGKILL just before its N-th system call that changes the
file system while saving (0: never, prints how many there were). The interpreter's profiling hook sees every call of
`os`, so nothing in the library is replaced.
"""

from __future__ import annotations

import os
import signal
import sys
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


def main() -> None:
    directory, last = sys.argv[1], int(sys.argv[2])
    count = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal count
        if event == "c_call" and function in CHANGING:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = am_ckpt.Checkpointer(directory, layout=sys.argv[3], keep_last=2)
    states = [state(2), state(3)]
    sys.setprofile(watch)
    for value, entry in zip((2, 3), states, strict=True):
        checkpoints.save(value, entry)
    sys.setprofile(None)
    print(count)


if __name__ == "__main__":
    main()
