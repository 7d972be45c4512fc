"""The log through the public API: its sinks, in order and to the end, and what run.json keeps."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import rich.console

from am_recipes.log import MAX_WARNINGS, Log
from am_recipes.sinks import Sink

CONFIG = "recipe: sft\nseed: 1\n"


def start(run_dir: Path, output: io.StringIO | None = None, **arguments: Any) -> Log:
    console = rich.console.Console(file=output or io.StringIO(), force_terminal=False, width=120)
    return Log(run_dir, CONFIG, console=console, **({"total_steps": 20} | arguments))


def step(log: Log, number: int, **changed: Any) -> None:
    values = {"epoch": 0, "loss": 2.5, "grad_norm": 1.5, "lr": 1e-3, "tokens": 100, "target_tokens": 60, "seconds": 0.5}
    log.step(number, **(values | changed))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


class BestLoss:
    """A sink as a user writes it, without a base class."""

    def __init__(self) -> None:
        self.best, self.status = math.inf, ""

    def note(self, fact: str) -> None: ...

    def step(self, row: Mapping[str, float | int]) -> None:
        self.best = min(self.best, row["loss"])

    def validation(self, row: Mapping[str, float | int]) -> None: ...

    def close(self, status: str) -> None:
        self.status = status


class Recorder:
    """Notes its calls in a list that several share, with what the run directory held; raises in one of them."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]], fails_in: str = "") -> None:
        self.name, self.calls, self.fails_in = name, calls, fails_in

    def called(self, method: str, argument: object) -> None:
        self.calls.append((self.name, method, argument))
        if method == self.fails_in:
            raise LookupError(f"{self.name} failed in {method}")

    def note(self, fact: str) -> None:
        self.called("note", fact)

    def step(self, row: Mapping[str, float | int]) -> None:
        self.called("step", row["step"])

    def validation(self, row: Mapping[str, float | int]) -> None:
        self.called("validation", dict(row))

    def close(self, status: str) -> None:
        self.called("close", status)


def test_a_sink_of_the_user_is_ten_lines(tmp_path: Path) -> None:
    sink = BestLoss()
    assert isinstance(sink, Sink)
    with start(tmp_path, sinks=[sink]) as log:
        log.note("kernels")
        log.validation(0, {"val_loss": 3.0})
        for number, loss in enumerate((3.0, 1.0, 2.0), start=1):
            step(log, number, loss=loss)
        log.finish()
    assert (sink.best, sink.status) == (1.0, "finished")


