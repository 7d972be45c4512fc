"""Delivers a run to a tracker, from a thread that reads metrics.jsonl as it grows.

Nothing is held in memory and the training thread never waits: what a service has not taken yet is in the file, also
for the next launch. trackers.json says how far that is. A service that is away is tried again, with growing pauses.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from am_recipes.sinks import delivered
from am_recipes.sinks.address import without_password
from am_recipes.sinks.delivered import Delivered
from am_recipes.sinks.tracker import Status, Tracked, TrackedRow, Tracker, row_key

ROWS = "metrics.jsonl"
# Of one call, so that the calls of a long backlog stay short.
_ROWS_AT_A_TIME = 100
# After a failure, doubled from one to the next.
_LONGEST_PAUSE = 60.0
# How often the end of a run is tried where the service does not take it at once.
_ATTEMPTS_AT_THE_END = 2

Argument = TypeVar("Argument")


class Follower:
    """The thread of one tracker. `start` it once metrics.jsonl is that of this launch; `finish` it, then `join`.

    Args:
        name: of the tracker: its section of the config.
        tracked: makes what the tracker is told of the run, given the id it has there; called in the thread.
        artifacts: names in the run directory that the tracker gets, where they are there: what is there from the
            beginning at once, all of it at the end.
        interval: seconds between two looks at the file.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run_dir: Path,
        tracked: Callable[[str | None], Tracked],
        artifacts: Sequence[str] = (),
        *,
        interval: float = 1.0,
    ) -> None:
        self.name = name
        self._tracker, self._run_dir, self._tracked, self._artifacts = tracker, run_dir, tracked, artifacts
        self._interval = interval
        # Read by the training thread: replaced, never changed.
        self._delivered = Delivered()
        self._begun = self._warned = self._tried = False
        self._sent: dict[str, float] = {}
        self._refused: list[str] = []
        self._offset, self._time = 0, 0.0
        self._closing = threading.Event()
        self._status: Status = "FINISHED"
        # A folder, which may take hours: the end of the run waits for it.
        self.is_uploading = False
        # Appending and taking out are atomic: neither thread waits for the other.
        self._news: deque[str] = deque()
        # The process may end while a client hangs in it.
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, status: Status) -> None:
        """Deliver the rest, and how the run ended, then end the thread."""
        self._status = status
        self._closing.set()

    def join(self, seconds: float) -> bool:
        """Wait for the end of the thread; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def news(self) -> Iterator[str]:
        """What there is to say since the last call: where the run is, that something failed (once)."""
        while self._news:
            yield self._news.popleft()

    def undelivered(self) -> str | None:
        """What the service does not have, in words; None where it has all."""
        steps = [step for step, validation in self._later_keys() if not self._delivered.has(step, validation)]
        if not steps and self._delivered.status is not None:
            return None
        parts = [f"{len(steps)} rows, from step {steps[0]} on"] if steps else []
        parts += self._refused or ["how the run ended"]
        return f"{self.name} has not got {' and '.join(parts)}; the same command delivers it"

    def _run(self) -> None:
        pause, failures_at_the_end = 0.0, 0
        while not self._closing.wait(pause) or failures_at_the_end < _ATTEMPTS_AT_THE_END:
            is_last = self._closing.is_set()
            if self._succeeds(self._deliver, is_last):
                if is_last:
                    return
                pause = self._interval
            else:
                pause = min(max(2 * pause, self._interval), _LONGEST_PAUSE)
                if is_last:
                    failures_at_the_end += 1
                    time.sleep(self._interval)

    def _succeeds(self, call: Callable[[Argument], None], argument: Argument) -> bool:
        """Call it; whether it does not raise. The first time that it does, there is news."""
        try:
            call(argument)
        # A service may fail in any way, and the run goes on without it; what failed is tried again.
        except Exception as error:  # noqa: BLE001
            if not self._warned:
                what = without_password(" ".join(str(error).split())[:300])
                self._news.append(
                    f"WARNING {self.name} does not take the run: {type(error).__name__}: {what}; training goes on, and "
                    "it is tried again"
                )
            self._warned = True
            return False
        return True

    def _deliver(self, is_last: bool) -> None:
        if not self._begun:
            self._begin()
        while rows := self._read():
            self._tracker.rows(rows)
            self._offset, self._time = self._next
            step, validation = row_key(rows[-1])
            self._remember(replace(self._delivered, step=step, validation=validation, status=None))
            if len(rows) < _ROWS_AT_A_TIME:
                break
            # A long backlog leaves the interpreter to the training thread in between.
            self._closing.wait(self._interval / 20)
        # Rows go first: a place for files may fail by itself, and then they wait for nothing but the end.
        if is_last:
            self._refused = [
                name
                for name in self._artifacts
                if not any(self._succeeds(self._send, name) for _ in range(_ATTEMPTS_AT_THE_END))
            ]
            self._tracker.end(self._status)
            if not self._refused:
                self._remember(replace(self._delivered, status=self._status))
        elif "config.yaml" in self._artifacts and not self._tried:
            self._tried = True
            self._succeeds(self._send, "config.yaml")

    def _begin(self) -> None:
        known = self._delivered if self._delivered.id is not None else delivered.load(self._run_dir, self.name)
        identifier = self._tracker.begin(self._tracked(known.id))
        if known.id is not None and identifier != known.id:
            self._news.append(
                f"WARNING {self.name}: run {known.id} is not continued (it was deleted, is at another service, or is "
                f"not to be: resume); run {identifier} gets every step"
            )
        if identifier != known.id:
            known = Delivered(id=identifier, began=time.time())
        self._remember(replace(known, status=None))
        self._begun, self._offset, self._time = True, 0, known.began
        self._news.append(f"{self.name}: {self._tracker.where}")

    def _remember(self, what: Delivered) -> None:
        if what != self._delivered:
            # First here: where the file cannot be written, a later launch sends twice, and this one does not.
            self._delivered = what
            delivered.save(self._run_dir, self.name, what)

    def _read(self) -> list[TrackedRow]:
        """The next rows that the service does not have; none where there is nothing new.

        `_next` is the place in the file after them, and the time of the last of them.
        """
        rows: list[TrackedRow] = []
        with (self._run_dir / ROWS).open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < self._offset:
                # Somebody has rewritten the file; what the service has is left out below.
                self._offset = 0
            stream.seek(self._offset)
            offset, now = self._offset, self._time
            for line in stream:
                if not line.endswith(b"\n") or len(rows) == _ROWS_AT_A_TIME:
                    break
                offset += len(line)
                row = json.loads(line)
                # A validation has none of its own. That of its step is the same when the row is sent a second time.
                now = row.setdefault("time", now)
                if not self._delivered.has(*row_key(row)):
                    rows.append(row)
            self._next = offset, now
        if not rows:
            self._offset, self._time = self._next
        return rows

    def _later_keys(self) -> list[tuple[int, bool]]:
        """Of the rows after those that are delivered, and perhaps some of these."""
        file = self._run_dir / ROWS
        if not file.exists():
            return []
        with file.open("rb") as stream:
            stream.seek(self._offset)
            return [row_key(json.loads(line)) for line in stream if line.endswith(b"\n")]

    def _send(self, name: str) -> None:
        """Send a file or folder, where it is there and has changed since it was sent."""
        path = self._run_dir / name
        if not path.exists() or self._sent.get(name) == path.stat().st_mtime:
            return
        changed = path.stat().st_mtime
        self.is_uploading = path.is_dir()
        try:
            self._tracker.artifact(path)
        finally:
            self.is_uploading = False
        self._sent[name] = changed
