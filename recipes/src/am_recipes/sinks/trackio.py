"""trackio: an SQLite database on this machine, or a Space or a server of trackio's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from am_recipes.sinks import address
from am_recipes.sinks.tracker import Status, Tracked, TrackedRow, numbers, row_key

if TYPE_CHECKING:
    from am_recipes.sections import Trackio


class TrackioTracker:
    """A run of trackio.

    `log` of a trackio run queues a row and swallows what goes wrong with it later. In a local database rows are written
    without it, each under a name of its own: they are there when the call returns, and none is there twice.
    """

    def __init__(self, settings: Trackio) -> None:
        self._settings = settings
        self._step = 0
        self.where = ""

    def begin(self, run: Tracked) -> str:
        import trackio

        self._step = run.resume_step or 0
        self._run: Any = self._init(run, "never" if run.id is None else "allow")
        if run.id is not None and self._run.id != run.id:
            # trackio finds a run by its name, and gave a later one, or a new one.
            self._run = self._init(run, "never")
        self._is_local = self._settings.is_local and trackio.utils.get_storage_mode() == "sqlite"
        project = self._settings.project
        folder = f" in {trackio.TRACKIO_DIR}; to look at it: {self._shown_by()}"
        self.where = f"{self._run.name} of project {project}{folder if self._settings.is_local else ''}"
        return str(self._run.id)

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        import trackio

        values, steps = [numbers(row) for row in rows], [row_key(row)[0] for row in rows]
        self._step = steps[-1]
        if not self._is_local:
            for step, value in zip(steps, values, strict=True):
                self._run.log(value, step=step)
            return
        trackio.SQLiteStorage.bulk_log(
            project=self._settings.project,
            run=self._run.name,
            run_id=self._run.id,
            metrics_list=values,
            steps=steps,
            timestamps=[datetime.fromtimestamp(row["time"] or 0, UTC).isoformat() for row in rows],
            config=self._run.config,
            log_ids=[f"{self._run.id}-{row['step']}-{'step' if 'loss' in row else 'validation'}" for row in rows],
        )

    def artifact(self, path: Path) -> None:
        self._run.log_artifact(path, name=f"{self._run.name}-{path.name}", type=path.stem)

    def end(self, status: Status) -> None:
        import trackio

        levels = trackio.AlertLevel
        level = {"FINISHED": levels.INFO, "FAILED": levels.ERROR, "KILLED": levels.WARN}[status]
        # trackio keeps no status of a run.
        self._run.alert(status, level=level, step=self._step)
        self._run.finish()

    def abandon(self) -> None:
        """Nothing: its threads end with the process."""

    def _init(self, run: Tracked, resume: str) -> Any:
        import trackio

        settings = self._settings
        # Its monitors are threads that would take their time from the steps; a config may turn them on.
        options = {"auto_log_cpu": False, "auto_log_gpu": False} | settings.init.built_arguments()
        return trackio.init(
            project=settings.project,
            name=settings.name or run.name,
            space_id=settings.space_id,
            config=run.config,
            resume=resume,
            **options,
        )

    def _shown_by(self) -> str:
        folder = self._settings.dir
        here = "" if folder is None else f"TRACKIO_DIR={shlex.quote(str(folder.absolute()))} "
        return f"{here}trackio show --project {shlex.quote(self._settings.project)}"


def reach(settings: Trackio) -> None:
    """Import the package. Raises ValueError or ConnectionError where it cannot be used."""
    import huggingface_hub
    import trackio

    if settings.dir is not None and settings.dir.absolute() != trackio.TRACKIO_DIR:
        raise ValueError(
            f"dir={settings.dir}, and this process has imported trackio already, with {trackio.TRACKIO_DIR}; set "
            "TRACKIO_DIR before, or leave dir out"
        )
    if settings.space_id is not None and huggingface_hub.get_token() is None:
        raise ValueError(f"space_id={settings.space_id} needs a login: hf auth login, or HF_TOKEN")
    server = settings.init.arguments.get("server_url")
    if server is not None:
        try:
            address.require_connection(str(server).partition("?")[0])
        except ConnectionError as error:
            raise ConnectionError(f"server_url takes no connection ({error}); start it, or correct it") from error
