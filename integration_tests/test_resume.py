"""A run that is killed and started again is the run that was never killed.

The kills are real: SIGKILL, at random moments, also while a checkpoint is being written. A start costs no seconds, so
ten of them fit into a test. The runs have ten steps of four packs, each step with a checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import am_ckpt
from am_recipes import configs, run_dir, sft
from am_recipes.sections import Checkpoint
from integration_tests import runs
from integration_tests.runs import assert_same_run, finish, kill_when, metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipes" / "configs" / "tiny.yaml"
SHORT = {
    "checkpoint.keep_last": "3",
    "step_scheduler.ckpt_every_steps": "1",
    "packed_sequence.packed_sequence_size": "256",
    "dataset.max_length": "256",
    "dataset.split": "train[:48]",
    "validation_dataset.max_length": "256",
    "validation_dataset.split": "train[:8]",
}


def changes(overrides: dict[str, str]) -> dict[str, str]:
    """`SHORT` and `overrides`, where `__` in a keyword stands for a dot."""
    return SHORT | {key.replace("__", "."): value for key, value in overrides.items()}


def tiny(run_dir: Path, **overrides: str) -> configs.SftConfig:
    return configs.parse(CONFIG, [("run_dir", str(run_dir)), *changes(overrides).items()])


def start(run_dir: Path, world_size: int = 1, **overrides: str) -> list[Any]:
    return runs.start(CONFIG, run_dir, changes(overrides), world_size)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish(start(run_dir)) == 0
    return run_dir


def test_killed_ten_times_at_random_moments(tmp_path: Path, uninterrupted: Path) -> None:
    begin = time.monotonic()
    assert finish(start(tmp_path / "timing")) == 0
    duration = time.monotonic() - begin
    generator = random.Random(11)
    kills = 0
    for attempt in range(10):
        run_dir = tmp_path / f"run{attempt}"
        (process,) = start(run_dir)
        process.join(generator.uniform(0.05, 0.95) * duration)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert finish(start(run_dir)) == 0
        assert_same_run(run_dir, uninterrupted)
    assert kills >= 8, "the kills came too late to show anything"


@pytest.mark.parametrize("option", [{}, {"checkpoint__asynchronous": "true"}, {"checkpoint__layout": "direct"}])
def test_killed_again_and_again_in_one_run(tmp_path: Path, uninterrupted: Path, option: dict[str, str]) -> None:
    for _ in range(40):
        (process,) = start(tmp_path, **option)
        # Long enough for one more checkpoint, then no mercy.
        before = len(list((tmp_path / "checkpoints").glob("step_*"))) if (tmp_path / "checkpoints").exists() else 0
        latest = tmp_path / "checkpoints" / "latest"
        was = os.readlink(latest) if before else None
        while process.is_alive() and not (latest.is_symlink() and os.readlink(latest) != was):
            time.sleep(0.01)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert finish(start(tmp_path)) == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(("number", "asynchronous"), [(signal.SIGTERM, "false"), (signal.SIGUSR1, "true")])
def test_a_signal_commits_and_exits_75(tmp_path: Path, uninterrupted: Path, number: int, asynchronous: str) -> None:
    (process,) = start(tmp_path, checkpoint__asynchronous=asynchronous)
    while not (tmp_path / "checkpoints" / "latest").is_symlink():
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert finish([process]) == 75
    stopped = metrics(tmp_path)[-1]["step"]
    assert 0 < stopped < 10
    assert os.readlink(tmp_path / "checkpoints" / "latest") == f"step_{stopped:06d}"
    assert finish(start(tmp_path)) == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_two_ranks_stop_after_the_same_step(tmp_path: Path, uninterrupted: Path, asynchronous: str) -> None:
    processes = start(tmp_path, 2, checkpoint__asynchronous=asynchronous)
    while not (tmp_path / "checkpoints" / "latest").is_symlink():
        time.sleep(0.01)
    # One rank alone is told; both finish the step, commit and leave.
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == 75
    assert all(process.exitcode == 75 for process in processes)
    stopped = metrics(tmp_path)[-1]["step"]
    assert os.readlink(tmp_path / "checkpoints" / "latest") == f"step_{stopped:06d}"
    assert finish(start(tmp_path, 2)) == 0
    assert metrics(tmp_path)[-1] == pytest.approx(metrics(uninterrupted)[-1], rel=1e-5)


def ephemeral(run_dir: Path) -> dict[int, bool]:
    """The steps that have a checkpoint, and whether the next one takes its place."""
    return {
        int(step.name[5:]): "ephemeral" in json.loads((step / "manifest.json").read_text())
        for step in sorted((run_dir / "checkpoints").glob("step_??????"))
    }


def test_a_run_goes_on_after_its_time_limits_to_the_bit(tmp_path: Path, uninterrupted: Path) -> None:
    """A save that was never measured is taken to last 10 s: with less than that and 15 s to end, one step is done."""
    none = {"step_scheduler__ckpt_every_steps": "null"}
    for step in (1, 2):
        assert finish(start(tmp_path, step_scheduler__max_time="0:24", **none)) == 75
        assert ephemeral(tmp_path) == {step: True}
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["status"] == (
            f"stopped after step {step} of 10, which is committed, out of time; the same command continues with step "
            f"{step + 1}"
        )
        # 229,696 parameters in float32, as much twice for AdamW, and 20 counts of its steps.
        assert re.fullmatch(
            r"out of time: step_scheduler.max_time=0:24 leaves \d+\.\d s, and to go on takes \d+\.\d s: \d+\.\d s to "
            r"the next step \(the longest so far\), 10\.1 s for a save \(estimated: 10 s, and 2,756,432 bytes at 50 "
            r"MB/s\), 15 s to end",
            record["notes"][-1],
        )
    assert finish(start(tmp_path, **none)) == 0
    assert_same_run(tmp_path, uninterrupted)
    assert ephemeral(tmp_path) == {10: False}


def test_the_end_of_the_job_stops_a_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that is asked to end at the step where it was stopped has that checkpoint for good."""
    constant = {
        "lr_scheduler__style": "constant",
        "lr_scheduler__min_lr": "0.0",
        "lr_scheduler__warmup_steps": "0",
        "step_scheduler__ckpt_every_steps": "null",
    }
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 24:.0f}")
    assert sft.main(tiny(tmp_path, **constant)) == 75
    assert "out of time: SLURM_JOB_END_TIME=" in json.loads((tmp_path / "run.json").read_text())["notes"][-1]
    assert ephemeral(tmp_path) == {1: True}
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() - 1:.0f}")
    with pytest.raises(ValueError, match=r"SLURM_JOB_END_TIME=\d+ was over \d+ s before the first step of this launch"):
        sft.main(tiny(tmp_path, **constant))
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    # This process began long before.
    with pytest.raises(ValueError, match=r"step_scheduler.max_time=0:01 was over .* raise it, or set it to null"):
        sft.main(tiny(tmp_path, step_scheduler__max_time="0:01", **constant))
    assert ephemeral(tmp_path) == {1: True}
    assert sft.main(tiny(tmp_path, step_scheduler__max_steps="1", **constant)) == 0
    assert ephemeral(tmp_path) == {1: False}


