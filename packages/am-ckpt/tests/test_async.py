"""Saving in the background: what was true when save was called is what is stored, and no error is lost."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crash_matrix import Server
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import am_ckpt
from am_testing import run_distributed, small_files


def state_of(value: float, size: int = 8) -> dict[str, Any]:
    model = nn.Linear(size, 3)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=value)}


def value_of(state: dict[str, Any]) -> float:
    values = torch.cat([state["model"].weight.reshape(-1), state["model"].bias]).unique().tolist()
    assert values == [state["optimizer"].param_groups[0]["lr"]]
    return values[0]


def set_value(state: dict[str, Any], value: float) -> None:
    with torch.no_grad():
        for parameter in state["model"].parameters():
            parameter.fill_(value)
    state["optimizer"].param_groups[0]["lr"] = value


@contextmanager
def gate(opened: threading.Event, reached: threading.Event | None = None) -> Iterator[None]:
    """Threads that start inside stop before their first write of data until `opened`."""

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.pwrite and threading.current_thread().name == "am-ckpt save":
            if reached is not None:
                reached.set()
            opened.wait(20)

    threading.setprofile(hook)
    try:
        yield
    finally:
        opened.set()
        threading.setprofile(None)  # type: ignore[arg-type]


# Leases and reports fit, shards do not.
SMALL = 2000


def test_training_goes_on_while_the_copy_is_written(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=True)
    opened = threading.Event()
    state = state_of(1.0)
    with gate(opened):
        checkpoints.save(1, state)
        set_value(state, 2.0)
        assert am_ckpt.Checkpointer(tmp_path).load(state_of(9.0)) is None
        opened.set()
        checkpoints.wait()
    loaded = state_of(9.0)
    assert checkpoints.load(loaded) == 1
    assert value_of(loaded) == 1.0


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=True, keep_last=2)
    state = state_of(1.0)
    for step in range(1, 6):
        set_value(state, float(step))
        checkpoints.save(step, state)
    # So does loading.
    assert checkpoints.load(state) == 5
    for step in (4, 5):
        loaded = state_of(9.0)
        assert checkpoints.load(loaded, f"step_{step:06d}") == step
        assert value_of(loaded) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000004", "step_000005"]


def test_an_error_surfaces_once_at_the_next_call(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=True)
    state = state_of(1.0, 4096)
    calls = [checkpoints.wait, lambda: checkpoints.save(9, state), lambda: checkpoints.load(state)]
    for step, call in enumerate(calls, start=1):
        with small_files(SMALL):
            checkpoints.save(step, state)
            for thread in threading.enumerate():
                if thread.name == "am-ckpt save":
                    thread.join()
        with pytest.raises(OSError, match=f"step {step} was not saved in .*, nothing was published.*File too large"):
            call()
        checkpoints.wait()
    assert list(tmp_path.iterdir()) == []
    checkpoints.save(4, state)
    checkpoints.wait()
    assert checkpoints.load(state_of(9.0, 4096)) == 4


SCRIPT = """
import resource, sys, torch
import am_ckpt
checkpoints = am_ckpt.Checkpointer(sys.argv[1], asynchronous=True)
if sys.argv[2] == "fail":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
checkpoints.save(1, {"model": torch.nn.Linear(512, 512)})
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("raise", 3), ("fail", 0)])
def test_a_process_that_ends_without_waiting(how: str, status: int, server: Server, tmp_path: Path) -> None:
    ended, text = server.run(SCRIPT, str(tmp_path), how)
    assert ended == status, text
    if how == "fail":
        assert "never asked for" in text
        assert "step 1 was not saved" in text
        assert "File too large" in text
        assert list(tmp_path.iterdir()) == []
    else:
        assert text == ""
        assert am_ckpt.Checkpointer(tmp_path).load({"model": nn.Linear(512, 512)}) == 1


