"""The default process group as a context: torchrun's, a group of one, or the one that is already there."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def process_group(timeout_minutes: float = 30.0) -> Iterator[torch.device]:
    """Run the body inside a default process group; yields this rank's device.

    Under torchrun (`RANK` is set) the group is torchrun's; otherwise it is a group of one over an in-process store,
    which opens no port. CUDA where there is a GPU (device `LOCAL_RANK`, NCCL for CUDA tensors and gloo for CPU ones),
    else CPU and gloo. `timeout_minutes` is how long a collective may wait for the slowest rank. The group is destroyed
    on exit, unless it existed before: then it is used and left alone with the device its owner has chosen, so a program
    embedded in another framework works unchanged.

    Raises `ValueError` for a `timeout_minutes` that is not positive or a `LOCAL_RANK` without a GPU of its own, and
    `TimeoutError`, with the ranks that are missing, where one has not come within that time.
    """
    if timeout_minutes <= 0:
        raise ValueError(f"timeout_minutes={timeout_minutes} must be positive; 30 is the default")
    if dist.is_initialized():
        # Its owner has chosen the device. A gloo group works on CPU tensors even where there is a GPU.
        nccl = "nccl" in dist.get_backend_config()
        yield torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        return
    launched = "RANK" in os.environ
    device = _device(int(os.environ["LOCAL_RANK"]) if launched and "LOCAL_RANK" in os.environ else None)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if launched:
        # torch.distributed has it and the stores by a star import, which type checkers do not count as public.
        meet = dist.rendezvous  # type: ignore[attr-defined]
        store, rank, world_size = next(iter(meet("env://", timeout=timeout)))
        _call_the_roll(store, rank, world_size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _call_the_roll(
    store: dist.Store,  # type: ignore[name-defined]
    rank: int,
    world_size: int,
    timeout: datetime.timedelta,
) -> None:
    """Wait until every rank has come to `store`: a backend only says that it waited, not for whom.

    Rank 0 waits for all and answers, so that a world of N costs N requests and not N * N.
    """
    store.set(f"am_mesh/arrived/{rank}", "")
    keys = [f"am_mesh/arrived/{other}" for other in range(world_size)]
    try:
        store.wait(keys if rank == 0 else ["am_mesh/all"], timeout)
    except dist.DistError as error:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        if not missing:
            return
        raise TimeoutError(
            f"rank {', '.join(map(str, missing))} of world_size={world_size} has not come within "
            f"{timeout.total_seconds() / 60:g} minutes; every rank has to start: look at its own log, or for a process "
            "that hangs before this, and raise timeout_minutes if it is only slow"
        ) from error
    if rank == 0:
        store.set("am_mesh/all", "")


def _device(local_rank: int | None) -> torch.device:
    """This rank's device, made current where it is a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local_rank} has no GPU: {torch.cuda.device_count()} visible; start at most that many "
                "processes per node, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())
