"""Sections of the services that a run is delivered to (`am_recipes.trackers`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from am_recipes.sections.kinds import PositiveInt, Text

if TYPE_CHECKING:
    from am_recipes.sinks.tracker import Tracker

Artifact: TypeAlias = Literal["config", "report", "export"]
_FILES: Mapping[str, str] = {"config": "config.yaml", "report": "report.html", "export": "export"}


class Tracking(Protocol):
    """A section of a config that names a tracker."""

    def require(self) -> None:
        """Find the package, without an import. Raises ValueError where it is not there."""
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
    run_name: Text | None = None
    """Null: the name of run_dir."""
    tracking_uri: Text | None = None
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

    def require(self) -> None:
        require_package("mlflow")

    def reach(self) -> None:
        from am_recipes.sinks import mlflow

        mlflow.reach(self)

    def tracker(self) -> Tracker:
        from am_recipes.sinks.mlflow import MlflowTracker

        return MlflowTracker(self)

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