def test_a_finished_run_says_so(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert sft.main(tiny(uninterrupted)) == 0
    assert "holds this run, finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_fewer_steps_than_done_are_refused(uninterrupted: Path) -> None:
    constant = {"lr_scheduler__style": "constant", "lr_scheduler__min_lr": "0.0", "lr_scheduler__warmup_steps": "0"}
    run_dir = uninterrupted.parent / "constant"
    assert sft.main(tiny(run_dir, step_scheduler__max_steps="2", **constant)) == 0
    with pytest.raises(ValueError, match="is at step 2, and the run would end at step 1"):
        sft.main(tiny(run_dir, step_scheduler__max_steps="1", **constant))
    assert json.loads((run_dir / "run.json").read_text())["finished"] == {
        "max_steps": 2,
        "num_epochs": None,
        "max_tokens": None,
    }
    assert sft.main(tiny(run_dir, step_scheduler__max_steps="3", **constant)) == 0
    assert metrics(run_dir)[-1]["step"] == 3


def test_how_to_lengthen_a_finished_cosine_run_is_said_and_works(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps: 10 there, 12 now\n.*style=cosine .* from its export"):
        sft.main(tiny(uninterrupted, step_scheduler__max_steps="12"))
    base = {"model__config": "null", "model__name_or_path": str(uninterrupted / "export")}
    more = {"step_scheduler__max_steps": "2", "lr_scheduler__warmup_steps": "2", "optimizer__lr": "4e-4"}
    assert sft.main(tiny(tmp_path / "more", **base, **more)) == 0
    # It begins where the other has ended.
    first, last = (
        [row["val_loss"] for row in metrics(folder) if "val_loss" in row]
        for folder in (tmp_path / "more", uninterrupted)
    )
    assert first[0] == pytest.approx(last[-1], rel=1e-5)


def test_another_runs_directory_is_refused(uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.002 there, 0\.5 now"):
        sft.main(tiny(uninterrupted, optimizer__lr="0.5"))
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_rows_once_over_kills_and_changes_of_world_size(tmp_path: Path, uninterrupted: Path) -> None:
    """1 rank, then 2, then 4, each killed after a few steps: the same losses as one rank without a kill, to 1e-5."""
    for world_size, until in ((1, 3), (2, 6), (4, None)):
        processes = start(tmp_path, world_size, checkpoint__keep_last="20")
        if until is not None:
            kill_when(processes, tmp_path / "checkpoints" / f"step_{until:06d}")
        else:
            assert finish(processes) == 0
    ours, reference = metrics(tmp_path), metrics(uninterrupted)
    assert len(ours) == len(reference)
    for row, expected in zip(ours, reference):
        assert row.keys() == expected.keys()
        for key in row:
            assert row[key] == pytest.approx(expected[key], rel=1e-5), (key, row)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)])
