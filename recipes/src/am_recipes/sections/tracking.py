"""Sections of the services that a run is delivered to (`am_recipes.trackers`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

from am_recipes.sections.kinds import PositiveInt, Text
from am_recipes.settings import Call, Check, DefaultTarget, Inline, Target

if TYPE_CHECKING:
    from am_recipes.sinks.tracker import Tracker

Address: TypeAlias = Annotated[
    str,
    Check(
        lambda text: "://" in text or text == "databricks",
        "must be an address, such as http://HOST:PORT, or a database, such as sqlite:///FILE",
    ),
]
Artifact: TypeAlias = Literal["config", "report", "export"]
_FILES: Mapping[str, str] = {"config": "config.yaml", "report": "report.html", "export": "export"}
# What their clients take beside the keys of the section. The last line is what the tracker gives them.
_WANDB = DefaultTarget(
    "wandb.init",
    (
        *("dir", "config_exclude_keys", "config_include_keys", "job_type", "force", "resume_from", "fork_from"),
        *("tensorboard", "sync_tensorboard", "monitor_gym", "save_code", "settings"),
        *("id", "config", "resume", "reinit", "allow_val_change"),
    ),
)
_TRACKIO = DefaultTarget(
    "trackio.init",
    (
        *("group", "server_url", "dataset_id", "bucket_id", "private", "embed", "auto_log_gpu", "gpu_log_interval"),
        *("auto_log_cpu", "cpu_log_interval", "webhook_url", "webhook_min_level"),
        *("config", "resume"),
    ),
)


class Tracking(Protocol):
    """A section of a config that names a tracker."""

    def prepare(self) -> None:
        """Find the package, without an import, and set what that reads. Raises ValueError where it is not there."""
        ...

    def reach(self) -> None:
        """Import the package and ask the service for an answer, in seconds. Raises ValueError or OSError, whose message
        begins with the key (`tracking_uri=`), where there is none.
        """
        ...

    def tracker(self) -> Tracker:
        """The tracker itself; it imports and opens nothing yet."""
        ...

    def artifacts(self) -> Sequence[str]:
        """What of the run directory it gets: names of files and folders."""
        ...


@dataclass(frozen=True)
class Mlflow:
    """A run of an MLflow server, or of a database on this machine."""

    experiment_name: Text = "automodel-experiment"
    """Made where it is not there."""
    run_name: str | None = None
    """Null or empty: the name of run_dir."""
    tracking_uri: Address | None = None
    """Address of the server; null: $MLFLOW_TRACKING_URI, or MLflow's own default, a database in this folder."""
    artifact_location: Text | None = None
    """Where a new experiment keeps its files; null: where the server says."""
    tags: Mapping[str, Any] | None = None
    """Further tags of the run."""
    resume: bool = True
    """A launch that continues a run continues it in MLflow too; false: each launch is a run there."""
    description: Text | None = None
    """Text on the page of the run."""
    flatten_depth: PositiveInt | None = 1
    """Sections that become part of a parameter's name; what lies deeper is JSON in one value. Null: all."""
    log_artifacts: tuple[Artifact, ...] = ("config", "report")
    """What of the run directory is uploaded at the end (config at the beginning too)."""

    def prepare(self) -> None:
        require_package("mlflow")

    def reach(self) -> None:
        from am_recipes.sinks import mlflow

        mlflow.reach(self)

    def tracker(self) -> Tracker:
        from am_recipes.sinks.mlflow import MlflowTracker

        return MlflowTracker(self)

    def artifacts(self) -> Sequence[str]:
        return files(self.log_artifacts)


@dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases: at a server, or in a folder that `wandb sync` uploads."""

    init: Annotated[Target, Inline(), _WANDB]
    """Further arguments of wandb.init, such as job_type and settings."""
    project: Text = "automodel"
    """Made where it is not there."""
    entity: str | None = None
    """The team; null: your own."""
    name: str | None = None
    """Null or empty: the name of run_dir."""
    group: str | None = None
    """What it is shown together with."""
    tags: tuple[Text, ...] = ()
    """Labels of the run."""
    notes: str | None = None
    """Text on the page of the run."""
    enable: bool = True
    """Whether it is used at all."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where there is a key and the server answers, offline elsewhere. WANDB_MODE says it for auto."""
    log_artifacts: tuple[Artifact, ...] = ("config", "report")
    """What of the run directory is kept as artifacts."""

    def __post_init__(self) -> None:
        _require_own(self.init, _WANDB)

    @property
    def is_on(self) -> bool:
        """Whether there is a run of it; `WANDB_MODE=disabled` holds for `auto`."""
        mode = os.environ.get("WANDB_MODE") if self.mode == "auto" else self.mode
        return self.enable and mode != "disabled"

    def calls(self, key: str) -> Iterator[Call]:
        """The target of the section, where it is given more than the section knows."""
        if self.init.arguments:
            given = ("project", "entity", "name", "group", "tags", "notes", "mode")
            yield Call(key, self.init, (*given, "id", "config", "resume", "reinit", "allow_val_change"))

    def prepare(self) -> None:
        require_package("wandb")

    def reach(self) -> None:
        from am_recipes.sinks import wandb

        wandb.reach(self)

    def tracker(self) -> Tracker:
        from am_recipes.sinks.wandb import WandbTracker

        return WandbTracker(self)

    def artifacts(self) -> Sequence[str]:
        return files(self.log_artifacts)


@dataclass(frozen=True)
class TensorBoard:
    """Event files for TensorBoard."""

    log_dir: Path | None = None
    """Where the run gets a folder of its name; null: tensorboard in the run directory."""

    def prepare(self) -> None:
        require_package("tensorboard")

    def reach(self) -> None:
        from am_recipes.sinks import tensorboard

        tensorboard.reach(self)

    def tracker(self) -> Tracker:
        from am_recipes.sinks.tensorboard import TensorBoardTracker

        return TensorBoardTracker(self)

    def artifacts(self) -> Sequence[str]:
        return ()


@dataclass(frozen=True)
class Trackio:
    """A run of trackio: in a database on this machine, or in a Space."""

    init: Annotated[Target, Inline(), _TRACKIO]
    """Further arguments of trackio.init, such as group and server_url."""
    project: Text = "automodel"
    """Made where it is not there."""
    name: Text | None = None
    """Null: the name of run_dir."""
    space_id: Text | None = None
    """A Space of Hugging Face that keeps the run; null: this machine alone."""
    dir: Path | None = None
    """Where the database is; null: $TRACKIO_DIR, or trackio in the cache of Hugging Face."""
    log_artifacts: tuple[Artifact, ...] = ("config", "report")
    """What of the run directory is kept as artifacts."""

    def __post_init__(self) -> None:
        _require_own(self.init, _TRACKIO)

    @property
    def is_local(self) -> bool:
        """Whether rows stay on this machine, in its database."""
        elsewhere = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
        given = self.space_id or self.init.arguments.get("server_url")
        return given is None and not any(os.environ.get(name) for name in elsewhere)

    def calls(self, key: str) -> Iterator[Call]:
        """The target of the section, where it is given more than the section knows."""
        if self.init.arguments:
            yield Call(key, self.init, ("project", "name", "space_id", "config", "resume"))

    def prepare(self) -> None:
        require_package("trackio")
        if self.dir is not None:
            # For the process from here on: the package reads it once, when it is imported.
            os.environ["TRACKIO_DIR"] = str(self.dir.absolute())

    def reach(self) -> None:
        from am_recipes.sinks import trackio

        # Not done yet where a program calls the recipe and has not checked its targets.
        self.prepare()
        trackio.reach(self)

    def tracker(self) -> Tracker:
        from am_recipes.sinks.trackio import TrackioTracker

        return TrackioTracker(self)

    def artifacts(self) -> Sequence[str]:
        return files(self.log_artifacts)


def files(artifacts: Sequence[Artifact]) -> list[str]:
    """Where in a run directory they lie."""
    return [_FILES[name] for name in artifacts]


def require_package(name: str) -> None:
    """Refuse a tracker whose package is not installed: ValueError. A folder of that name, as trackers make, is none."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f'needs the package {name}, which is not installed: pip install "am-recipes[{name}]"')


def _require_own(init: Target, own: DefaultTarget) -> None:
    """Refuse another callable than the client's: the other keys of the section are its arguments too."""
    if init.path != own.path:
        raise init.places.get("_target_", init.place).error(f"must be {own.path}, got {init.path!r}; leave it out")
