"""Ranks on two machines, for test_direct.py: one of them sees another boot of the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import torch
import torch.distributed as dist

import am_ckpt

BOOT_ID = "/proc/sys/kernel/random/boot_id"
CLONE_NEWNS, CLONE_NEWUSER, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 0x1000, 0x4000, 0x40000


def see_another_boot(file: str) -> bool:
    """From now on this process reads `file` as the id of the boot, in its own namespaces; False where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()

    def require(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    try:
        require(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        require(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
        require(libc.mount(file.encode(), BOOT_ID.encode(), None, MS_BIND, None))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOSPC):
            return False
        raise
    return True


def save(store: str, rank: int, directory: str) -> str:
    """What a save on this of two ranks is refused with."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    try:
        am_ckpt.Checkpointer(directory, layout="direct").save(1, {"model": torch.nn.Linear(2, 2)})
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""
