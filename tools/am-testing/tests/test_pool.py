from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from am_testing import Pool, run_distributed


def total(value: float) -> float:
    tensor = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(tensor)
    return tensor.item()


def fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("this rank fails")
    dist.barrier()


def hang() -> None:
    time.sleep(60)


def test_every_rank_takes_part() -> None:
    assert run_distributed(total, 4, 1.5) == [15.0] * 4
    assert run_distributed(total, 2, 1.0) == [3.0] * 2


def own_pid() -> int:
    return os.getpid()


def test_no_more_workers_than_ranks_and_they_stay() -> None:
    pool = Pool(3)
    try:
        first = pool.run(own_pid, 1)
        two = pool.run(own_pid, 2)
        assert two[:1] == first
        assert pool.run(own_pid, 1) == first
        assert pool.run(own_pid, 3)[:2] == two
        assert len({*pool.run(own_pid, 3), os.getpid()}) == 4
    finally:
        pool.close()


def test_a_failing_rank_is_reported_and_the_pool_recovers() -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2: ValueError: this rank fails"):
        run_distributed(fail_on_last, 2)
    assert run_distributed(total, 2, 1.0) == [3.0] * 2


def test_a_hanging_job_times_out() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        run_distributed(hang, 2, timeout=1.0)


def test_world_size_beyond_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size=5 must be between 1 and the pool's size 4"):
        run_distributed(total, 5, 1.0)
