"""An MLflow server is told of runs while the run, or the server, is killed: one run there, with every step once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests import runs
from integration_tests.mlflow_server import Server, Stored
from integration_tests.test_contracts import MINE
from integration_tests.test_resume import CONFIG, changes
from integration_tests.test_start import automodel

# Seconds long, so that there is a middle of it.
LONG = {
    "step_scheduler.max_steps": "40",
    "step_scheduler.ckpt_every_steps": "10",
    "step_scheduler.val_every_steps": "20",
}
# So long on every machine: they are stopped, or lose their server, once it has their first step.
SLOW = {"sinks": f"[{{_target_: {MINE}.Slow, seconds: [0.1]}}]"}
# More than MLflow takes for one parameter.
DESCRIPTION = "words " * 2000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.train(tmp_path_factory.mktemp("untracked"), "run", CONFIG, changes(LONG))


def tracked(server: Server, experiment: str, **more: str) -> dict[str, str]:
    section = {"mlflow.tracking_uri": server.address, "mlflow.experiment_name": experiment}
    return LONG | section | {f"mlflow.{key}": value for key, value in more.items()}


def state(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "trackers.json"
    content: dict[str, Any] = json.loads(file.read_text())["mlflow"] if file.exists() else {"step": None}
    return content


def wait_until(process: Any, condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.is_alive(), "the run ended before"
        time.sleep(0.01)


def delivered(run_dir: Path, step: int) -> bool:
    return (state(run_dir)["step"] or 0) >= step


def warnings_of_mlflow(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("WARNING") and "mlflow" in line]


def require_every_row_once(server: Server, run: Stored, run_dir: Path) -> None:
    """Raise AssertionError unless the server has what metrics.jsonl says, as often."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row} - {"step", "time"}
    assert set(run.metrics) == names
    for name in sorted(names & {"loss", "val_loss", "lr", "grad_norm", "tokens"}):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert [value[:2] for value in server.history(run, name)] == expected, name


def test_a_killed_run_is_the_same_run_at_the_server(server: Server, tmp_path: Path, untracked: Path) -> None:
    run_dir, ranks = tmp_path / "run", 2
    tags = "{team: blue, " + ", ".join(f"number{number}: {number}" for number in range(10)) + "}"
    overrides = changes(tracked(server, "killed", description=DESCRIPTION, flatten_depth="null", tags=tags))
    processes = runs.start(CONFIG, run_dir, overrides | SLOW, ranks)
    wait_until(processes[0], lambda: delivered(run_dir, 1) and (run_dir / "checkpoints/latest").exists())
    for process in processes:
        # SIGKILL; it may have died of the death of the other one.
        process.kill()
    for process in processes:
        process.join()
    (before,) = server.runs("killed")
    assert before.status == "RUNNING"
    assert state(run_dir)["step"] < 40

    runs.train(tmp_path, "run", CONFIG, overrides, ranks)
    (run,) = server.runs("killed")
    assert (run.id, run.name, run.status) == (before.id, "run", "FINISHED")
    require_every_row_once(server, run, run_dir)
    # With the times of the rows, those that the killed launch has sent among them.
    times = [when for _, _, when in server.history(run, "loss")]
    assert times == sorted(times)
    assert times[0] / 1000 == pytest.approx(run.began / 1000, abs=30)

    assert run.params["optimizer.lr"] == "0.002"
    assert run.params["model.config.model_type"] == "llama"
    assert run.params["mlflow.description"].endswith("cut, 12000 characters")
    # More than one request takes.
    assert len(run.params) > 100
    assert (run.tags["team"], run.tags["recipe"], run.tags["world_size"]) == ("blue", "sft", "2")
    assert run.tags["mlflow.note.content"].startswith("words words")
    assert {"version.torch", "device", "run_dir", "host"} <= run.tags.keys()
    assert server.files(run) == ["config.yaml", "report.html"]
    assert server.file(run, "config.yaml") == (run_dir / "config.yaml").read_bytes()
    assert b"loss" in server.file(run, "report.html")

    # The run there is deleted; what is missing is all of it, for a new one.
    server.ask("mlflow/runs/delete!", run_id=run.id)
    (run_dir / "trackers.json").write_text(json.dumps({"mlflow": state(run_dir) | {"status": None}}))
    process = automodel(run_dir, tmp_path / "output", tracked(server, "killed", description="shorter"))
    assert runs.finish([process]) == 0
    told = (tmp_path / "output").read_text()
    assert "holds this run, finished" in told
    assert f"WARNING mlflow: run {run.id} is not continued (it was deleted" in told
    (new,) = server.runs("killed")
    assert new.id != run.id
    require_every_row_once(server, new, run_dir)


