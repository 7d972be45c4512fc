"""A real `mlflow server` on this machine, with a database and a folder for files, asked through its REST API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from am_testing import free_port

SECONDS_TO_START = 180


class Server:
    """`mlflow server`, started and answering; `kill` takes it away at once, `restart` brings it back."""

    def __init__(self, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        # It would start a second server for jobs that nobody has here, and tell its makers about itself.
        self._environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
        command += ["--port", self.address.rpartition(":")[2], "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        self._command = [*command, "--artifacts-destination", str(folder / "files")]
        self.restart()

    def restart(self) -> None:
        """Start it, or start it again, at the same address, on the same database."""
        log = self._folder / "server.log"
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                self._command,
                stdout=stream,
                stderr=stream,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.address}/health", timeout=5).status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL for the server and what started it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def ask(self, path: str, **body: object) -> dict[str, Any]:
        """The answer of the API to a GET with `body` as its query, or a POST where the path ends with a `!`."""
        address = f"{self.address}/api/2.0/{path.rstrip('!')}"
        if path.endswith("!"):
            request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        else:
            request = urllib.request.Request(f"{address}?{urllib.parse.urlencode(body)}")
        answer: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=30).read())
        return answer

    def runs(self, experiment: str) -> list[Stored]:
        """The runs of an experiment, the oldest first."""
        found = self.ask("mlflow/experiments/get-by-name", experiment_name=experiment)["experiment"]["experiment_id"]
        answer = self.ask("mlflow/runs/search!", experiment_ids=[found])
        stored = [Stored.of(run) for run in answer.get("runs", [])]
        return sorted(stored, key=lambda run: run.began)

    def history(self, run: Stored, metric: str) -> list[tuple[int, float, int]]:
        """Step, value and milliseconds of each value."""
        answer = self.ask("mlflow/metrics/get-history", run_id=run.id, metric_key=metric)
        values = [(value.get("step", 0), value["value"], value["timestamp"]) for value in answer.get("metrics", [])]
        return sorted((int(step), float(value), int(when)) for step, value, when in values)

    def files(self, run: Stored) -> list[str]:
        return sorted(file["path"] for file in self.ask("mlflow/artifacts/list", run_id=run.id).get("files", []))

    def file(self, run: Stored, path: str) -> bytes:
        address = f"{self.address}/get-artifact?run_id={run.id}&path={path}"
        content: bytes = urllib.request.urlopen(address, timeout=30).read()
        return content


@dataclass(frozen=True)
class Stored:
    """A run as the server has it."""

    id: str
    name: str
    status: str
    began: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[str]

    @classmethod
    def of(cls, run: dict[str, Any]) -> Stored:
        info, data = run["info"], run["data"]
        params, tags = ({item["key"]: item["value"] for item in data.get(kind, [])} for kind in ("params", "tags"))
        metrics = [metric["key"] for metric in data.get("metrics", [])]
        return cls(info["run_id"], info["run_name"], info["status"], int(info["start_time"]), params, tags, metrics)
