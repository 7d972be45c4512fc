"""Which steps stay, and who may write into a directory."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import am_ckpt

SHARD = "model/shard-00001-model-00001-of-00001.safetensors"


def model_of(value: float = 1.0) -> dict[str, Any]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    return {"model": model}


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in directory.iterdir() if path.name[-1].isdigit())


def test_multiples_stay_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, model_of())
    assert steps_in(tmp_path) == [4, 8, 9, 10]
    only = am_ckpt.Checkpointer(tmp_path / "only", keep_every=3)
    for step in range(1, 6):
        only.save(step, model_of())
    assert steps_in(tmp_path / "only") == [3, 5]


def test_a_pinned_step_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    checkpoints.save(1, model_of())
    checkpoints.pin(1)
    # What a person does in a shell.
    (tmp_path / "step_000002.pin").touch()
    for step in (2, 3, 4):
        checkpoints.save(step, model_of())
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_000001",
        "step_000001.pin",
        "step_000002",
        "step_000002.pin",
        "step_000004",
    ]
    assert checkpoints.load(model_of()) == 4
    checkpoints.unpin(1)
    checkpoints.unpin(2)
    checkpoints.save(5, model_of())
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000005"]
    with pytest.raises(FileNotFoundError, match=r"step 7 cannot be pinned; steps in .*: step_000005"):
        checkpoints.pin(7)


def test_a_damaged_step_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    checkpoints.save(1, model_of())
    for other in (0, 9):
        shutil.copytree(tmp_path / "step_000001", tmp_path / f"step_{other:06d}")
        os.truncate(tmp_path / f"step_{other:06d}" / SHARD, 100)
    checkpoints.save(2, model_of(2.0))
    # Step 9 is the newest by number; were it counted, the one step that can be loaded would go.
    assert steps_in(tmp_path) == [0, 2, 9]
    state = model_of()
    with pytest.warns(UserWarning, match="SKIPPED a damaged checkpoint"):
        assert checkpoints.load(state) == 2


def test_links_that_cannot_be_set_do_not_stop_saving_or_deleting(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
    for step in (1, 2):
        with pytest.warns(UserWarning, match=rf"step {step} is saved; the links in .* could not be set"):
            checkpoints.save(step, model_of())
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_every": 0}, "keep_every=0 must be at least 1"),
        ({"timeout": 0.0}, r"timeout=0.0 must be a positive number of seconds"),
    ],
)
def test_impossible_arguments_are_refused_at_once(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        am_ckpt.Checkpointer(tmp_path, **arguments)


def staging_of_another_machine(directory: Path) -> Path:
    staging = directory / ".staging-step_000001-other"
    staging.mkdir(parents=True)
    lease = {"host": "elsewhere", "boot_id": "b", "pid_namespace": "n", "pid": 1, "start_time": "1"}
    (staging / "lease.json").write_text(json.dumps(lease))
    return staging


def test_what_a_dead_writer_of_another_machine_left_is_removed(tmp_path: Path) -> None:
    lease = staging_of_another_machine(tmp_path) / "lease.json"
    an_hour_ago = time.time() - 3600
    os.utime(lease, (an_hour_ago, an_hour_ago))
    am_ckpt.Checkpointer(tmp_path).save(2, model_of())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]


def test_a_writer_of_another_machine_that_renews_its_lease_keeps_others_out(tmp_path: Path) -> None:
    lease = staging_of_another_machine(tmp_path) / "lease.json"
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(lease)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="another process is saving to this directory"):
            am_ckpt.Checkpointer(tmp_path).save(2, model_of())
    finally:
        ended.set()
        thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging-step_000001-other"]


def filled(directory: Path, **keep: Any) -> am_ckpt.Checkpointer:
    checkpoints = am_ckpt.Checkpointer(directory, **keep)
    for step in (10, 20, 30):
        checkpoints.save(step, model_of(step))
    return checkpoints


def test_going_on_from_an_older_step_is_refused_before_anything_is_lost(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, keep_last=2)
    state = model_of()
    assert checkpoints.load(state, 20) == 20
    for step in (25, 20):
        with pytest.raises(ValueError, match=rf"step_000030 is newer than step {step} .*discard_newer=True"):
            checkpoints.save(step, model_of(20))
    assert steps_in(tmp_path) == [20, 30]
    # The same of a run that was started anew, in a directory that is in use.
    with pytest.raises(ValueError, match=r"step_000030 is newer than step 1 \(2 such\)"):
        am_ckpt.Checkpointer(tmp_path, keep_last=2).save(1, model_of())


@pytest.mark.parametrize("which", [20, "step_000020", "best"])
def test_newer_steps_are_discarded_on_request(which: Any, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=3, keep_best=("loss", "min", 1))
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.0)):
        checkpoints.save(step, model_of(step), metrics={"loss": loss})
    state = model_of()
    assert checkpoints.load(state, which, discard_newer=True) == 20
    assert steps_in(tmp_path) == [20]
    assert {name: os.readlink(tmp_path / name) for name in ("latest", "best")} == dict.fromkeys(
        ("latest", "best"), "step_000020"
    )
    checkpoints.save(25, state)
    checkpoints.save(30, model_of(31))
    assert checkpoints.load(state) == 30
    assert state["model"].weight[0, 0] == 31


def test_a_best_step_that_is_discarded_leaves_no_link(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=3, keep_best=("loss", "min", 1))
    for step, loss in ((10, 3.0), (20, 1.0)):
        checkpoints.save(step, model_of(step), metrics={"loss": loss})
    assert checkpoints.load(model_of(), 10, discard_newer=True) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000010"]
    assert (tmp_path / "latest").resolve() == (tmp_path / "step_000010").resolve()


def test_newer_steps_stay_where_discarding_is_not_possible(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path / "one")
    checkpoints.pin(30)
    state = model_of(7.0)
    with pytest.raises(ValueError, match="would delete step_000030, which is pinned"):
        checkpoints.load(state, 10, discard_newer=True)
    with pytest.raises(ValueError, match=r"goes back to a step of .*two"):
        filled(tmp_path / "two").load(state, tmp_path / "one" / "step_000010", discard_newer=True)
    assert state["model"].weight[0, 0] == 7
    # What does not fit deletes nothing.
    checkpoints.unpin(30)
    with pytest.raises(ValueError, match="does not match the checkpoint"):
        checkpoints.load({"model": nn.Linear(2, 2)}, 10, discard_newer=True)
    assert steps_in(tmp_path / "one") == steps_in(tmp_path / "two") == [10, 20, 30]


def test_the_step_that_is_loaded_may_be_deleted_for_a_newer_one(tmp_path: Path) -> None:
    """A reader beside a run that keeps one step: it sees one, never none, and never one that is gone."""
    am_ckpt.Checkpointer(tmp_path).save(1, model_of(1))

    def save() -> None:
        checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1)
        for step in range(2, 60):
            checkpoints.save(step, model_of(step))

    loads, last = 0, 0
    with ThreadPoolExecutor(1) as threads:
        writer = threads.submit(save)
        while not writer.done():
            state = model_of(0)
            step = am_ckpt.Checkpointer(tmp_path).load(state, verify=loads % 2 == 0)
            assert step is not None
            assert step >= last
            assert state["model"].weight.unique().tolist() == [step]
            loads, last = loads + 1, step
        writer.result()
    assert loads > 10


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_never_the_best(mode: str, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path, keep_last=1, keep_best=("v", mode, 1))
    for step, value in enumerate([math.inf, 2.0, -math.inf, math.nan, math.inf, -math.inf], start=1):
        checkpoints.save(step, model_of(step), metrics={"v": value})
    assert os.readlink(tmp_path / "best") == "step_000002"
    assert steps_in(tmp_path) == [2, 6]
    assert checkpoints.load(model_of(), "best") == 2
