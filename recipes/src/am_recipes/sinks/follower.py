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

from am_recipes.settings import without_secrets
from am_recipes.sinks import delivered
from am_recipes.sinks.delivered import Delivered
from am_recipes.sinks.tracker import Incomplete, Status, Tracked, TrackedRow, Tracker, row_key

ROWS = "metrics.jsonl"
# Of one call, so that the calls of a long backlog stay short.
_ROWS_AT_A_TIME = 100
# After a failure, doubled from one to the next.
_LONGEST_PAUSE = 60.0
# How often the end of a run is tried where the service does not take it at once.
_ATTEMPTS_AT_THE_END, _PAUSE_AT_THE_END = 2, 1.0
# An upload that brings fewer bytes a second, beside its first minute, is one that hangs.
_SLOWEST_UPLOAD = 1e6


class Follower:
    """The thread of one tracker. `start` it once metrics.jsonl is that of this launch; `finish` it, then `join`.

    Args:
        name: of the tracker: its section of the config.
        tracked: makes what the tracker is told of the run, given the id it has there; called in the thread.
        artifacts: names in the run directory that the tracker gets at the end, where they are there; a folder, which
            the end of a whole run makes, only then.
        at_the_beginning: those of them that it gets as soon as it has a row.
        interval: seconds between two looks at the file. Each delivery holds the interpreter, which the training thread
            needs too, for some milliseconds, however few rows it has.
        upload_seconds: what an upload of a folder is given, beside the time for its bytes.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run_dir: Path,
        tracked: Callable[[str | None], Tracked],
        artifacts: Sequence[str] = (),
        *,
        at_the_beginning: Sequence[str] = (),
        interval: float = 5.0,
        upload_seconds: float = 60.0,
    ) -> None:
        self.name = name
        self._tracker, self._run_dir, self._tracked, self._artifacts = tracker, run_dir, tracked, artifacts
        self._at_the_beginning, self._interval, self._upload_seconds = at_the_beginning, interval, upload_seconds
        # Read by the training thread: replaced, never changed.
        self._delivered = self._saved = Delivered()
        self._begun = False
        self._has_failed = self._has_recovered = False
        self._refused: list[str] = []
        # What the service has not got and another launch does not bring, in words.
        self._elsewhere: str | None = None
        self._offset, self._time = 0, 0.0
        self._closing = threading.Event()
        self._status: Status = "FINISHED"
        self._upload_ends = 0.0
        # Between giving the thread up and what it writes; held for no more than a write.
        self._recording = threading.Lock()
        self._is_given_up = False
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

    def give_up(self) -> None:
        """Wait no longer for the thread: it tells the tracker nothing more, and records nothing.

        A later launch, in this process too, may go on where trackers.json says.
        """
        with self._recording:
            self._is_given_up = True
        try:
            self._elsewhere = self._tracker.abandon()
        # It is about a service that hangs, and its client may fail in any way; the run has ended without it.
        except Exception as error:  # noqa: BLE001
            self._news.append(f"WARNING {self.name}: its client may hold up the end of this process: {_text(error)}")

    @property
    def is_uploading(self) -> bool:
        """Whether a folder is on its way, for no longer than that may take: the end of the run waits for it."""
        return time.monotonic() < self._upload_ends

    def news(self) -> Iterator[str]:
        """What there is to say since the last call: where the run is, that something failed, or does again (once)."""
        while self._news:
            yield self._news.popleft()

    def undelivered(self) -> str | None:
        """What the service does not have, in words; None where it has all."""
        steps = [step for step, validation in self._later_keys() if not self._delivered.has(step, validation)]
        if not steps and self._delivered.status is not None:
            return None
        parts = [f"{len(steps)} rows, from step {steps[0]} on"] if steps else []
        parts += self._refused or (["how the run ended"] if self._elsewhere is None else [])
        told = [f"{' and '.join(parts)}; the same command delivers it"] if parts else []
        told += [self._elsewhere] if self._elsewhere is not None else []
        return f"{self.name} has not got {'; nor '.join(told)}"

    def _run(self) -> None:
        pause, failures_at_the_end = 0.0, 0
        while not self._closing.wait(pause) or failures_at_the_end < _ATTEMPTS_AT_THE_END:
            is_last = self._closing.is_set()
            if self._delivers(is_last):
                if is_last:
                    return
                pause = self._interval
            else:
                pause = min(max(2 * pause, self._interval), _LONGEST_PAUSE)
                if is_last:
                    failures_at_the_end += 1
                    time.sleep(min(self._interval, _PAUSE_AT_THE_END))

    def _delivers(self, is_last: bool) -> bool:
        """Whether the service takes what is new. The first time that it does not, and that it does again, is news."""
        try:
            self._deliver(is_last)
        # A service may fail in any way, and the run goes on without it; what failed is tried again.
        except Exception as error:  # noqa: BLE001
            if not self._has_failed and not self._is_given_up:
                self._has_failed = True
                why = f"{_text(error)}; training goes on, and it is tried again"
                self._news.append(f"WARNING {self.name} does not take the run: {why}")
            return False
        if self._has_failed and not self._has_recovered:
            self._has_recovered = True
            self._news.append(f"{self.name} takes the run again")
        return True

    def _refusal(self, name: str) -> str | None:
        """Send a file or folder; why the service does not take it, None where it does."""
        try:
            self._send(name)
        # As above; a place for files may fail by itself.
        except Exception as error:  # noqa: BLE001
            return _text(error)
        return None

    def _deliver(self, is_last: bool) -> None:
        if not self._begun:
            self._begin()
        # Where it could not be written, it is now: before that, rows would come twice after a kill.
        self._remember(self._delivered)
        while True:
            rows, offset, now = self._read()
            if rows:
                self._require_wanted()
                self._tracker.rows(rows)
            self._offset, self._time = offset, now
            if not rows:
                break
            step, validation = row_key(rows[-1])
            self._remember(replace(self._delivered, step=step, validation=validation, status=None))
            if len(rows) < _ROWS_AT_A_TIME:
                break
            # A long backlog leaves the interpreter to the training thread in between.
            self._closing.wait(self._interval / 20)
        # Rows go first: a place for files may fail by itself, and then they wait for nothing but the end.
        if is_last:
            self._end()
        else:
            names, self._at_the_beginning = self._at_the_beginning, ()
            for name in names:
                # Of no consequence now: they are sent again at the end.
                self._refusal(name)

    def _end(self) -> None:
        refusals = {name: self._refusal(name) and self._refusal(name) for name in self._artifacts}
        self._refused = [name for name, why in refusals.items() if why is not None]
        self._require_wanted()
        try:
            self._tracker.end(self._status)
        except Incomplete as error:
            self._elsewhere = str(error)
        # Said here, as one warning is enough of a service that takes nothing any more, the end neither.
        for name in self._refused[:1]:
            self._news.append(f"WARNING {self.name} does not take files: {refusals[name]}")
        if not self._refused and self._elsewhere is None:
            self._remember(replace(self._delivered, status=self._status))

    def _begin(self) -> None:
        known = self._delivered if self._delivered.id is not None else delivered.load(self._run_dir, self.name)
        self._require_wanted()
        tracked = self._tracked(known.id)
        if tracked.resume_step is None and known.step is not None:
            # Its rows are of other weights; behind them, those of this launch would make one curve of two runs.
            self._news.append(
                f"WARNING {self.name}: this launch begins anew, with step 1, and run {known.id} has rows of one before "
                "it; that run stays as it is, and a new one gets every step"
            )
            known = Delivered()
            tracked = replace(tracked, id=None)
        identifier = self._tracker.begin(tracked)
        # The run is open there: whatever fails from here on, it is not opened again.
        self._begun, self._offset = True, 0
        if known.id is not None and identifier != known.id:
            self._news.append(
                f"WARNING {self.name}: run {known.id} is not continued (it was deleted, is at another service, or is "
                f"not to be: resume); run {identifier} gets every step"
            )
        if identifier != known.id:
            known = Delivered(id=identifier, began=time.time())
        self._time = known.began
        self._news.append(f"{self.name}: {self._tracker.where}")
        self._remember(replace(known, status=None))

    def _remember(self, what: Delivered) -> None:
        """Raises OSError where the file cannot be written; this launch knows it all the same, and sends nothing twice.

        A thread that was given up writes nothing: the next launch may have gone on already.
        """
        with self._recording:
            self._require_wanted()
            self._delivered = what
            if what != self._saved:
                delivered.save(self._run_dir, self.name, what)
                self._saved = what

    def _require_wanted(self) -> None:
        if self._is_given_up:
            raise RuntimeError("the run has ended without this thread")

    def _read(self) -> tuple[list[TrackedRow], int, float]:
        """The next rows that the service does not have, none where there is nothing new; the place in the file after
        them, and the time of the last of them.
        """
        rows: list[TrackedRow] = []
        with (self._run_dir / ROWS).open("rb") as stream:
            is_shorter = os.fstat(stream.fileno()).st_size < self._offset
            # Somebody has rewritten the file; what the service has is left out below.
            offset, now = 0 if is_shorter else self._offset, self._time
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n") or len(rows) == _ROWS_AT_A_TIME:
                    break
                offset += len(line)
                row = json.loads(line)
                # A validation has none of its own. That of its step is the same when the row is sent a second time.
                now = row.setdefault("time", now)
                if not self._delivered.has(*row_key(row)):
                    rows.append(row)
        return rows, offset, now

    def _later_keys(self) -> list[tuple[int, bool]]:
        """Of the rows after those that are delivered, and perhaps some of these."""
        file = self._run_dir / ROWS
        if not file.exists():
            return []
        with file.open("rb") as stream:
            stream.seek(self._offset)
            return [row_key(json.loads(line)) for line in stream if line.endswith(b"\n")]

    def _send(self, name: str) -> None:
        """Send a file or folder, where it is there and has changed since it was sent, by an earlier launch too."""
        path = self._run_dir / name
        if not path.exists() or (path.is_dir() and self._status != "FINISHED"):
            return
        stamp = _stamp(path)
        if self._delivered.files.get(name) == stamp:
            return
        self._require_wanted()
        if path.is_dir():
            self._upload_ends = time.monotonic() + self._upload_seconds + stamp[1] / _SLOWEST_UPLOAD
        try:
            self._tracker.artifact(path)
        finally:
            self._upload_ends = 0.0
        self._remember(replace(self._delivered, files={**self._delivered.files, name: stamp}))


def _stamp(path: Path) -> list[float]:
    """When a file, or the last of a folder, was changed, and its bytes; as JSON has it."""
    found = [file.stat() for file in ([path, *path.rglob("*")] if path.is_dir() else [path])]
    return [max(file.st_mtime for file in found), sum(file.st_size for file in found)]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {without_secrets(' '.join(str(error).split())[:300])}"
