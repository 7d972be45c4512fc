"""metrics.jsonl: one line of JSON for each step and each validation.

A row reaches the operating system before `step` returns: killing the process loses none, and a row cut off by a power
failure is dropped on resume. Numbers that JSON has no word for (NaN, infinities) become null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from am_recipes.sinks import files
from am_recipes.sinks.sink import Row

SECONDS_BETWEEN_SYNCS = 5.0


class JsonLines:
    """The rows of a run, one JSON object a line, in the order they came.

    `first_validation` and `last_validation` are rows of the file, those that were kept on resume included.

    Args:
        file: created where missing.
        resume_step: rows of later steps are dropped, as they will be written again; None drops all.
    """

    def __init__(self, file: Path, *, resume_step: int | None = None) -> None:
        self.first_validation: Row | None = None
        self.last_validation: Row | None = None
        self._file = file
        files.replace(file, self._kept_lines(resume_step))
        self._stream = file.open("a", encoding="utf-8")
        self._last_sync = time.monotonic()

    def note(self, fact: str) -> None:
        """Nothing: the file holds numbers alone."""

    def step(self, row: Row) -> None:
        self._write(row)
        if time.monotonic() - self._last_sync > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def validation(self, row: Row) -> None:
        self._write(row)
        self._remember(row)
        self.sync()

    def close(self, status: str) -> None:
        with self._stream:
            self.sync()

    def sync(self) -> None:
        """Wait until every row would survive a power failure; happens by itself every few seconds."""
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise files.not_written(self._file, error) from error
        self._last_sync = time.monotonic()

    def _write(self, row: Row) -> None:
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            line = json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()})
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError as error:
            raise files.not_written(self._file, error) from error

    def _remember(self, row: Row) -> None:
        self.first_validation = self.first_validation or row
        self.last_validation = row

    def _kept_lines(self, resume_step: int | None) -> Iterator[bytes]:
        """The lines up to `resume_step`, none for None, without a torn line and whatever follows it."""
        if resume_step is None or not self._file.exists():
            return
        with self._file.open("rb") as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                except ValueError:
                    return
                if row["step"] <= resume_step:
                    if "loss" not in row:
                        self._remember({name: value for name, value in row.items() if value is not None})
                    yield line.rstrip(b"\r\n") + b"\n"
