"""What reaches one rank reaches all: a signal, also where they split no rows, and the death of another."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import am_mesh
from am_recipes import time_limit
from am_recipes.progress import any_rank, first_told
from am_recipes.stop_signal import StopSignal
from am_testing import run_distributed
from integration_tests import runs


def steps_until_stop(axes: dict[str, int], told: int) -> int:
    """After how many steps this rank stops, where the rank `told` gets SIGTERM in the third."""
    dims = am_mesh.ParallelDims(**axes).build("cpu")
    with StopSignal() as stop:
        stop.doing = "the step is finished"
        for step in range(1, 10):
            if step == 3 and dist.get_rank() == told:
                os.kill(os.getpid(), signal.SIGTERM)
            if any_rank(dims, stop.received is not None) == [True]:
                return step
    return 0


@pytest.mark.parametrize("axis", ["dp_shard", "cp", "tp", "pp"])
@pytest.mark.parametrize("told", [0, 1])
def test_two_ranks_stop_after_the_same_step(axis: str, told: int) -> None:
    axes = {"dp_shard": 1} | {axis: 2}
    assert run_distributed(steps_until_stop, 2, axes, told) == [3, 3]


def step_out_of_time(told: int) -> tuple[int, str]:
    """After how many steps this rank stops, and why, where the rank `told` alone has a limit: 110 s, 10 s a step."""
    dims = am_mesh.ParallelDims(dp_shard=2).build("cpu")
    now = 0.0
    ends = [time_limit.End("max_time=1:50", "raise it", 110.0)] if dist.get_rank() == told else []
    limit = time_limit.TimeLimit(ends, lambda: now)
    for step in range(1, 20):
        now += 10.0
        late = limit.asked(time_limit.measured_save(20.0), others=0)
        if any_rank(dims, late is not None) == [True]:
            return step, first_told(late)
    return 0, ""


@pytest.mark.parametrize("told", [0, 1])
def test_the_time_limit_of_one_rank_stops_both_after_the_same_step(told: int) -> None:
    (step, why), other = run_distributed(step_out_of_time, 2, told)
    assert (step, why) == other
    assert step == 7
    assert why.startswith("out of time: max_time=1:50 leaves 40.0 s, and to go on takes 45.0 s: ")


def test_a_rank_that_was_killed_is_missed_with_what_to_do(tmp_path: Path) -> None:
    recipe, config = "recipes/src/am_recipes/sft.py", "recipes/configs/tiny.yaml"
    many = ("--step_scheduler.max_steps", "1000", "--lr_scheduler", "{}", "--step_scheduler.ckpt_every_steps", "null")
    run_dir, printed = tmp_path / "run", tmp_path / "printed"
    arguments = ["-c", config, "--run_dir", str(run_dir), *many, "--step_scheduler.val_every_steps", "null"]
    left, killed = runs.start_file(runs.ROOT / recipe, arguments, runs.ROOT, printed, world_size=2)
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("grad_norm") < 2:
        assert left.is_alive(), (printed / "0.txt").read_text()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert runs.finish([left]) == 1
    told = (printed / "0.txt").read_text()
    assert "error: another rank is gone or cannot be reached" in told
    assert "the same command continues from the latest checkpoint" in told
    assert "Traceback" not in told
    assert "Traceback" in (run_dir / "error.txt").read_text()
