"""What local trackers keep of a run, read without their clients: rows by key, parameters, statuses."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where a row stands in a run (its step; whether it is a validation), and what it says.
Rows = list[tuple[tuple[int, bool], dict[str, float]]]
# A block of the format that W&B's files have, which is that of LevelDB's log.
_BLOCK = 32768
_FULL, _LAST = 1, 4


@dataclass
class Kept:
    """A run at a tracker; `statuses` are one for each launch that has ended."""

    rows: Rows = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    statuses: list[Any] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)


def wandb(folder: Path) -> dict[str, Kept]:
    """The runs below a folder that W&B wrote, offline, by id; launches in their order."""
    from wandb.proto import wandb_internal_pb2

    runs: dict[str, Kept] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run = runs.setdefault(file.stem.removeprefix("run-"), Kept())
        for content in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                run.rows.append((divmod(int(values["_step"]), 2), values))  # type: ignore[arg-type]
            elif kind == "run":
                run.params |= {
                    item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.run.config.update
                }
            elif kind == "artifact":
                run.artifacts.append(record.artifact.type)
            elif kind == "exit":
                run.statuses.append(record.exit.exit_code)
    return runs


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind W&B's header of seven bytes; the last may be cut off."""
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def tensorboard(folder: Path) -> Kept:
    """The run in a folder of event files, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    rows: dict[tuple[int, bool], dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            row = rows.setdefault((event.step, tag.startswith("val_loss")), {})
            assert tag not in row, f"{tag} of step {event.step} is there twice"
            row[tag] = event.value
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    params = {
        name: {"number_value": value.number_value, "string_value": value.string_value, "bool_value": value.bool_value}[
            value.WhichOneof("kind")
        ]
        for name, value in started.hparams.items()
    }
    statuses: list[Any] = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("status/text_summary")]
    if "_hparams_/session_end_info" in events.PluginTagToContent("hparams"):
        content = events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
        statuses.append(plugin_data_pb2.HParamsPluginData.FromString(content).session_end_info.status)
    return Kept(sorted(rows.items()), params, statuses)


def trackio(folder: Path, project: str) -> dict[str, Kept]:
    """The runs of a project in trackio's database, by id."""
    runs: dict[str, Kept] = {}
    with contextlib.closing(sqlite3.connect(folder / f"{project}.db")) as database:
        for run, step, text in database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id"):
            values = json.loads(text)
            runs.setdefault(run, Kept()).rows.append(((step, "loss" not in values), values))
        for run, text in database.execute("SELECT run_id, config FROM configs"):
            runs[run].params = json.loads(text)
        for run, title in database.execute("SELECT run_id, title FROM alerts ORDER BY id"):
            runs[run].statuses.append(title)
    return runs


def mlflow(file: Path) -> dict[str, Kept]:
    """The runs of an MLflow database, by id, with the losses of each step as rows."""
    runs: dict[str, Kept] = {}
    with contextlib.closing(sqlite3.connect(file)) as database:
        for run, status in database.execute("SELECT run_uuid, status FROM runs"):
            runs[run] = Kept(statuses=[status])
        for run, key, value in database.execute("SELECT run_uuid, key, value FROM params"):
            runs[run].params[key] = value
        query = "SELECT run_uuid, step, key, value FROM metrics WHERE key IN ('loss', 'val_loss') ORDER BY step, key"
        for run, step, key, value in database.execute(query):
            runs[run].rows.append(((step, key != "loss"), {key: value}))
    return runs
