"""Weights & Biases: a run at a server, or in a folder of the run directory that `wandb sync` uploads."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from am_recipes.sinks import address
from am_recipes.sinks.tracker import Incomplete, Status, Tracked, TrackedRow, numbers, row_key

if TYPE_CHECKING:
    from am_recipes.sections import Wandb

# W&B's own process writes to the disk so often, in seconds; by itself every 15, and a kill takes what was not written.
_SECONDS_TO_DISK = 0.1
# Neither the terminal nor code is taken along. A server that hangs fails the beginning, which is tried again, and the
# end, which says so. `settings` in the config comes after it.
_SETTINGS: Mapping[str, object] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "finish_timeout": 30.0,
    "finish_timeout_raises": True,
    "init_timeout": 30.0,
    "quiet": True,
    "save_code": False,
    "show_info": False,
    "silent": True,
    # Among it the command with all its arguments; the one without secrets is in the config (`launch.command`).
    "x_disable_meta": True,
    "x_transaction_log_flush_interval": _SECONDS_TO_DISK,
}
# What its pages call finished, failed and killed.
_EXIT_CODES: Mapping[Status, int] = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}
_KINDS = {"config.yaml": "config", "report.html": "report", "export": "model"}


class WandbTracker:
    """A run of W&B, over the metric `step`.

    W&B's own count of rows is twice the step, and one more for a validation: so it grows, over every launch, and W&B
    leaves out a row that comes again.
    """

    def __init__(self, settings: Wandb) -> None:
        self._settings = settings
        # Of a run that a failure after its making has left, too.
        self._id = uuid.uuid4().hex[:12]
        self._run: Any = None
        self._why_offline: str | None = None
        self.where = ""

    def begin(self, run: Tracked) -> str:
        if self._run is None:
            self._why_offline = _why_offline(self._settings)
            try:
                self._run = self._init(run)
            except Exception:
                # For W&B's process the run is in use, also where it could not be made.
                _end_service()
                raise
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.where = self._run.url if self._online else f"offline ({self._why_offline}); to upload it: {self._upload}"
        return str(self._run.id)

    def _init(self, run: Tracked) -> Any:
        import wandb

        settings = self._settings
        options = settings.init.built_arguments()
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=run.id or self._id,
            name=settings.name or run.name,
            group=settings.group,
            notes=settings.notes,
            tags=settings.tags,
            config=run.config,
            mode="online" if self._online else "offline",
            resume="allow",
            allow_val_change=True,
            # A run that the process has beside it stays `wandb.run`.
            reinit="create_new",
            **{"dir": str(run.run_dir), **options, "settings": {**_SETTINGS, **options.get("settings", {})}},
        )

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        for row in rows:
            step, is_validation = row_key(row)
            values = {"step": step, **numbers(row), "_timestamp": row["time"]}
            self._run.log(values, step=2 * step + is_validation, commit=True)
        # Answered when everything before it has arrived in W&B's process, which then writes it to the disk.
        self._run.summary.get("step")
        time.sleep(3 * _SECONDS_TO_DISK)

    def artifact(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type=_KINDS.get(path.name, "file"))
        if path.is_dir():
            # Read where it lies when it is uploaded: a model is not copied.
            artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        else:
            artifact.add_file(str(path), skip_cache=True)
        logged = self._run.log_artifact(artifact)
        if self._online:
            logged.wait()

    def end(self, status: Status) -> None:
        import wandb

        try:
            self._run.finish(exit_code=_EXIT_CODES[status])
        except Exception as error:
            # W&B takes an end once: another attempt would do nothing, whatever came of the first.
            _end_service()
            raise Incomplete(f"what its server had not taken by then ({error}); upload it: {self._upload}") from error
        if wandb.run is None:
            # Its process would stay until this one ends, and is not told so where that was forked.
            wandb.teardown()

    def abandon(self) -> str | None:
        if "wandb" in sys.modules:
            _end_service()
        if self._run is None or not self._online:
            return None
        return f"what its server had not taken by then; upload it: {self._upload}"

    @property
    def _online(self) -> bool:
        return self._why_offline is None

    @property
    def _upload(self) -> str:
        """The command."""
        online = "--include-online " if self._online else ""
        return f"wandb sync {online}{shlex.quote(str(self._run.settings.sync_dir))}"


def reach(settings: Wandb) -> None:
    """Import the package; ask the server, where the run has to be online. Raises ValueError or ConnectionError."""
    import wandb

    given = settings.init.arguments.get("settings", {})
    try:
        wandb.Settings(**{**_SETTINGS, **given})
    except (TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"settings={sorted(given) if isinstance(given, Mapping) else given}: {what}") from error
    if settings.mode == "online":
        _require_key(settings)
        _require_server(settings)


def _end_service() -> None:
    """Kill W&B's process, unless it has a run of somebody else's: where a server hangs, so does it, and at its end
    this process waits for it.

    What it was given of a run is on the disk within `_SECONDS_TO_DISK`.
    """
    import wandb

    # There is no public name for it.
    connection = wandb.setup()._connection
    if wandb.run is None and connection is not None and connection.owns_service:
        connection._proc._process.kill()
        # So that the next run has one of its own. It cannot be told to end, and its status would end this process.
        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()


def _why_offline(settings: Wandb) -> str | None:
    """Why a run that begins now is offline; None where it is online: `auto` is with a key and a server that answers."""
    if settings.mode == "offline":
        return "as configured"
    if settings.mode == "auto" and os.environ.get("WANDB_MODE", "online") != "online":
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    try:
        _require_key(settings)
        # Where nobody answers, wandb.init tries for minutes, also while the process wants to end.
        _require_server(settings)
    except (ValueError, ConnectionError) as error:
        if settings.mode == "online":
            raise
        return str(error)
    return None


def _require_key(settings: Wandb) -> None:
    import requests
    import wandb

    known = wandb.setup().settings
    if not (known.api_key or known.identity_token_file or requests.utils.get_netrc_auth(known.base_url)):
        raise ValueError(
            f"mode={settings.mode} finds no key of {known.base_url}; wandb login, set WANDB_API_KEY, or mode offline"
        )


def _require_server(settings: Wandb) -> None:
    try:
        address.require_answer(_server())
    except ConnectionError as error:
        raise ConnectionError(
            f"mode={settings.mode}: {_server()} does not answer ({error}); correct WANDB_BASE_URL, or use mode "
            "offline and wandb sync later"
        ) from error


def _server() -> str:
    import wandb

    return str(wandb.setup().settings.base_url)