def test_what_ends_a_run_is_its_status(server: Server, tmp_path: Path) -> None:
    process = automodel(tmp_path / "stopped", tmp_path / "output", tracked(server, "stopped") | SLOW)
    wait_until(process, lambda: delivered(tmp_path / "stopped", 1))
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish([process]) == 75
    (run,) = server.runs("stopped")
    assert run.status == "KILLED"
    require_every_row_once(server, run, tmp_path / "stopped")

    overrides = tracked(server, "failed") | {"optimizer.lr": "1.0e+30", "clip_grad_norm": "null"}
    assert runs.finish([automodel(tmp_path / "failed", tmp_path / "output", overrides)]) == 1
    assert "finite numbers are needed to go on" in (tmp_path / "output").read_text()
    assert server.runs("failed")[0].status == "FAILED"


def test_a_server_that_is_killed_neither_stops_nor_changes_a_run(
    server: Server, tmp_path: Path, untracked: Path
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    overrides = tracked(server, "away", log_artifacts="[config, report, export]")
    process = automodel(run_dir, output, overrides | SLOW)
    wait_until(process, lambda: delivered(run_dir, 1))
    server.kill()
    assert runs.finish([process]) == 0
    told = output.read_text()
    (warning,) = warnings_of_mlflow(told)
    assert warning.startswith("WARNING mlflow does not take the run: ")
    assert "mlflow has not got " in told
    assert told.count("Traceback") == told.count("urllib3") == 0
    runs.assert_same_run(run_dir, untracked)

    # Nobody begins a run that nobody would see; one that goes on does so.
    fresh = tmp_path / "fresh"
    assert runs.finish([automodel(fresh, output, overrides)]) == 1
    told = output.read_text()
    assert f"tracking_uri: tracking_uri={server.address} does not answer as an MLflow server or database (" in told
    assert "start it, correct the address, or leave the section out (--mlflow null)" in told
    assert not fresh.exists()
    (killed,) = runs.start(CONFIG, fresh, changes(LONG))
    runs.kill_when([killed], fresh / "checkpoints/step_000020")
    assert runs.finish([automodel(fresh, output, overrides)]) == 0
    told = output.read_text()
    at_the_start, later = warnings_of_mlflow(told)
    assert at_the_start.endswith("; the run goes on, and what is missing there is delivered once it answers")
    assert later.startswith("WARNING mlflow does not take the run: ")
    runs.assert_same_run(fresh, untracked)

    server.restart()
    for folder in (run_dir, fresh):
        assert runs.finish([automodel(folder, output, overrides)]) == 0
        told = output.read_text()
        assert "mlflow: what is missing there of" in told
        assert warnings_of_mlflow(told) == []
    first, second = server.runs("away")
    for run, folder in ((first, run_dir), (second, fresh)):
        assert run.status == "FINISHED"
        require_every_row_once(server, run, folder)
        assert server.files(run) == ["config.yaml", "export", "report.html"]
    exported = server.file(first, "export/model.safetensors")
    assert exported == (run_dir / "export/model.safetensors").read_bytes()


def test_without_a_server_it_is_a_database_in_this_folder(tmp_path: Path) -> None:
    recipe = runs.ROOT / "recipes/src/am_recipes/sft.py"
    options = [f"--{key}={value}" for key, value in changes({"mlflow.run_name": "first"}).items()]
    arguments = ["-c", str(CONFIG), "--run_dir", "run", *options]
    assert runs.finish(runs.start_file(recipe, arguments, tmp_path, tmp_path / "printed")) == 0
    told = (tmp_path / "printed/0.txt").read_text()
    assert f"in sqlite:///{tmp_path}/mlflow.db; to look at it: mlflow ui --backend-store-uri" in told
    assert "INFO" not in told
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("first", "FINISHED")]
        losses = database.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
    database.close()
    assert losses == [(row["step"], row["loss"]) for row in runs.metrics(tmp_path / "run") if "loss" in row]
    (report,) = (tmp_path / "mlruns").rglob("report.html")
    assert report.stat().st_size > 1000
