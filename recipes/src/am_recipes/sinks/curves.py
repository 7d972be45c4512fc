"""The columns of metrics.jsonl as curves of a bounded number of points, read as a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A curve has at most this many points, an even number; more are averaged in buckets of consecutive steps.
MAX_POINTS = 320
BLOCK_BYTES = 1 << 18
# Columns of a step that are summed up, or drawn in a unit of their own.
STANDARD = ("step", "epoch", "tokens", "target_tokens", "time")


@dataclass
class Bucket:
    """Consecutive points of a curve: their number, the sums of their steps and values, the extremes."""

    count: int = 0
    steps: float = 0.0
    values: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    @property
    def step(self) -> float:
        return self.steps / self.count

    @property
    def mean(self) -> float:
        return self.values / self.count

    def add(self, steps: Sequence[float], values: Sequence[float]) -> None:
        self.count += len(values)
        self.steps += sum(steps)
        self.values += sum(values)
        self.low = min(self.low, min(values))
        self.high = max(self.high, max(values))

    def merged(self, other: Bucket) -> Bucket:
        return Bucket(
            self.count + other.count,
            self.steps + other.steps,
            self.values + other.values,
            min(self.low, other.low),
            max(self.high, other.high),
        )


@dataclass
class Curve:
    """Values over steps as at most `MAX_POINTS` buckets; `size` points fill one. `first` and `last` are points."""

    size: int = 1
    buckets: list[Bucket] = field(default_factory=list)
    first: tuple[float, float] | None = None
    last: tuple[float, float] | None = None

    def extend(self, steps: Sequence[float], values: Sequence[float]) -> None:
        """Add points whose steps do not go back."""
        if not values:
            return
        self.first = self.first or (steps[0], values[0])
        self.last = steps[-1], values[-1]
        start = 0
        while start < len(values):
            if not self.buckets or self.buckets[-1].count == self.size:
                if len(self.buckets) == MAX_POINTS:
                    pairs = zip(self.buckets[::2], self.buckets[1::2], strict=True)
                    self.buckets = [one.merged(other) for one, other in pairs]
                    self.size *= 2
                self.buckets.append(Bucket())
            end = start + self.size - self.buckets[-1].count
            self.buckets[-1].add(steps[start:end], values[start:end])
            start = end

    @property
    def low(self) -> float:
        return min(bucket.low for bucket in self.buckets)

    @property
    def high(self) -> float:
        return max(bucket.high for bucket in self.buckets)

    def smoothed(self) -> Curve:
        """The mean over the points around each, a twentieth of the curve to either side; fewer than 20 points stay.

        Near the start the window is narrower, so that it does not lean to one side; at the end it is one-sided.
        """
        widest = len(self.buckets) // 20
        if not widest or self.last is None:
            return self
        buckets = []
        for number, bucket in enumerate(self.buckets):
            reach = min(widest, number)
            near = self.buckets[number - reach : number + reach + 1]
            mean = sum(other.values for other in near) / sum(other.count for other in near)
            buckets.append(Bucket(bucket.count, bucket.steps, mean * bucket.count, mean, mean))
        return Curve(self.size, buckets, self.first, (self.last[0], buckets[-1].mean))

    def scaled(self, factor: float) -> Curve:
        """The same curve in another unit."""
        buckets = [
            Bucket(bucket.count, bucket.steps, bucket.values * factor, bucket.low * factor, bucket.high * factor)
            for bucket in self.buckets
        ]
        ends = [None if point is None else (point[0], point[1] * factor) for point in (self.first, self.last)]
        return Curve(self.size, buckets, *ends)


@dataclass
class Metrics:
    """What metrics.jsonl says, in bounded memory.

    Args:
        train: a curve for each column of the steps, except `STANDARD`, in the order of the rows.
        validation: a curve for each validation loss.
        last_step: 0 where no step was taken.
        last_time: seconds since 1970 of the last step.
        seconds: spent in steps.
        num_lines: read so far; `num_bytes` are their bytes.
        is_broken: whether the next line is no JSON though others follow; they were not read.
    """

    train: dict[str, Curve] = field(default_factory=dict)
    validation: dict[str, Curve] = field(default_factory=dict)
    last_step: int = 0
    last_time: float | None = None
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    num_lines: int = 0
    num_bytes: int = 0
    is_broken: bool = False

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows that follow; None stands where a number was not finite."""
        train = [row for row in rows if "tokens_per_second" in row]
        _extend(self.validation, [row for row in rows if "tokens_per_second" not in row])
        _extend(self.train, train)
        if train:
            self.last_step, self.last_time = train[-1]["step"], train[-1]["time"]
            self.tokens += sum([row["tokens"] for row in train])
            self.target_tokens += sum([row["target_tokens"] for row in train])
            self.seconds += sum([row["tokens"] / row["tokens_per_second"] for row in train if row["tokens_per_second"]])


def _extend(curves: dict[str, Curve], rows: Sequence[dict[str, Any]]) -> None:
    for name in dict.fromkeys(name for names in {tuple(row): None for row in rows} for name in names):
        if name not in STANDARD:
            kept = [row for row in rows if row.get(name) is not None]
            curve = curves.setdefault(name, Curve())
            curve.extend([row["step"] for row in kept], [row[name] for row in kept])


def read(file: Path, metrics: Metrics | None = None) -> Metrics:
    """Read `file`, or on from where `metrics` ends, and return what is known then.

    A last line that was torn off, by a crash or because it is being written, is left out.
    """
    metrics = metrics if metrics is not None else Metrics()
    with file.open("rb") as stream:
        stream.seek(metrics.num_bytes)
        while lines := stream.readlines(BLOCK_BYTES):
            rows = _parse(lines)
            metrics.add(rows)
            metrics.num_lines += len(rows)
            metrics.num_bytes += sum(map(len, lines[: len(rows)]))
            if len(rows) < len(lines):
                metrics.is_broken = len(rows) < len(lines) - 1 or bool(stream.readline())
                break
    return metrics


def _parse(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The rows before the first line that is no whole line of JSON."""
    # One call for all takes half the time of one for each.
    try:
        rows: list[dict[str, Any]] = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        rows = []
    if len(rows) == len(lines) and lines[-1].endswith(b"\n"):
        return rows
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if line.endswith(b"\n"):
            rows.append(row)
    return rows
