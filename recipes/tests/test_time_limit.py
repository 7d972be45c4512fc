"""When a launch stops so that its time suffices to commit: what is measured, what is estimated, what is said."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time

import pytest

from am_recipes import job_time, time_limit


class Clock:
    """A clock that goes as it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def limit_of(left: float) -> tuple[time_limit.TimeLimit, Clock]:
    clock = Clock()
    limit = time_limit.TimeLimit([time_limit.End("max_time=x", "raise it", clock.now + left)], clock)
    return limit, clock


def step(limit: time_limit.TimeLimit, clock: Clock, seconds: float, save: float = 20.0, others: int = 0):
    clock.now += seconds
    return limit.asked(time_limit.measured_save(save), others=others)


def test_it_stops_while_a_step_and_a_save_still_fit():
    limit, clock = limit_of(110.0)
    limit.begin()
    # After each step 110 - 10 n are left; 10 for a step, 20 for the save and 15 to end are needed.
    said = [step(limit, clock, 10.0) for _ in range(7)]
    assert said[:6] == [None] * 6
    assert said[6] == (
        "out of time: max_time=x leaves 40.0 s, and to go on takes 45.0 s: 10.0 s to the next step (the longest so "
        "far), 20.0 s for a save (the longest so far), 15 s to end"
    )


def test_a_save_that_comes_before_the_next_question_counts_too():
    limit, clock = limit_of(110.0)
    limit.begin()
    assert [bool(step(limit, clock, 10.0, others=1)) for _ in range(5)] == [False] * 4 + [True]


def test_the_first_step_counts_until_there_is_a_second():
    limit, clock = limit_of(1000.0)
    limit.begin()
    # It compiled. 500 are left, and another like it would not leave time for the save.
    assert "500.0 s to the next step" in str(step(limit, clock, 500.0, save=0.0))
    limit, clock = limit_of(1000.0)
    limit.begin()
    assert [step(limit, clock, 400.0), step(limit, clock, 10.0), step(limit, clock, 10.0)] == [None] * 3
    # What comes later is never forgotten: a validation.
    assert step(limit, clock, 200.0) is None
    assert "200.0 s to the next step" in str(step(limit, clock, 200.0))


def test_a_save_is_no_part_of_the_time_to_the_next_question():
    limit, clock = limit_of(210.0)
    limit.begin()
    for _ in range(3):
        assert step(limit, clock, 10.0, save=30.0) is None
        clock.now += 30.0
        limit.begin()
    # 90 are left: 10 for the next step and 30 for its save still fit after this one, and not after one more.
    assert step(limit, clock, 10.0, save=30.0) is None
    assert step(limit, clock, 10.0, save=30.0) is None
    assert step(limit, clock, 10.0, save=30.0) is None
    assert "leaves 50.0 s, and to go on takes 55.0 s: 10.0 s to the next" in str(step(limit, clock, 10.0, save=30.0))


def test_it_always_leaves_time_to_commit():
    """Whatever the steps and saves, as long as none is longer than one before: the last save ends in time."""
    for seed in range(300):
        draw = random.Random(seed)
        longest_step, longest_save = draw.uniform(1, 50), draw.uniform(0, 100)
        every, asynchronous = draw.choice([1, 2, 5, 1000]), draw.random() < 0.5
        given = draw.uniform(400, 3000)
        limit, clock = limit_of(given)
        end = clock.now + given
        limit.begin()
        under_way_until = 0.0
        for number in range(1, 10_000):
            # The first two show how long it may take.
            clock.now += longest_step * (1 if number <= 2 else draw.random())
            due = number % every == 0
            busy = asynchronous and clock.now < under_way_until
            late = limit.asked(time_limit.measured_save(longest_save), others=due + busy)
            if not due and not late:
                continue
            began = max(clock.now, under_way_until)
            took = longest_save * draw.random()
            under_way_until = began + took
            if late:
                break
            clock.now = began if asynchronous else under_way_until
            limit.begin()
        assert number > 2
        assert max(clock.now, under_way_until) + time_limit.ENDING_SECONDS <= end, seed


def test_before_any_save_it_is_estimated_by_its_bytes():
    save = time_limit.estimated_save(12_000_000_000)
    assert save.seconds == 10 + 240
    assert save.basis == "estimated: 10 s, and 12,000,000,000 bytes at 50 MB/s"
    limit, clock = limit_of(100.0)
    assert "250.0 s for a save (estimated: 10 s, and 12," in str(limit.asked(save, others=0))
    assert clock.now == 100.0


def test_without_an_end_there_is_always_time():
    limit = time_limit.TimeLimit([], Clock())
    assert not limit.is_set
    assert limit.over_before_a_step() is None
    assert limit.asked(time_limit.measured_save(1e9), others=1) is None


def test_the_earlier_end_counts_and_says_who_set_it():
    both = time_limit.ends("1:00", 1_700_000_030.0, now=50.0, epoch=1_700_000_000.0, age=20.0)
    assert [(end.name, end.at) for end in both] == [
        ("step_scheduler.max_time=1:00", 90.0),
        ("SLURM_JOB_END_TIME=1700000030", 80.0),
    ]
    clock = Clock()
    clock.now = 79.0
    limit = time_limit.TimeLimit(both, clock)
    assert limit.over_before_a_step() is None
    assert "SLURM_JOB_END_TIME=1700000030 leaves 1.0 s" in str(limit.asked(time_limit.measured_save(0.0), others=0))
    clock.now = 84.0
    assert limit.over_before_a_step() == (
        "SLURM_JOB_END_TIME=1700000030 was over 4 s before the first step of this launch, which would never train; "
        "give the job more time, or unset it where it is of another job. Nothing was lost"
    )
    assert time_limit.ends(None, None, now=0.0, epoch=0.0, age=0.0) == []


def test_the_end_of_a_job_is_read_or_refused():
    assert job_time.job_end({}) is None
    assert job_time.job_end({"SLURM_JOB_END_TIME": ""}) is None
    assert job_time.job_end({"SLURM_JOB_END_TIME": "1700000030"}) == 1_700_000_030.0
    for text in ("soon", "-5", "1e9", "²"):
        with pytest.raises(ValueError, match=f"SLURM_JOB_END_TIME={re.escape(text)} is not a number of seconds since"):
            job_time.job_end({"SLURM_JOB_END_TIME": text})


def test_a_process_knows_when_it_began():
    """Also before this module was imported."""
    program = "import time; time.sleep(0.5); from am_recipes import job_time; print(job_time.process_age())"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.5 <= float(result.stdout) <= time.monotonic() - began + 0.1
