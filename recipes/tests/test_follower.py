"""What a tracker is told of a run, by a thread that follows its metrics.jsonl: everything, once, and nobody waits."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from am_recipes.log import Log
from am_recipes.sinks import ends
from am_recipes.sinks.follower import Follower
from am_recipes.sinks.tracker import Incomplete, Status, Tracked, TrackedRow, Tracker
from am_recipes.trackers import Trackers

SECONDS = 0.01


class Service:
    """What a service keeps; it outlives the launches of a run, and answers when it is `up`."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Any]] = {}
        self.up = True
        self.tries = 0


class Kept:
    """A tracker as the contract has it."""

    where = "at the service"

    def __init__(self, service: Service) -> None:
        self.service, self.id, self.thread, self.killed = service, "", 0, False
        self.is_abandoned = False

    def _call(self, fact: Any) -> None:
        if self.killed:
            # Ends what the thread does, as the death of its process would.
            threading.Event().wait()
        self.service.tries += 1
        if not self.service.up:
            raise ConnectionError("nobody answers")
        self.service.runs[self.id].append(fact)

    def begin(self, run: Tracked) -> str:
        self.id, self.thread = run.id or f"run {len(self.service.runs)}", threading.get_ident()
        self.service.runs.setdefault(self.id, [])
        self._call(("begin", run.resume_step))
        return self.id

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        for row in rows:
            self._call((row["step"], row.get("loss", row.get("val_loss")), row["time"]))

    def artifact(self, path: Path) -> None:
        self._call(path.name)

    def end(self, status: Status) -> None:
        self._call(status)

    def abandon(self) -> str | None:
        self.is_abandoned = True
        return None


def follow(
    run_dir: Path, tracker: Tracker, resume_step: int | None = None, *, upload_seconds: float = 60, **limits: float
) -> Trackers:
    def tracked(identifier: str | None) -> Tracked:
        return Tracked(run_dir.name, run_dir, {"lr": 0.1}, {}, identifier, resume_step)

    artifacts = ("config.yaml", "report.html", "export")
    follower = Follower(
        *("kept", tracker, run_dir, tracked, artifacts),
        at_the_beginning=["config.yaml"],
        interval=SECONDS,
        upload_seconds=upload_seconds,
    )
    return Trackers([follower], **limits)


def train(
    run_dir: Path, trackers: Trackers, steps: Sequence[int], *, resume: int | None = None, loss: float = 1.0
) -> Log:
    """The log of a run after these steps, of which every second is validated; not closed."""
    log = Log(run_dir, "recipe: sft\n", total_steps=10, resume_step=resume, sinks=[trackers], print_every=100)
    trackers.start()
    if resume is None:
        log.validation(0, {"val_loss": 2.0})
    for step in steps:
        numbers: dict[str, Any] = {"epoch": 0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 8, "target_tokens": 4}
        log.step(step, loss=loss / step, seconds=0.1, **numbers)
        if step % 2 == 0:
            log.validation(step, {"val_loss": 2.0 / step})
    return log


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(facts: Sequence[Any]) -> list[tuple[int, float]]:
    return [fact[:2] for fact in facts if isinstance(fact, tuple) and fact[0] != "begin"]


def expected(steps: Sequence[int]) -> list[tuple[int, float]]:
    result = [(0, 2.0)]
    for step in steps:
        result += [(step, 1.0 / step), *([(step, 2.0 / step)] if step % 2 == 0 else [])]
    return result


def test_a_run_arrives_whole_and_in_order(tmp_path: Path) -> None:
    service, run_dir = Service(), tmp_path / "run"
    tracker = Kept(service)
    assert isinstance(tracker, Tracker)
    log = train(run_dir, follow(run_dir, tracker), range(1, 5))
    wait_for(lambda: len(rows(service.runs["run 0"])) == 7)
    (run_dir / "export").mkdir()
    log.finish()
    facts = service.runs["run 0"]
    assert rows(facts) == expected(range(1, 5))
    assert [fact for fact in facts if not isinstance(fact, tuple)] == [
        "config.yaml",
        "report.html",
        "export",
        "FINISHED",
    ]
    assert facts[0] == ("begin", None)
    assert tracker.thread != threading.get_ident()
    # A validation has the time of its step, so that it is the same when it comes again.
    times = [(fact[0], fact[2]) for fact in facts[1:] if isinstance(fact, tuple)]
    assert times[2:4] == [(2, times[2][1])] * 2
    assert times == sorted(times)


