"""Trackers that need no account: what they keep of a run that failed and was continued, was killed, or came twice."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from am_recipes import configs, sections
from am_recipes.settings import Target
from am_recipes.sinks.tracker import Incomplete, Tracked, Tracker
from integration_tests import read_trackers, runs
from integration_tests.test_contracts import BASE, MINE

ROWS: list[dict[str, Any]] = [
    {"step": 0, "val_loss": 7.5, "time": 1000.0},
    {"step": 1, "loss": 7.25, "tokens": 12, "time": 1001.0},
    {"step": 2, "loss": None, "tokens": 13, "time": 1002.0},
    {"step": 2, "val_loss": 7.0, "time": 1002.0},
    {"step": 3, "loss": 6.5, "tokens": 14, "time": 1003.0},
]
SECRET = "hunter" + "0" * 34
KEYS = [(0, True), (1, False), (2, False), (2, True), (3, False)]


def told(run_dir: Path, **more: Any) -> Tracked:
    return Tracked(name="run", run_dir=run_dir, params={"optimizer.lr": 0.5, "peft": None}, tags={"a": "b"}, **more)


def in_process(function: Callable[..., None], *arguments: object) -> int | None:
    """The exit status of a process of its own that calls `function`: clients keep what the environment once was."""
    process = runs.SERVER.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def wandb_section(mode: Literal["auto", "online", "offline"] = "offline") -> sections.Wandb:
    return sections.Wandb(Target("wandb.init", {}), mode=mode)


def command_of(file: Path) -> str:
    try:
        return file.read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def service_files() -> list[Path]:
    """The command lines of W&B's processes, which name the process they belong to."""
    return [file for file in Path("/proc").glob("[0-9]*/cmdline") if "wandb-core" in command_of(file)]


def services() -> list[str]:
    return [command_of(file) for file in service_files()]


