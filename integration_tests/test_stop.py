"""A signal on one rank stops every rank of the world after the same step, also those that split no rows."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

import am_mesh
from am_recipes.progress import StopSignal, any_rank
from am_testing import run_distributed


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