def test_an_optimizer_that_is_fused_on_one_process_alone(worlds: tuple[int, int], tmp_path: Path) -> None:
    """torch knows no fused SGD for sharded tensors: what one process chose for speed is not what the next one takes."""
    options = {"optimizer___target_": "torch.optim.SGD", "optimizer__momentum": "0.9", "step_scheduler__max_steps": "3"}
    first, second = worlds
    kill_when(start(tmp_path, first, **options), tmp_path / "checkpoints" / "step_000001")
    assert finish(start(tmp_path, second, **options)) == 0
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1, 2, 3]


def test_a_resume_says_what_it_verified(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state = {"model": torch.nn.Linear(3, 2)}
        checkpoints = am_ckpt.Checkpointer(tmp_path)
        assert run_dir.resume(checkpoints, state, Checkpoint(), 9) == (None, [])
        checkpoints.save(4, state)
        checkpoints.save(5, state)
        flip(next((tmp_path / "step_000005/model").glob("*.safetensors")))
        step, (skipped, restored) = run_dir.resume(checkpoints, state, Checkpoint(), 9)
        assert step == 4
        assert re.match(r"WARNING SKIPPED .* going back to step_000004: .*safetensors", skipped, re.DOTALL)
        verified = "all that was read has the digests it was saved with"
        assert restored == f"resumed from step 4 in {tmp_path}: {verified}"
        unverified = f"resumed from step 5 in {tmp_path}: not verified (checkpoint.verify)"
        assert run_dir.resume(checkpoints, state, Checkpoint(verify=False), 9) == (5, [unverified])
    finally:
        dist.destroy_process_group()


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 0xFF
    file.write_bytes(damaged)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.filterwarnings("ignore:set a damaged checkpoint aside:UserWarning")
def test_damaged_weights_are_not_trained_on(tmp_path: Path, adapter: bool, uninterrupted: Path) -> None:
    """The step before is taken, the file named, and the run ends as if nothing had been."""
    lora = {"peft": "{r: 2, lora_alpha: 4, target_modules: all-linear}", "export.merge_adapter": "true"}
    more = changes({"checkpoint.keep_last": "9", **(lora if adapter else {})})
    kill_when(runs.start(CONFIG, tmp_path, more), tmp_path / "checkpoints" / "step_000003")
    newest = max((tmp_path / "checkpoints").glob("step_*"))
    (weights,) = (newest / "model").glob("*.safetensors")
    flip(weights)
    config = configs.parse(CONFIG, [("run_dir", str(tmp_path)), *more.items()])
    assert sft.main(config) == 0
    notes = json.loads((tmp_path / "run.json").read_text())["notes"]
    assert re.search(f"going back to step_.*{weights.name}", notes[0])
    if not adapter:
        assert_same_run(tmp_path, uninterrupted)
