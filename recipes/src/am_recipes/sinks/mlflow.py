"""MLflow: a run of a tracking server, or of a database on this machine."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import json
import logging
import os
import posixpath
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from am_recipes.settings import without_secrets
from am_recipes.sinks.address import require_connection
from am_recipes.sinks.tracker import Status, Tracked, TrackedRow, numbers, row_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunData

    from am_recipes.sections import Mlflow

# Unless they are set already, and for this process alone. MLflow reports its use to its makers, and prints where a run
# is to be seen, which the log does. Its client would wait 120 s for an answer and ask 8 times; here every call is
# repeated from outside of it.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
# Limits of MLflow's API: entries of a batch, characters of a name, of a parameter's and of a tag's value.
_PARAMS, _METRICS, _NAME, _VALUE, _TAG = 100, 1000, 250, 6000, 8000

# The parameters that are tags too.
_TAGS = "mlflow.tags."
# The tag that says which is the last row: "7", or "7 validation".
_DELIVERED = "automodel.delivered"

Item = TypeVar("Item")


class MlflowTracker:
    """A run of MLflow. Parameters cannot change there: another value that a later launch has becomes a tag.

    The last row that it has is a tag too, set in the request that brings it: a process that is killed before it knows
    of the answer leaves no step twice.
    """

    def __init__(self, settings: Mlflow) -> None:
        self._settings = settings
        # Once it is begun.
        self._id = ""
        self._undescribed: tuple[Tracked, Mapping[str, str]] | None = None
        self.where = ""

    def begin(self, run: Tracked) -> str:
        self._client = _client(self._settings)
        # One that a failure after its creation has left is continued too.
        identifier = self._id or (run.id if self._settings.resume else None)
        data = None if identifier is None else self._data_of(identifier)
        if identifier is None or data is None:
            self._id = identifier = self._create(run)
            self._has = (-1, False)
            self._undescribed = run, {}
        else:
            self._id = identifier
            step, _, validation = data.tags.get(_DELIVERED, "-1").partition(" ")
            self._has = int(step), bool(validation)
            self._client.update_run(identifier, status="RUNNING")
            self._undescribed = run, data.params
        self.where = _where(self._client, identifier)
        return identifier

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        from mlflow.entities import Metric, RunTag

        self._describe()
        batch: list[Metric] = []
        new = [row for row in rows if row_key(row) > self._has]
        for row, following in itertools.zip_longest(new, new[1:], fillvalue=None):
            assert row is not None
            step, validation = row_key(row)
            batch += [
                Metric(_name(name), value, _milliseconds(row["time"]), step) for name, value in numbers(row).items()
            ]
            if following is None or len(batch) + len(following) > _METRICS:
                delivered = RunTag(_DELIVERED, f"{step} validation" if validation else str(step))
                self._client.log_batch(self._id, metrics=batch, tags=[delivered])
                self._has, batch = (step, validation), []

    def artifact(self, path: Path) -> None:
        self._describe()
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), path.name)
        else:
            self._client.log_artifact(self._id, str(path))

    def end(self, status: Status) -> None:
        self._describe()
        self._client.set_terminated(self._id, status)

    def abandon(self) -> None:
        """Nothing: the thread of a request that hangs ends with the process."""

    def _data_of(self, identifier: str) -> RunData | None:
        """Parameters and tags that the run has; None where it is not there any more."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(identifier)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run.data if run.info.lifecycle_stage == "active" else None

    def _create(self, run: Tracked) -> str:
        created = self._client.create_run(self._experiment(), run_name=self._settings.run_name or run.name)
        return str(created.info.run_id)

    def _experiment(self) -> str:
        """The id of the experiment, which is made where there is none."""
        from mlflow.exceptions import MlflowException

        name, place = self._settings.experiment_name, self._settings.artifact_location
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=place))
            except MlflowException as error:
                # Another run has made it meanwhile.
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise error
        return str(experiment.experiment_id)

    def _describe(self) -> None:
        """Parameters and tags, once; after `begin`, whose id is remembered whatever becomes of them."""
        from mlflow.entities import Param, RunTag

        if self._undescribed is None:
            return
        run, known = self._undescribed
        values = {
            _name(key): _cut(value, _VALUE) for key, value in grouped(run.params, self._settings.flatten_depth).items()
        }
        tags = self._tags(run) | {
            f"now.{key}": value for key, value in values.items() if known.get(key, value) != value
        }
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for params in _batches(new, _PARAMS):
            self._client.log_batch(self._id, params=params)
        named = {_name(key): _cut(value, _TAG) for key, value in tags.items()}
        for some in _batches([RunTag(key, value) for key, value in named.items()], _PARAMS):
            self._client.log_batch(self._id, tags=some)
        self._undescribed = None

    def _tags(self, run: Tracked) -> dict[str, str]:
        # Those of the config as it is saved: secrets and what came from the environment are references.
        own = {key.removeprefix(_TAGS): str(value) for key, value in run.params.items() if key.startswith(_TAGS)}
        tags = {**run.tags, **own}
        tags |= {"run_dir": str(run.run_dir), "host": socket.gethostname()}
        # Those that MLflow's pages show in places of their own.
        tags |= {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}
        with contextlib.suppress(KeyError, OSError):
            tags["mlflow.user"] = getpass.getuser()
        if "git_commit" in run.tags:
            tags["mlflow.source.git.commit"] = run.tags["git_commit"].removesuffix("-dirty")
        if self._settings.description is not None:
            tags["mlflow.note.content"] = self._settings.description
        return tags