@pytest.mark.parametrize(("asynchronous", "moment"), [(False, "pwrite"), (True, "copy_")])
def test_tensors_that_change_while_they_are_saved_are_refused(asynchronous: bool, moment: str, tmp_path: Path) -> None:
    state = state_of(1.0)
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=asynchronous)

    def interrupt(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ == moment:
            sys.setprofile(None)
            with torch.no_grad():
                state["model"].bias.add_(1.0)

    sys.setprofile(interrupt)
    try:
        with pytest.raises(RuntimeError, match=r"model tensor 'bias' was changed while it was being saved"):
            checkpoints.save(1, state)
    finally:
        sys.setprofile(None)
    assert list(tmp_path.iterdir()) == []
    checkpoints.save(1, state)
    checkpoints.wait()


def test_flush_gives_up_at_its_deadline(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=True)
    state = state_of(1.0)
    assert checkpoints.flush(0.0)
    checkpoints.save(1, state)
    assert checkpoints.flush(30.0)
    opened, reached = threading.Event(), threading.Event()
    with gate(opened, reached):
        checkpoints.save(2, state)
        assert reached.wait(20)
        assert not checkpoints.flush(0.01)
    # The write that hung has returned; nothing comes of it.
    with pytest.raises(TimeoutError, match=r"step 2 was not saved .* given up"):
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    checkpoints.save(3, state)
    assert checkpoints.flush(30.0)
    assert checkpoints.load(state) == 3
    assert am_ckpt.Checkpointer(tmp_path).flush(0.0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_is_flat_over_a_hundred_saves(tmp_path: Path) -> None:
    # 8 MiB: were they not used again, a hundred saves would show.
    state = state_of(1.0, 2**21 // 3)
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=True, keep_last=1)
    for step in range(1, 101):
        checkpoints.save(step, state)
        if step == 5:
            checkpoints.wait()
            early = resident_bytes()
    checkpoints.wait()
    assert resident_bytes() - early < 2 * 2**20


def sharded(value: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 37), nn.Linear(37, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=value)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * value
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def digest(state: dict[str, Any]) -> list[float]:
    slots = [slot for values in state["optimizer"].state.values() for slot in values.values() if slot.dim()]
    tensors = [*state["model"].parameters(), *slots]
    return [float(tensor.full_tensor().double().sum()) for tensor in tensors]


def on_every_rank(directory: str, fail: bool) -> tuple[list[float], list[float], str, list[str]]:
    checkpoints = am_ckpt.Checkpointer(directory, asynchronous=True)
    state = sharded(0.5)
    before = digest(state)
    checkpoints.save(1, state)
    state["optimizer"].step()
    checkpoints.wait()
    message = ""
    if fail:
        opened = threading.Event()
        with small_files(SMALL) if dist.get_rank() == 2 else gate(opened):
            opened.set()
            checkpoints.save(2, state)
            try:
                checkpoints.wait()
            except OSError as error:
                message = str(error)
    loaded = sharded(0.25)
    assert checkpoints.load(loaded) == 1
    dist.barrier()
    return before, digest(loaded), message, sorted(os.listdir(directory))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_publish_together_in_the_background(world_size: int, tmp_path: Path) -> None:
    for before, loaded, message, names in run_distributed(on_every_rank, world_size, str(tmp_path), False):
        assert loaded == before
        assert message == ""
        assert names == ["latest", "step_000001"]


def test_a_failure_of_one_rank_reaches_all_in_the_background(tmp_path: Path) -> None:
    outcomes = run_distributed(on_every_rank, 4, str(tmp_path), True)
    assert len({message for _, _, message, _ in outcomes}) == 1
    assert "step 2 was not saved" in outcomes[0][2]
    assert "rank 2 of 4: " in outcomes[0][2]
    assert "File too large" in outcomes[0][2]
    assert all(names == ["latest", "step_000001"] for _, _, _, names in outcomes)


def hanging(directory: str, asynchronous: bool) -> tuple[str, tuple[str, ...]]:
    """Rank 1 stops at its first write for three seconds, the others wait one."""
    checkpoints = am_ckpt.Checkpointer(directory, asynchronous=asynchronous, timeout=1.0)
    state = sharded(0.5)
    checkpoints.save(1, state)
    checkpoints.wait()
    stalled = threading.Event()

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.pwrite and not stalled.is_set():
            stalled.set()
            threading.Event().wait(3.0)

    if dist.get_rank() == 1:
        threading.setprofile(hook)
        sys.setprofile(hook)
    message = ""
    try:
        checkpoints.save(2, state)
        checkpoints.wait()
    except TimeoutError as error:
        message = str(error)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)
    dist.barrier()
    checkpoints.save(3, state)
    checkpoints.wait()
    dist.barrier()
    return message, tuple(sorted(os.listdir(directory)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_does_not_report_is_named_within_the_timeout(asynchronous: bool, tmp_path: Path) -> None:
    outcomes = run_distributed(hanging, 3, str(tmp_path), asynchronous)
    assert len(set(outcomes)) == 1
    message, left = outcomes[0]
    assert "step 2 was not saved" in message
    assert "rank 1 of 3 did not report within 1.0 seconds" in message
    assert left == ("latest", "step_000001", "step_000003")
