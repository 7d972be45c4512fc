"""A rank that dies or hangs while it saves: the others hear of it, on one machine at once, and nothing is published."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch_processes import torch_processes

import am_ckpt
from am_ckpt._train.lease import own_lease, process_state

WORLD_SIZE = 3


def before_the_first_write(action: Callable[[], None]) -> None:
    """Do something once, before this process writes to a file."""
    done = threading.Event()

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.pwrite and not done.is_set():
            done.set()
            action()

    threading.setprofile(hook)
    sys.setprofile(hook)


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(rank: int, folder: str, which: int, what: str, asynchronous: bool, timeout: float) -> None:
    """What each rank but the one that dies hears, and after how many seconds, as a file."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD_SIZE), rank=rank, world_size=3)
    checkpoints = am_ckpt.Checkpointer(f"{folder}/run", timeout=timeout, asynchronous=asynchronous)
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    checkpoints.save(1, {"model": model})
    checkpoints.wait()
    if rank == which:
        before_the_first_write(kill_this_process if what == "dies" else lambda: time.sleep(3.0))
    begin = time.monotonic()
    error: BaseException | None = None
    try:
        checkpoints.save(2, {"model": model})
        checkpoints.wait()
    except (RuntimeError, TimeoutError, OSError) as raised:
        error = raised
    sys.setprofile(None)
    heard = {"error": type(error).__name__, "text": str(error), "seconds": time.monotonic() - begin}
    Path(f"{folder}/{rank}.json").write_text(json.dumps(heard))
    # Without the farewell of process groups, for which a rank is missing.
    os._exit(0)


def outcomes(folder: Path, which: int, what: str, asynchronous: bool, timeout: float) -> dict[int, dict[str, Any]]:
    context = torch_processes()
    arguments = (str(folder), which, what, asynchronous, timeout)
    processes = [context.Process(target=save, args=(rank, *arguments)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    # Not joined in order: one that has ended stays, as under a launcher, until all have.
    for process in reversed(processes):
        process.join(60)
        assert process.exitcode is not None
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize(("which", "asynchronous"), [(0, False), (0, True), (1, False)])
def test_a_dead_rank_is_noticed_at_once_on_its_machine(which: int, asynchronous: bool, tmp_path: Path) -> None:
    heard = outcomes(tmp_path, which, "dies", asynchronous, 600.0)
    assert sorted(heard) == [rank for rank in range(WORLD_SIZE) if rank != which]
    for told in heard.values():
        assert told["error"] == "RuntimeError"
        assert f"rank {which} of 3 died before" in told["text"]
        assert "step 2" in told["text"]
        assert told["seconds"] < 20
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_000001"]
    # What it left does not keep the next one out.
    am_ckpt.Checkpointer(tmp_path / "run").save(3, {"model": nn.Linear(3, 2)})
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_rank_0_that_hangs_is_named_within_the_timeout(tmp_path: Path) -> None:
    heard = outcomes(tmp_path, 0, "hangs", False, 1.0)
    assert sorted(heard) == [0, 1, 2]
    for told in heard.values():
        assert told["error"] == "TimeoutError"
        assert "rank 0 of 3 did not report within 1.0 seconds" in told["text"]
    assert all(heard[rank]["seconds"] < 2.5 for rank in (1, 2))
    # It was alive after all, and has not published what the others had given up.
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_000001"]


def test_a_staging_folder_that_nobody_has_signed_goes_at_once(tmp_path: Path) -> None:
    for name, content in ((".staging-step_000007-new", None), (".staging-step_000008-new", b'{"ho')):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "lease.json.new").write_bytes(content)
    model = {"model": torch.nn.Linear(3, 2)}
    am_ckpt.Checkpointer(tmp_path).save(2, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]


def test_a_writer_whose_folder_went_before_it_had_signed_gives_up(tmp_path: Path) -> None:
    """It may have been taken for a dead writer's, by one that had signed: one of the two must give up."""

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_return" and function is os.mkdir:
            for folder in tmp_path.glob(".staging-*"):
                if not any(folder.iterdir()):
                    folder.rmdir()

    sys.setprofile(hook)
    try:
        with pytest.raises(RuntimeError, match=r"another process is saving to this directory, and took \.staging-step"):
            am_ckpt.Checkpointer(tmp_path).save(2, {"model": torch.nn.Linear(3, 2)})
    finally:
        sys.setprofile(None)
    assert not any(tmp_path.iterdir())


def test_a_process_of_another_machine_is_not_called_dead() -> None:
    """What its number stands for here says nothing about it there: nor where machines have one name, or no boot id."""
    ended = own_lease() | {"start_time": "", "pid": 2**22 + 1}
    assert process_state(ended, own_lease()) == "dead"
    assert process_state(ended | {"boot_id": "another"}, own_lease()) == "unknown"
    nothing_known = {"boot_id": "", "pid_namespace": ""}
    ended, own = ended | nothing_known, own_lease() | nothing_known
    assert process_state(ended, own) == "dead"
    assert process_state(ended | {"host": "elsewhere"}, own) == "unknown"