def test_more_rows_than_one_call_takes(tmp_path: Path) -> None:
    service, run_dir = Service(), tmp_path / "run"
    train(run_dir, follow(run_dir, Kept(service)), range(1, 451)).finish()
    assert rows(service.runs["run 0"]) == expected(range(1, 451))


def test_a_killed_run_goes_on_at_the_service_without_a_step_twice(tmp_path: Path) -> None:
    service, run_dir = Service(), tmp_path / "run"
    tracker = Kept(service)
    log = train(run_dir, follow(run_dir, tracker, seconds=0.05), range(1, 6))
    wait_for(lambda: delivered(run_dir).get("step") == 5)
    tracker.killed = True
    log.finish()
    assert delivered(run_dir)["status"] is None
    # Its checkpoint is of step 2; 3 to 5 are trained, and written, once more.
    train(run_dir, follow(run_dir, Kept(service), 2), range(3, 9), resume=2).finish()
    assert list(service.runs) == ["run 0"]
    assert rows(service.runs["run 0"]) == expected(range(1, 9))
    assert ("begin", 2) in service.runs["run 0"]


def test_a_launch_that_begins_anew_is_a_run_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service, run_dir = Service(), tmp_path / "run"
    train(run_dir, follow(run_dir, Kept(service)), range(1, 5), loss=8.0).finish(status="stopped")
    # Without a checkpoint: what it trains is another curve.
    train(run_dir, follow(run_dir, Kept(service)), range(1, 7)).finish()
    assert rows(service.runs["run 1"]) == expected(range(1, 7))
    assert len(rows(service.runs["run 0"])) == 7
    assert delivered(run_dir)["id"] == "run 1"
    assert "WARNING kept: this launch begins anew, with step 1, and run run 0 has rows" in capsys.readouterr().out