@pytest.fixture(scope="module")
def failed_and_continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a run of nine steps that all four were told of, whose first launch failed after the third, and what
    they kept by then.
    """
    folder = tmp_path_factory.mktemp("trackers")
    config = BASE | {
        "dataset": {"_target_": f"{MINE}.Few"},
        "validation_dataset": {"path": "recipes/data/chat/validation.jsonl", "split": "train[:4]"},
        "dataloader": {"shuffle": False},
        "step_scheduler": {"global_batch_size": 2, "max_steps": 9, "num_epochs": 1, "val_every_steps": 3},
        "mlflow": {
            "tracking_uri": f"sqlite:///{folder}/mlflow.db",
            "artifact_location": f"{folder}/mlflow",
            "tags": {"team": "blue", "a//b": 1, "api_key": SECRET},
        },
        "wandb": {
            "mode": "offline",
            "tags": ["one"],
            "log_artifacts": ["config", "export"],
            "settings": {"api_key": SECRET},
        },
        "tensorboard": {},
        "trackio": {"dir": f"{folder}/trackio", "project": "four", "group": "g"},
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(config))
    process = runs.start(folder / "given.yaml", folder / "run", {})
    assert runs.finish(process) == 1
    assert not [command for command in services() if f"--pid {process[0].pid}" in command]
    before = everywhere(folder)
    runs.train(folder, "run", folder / "given.yaml", {"step_scheduler.num_epochs": "3"})
    return folder, before


def everywhere(folder: Path) -> dict[str, Any]:
    """The run as each tracker keeps it; it must be one there."""
    (mlflow,) = read_trackers.mlflow(folder / "mlflow.db").values()
    (wandb,) = read_trackers.wandb(folder / "run").values()
    (trackio,) = read_trackers.trackio(folder / "trackio", "four").values()
    tensorboard = read_trackers.tensorboard(folder / "run" / "tensorboard")
    return {"mlflow": mlflow, "wandb": wandb, "tensorboard": tensorboard, "trackio": trackio}


def losses(rows: read_trackers.Rows) -> list[tuple[tuple[int, bool], float]]:
    return [((step, bool(validation)), row["val_loss" if validation else "loss"]) for (step, validation), row in rows]


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard", "trackio"])
def test_every_row_is_there_once_over_a_failure_and_its_continuation(
    failed_and_continued: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, _ = failed_and_continued
    rows = runs.metrics(folder / "run")
    expected = [((row["step"], "loss" not in row), row["loss"] if "loss" in row else row["val_loss"]) for row in rows]
    assert [step for (step, validation), _ in expected if not validation] == list(range(1, 10))
    assert [step for (step, validation), _ in expected if validation] == [0, 3, 6, 9]
    found = losses(everywhere(folder)[name].rows)
    # TensorBoard keeps float32.
    assert found == [(key, pytest.approx(value, rel=1e-6 if name == "tensorboard" else 0)) for key, value in expected]


@pytest.mark.parametrize(
    ("name", "first", "both"),
    [
        ("mlflow", ["FAILED"], ["FINISHED"]),
        ("wandb", [1], [1, 0]),
        # Texts of each launch; then that of its page of hyperparameters: 1 is a success.
        ("tensorboard", ["FAILED"], ["FAILED", "FINISHED", 1]),
        ("trackio", ["FAILED"], ["FAILED", "FINISHED"]),
    ],
)
def test_every_tracker_knows_how_each_launch_ended(
    failed_and_continued: tuple[Path, dict[str, Any]], name: str, first: list[Any], both: list[Any]
) -> None:
    folder, before = failed_and_continued
    assert before[name].statuses == first
    assert everywhere(folder)[name].statuses == both


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard", "trackio"])
def test_the_config_is_there(failed_and_continued: tuple[Path, dict[str, Any]], name: str) -> None:
    params = everywhere(failed_and_continued[0])[name].params
    assert float(params["optimizer.lr"]) == 1e-3
    assert str(params["dataset._target_"]) == f"{MINE}.Few"
    assert str(params["model.dtype"]) == "float32"


def test_no_secret_is_anywhere(failed_and_continued: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = failed_and_continued
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "given.yaml"]
    assert {file.suffix for file in files} >= {".db", ".wandb", ".html", ".json", ".yaml"}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_tags_of_mlflow_are_those_of_the_config_as_it_is_saved(
    failed_and_continued: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = failed_and_continued
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        tags = dict(database.execute("SELECT key, value FROM tags"))
    assert (tags["team"], tags["a__b"], tags["api_key"]) == ("blue", "1", "${API_KEY}")
    told = "mlflow.tags.api_key is a secret, and config.yaml has ${API_KEY} in its place: to use that file, set API_KEY"
    assert told in json.loads((folder / "run" / "run.json").read_text())["notes"]
    assert "version.torch" in tags
    assert len(tags) < 40


def test_wandb_keeps_the_config_and_the_export_offline(failed_and_continued: tuple[Path, dict[str, Any]]) -> None:
    assert set(everywhere(failed_and_continued[0])["wandb"].artifacts) == {"config", "model"}


def killed_with_its_rows(folder: Path) -> None:
    tracker = wandb_section().tracker()
    tracker.begin(told(folder, id="same"))
    tracker.rows(ROWS)
    os.kill(os.getpid(), signal.SIGKILL)


def stopped_after_all_rows(folder: Path) -> None:
    sys.argv = ["automodel", f"--dataset.hf_token={SECRET}"]
    tracker = wandb_section().tracker()
    assert tracker.begin(told(folder, id="same", resume_step=2)) == "same"
    tracker.rows(ROWS[3:])
    # Once more, as after a call that failed.
    tracker.rows(ROWS[3:])
    tracker.end("KILLED")


def test_what_wandb_has_taken_outlives_a_kill_and_its_process_does_not(tmp_path: Path) -> None:
    process = runs.SERVER.Process(target=killed_with_its_rows, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while [command for command in services() if f"--pid {process.pid}" in command]:
        assert time.monotonic() < deadline, "W&B's process stays"
        time.sleep(0.05)
    kept = read_trackers.wandb(tmp_path)["same"]
    assert [(step, bool(validation)) for (step, validation), _ in kept.rows] == KEYS
    assert kept.rows[1][1]["loss"] == 7.25
    assert kept.rows[1][1]["_timestamp"] == 1001.0
    assert math.isnan(kept.rows[2][1]["loss"])
    assert kept.statuses == []

    assert in_process(stopped_after_all_rows, tmp_path) == 0
    kept = read_trackers.wandb(tmp_path)["same"]
    # Those that came twice to one launch are there once; what another launch has is left to W&B, which goes by `_step`.
    assert [row["_step"] for _, row in kept.rows] == [1, 2, 4, 5, 6, 5, 6]
    assert kept.statuses == [255]
    assert [file for file in tmp_path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()] == []


def test_tensorboard_hides_what_comes_again(tmp_path: Path) -> None:
    section = sections.TensorBoard(log_dir=tmp_path)
    tracker: Tracker = section.tracker()
    known = tracker.begin(told(tmp_path))
    tracker.rows(ROWS[:4])
    # A launch that was killed before it was remembered that the last rows arrived.
    second = section.tracker()
    assert second.begin(told(tmp_path, id=known, resume_step=1)) == known
    second.rows(ROWS[2:])
    second.end("KILLED")
    kept = read_trackers.tensorboard(tmp_path / "run")
    # NaN is left out.
    assert [(key, row) for key, row in kept.rows if "loss" in row or key[1]] == [
        ((0, True), {"val_loss": 7.5}),
        ((1, False), {"loss": 7.25, "tokens": 12}),
        ((2, True), {"val_loss": 7.0}),
        ((3, False), {"loss": 6.5, "tokens": 14}),
    ]
    assert kept.statuses == ["KILLED"]


def test_tensorboard_without_its_files_gets_everything_again(tmp_path: Path) -> None:
    section = sections.TensorBoard(log_dir=tmp_path / "events")
    assert section.tracker().begin(told(tmp_path, id="of a folder that was removed")) != "of a folder that was removed"


def test_runs_that_share_a_folder_of_tensorboard_hide_nothing_of_each_other(tmp_path: Path) -> None:
    section = sections.TensorBoard(log_dir=tmp_path / "two words")
    first = section.tracker()
    known = first.begin(told(tmp_path))
    assert first.where.endswith(f"tensorboard --logdir '{tmp_path}/two words/run'")
    first.rows(ROWS)
    first.end("FINISHED")
    # Another run directory of the same name.
    other = section.tracker()
    other.begin(told(tmp_path / "elsewhere"))
    other.rows(ROWS[:2])
    other.end("FINISHED")
    again = section.tracker()
    assert again.begin(told(tmp_path, id=known, resume_step=3)) == known
    again.rows([{"step": 4, "loss": 6.25, "time": 1004.0}])
    again.end("FINISHED")
    assert [key for key, _ in read_trackers.tensorboard(tmp_path / "two words" / "run").rows] == [*KEYS, (4, False)]
    assert [key for key, _ in read_trackers.tensorboard(tmp_path / "two words" / "run-2").rows] == KEYS[:2]


def trackio_with_rows_twice(folder: Path) -> None:
    section = sections.Trackio(Target("trackio.init", {}), dir=folder, project="p")
    section.reach()
    tracker = section.tracker()
    known = tracker.begin(told(folder))
    tracker.rows(ROWS)
    tracker.rows(ROWS[3:])
    tracker.end("KILLED")
    # A later run takes the name, by which trackio finds what to continue.
    other = section.tracker()
    assert other.begin(told(folder)) != known
    other.rows([ROWS[0] | {"time": 2000.0}])
    other.end("FINISHED")
    again = section.tracker()
    assert again.begin(told(folder, id=known)) != known
    again.rows(ROWS)
    again.end("FINISHED")


def test_trackio_has_a_row_once_and_a_run_to_itself(tmp_path: Path) -> None:
    assert in_process(trackio_with_rows_twice, tmp_path) == 0
    first, other, again = read_trackers.trackio(tmp_path, "p").values()
    assert [key for key, _ in first.rows] == KEYS
    assert first.rows[1][1] == {"loss": 7.25, "tokens": 12}
    assert first.rows[2][1]["loss"] == "NaN"
    assert first.params["optimizer.lr"] == 0.5
    assert first.params["launch.a"] == "b"
    assert first.statuses == ["KILLED"]
    assert [key for key, _ in other.rows] == KEYS[:1]
    assert [key for key, _ in again.rows] == KEYS


def refused_online(environment: dict[str, str], expected: str) -> None:
    os.environ.update(environment)
    with pytest.raises((ValueError, ConnectionError), match=expected):
        wandb_section("online").reach()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", "mode=online finds no key of http://127.0.0.1:9; wandb login, set WANDB_API_KEY, or mode offline"),
        ("0" * 40, "mode=online: http://127.0.0.1:9 does not answer"),
    ],
)
def test_wandb_online_is_refused_without_a_key_or_a_server(tmp_path: Path, key: str, expected: str) -> None:
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    assert in_process(refused_online, environment | ({"WANDB_API_KEY": key} if key else {}), expected) == 0


def refused_by_mlflow(folder: Path) -> None:
    for address in ("foo://bar", "file:///there", "nodriver://host/db"):
        with pytest.raises(ConnectionError, match=f"tracking_uri={address} does not answer as .* server or database"):
            sections.Mlflow(tracking_uri=address).reach()
    sections.Mlflow(tracking_uri=f"sqlite:///{folder}/mlflow.db").reach()


def test_an_address_that_mlflow_cannot_use_is_named(tmp_path: Path) -> None:
    assert in_process(refused_by_mlflow, tmp_path) == 0


def refused_settings_of_wandb() -> None:
    for settings, expected in ({"nonsense": 5}, "nonsense"), (5, "settings=5"), ({"console": "loud"}, "console"):
        with pytest.raises(ValueError, match=expected):
            sections.Wandb(Target("wandb.init", {"settings": settings}), mode="offline").reach()
    sections.Wandb(Target("wandb.init", {"settings": {"console": "wrap"}}), mode="offline").reach()


def test_settings_that_wandb_does_not_take_are_refused(tmp_path: Path) -> None:
    assert in_process(refused_settings_of_wandb) == 0


def auto_is_offline(folder: Path, environment: dict[str, str], expected: str) -> None:
    os.environ.update(environment)
    tracker = wandb_section("auto").tracker()
    tracker.begin(told(folder))
    assert expected in tracker.where
    tracker.rows(ROWS)
    tracker.end("FINISHED")


def test_wandb_auto_is_offline_where_nobody_answers(tmp_path: Path) -> None:
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    assert in_process(auto_is_offline, tmp_path, environment, "offline (mode=auto: http://127.0.0.1:9 does not") == 0
    (kept,) = read_trackers.wandb(tmp_path).values()
    assert len(kept.rows) == len(ROWS)


class Hanging(http.server.BaseHTTPRequestHandler):
    """Says that it is there, and answers nothing else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.was_asked.set()  # type: ignore[attr-defined]
        threading.Event().wait()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def hanging() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hanging)
    server.was_asked = threading.Event()
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_of_wandb_that_hangs_does_not_keep_a_stopped_run(hanging: Any, tmp_path: Path) -> None:
    # A process that ends by itself, as that of a user: one that is forked leaves out what W&B does at its end.
    environment = os.environ | {"WANDB_BASE_URL": f"http://127.0.0.1:{hanging.server_port}", "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-m", "am_recipes.sft", "-c", "recipes/configs/tiny.yaml", "--run_dir", str(tmp_path)]
    steps = ["--step_scheduler.max_steps", "10000", "--step_scheduler.val_every_steps", "null"]
    with (tmp_path.parent / "output").open("w+") as output:
        process = subprocess.Popen(
            [*command, *steps, "--wandb.mode", "online"],
            *(-1, None, None, output, output),
            env=environment,
            cwd=runs.ROOT,
        )
        try:
            assert hanging.was_asked.wait(90)
            deadline = time.monotonic() + 60
            while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").stat().st_size:
                assert time.monotonic() < deadline, "no step is done"
                time.sleep(0.05)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
            # 10 s are for what is left; SLURM kills 30 s after the signal.
            took = time.monotonic() - began
            print(f"ended {took:.1f} s after SIGTERM")
            assert took < 30
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        told = output.read()
    assert re.search(r"wandb has not got \d+ rows, from step [01] on and how the run ended; the same command", told)
    assert "Traceback" not in told
    assert not [command for command in services() if f"--pid {process.pid}" in command]


