"""Signals to a run."""

from __future__ import annotations

import signal
import time

import pytest

from am_recipes import job_time, stop_signal


@pytest.fixture
def told(capfd):
    return lambda: capfd.readouterr().err


def test_before_the_first_step_a_signal_ends_the_process(told):
    with pytest.raises(KeyboardInterrupt), stop_signal.StopSignal():
        signal.raise_signal(signal.SIGINT)
    assert told() == "\nCtrl-C before the first step: ending, nothing is lost\n"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(SystemExit) as ended, stop_signal.StopSignal():
            signal.raise_signal(number)
        assert ended.value.code == 75
        assert told() == f"\n{number.name} before the first step: ending, nothing is lost\n"


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")]
)
def test_the_first_signal_is_told_at_once_and_remembered(told, number, name):
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(other) for other in handled]
    with stop_signal.StopSignal() as stop:
        stop.doing = "the current step is finished and committed"
        signal.raise_signal(number)
        assert told().startswith(f"\n{name} received: the current step is finished and committed. Ctrl-C ")
        assert stop.received == name
    assert [signal.getsignal(other) for other in handled] == before


def test_only_a_second_interrupt_by_a_person_quits_at_once(told, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stop_signal.time, "monotonic", lambda: now)
    with stop_signal.StopSignal() as stop:
        stop.doing = "the current step is finished and committed"
        signal.raise_signal(signal.SIGINT)
        # torchrun passes the terminal's Ctrl-C on, and sends SIGTERM.
        now += 0.2
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        now += 30
        # Schedulers repeat theirs.
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert told().count("\n") == 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again: quitting at once; the same command continues from the latest checkpoint" in told()


def test_a_job_that_ends_before_the_first_step_is_not_begun_for_ever(told, monkeypatch):
    """Half of its time and more has gone: 1, where a script does not begin it again. With time left it is 75."""
    for left, status in ((job_time.process_age() / 2, 1), (job_time.process_age() + 3600, 75)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + left:.0f}")
        with pytest.raises(SystemExit) as ended, stop_signal.StopSignal():
            signal.raise_signal(signal.SIGUSR1)
        assert ended.value.code == status
        assert ("such a launch never trains; give the job more time" in told()) == (status == 1)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    with pytest.raises(ValueError, match="SLURM_JOB_END_TIME=soon is not a number of seconds"):
        stop_signal.StopSignal()


def test_other_ranks_of_a_machine_say_nothing(told, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with stop_signal.StopSignal() as stop:
        stop.doing = "..."
        signal.raise_signal(signal.SIGTERM)
    assert told() == ""