def delivered(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "trackers.json"
    content: dict[str, Any] = json.loads(file.read_text())["kept"] if file.exists() else {}
    return content


def test_rows_of_an_outage_are_delivered_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service, run_dir = Service(), tmp_path / "run"
    trackers = follow(run_dir, Kept(service))
    log = train(run_dir, trackers, range(1, 3))
    wait_for(lambda: delivered(run_dir).get("step") == 2)
    service.up = False
    log.step(3, epoch=0, loss=1 / 3, grad_norm=1.0, lr=1.0, tokens=1, target_tokens=1, seconds=1.0)
    told: list[str] = []
    wait_for(lambda: len(told.extend(trackers.news()) or told) == 2)
    # Until it has failed some more.
    tries = service.tries
    wait_for(lambda: service.tries >= tries + 3)
    told += trackers.news()
    (where, warning) = told
    assert where == "kept: at the service"
    assert warning.startswith("WARNING kept does not take the run: ConnectionError: nobody answers; training goes on")
    service.up = True
    wait_for(lambda: delivered(run_dir).get("step") == 3)
    log.finish()
    # One warning, however often it failed, and that it is over.
    assert capsys.readouterr().out.count("kept takes the run again") == 1
    assert rows(service.runs["run 0"]) == expected(range(1, 4))


def test_rows_that_an_outage_left_are_delivered_by_the_next_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service, run_dir = Service(), tmp_path / "run"
    log = train(run_dir, follow(run_dir, Kept(service)), range(1, 3))
    wait_for(lambda: delivered(run_dir).get("step") == 2)
    service.up = False
    for step in (3, 4):
        log.step(step, epoch=0, loss=1 / step, grad_norm=1.0, lr=1.0, tokens=1, target_tokens=1, seconds=1.0)
    began = time.monotonic()
    log.finish(status="stopped")
    assert time.monotonic() - began < 20
    assert "kept has not got 2 rows, from step 3 on and how the run ended; the same command" in capsys.readouterr().out
    service.up = True
    train(run_dir, follow(run_dir, Kept(service), 4), range(5, 9), resume=4).finish()
    assert rows(service.runs["run 0"]) == [row for row in expected(range(1, 9)) if row != (4, 0.5)]
    assert delivered(run_dir)["status"] == "FINISHED"


class Hanging(Kept):
    """Does not come back from the second call on."""

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        threading.Event().wait()


@pytest.mark.parametrize(("status", "limits"), [("finished", (0.3, 9)), ("stopped", (9, 0.3)), ("failed: x", (0.3, 9))])
def test_the_end_does_not_wait_for_a_client_that_hangs(
    tmp_path: Path, status: str, limits: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Hanging(Service())
    trackers = follow(tmp_path, tracker, seconds=limits[0], seconds_after_a_signal=limits[1])
    log = train(tmp_path, trackers, range(1, 4))
    began = time.monotonic()
    log.finish(status=status)
    assert 0.2 < time.monotonic() - began < 8
    assert "kept has not got 5 rows, from step 0 on" in capsys.readouterr().out
    assert tracker.is_abandoned


class Slow(Kept):
    """Takes long over a folder."""

    def artifact(self, path: Path) -> None:
        time.sleep(0.6 if path.is_dir() else 0)
        super().artifact(path)


def test_an_upload_of_the_export_is_waited_for(tmp_path: Path) -> None:
    service = Service()
    trackers = follow(tmp_path, Slow(service), seconds=0.3)
    log = train(tmp_path, trackers, range(1, 4))
    wait_for(lambda: delivered(tmp_path).get("step") == 3)
    (tmp_path / "export").mkdir()
    log.finish()
    assert service.runs["run 0"][-2:] == ["export", "FINISHED"]


def test_an_upload_that_hangs_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers = follow(tmp_path, HangingUpload(Service()), upload_seconds=0.3, seconds=0.2)
    log = train(tmp_path, trackers, range(1, 4))
    (tmp_path / "export").mkdir()
    began = time.monotonic()
    log.finish()
    assert time.monotonic() - began < 9
    assert "kept has not got how the run ended" in capsys.readouterr().out


class HangingUpload(Kept):
    """Never takes a folder."""

    def artifact(self, path: Path) -> None:
        if path.is_dir():
            threading.Event().wait()


@pytest.mark.parametrize("status", ["stopped after step 4", "failed: ValueError: no"])
def test_an_export_that_lies_there_goes_with_a_whole_run_alone(tmp_path: Path, status: str) -> None:
    service = Service()
    (tmp_path / "export").mkdir()
    train(tmp_path, follow(tmp_path, Kept(service)), range(1, 5)).finish(status=status)
    assert "export" not in service.runs["run 0"]
    for _ in range(2):
        train(tmp_path, follow(tmp_path, Kept(service), 4), [], resume=4).finish()
    assert service.runs["run 0"].count("export") == 1
    # The page is another one each time.
    assert service.runs["run 0"].count("report.html") == 3


class Unaware(Kept):
    """Comes back from its first rows when it is told to."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.comes_back = threading.Event()
        self.came_back = threading.Event()

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        self.comes_back.wait(20)
        self.came_back.set()

    def end(self, status: Status) -> None:
        super().end("FAILED")


def test_a_thread_that_was_given_up_undoes_nothing_of_the_next_launch(tmp_path: Path) -> None:
    service = Service()
    hanging = Unaware(service)
    trackers = follow(tmp_path, hanging, seconds_after_a_signal=0.1)
    train(tmp_path, trackers, range(1, 5)).finish(status="stopped")
    train(tmp_path, follow(tmp_path, Kept(service), 4), range(5, 7), resume=4).finish()
    kept, facts = delivered(tmp_path), list(service.runs["run 0"])
    assert (kept["step"], kept["status"]) == (6, "FINISHED")
    hanging.comes_back.set()
    wait_for(lambda: not [each for each in threading.enumerate() if each.ident == hanging.thread])
    assert hanging.came_back.is_set()
    assert delivered(tmp_path) == kept
    assert service.runs["run 0"] == facts


def test_a_disk_that_is_full_for_a_moment_opens_no_second_run(tmp_path: Path) -> None:
    service = Service()
    # In the way of the file.
    blocked = tmp_path / f".trackers.json.{os.getpid()}.tmp"
    blocked.mkdir()
    trackers = follow(tmp_path, Kept(service))
    log = train(tmp_path, trackers, range(1, 5))
    told: list[str] = []
    wait_for(lambda: any("WARNING kept does not take the run" in fact for fact in told.extend(trackers.news()) or told))
    # Some more attempts.
    time.sleep(10 * SECONDS)
    blocked.rmdir()
    log.finish()
    assert service.runs == {"run 0": service.runs["run 0"]}
    assert [fact for fact in service.runs["run 0"] if fact == ("begin", None)] == [("begin", None)]
    assert rows(service.runs["run 0"]) == expected(range(1, 5))
    assert delivered(tmp_path)["status"] == "FINISHED"


class Lossy(Kept):
    """Ends a run without some of its rows."""

    def end(self, status: Status) -> None:
        super().end(status)
        raise Incomplete("some rows; upload them with: kept sync")


def test_what_a_service_lacks_at_the_end_is_said_with_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()
    train(tmp_path, follow(tmp_path, Lossy(service)), range(1, 4)).finish()
    assert "kept has not got some rows; upload them with: kept sync\n" in capsys.readouterr().out
    assert service.runs["run 0"].count("FINISHED") == 1
    assert delivered(tmp_path)["status"] is None


class WithoutFiles(Kept):
    """Has no place for files."""

    def artifact(self, path: Path) -> None:
        raise PermissionError(f"{path.name} has no place")


def test_files_that_are_not_taken_hold_up_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = Service()
    train(tmp_path, follow(tmp_path, WithoutFiles(service)), range(1, 4)).finish()
    assert rows(service.runs["run 0"]) == expected(range(1, 4))
    assert service.runs["run 0"][-1] == "FINISHED"
    told = capsys.readouterr().out
    assert told.count("WARNING kept") == 1
    assert "kept has not got config.yaml and report.html" in told


class Forgetful(Kept):
    """Has lost the run that is to be continued."""

    def begin(self, run: Tracked) -> str:
        self.service.runs.pop(run.id or "", None)
        self.id = "another"
        self.service.runs[self.id] = []
        return self.id


def test_a_run_that_is_gone_begins_anew_with_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = Service()
    train(tmp_path, follow(tmp_path, Kept(service)), range(1, 5)).finish(status="stopped")
    train(tmp_path, follow(tmp_path, Forgetful(service), 4), range(5, 7), resume=4).finish()
    assert rows(service.runs["another"]) == expected(range(1, 7))
    assert "WARNING kept: run run 0 is not continued" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (f"{ends.FINISHED}: early, after step 4", "FINISHED"),
        (f"{ends.STOPPED} after step 4", "KILLED"),
        (ends.failed(KeyboardInterrupt()), "KILLED"),
        (ends.failed(SystemExit(1)), "KILLED"),
        (ends.failed(ValueError("no")), "FAILED"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, status: str, told: str) -> None:
    service = Service()
    train(tmp_path, follow(tmp_path, Kept(service)), range(1, 3)).finish(status=status)
    assert service.runs["run 0"][-1] == told


def test_a_damaged_state_is_said_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trackers.json").write_text('{"kept": {"step')
    train(tmp_path, follow(tmp_path, Kept(Service())), range(1, 3)).finish()
    assert "trackers.json does not say what trackers have" in capsys.readouterr().out


def test_a_row_that_is_not_finite_arrives_without_its_value(tmp_path: Path) -> None:
    service = Service()
    train(tmp_path, follow(tmp_path, Kept(service)), [1], loss=float("nan")).finish()
    assert rows(service.runs["run 0"]) == [(0, 2.0), (1, None)]
