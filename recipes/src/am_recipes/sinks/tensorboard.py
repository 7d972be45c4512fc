"""TensorBoard: event files, and nothing else."""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from am_recipes.sinks.tracker import Status, Tracked, TrackedRow, row_key

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    from am_recipes.sections import TensorBoard


# Between the folder of a run and the time, in its name here.
_BEGUN = ", begun "


class TensorBoardTracker:
    """Events of a run: scalars, its config as hyperparameters and as text, its status as text.

    A launch begins with the step that its first row has, and TensorBoard shows nothing from there on of launches
    before. So each run has a folder of its own.
    """

    def __init__(self, settings: TensorBoard) -> None:
        self._settings = settings
        self._folder: Path | None = None
        self._writer: SummaryWriter | None = None
        self._step = 0
        self.where = ""

    def begin(self, run: Tracked) -> str:
        if self._folder is None:
            self._folder = self._choose(run)
        self.where = f"to look at it: tensorboard --logdir {shlex.quote(str(self._folder))}"
        if run.id is not None and _has_events(self._folder):
            # Opened at the first row.
            self._step = run.resume_step or 0
            return run.id
        self._describe(run, self._open(0))
        return f"{self._folder}{_BEGUN}{time.time():.3f}"

    def _choose(self, run: Tracked) -> Path:
        """The folder that the run has already, or one that no other run has."""
        place = self._settings.log_dir
        if place is None:
            return run.run_dir / "tensorboard"
        known = Path((run.id or "").partition(_BEGUN)[0])
        if known.parent == place and known.name.startswith(run.name):
            return known
        names = itertools.chain([run.name], (f"{run.name}-{number}" for number in itertools.count(2)))
        return next(place / name for name in names if not _has_events(place / name))

    def rows(self, rows: Sequence[TrackedRow]) -> None:
        # A validation comes after its step's own row, which has to stay.
        writer = self._writer or self._open(sum(row_key(rows[0])))
        # Where this fails, the next attempt opens another one, which hides what this one has written.
        self._writer = None
        for row in rows:
            self._step, _ = row_key(row)
            for name, value in row.items():
                if value is not None and name not in ("step", "time"):
                    writer.add_scalar(name, value, self._step, walltime=row["time"])
        writer.flush()
        self._writer = writer

    def artifact(self, path: Path) -> None:
        """Nothing: it keeps no files."""

    def end(self, status: Status) -> None:
        writer = self._writer or self._open(None)
        writer.add_text("status", status, self._step)
        if status == "FINISHED":
            # TensorBoard keeps the first that it reads, and another launch may come after one that has failed.
            _events(writer).add_summary(_success())
        writer.close()
        self._writer = None

    def abandon(self) -> None:
        """Nothing: a thread that writes ends with the process."""

    def _open(self, first_step: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=first_step)
        return self._writer

    def _describe(self, run: Tracked, writer: SummaryWriter) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = {name: _plain(value) for name, value in run.params.items()}
        experiment, session, _ = hparams(values, {"loss": 0.0, "val_loss": 0.0})
        _events(writer).add_summary(experiment)
        _events(writer).add_summary(session)
        table = [f"|{name}|{_cell(value)}|" for name, value in {**run.params, **run.tags}.items()]
        writer.add_text("config", "\n".join(["|key|value|", "|---|---|", *table]), 0)
        writer.flush()


def _has_events(folder: Path) -> bool:
    return any(folder.glob("events.out.tfevents.*"))


def _events(writer: SummaryWriter) -> Any:
    """The file of a writer, which torch declares as None, for what no method of the writer's writes."""
    return writer.file_writer


def _success() -> Summary:
    """The end of a run for the page of hyperparameters; TensorBoard's own function for it needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"), end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=plugin))
    return Summary(value=[value])


def reach(settings: TensorBoard) -> None:
    """Import the package. Raises OSError where `log_dir` cannot be made."""
    import torch.utils.tensorboard  # noqa: F401 - later it would hold up the steps

    if settings.log_dir is not None:
        try:
            settings.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"log_dir={settings.log_dir} cannot be made ({error}); choose another folder") from error


def _plain(value: object) -> bool | float | str:
    """A value as hyperparameters have it."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def _cell(value: object) -> str:
    """A value in a table of Markdown."""
    return str(_plain(value)).replace("|", "\\|").replace("\n", " ")