def reach(settings: Mlflow) -> None:
    """Ask for the experiment. Raises ValueError or ConnectionError where nobody answers, or it was deleted."""
    address = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if address is not None:
        try:
            require_connection(address)
        except ConnectionError as error:
            raise ConnectionError(_unreachable(address, error)) from error
    _set_defaults()
    from mlflow.exceptions import MlflowException

    try:
        client = _client(settings)
        experiment = client.get_experiment_by_name(settings.experiment_name)
    # An ImportError names the driver of a database.
    except (MlflowException, OSError, ImportError) as error:
        raise ConnectionError(_unreachable(address or "null", error)) from error
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment_name={settings.experiment_name} is deleted at {client.tracking_uri}; choose another, or "
            f"restore it: mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )


def _unreachable(address: str, error: Exception) -> str:
    what = without_secrets(" ".join(str(error).split())[:300])
    return (
        f"tracking_uri={without_secrets(address)} does not answer as an MLflow server or database ({what}); start it, "
        "correct the address, or leave the section out (--mlflow null)"
    )


def _set_defaults() -> None:
    """Before MLflow is imported, which reads some of them then."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def _client(settings: Mlflow) -> MlflowClient:
    _set_defaults()
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        # Each table that it makes is a line otherwise. Its import sets the level, so this comes after it.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=settings.tracking_uri)


def _where(client: MlflowClient, identifier: str) -> str:
    address, run = without_secrets(str(client.tracking_uri)), client.get_run(identifier)
    if address.startswith("http"):
        return f"{address}/#/experiments/{run.info.experiment_id}/runs/{identifier}"
    return f"run {identifier} in {address}; to look at it: mlflow ui --backend-store-uri {shlex.quote(address)}"


def grouped(params: Mapping[str, object], depth: int | None) -> dict[str, object]:
    """Parameters by dotted key, with what lies deeper than `depth` sections as one mapping; None: nothing does."""
    result: dict[str, object] = {}
    for key, value in params.items():
        *sections, name = key.split(".")
        if depth is None or len(sections) <= depth:
            result[key] = value
        else:
            inner = result.setdefault(".".join([*sections, name][: depth + 1]), {})
            assert isinstance(inner, dict)
            inner[".".join([*sections, name][depth + 1 :])] = value
    return result


def _cut(value: object, limit: int) -> str:
    """A value as text of at most `limit` characters; one that was cut says so."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) <= limit:
        return text
    end = f" ... cut, {len(text)} characters"
    return text[: limit - len(end)] + end


def _name(name: str) -> str:
    """A name as MLflow takes it, which could be the path of a file below a folder."""
    taken = re.sub(r"[^\w\-. :/]", "_", name)[:_NAME] or "_"
    is_path = posixpath.normpath(taken) == taken and not taken.startswith(("/", ".."))
    return taken if is_path and taken != "." else re.sub("[/.]", "_", taken)


def _milliseconds(seconds: float | int | None) -> int:
    assert seconds is not None
    return int(1000 * seconds)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