def begins_twice_in_vain(folder: Path, port: int) -> None:
    os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
    tracker = sections.Wandb(Target("wandb.init", {"settings": {"init_timeout": 1.0}}), mode="online").tracker()
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            tracker.begin(told(folder, id="same"))
        assert "in use" not in str(caught.value)


def test_a_beginning_that_hangs_is_tried_again(hanging: Any, tmp_path: Path) -> None:
    assert in_process(begins_twice_in_vain, tmp_path, hanging.server_port) == 0


def refuses_one_that_hangs(listening: socket.socket) -> None:
    os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{listening.getsockname()[1]}", "WANDB_API_KEY": "0" * 40}
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="does not answer"):
        wandb_section("online").reach()
    assert time.monotonic() - began < 30


def test_wandb_online_is_refused_where_nobody_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert in_process(refuses_one_that_hangs, listening) == 0


def begun_again(folder: Path) -> None:
    tracker = wandb_section().tracker()
    known = tracker.begin(told(folder))
    # As after a failure that came after it.
    assert tracker.begin(told(folder)) == known
    tracker.rows(ROWS)
    tracker.end("FINISHED")


def test_a_run_of_wandb_is_opened_once(tmp_path: Path) -> None:
    assert in_process(begun_again, tmp_path) == 0
    (kept,) = read_trackers.wandb(tmp_path).values()
    assert len(kept.rows) == len(ROWS)


