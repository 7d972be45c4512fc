"""Which steps stay, and who may write into a directory."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
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


def test_a_staging_folder_that_is_not_signed_yet_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".staging-step_000007-new").mkdir()
    am_ckpt.Checkpointer(tmp_path).save(2, model_of())
    assert ".staging-step_000007-new" in [path.name for path in tmp_path.iterdir()]
    assert am_ckpt.Checkpointer(tmp_path).load(model_of()) == 2