def test_every_sink_hears_everything_in_order(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    with start(tmp_path, sinks=[Recorder("one", calls), Recorder("two", calls)]) as log:
        log.note(["kernels"])
        log.validation(0, {"val_loss": 3.0})
        step(log, 1, loss=math.nan)
        log.answers("after", [("Why?", " Because. ")])
        log.images("after", [([b"PNG"], "What?", "dog", "cat")], "0 of 1 right")
        log.finish()
    heard = [
        ("note", "['kernels']"),
        ("validation", {"step": 0, "val_loss": 3.0}),
        ("note", "WARNING step 1: loss is nan; written as null"),
        ("step", 1),
        ("note", "> after: Why?\n  Because."),
        ("note", "after: 0 of 1 right"),
        ("close", "finished"),
    ]
    assert calls == [(name, *call) for call in heard for name in ("one", "two")]


def test_the_sinks_of_the_user_come_after_ours(tmp_path: Path) -> None:
    class Reader(BestLoss):
        def step(self, row: Mapping[str, float | int]) -> None:
            assert rows(tmp_path)[-1] == dict(row)

        def close(self, status: str) -> None:
            self.status = (tmp_path / "report.html").read_text()

    sink = Reader()
    with start(tmp_path, sinks=[sink]) as log:
        step(log, 1)
        log.finish(next_steps=["am-ckpt verify RUN"])
    assert '<span class="pill good">finished</span>' in sink.status
    assert "am-ckpt verify RUN" in sink.status


def run_out_of_luck(run_dir: Path, *sinks: Sink) -> None:
    with start(run_dir, sinks=sinks) as log:
        step(log, 1)
        raise RuntimeError("out of luck")


def test_an_error_is_recorded_and_closes_every_sink(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    sinks = [Recorder("one", calls, "close"), Recorder("two", calls), Recorder("three", calls, "close")]
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        run_out_of_luck(tmp_path, *sinks)
    failed = "failed: RuntimeError: out of luck"
    assert calls[3:] == [(name, "close", failed) for name in ("one", "two", "three")]
    assert (record(tmp_path)["status"], record(tmp_path)["finished"]) == (failed, None)
    assert failed in (tmp_path / "report.html").read_text()
    # Nothing is swallowed: where the others failed, and in which line.
    for note, name in zip(caught.value.__notes__, ("one", "three"), strict=True):
        assert "closing the log failed too" in note
        assert f"LookupError: {name} failed in close" in note
        assert "in called\n" in note


@pytest.mark.parametrize("method", ["note", "step", "validation"])
def test_what_a_sink_raises_ends_the_run(tmp_path: Path, method: str) -> None:
    calls: list[tuple[Any, ...]] = []

    def train() -> None:
        with start(tmp_path, sinks=[Recorder("one", calls, method), Recorder("two", calls)]) as log:
            log.note("kernels")
            log.validation(0, {"val_loss": 3.0})
            step(log, 1)

    with pytest.raises(LookupError, match=f"one failed in {method}"):
        train()
    failed = f"failed: LookupError: 'one failed in {method}'".replace("'", "")
    assert calls[-2:] == [("one", "close", failed), ("two", "close", failed)]
    assert record(tmp_path)["status"] == failed


def test_a_sink_that_cannot_close_does_not_undo_a_finished_run(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    def train() -> None:
        with start(tmp_path, sinks=[Recorder("one", calls, "close"), Recorder("two", calls)]) as log:
            log.finish(goal={"max_steps": 20})

    with pytest.raises(LookupError, match="one failed in close"):
        train()
    assert calls == [("one", "close", "finished"), ("two", "close", "finished")]
    assert (record(tmp_path)["status"], record(tmp_path)["finished"]) == ("finished", {"max_steps": 20})


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    sink = BestLoss()
    with start(tmp_path, sinks=[sink]) as log:
        log.finish(status="stopped after step 3; run the same command again")
    assert sink.status == record(tmp_path)["status"] == "stopped after step 3; run the same command again"
    assert record(tmp_path)["finished"] is None
    with start(tmp_path, sinks=[sink]):
        assert record(tmp_path)["status"] == "running"
    assert sink.status == record(tmp_path)["status"] == "stopped"


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    with start(tmp_path / "run", rank=1, sinks=[Recorder("one", calls)]) as log:
        log.note("kernels")
        log.samples([[("a", True)]])
        log.answers("before", [("a", "b")])
        log.images("after", [], "0 of 0")
        step(log, 1)
        log.validation(1, {"val_loss": 1.0})
        log.sync()
        log.finish()
    assert not (tmp_path / "run").exists()
    assert calls == []


def test_a_step_is_one_complete_row(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        step(log, 1, others={"kd_loss": 0.25, "ce_loss": 3.5})
        (row,) = rows(tmp_path)
        assert row.pop("time") > 1.7e9
        assert row.pop("peak_memory_bytes") > 10 * 2**20
        assert list(row.items()) == [
            ("step", 1),
            ("epoch", 0),
            ("loss", 2.5),
            ("grad_norm", 1.5),
            ("lr", 1e-3),
            ("tokens", 100),
            ("target_tokens", 60),
            ("tokens_per_second", 200.0),
            ("kd_loss", 0.25),
            ("ce_loss", 3.5),
        ]
        log.validation(1, {"val_loss": 2.25})
        log.validation(1, {"val_loss_chat": 2.0, "val_loss_code": 3.0})
        assert rows(tmp_path)[1:] == [
            {"step": 1, "val_loss": 2.25},
            {"step": 1, "val_loss_chat": 2.0, "val_loss_code": 3.0},
        ]
        with pytest.raises(ValueError, match=r"\['chat'\] must be named val_loss or val_loss_<name>"):
            log.validation(1, {"chat": 2.0})


def test_numbers_json_has_no_word_for_become_null_with_a_warning(tmp_path: Path) -> None:
    output = io.StringIO()
    with start(tmp_path, output) as log:
        log.validation(0, {"val_loss": math.nan})
        step(log, 1, loss=math.nan, grad_norm=math.inf)
        step(log, 2, others={"load": -math.inf}, seconds=0.0)
        assert record(tmp_path)["warnings"] == [
            [0, "step 0: val_loss is nan"],
            [1, "step 1: loss is nan, grad_norm is inf"],
            [2, "step 2: tokens_per_second is nan, load is -inf"],
        ]
        step(log, 3)
        log.validation(3, {"val_loss": 1.0})
        log.finish()
    assert [(row["loss"], row["grad_norm"]) for row in rows(tmp_path)[1:4]] == [(None, None), (2.5, 1.5), (2.5, 1.5)]
    assert "WARNING step 1: loss is nan, grad_norm is inf; written as null" in output.getvalue()
    assert "step 1: loss is nan, grad_norm is inf" in (tmp_path / "report.html").read_text()


def test_a_warning_at_every_step_does_not_fill_the_record(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        for number in range(1, 2 * MAX_WARNINGS):
            step(log, number, others={"load": math.nan})
    *kept, (_, last) = record(tmp_path)["warnings"]
    assert [step for step, _ in kept] == list(range(1, MAX_WARNINGS + 1))
    assert "only the terminal has them" in last


def test_run_json_is_there_before_any_other_file(tmp_path: Path) -> None:
    # Otherwise a start that was killed leaves a directory that holds files and no run.
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    with pytest.raises(OSError):
        start(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "run.json"]
    assert len(record(tmp_path / "run")["launches"]) == 1


def test_resuming_keeps_what_the_checkpoint_covers(tmp_path: Path) -> None:
    with start(tmp_path, identity={"seed": 1}) as first:
        first.note("of the first launch")
        first.answers("before", [("Why?", "Because.")])
        first.images("after", [([b"PNG"], "What?", "dog", "cat")], "0 of 1 right")
        first.validation(0, {"val_loss": 3.0})
        for number in range(1, 6):
            step(first, number, loss=math.nan if number in (2, 5) else float(number))
    output = io.StringIO()
    with start(tmp_path, output, resume_step=3, identity={"seed": 1}) as resumed:
        assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]
        step(resumed, 4, loss=40.0)
        resumed.validation(4, {"val_loss": 1.5})
        resumed.finish(goal={"max_steps": 4})
    assert [row.get("loss") for row in rows(tmp_path)] == [None, 1.0, None, 3.0, 40.0, None]
    found = record(tmp_path)
    assert [launch["resume_step"] for launch in found["launches"]] == [None, 3]
    assert found["answers"] == {"before": [["Why?", "Because."]]}
    assert found["image_answers"]["summary"] == {"after": "0 of 1 right"}
    assert found["warnings"] == [[2, "step 2: loss is nan"]]
    assert found["notes"] == []
    assert "val_loss 3.0000 before, 1.5000 after" in output.getvalue()
    with start(tmp_path):
        assert rows(tmp_path) == []
    found = record(tmp_path)
    assert [launch["resume_step"] for launch in found["launches"]] == [None]
    assert (found["answers"], found["image_answers"], found["warnings"]) == ({}, None, [])


def test_run_json_says_what_ran(tmp_path: Path) -> None:
    with start(tmp_path, world_size=4, identity={"seed": 1}) as log:
        found = record(tmp_path)
        assert (found["identity"], found["finished"], found["total_steps"]) == ({"seed": 1}, None, 20)
        (launch,) = found["launches"]
        assert launch["world_size"] == 4
        assert {"python", "torch", "transformers", "am-recipes"} <= launch["versions"].keys()
        log.note("kernels")
        log.samples([[("question ", False), ("answer", True)]])
        found = record(tmp_path)
        assert (found["notes"], found["samples"]) == (["kernels"], [[["question ", False], ["answer", True]]])
        log.finish(goal={"max_steps": 20, "num_epochs": None}, next_steps=["# Try it:", "ls"])
    found = record(tmp_path)
    assert (found["finished"], found["next_steps"]) == ({"max_steps": 20, "num_epochs": None}, ["# Try it:", "ls"])
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]


def test_the_end_of_the_output(tmp_path: Path) -> None:
    output = io.StringIO()
    with start(tmp_path, output, total_steps=25, print_every=10) as log:
        log.note("kernels: [torch]")
        log.validation(0, {"val_loss": 3.0})
        for number in range(1, 26):
            step(log, number)
        log.validation(25, {"val_loss": 2.0})
        log.finish(next_steps=["am-ckpt verify RUN"])
    lines = output.getvalue().splitlines()
    assert lines[0] == "kernels: [torch]"
    assert [line.split()[1] for line in lines[1:7]] == ["0/25", "1/25", "10/25", "20/25", "25/25", "25/25"]
    assert lines[6:] == [
        "step 25/25  val_loss 2.0000",
        "",
        "val_loss 3.0000 before, 2.0000 after",
        f"finished: {tmp_path / 'report.html'}",
        "  am-ckpt verify RUN",
    ]
    assert "\x1b" not in output.getvalue()
