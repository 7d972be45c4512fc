"""Ephemeral steps: the last one stays beside the permanent ones, until a newer step is durable."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import am_ckpt
from am_ckpt._cli import main
from am_ckpt._files.step import seal
from am_testing import run_distributed, small_files


def model_of(value: float = 1.0) -> dict[str, Any]:
    model = nn.Linear(40, 30)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return {"model": model}


def steps_in(directory: Path) -> dict[int, bool]:
    """The steps, and whether each is ephemeral."""
    manifests = sorted(directory.glob("step_*/manifest.json"))
    return {int(path.parent.name[5:]): "ephemeral" in json.loads(path.read_text()) for path in manifests}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_one_stays_beside_all_permanent_ones(asynchronous: bool, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=asynchronous)
    seen = []
    for step in range(1, 9):
        checkpoints.save(step, model_of(step), ephemeral=step % 4 != 0)
        checkpoints.wait()
        seen.append(steps_in(tmp_path))
    first = [{1: True}, {2: True}, {3: True}, {4: False}]
    assert seen == [*first, *({4: False, step: True} for step in (5, 6, 7)), {4: False, 8: False}]
    state = model_of()
    assert am_ckpt.Checkpointer(tmp_path).load(state) == 8
    assert (tmp_path / "latest").readlink() == Path("step_000008")


def test_what_keep_last_keeps_is_permanent(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2):
        checkpoints.save(step, model_of(step))
    for step in (3, 4):
        checkpoints.save(step, model_of(step), ephemeral=True)
        assert steps_in(tmp_path) == {1: False, 2: False, step: True}
    checkpoints.save(5, model_of(5))
    assert steps_in(tmp_path) == {2: False, 5: False}
    # The one permanent step is not given for an ephemeral one.
    one = am_ckpt.Checkpointer(tmp_path / "one", keep_last=1)
    one.save(1, model_of(1))
    one.save(2, model_of(2), ephemeral=True)
    assert steps_in(tmp_path / "one") == {1: False, 2: True}


def test_what_is_best_pinned_or_a_multiple_is_not_lost(tmp_path: Path) -> None:
    best = am_ckpt.Checkpointer(tmp_path / "best", keep_last=1, keep_best=("loss", "min", 1))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0)):
        best.save(step, model_of(step), metrics={"loss": loss}, ephemeral=step < 4)
    assert list(steps_in(tmp_path / "best")) == [2, 4]
    state = model_of()
    assert best.load(state, "best") == 2
    assert state["model"].weight[0, 0] == 2
    # It goes when another one is.
    best.save(5, model_of(5), metrics={"loss": 0.5})
    assert list(steps_in(tmp_path / "best")) == [5]

    pinned = am_ckpt.Checkpointer(tmp_path / "pinned")
    pinned.save(1, model_of(1), ephemeral=True)
    pinned.pin(1)
    for step in (2, 3):
        pinned.save(step, model_of(step), ephemeral=True)
    assert list(steps_in(tmp_path / "pinned")) == [1, 3]
    pinned.unpin(1)
    pinned.save(4, model_of(4))
    assert list(steps_in(tmp_path / "pinned")) == [4]

    every = am_ckpt.Checkpointer(tmp_path / "every", keep_last=1, keep_every=2)
    for step in range(1, 6):
        every.save(step, model_of(step), ephemeral=True)
    assert list(steps_in(tmp_path / "every")) == [2, 4, 5]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_deletes_nothing(asynchronous: bool, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, model_of(1), ephemeral=True)
    checkpoints.wait()

    def save() -> None:
        checkpoints.save(2, model_of(2), ephemeral=True)
        checkpoints.wait()

    # Weights do not fit.
    with small_files(2000), pytest.raises(OSError, match=r"step 2 was not saved in .*, nothing was published"):
        save()
    assert steps_in(tmp_path) == {1: True}
    assert am_ckpt.Checkpointer(tmp_path).load(model_of()) == 1
    save()
    assert steps_in(tmp_path) == {2: True}


def test_the_older_one_is_there_until_the_newer_one_is(tmp_path: Path) -> None:
    """What is there whenever a name changes, of a save in the background: never no whole step."""
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=True)
    checkpoints.save(1, model_of(1), ephemeral=True)
    checkpoints.wait()
    seen = []

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function in (os.rename, os.replace, os.pwrite, os.fsync):
            seen.append(tuple(steps_in(tmp_path)))

    threading.setprofile(hook)
    try:
        checkpoints.save(2, model_of(2), ephemeral=True)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    checkpoints.wait()
    assert [step for step, _ in itertools.groupby(seen)] == [(1,), (1, 2), (2,)]


def test_a_step_that_is_saved_again_for_good_is_permanent(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1, keep_best=("loss", "min", 1))
    checkpoints.save(1, model_of(1), metrics={"loss": 2.0})
    checkpoints.save(2, model_of(2), ephemeral=True)
    assert steps_in(tmp_path) == {1: False, 2: True}
    before = contents(tmp_path / "step_000002")
    # Validated meanwhile.
    checkpoints.save(2, model_of(2), metrics={"loss": 1.0})
    assert steps_in(tmp_path) == {2: False}
    assert (tmp_path / "best").readlink() == Path("step_000002")
    after = contents(tmp_path / "step_000002")
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert before.keys() == after.keys()
    assert am_ckpt.verify(tmp_path / "step_000002", full=True).problems == []
    # And stays so.
    checkpoints.save(2, model_of(2), ephemeral=True)
    assert contents(tmp_path / "step_000002") == after
    with pytest.raises(FileExistsError, match="exists with other content, metrics"):
        checkpoints.save(2, model_of(2), metrics={"loss": 3.0})
    # What is another model makes nothing permanent.
    other = am_ckpt.Checkpointer(tmp_path / "other")
    other.save(1, model_of(1), ephemeral=True)
    with pytest.raises(FileExistsError):
        other.save(1, model_of(2))
    assert steps_in(tmp_path / "other") == {1: True}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_permanent_on_every_rank(directory: str) -> list[bool]:
    checkpoints = am_ckpt.Checkpointer(directory, asynchronous=True)
    checkpoints.save(1, model_of(1), ephemeral=True)
    checkpoints.wait()
    dist.barrier()
    # Killed after the commit and before it could delete: the older one is there still.
    checkpoints.pin(1)
    checkpoints.save(2, model_of(2), ephemeral=True)
    checkpoints.make_permanent(2)
    dist.barrier()
    first = steps_in(Path(directory))
    dist.barrier()
    checkpoints.unpin(1)
    checkpoints.make_permanent(2)
    dist.barrier()
    return [first == {1: True, 2: False}, steps_in(Path(directory)) == {2: False}]


def test_ranks_make_a_step_permanent_and_delete_what_is_left(tmp_path: Path) -> None:
    assert run_distributed(make_permanent_on_every_rank, 2, str(tmp_path)) == [[True, True]] * 2
    with pytest.raises(ValueError, match=r"step 7 was not made permanent: .*step_000007 is not a checkpoint"):
        am_ckpt.Checkpointer(tmp_path).make_permanent(7)


def test_a_linked_step_is_left_as_it_is(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path / "there").save(1, model_of(1), ephemeral=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/step_000001").symlink_to(tmp_path / "there/step_000001")
    before = contents(tmp_path / "there")
    am_ckpt.Checkpointer(tmp_path / "here").make_permanent(1)
    am_ckpt.Checkpointer(tmp_path / "here").save(2, model_of(2))
    assert contents(tmp_path / "there") == before
    assert steps_in(tmp_path / "here") == {1: True, 2: False}


def test_people_see_what_a_step_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    am_ckpt.Checkpointer(tmp_path / "run").save(1, model_of(1), ephemeral=True)
    step = tmp_path / "run/step_000001"
    assert main(["inspect", str(step)]) == 0
    assert "am-ckpt, step 1, ephemeral: a save of a newer step deletes it\n" in capsys.readouterr().out
    assert main(["inspect", str(step), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ephemeral"] is True
    # Whoever cuts it anew wants to have it.
    am_ckpt.reshard(step, tmp_path / "cut", mesh={"dp": 2})
    assert main(["inspect", str(tmp_path / "cut")]) == 0
    assert "ephemeral" not in capsys.readouterr().out


def test_another_value_of_the_key_is_damage(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path).save(1, model_of(1))
    file = tmp_path / "step_000001/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["xxh3_128"]
    file.write_bytes(seal(manifest | {"ephemeral": "no"}))
    with pytest.raises(ValueError, match="it has ephemeral='no'"):
        am_ckpt.Checkpointer(tmp_path).load(model_of(), 1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_longest_save_is_known_once_it_is_durable(asynchronous: bool, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, asynchronous=asynchronous)
    assert checkpoints.longest_save is None
    opened = threading.Event()

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.pwrite:
            opened.wait(20)

    threading.setprofile(hook)
    try:
        if not asynchronous:
            opened.set()
        checkpoints.save(1, model_of())
        if asynchronous:
            assert checkpoints.is_saving
            assert checkpoints.longest_save is None
            time.sleep(0.05)
    finally:
        opened.set()
        threading.setprofile(None)  # type: ignore[arg-type]
    checkpoints.wait()
    first = checkpoints.longest_save
    assert not checkpoints.is_saving
    assert first is not None
    assert (0.05 if asynchronous else 0) < first < 20
    # One that is there already was not written.
    checkpoints.save(1, model_of())
    assert checkpoints.longest_save == first