def ended_without_its_process(folder: Path) -> None:
    tracker = wandb_section().tracker()
    tracker.begin(told(folder))
    tracker.rows(ROWS)
    (core,) = [file.parent.name for file in service_files() if f"--pid {os.getpid()}" in command_of(file)]
    os.kill(int(core), signal.SIGKILL)
    with pytest.raises(Incomplete, match="upload it: wandb sync "):
        tracker.end("FINISHED")


def test_an_end_that_wandb_does_not_take_is_said(tmp_path: Path) -> None:
    assert in_process(ended_without_its_process, tmp_path) == 0


def test_a_package_that_is_not_there_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    # An environment like this one but for the packages: links to everything else.
    names = ("mlflow", "wandb", "tensorboard", "trackio")
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in {Path(pytest.__file__).parents[1], Path(yaml.__file__).parents[1]}:
        for entry in folder.iterdir():
            if entry.name.partition("-")[0] not in names and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    sources = [*runs.ROOT.glob("packages/*/src"), runs.ROOT / "recipes" / "src"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*sources, packages]))}
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(BASE | {name: {}}))
    program = (
        "import sys; from am_recipes import cli\n"
        "for config in sys.argv[1:]:\n"
        "    assert cli.main([config, '--nproc-per-node', '1', '--run_dir', f'{config}.run']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    configs_of_each = [str(tmp_path / f"{name}.yaml") for name in names]
    command = [sys.executable, "-S", "-c", program, *configs_of_each]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr
    for name, config, told in zip(names, configs_of_each, done.stderr.splitlines(), strict=True):
        expected = f'needs the package {name}, which is not installed: pip install "am-recipes[{name}]"'
        assert told == f"{config}:{line_of(Path(config), name)}: {name}: {expected}"
    assert list(tmp_path.glob("*.run")) == []


def line_of(config: Path, key: str) -> int:
    return next(
        number for number, line in enumerate(config.read_text().splitlines(), start=1) if line.startswith(f"{key}:")
    )


def test_trackers_json_says_what_each_has(failed_and_continued: tuple[Path, dict[str, Any]]) -> None:
    content = json.loads((failed_and_continued[0] / "run" / "trackers.json").read_text())
    assert {
        name: (state["step"], state["validation"], state["status"]) for name, state in content.items()
    } == dict.fromkeys(("mlflow", "wandb", "tensorboard", "trackio"), (9, True, "FINISHED"))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"wandb": {"id": "x"}}, "wandb.id: the recipe passes this argument itself; remove it"),
        ({"wandb": {"resume": "must"}}, "wandb.resume: the recipe passes this argument itself; remove it"),
        ({"trackio": {"resume": "must"}}, "trackio.resume: the recipe passes this argument itself; remove it"),
    ],
)
def test_what_the_tracker_decides_is_refused(tmp_path: Path, section: dict[str, Any], expected: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(BASE | section))
    with pytest.raises(configs.ConfigError) as caught:
        configs.check_targets(configs.parse(tmp_path / "config.yaml"))
    assert expected in str(caught.value)
