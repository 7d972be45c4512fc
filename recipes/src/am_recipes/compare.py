"""Two run directories against each other: the first step that differs, and what differed before it.

Reads metrics.jsonl of both as a stream, and run.json. Imports no torch, so it answers at once, on any machine that has
copies of these files.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from am_recipes.settings import inline, leaves
from am_recipes.sinks import record, text
from am_recipes.sinks.record import Launch, Record
from am_recipes.sinks.tracker import row_key

WIDTH = 80
# What two equal runs differ in: when, how fast, how much memory. So do further columns that end like RATES.
MEASURED = ("time", "tokens_per_second", "peak_memory_bytes")
RATES = ("_per_second", "_seconds")
# What torchrun sets by itself, so that it says no more than the number of ranks.
TORCHRUN = re.compile(r"TORCH_?ELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING")
# The keys of a config that are another run's in any case.
PLACES = ("run_dir",)
NOTHING = ("not there", "")
EMPTY = ("[]", "{}", "null")
# By name: a value, and what is told behind it.
Facts = Mapping[str, tuple[str, str]]
Value = float | int | str | None
Pair = tuple[Mapping[str, Value], Mapping[str, Value]]
# A step of the loop comes before a validation of the same number.
Key = tuple[int, bool]


@dataclass
class Rows:
    """What the rows of two runs, A and B, have in common.

    Args:
        equal: rows that both have, equal in all but what is `MEASURED`.
        different: rows that both have and that differ.
        first, latest: the first and the last of those: the row of A and the row of B.
        only: rows that one alone has; last: the last step of each.
        notes: what could not be read.
    """

    equal: int = 0
    different: int = 0
    first: Pair | None = None
    latest: Pair | None = None
    only: list[int] = field(default_factory=lambda: [0, 0])
    last: list[int] = field(default_factory=lambda: [0, 0])
    notes: list[str] = field(default_factory=list)

    @property
    def are_equal(self) -> bool:
        # Without a row nothing was shown to be equal.
        return self.equal > 0 and not self.different and not any(self.only)


def compare(run_a: Path, run_b: Path) -> tuple[bool, str]:
    """Whether the rows of two runs are equal, and a text about what is not, 80 columns wide.

    Raises ValueError where one of them is not the directory of a run, OSError where it cannot be read.
    """
    runs = [(folder, _load(folder)) for folder in (run_a, run_b)]
    rows = compare_rows(run_a / "metrics.jsonl", run_b / "metrics.jsonl")
    lines = [f"A  {run_a}", f"B  {run_b}", "", *_told(rows)]
    for title, (a, b) in _sections([run.launches[-1] for _, run in runs]):
        lines += _section(title, a, b)
    for name, (_, run) in zip("AB", runs, strict=True):
        lines += _changed_on_the_way(name, run)
    return rows.are_equal, "\n".join(lines)


def _load(folder: Path) -> Record:
    missing = [name for name in (record.NAME, "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not the directory of a run: {' and '.join(missing)} not found there; give that of one"
        )
    run = record.load(folder)
    if not run.launches:
        raise ValueError(f"{folder / record.NAME} names no launch, so it is not the record of a run; restore the file")
    return run


def compare_rows(file_a: Path, file_b: Path) -> Rows:
    """Hold the rows of two metrics.jsonl against each other, those of the same step, in bounded memory."""
    found = Rows()
    streams = [_rows(file, name, found.notes) for name, file in (("A", file_a), ("B", file_b))]
    heads = [next(stream, None) for stream in streams]
    while any(heads):
        key = min(row_key(head) for head in heads if head is not None)
        pair = [head if head is not None and row_key(head) == key else None for head in heads]
        for side, row in enumerate(pair):
            if row is not None:
                found.last[side] = key[0]
                heads[side] = next(streams[side], None)
        a, b = pair
        if a is None or b is None:
            found.only[0 if b is None else 1] += 1
        elif not different_columns(a, b):
            found.equal += 1
        else:
            found.different += 1
            found.first, found.latest = found.first or (a, b), (a, b)
    return found


def _rows(file: Path, name: str, notes: list[str]) -> Iterator[dict[str, Value]]:
    """The rows of a file up to the first line that is none, which `notes` are told of."""
    before: Key = (-1, False)
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
                key = row_key(row)
            except (ValueError, TypeError, KeyError):
                # A run that goes on, or was killed by a power failure, may end within a line.
                rest = "" if line.endswith(b"\n") else ", which is not finished"
                notes.append(f"{name}: read up to line {number} of metrics.jsonl, which is no row{rest}")
                return
            if key <= before:
                raise ValueError(f"{file}:{number}: step {key[0]} comes after step {before[0]}; restore the file")
            before = key
            yield row


def different_columns(a: Mapping[str, Value], b: Mapping[str, Value]) -> list[str]:
    """The columns in which two rows differ, or that one alone has. NaN, infinities and null are one: not finite."""
    names = [name for name in dict.fromkeys((*a, *b)) if not _is_measured(name)]
    return [name for name in names if not _equal(a.get(name, NOTHING[0]), b.get(name, NOTHING[0]))]


def _is_measured(column: str) -> bool:
    # `loss` is in the name of every held-out loss, whose end is the user's: val_loss_first_seconds.
    return column in MEASURED or (column.endswith(RATES) and "loss" not in column)


def _equal(a: Value, b: Value) -> bool:
    # The file of a run has null for what is not finite.
    a, b = (None if isinstance(value, float) and not math.isfinite(value) else value for value in (a, b))
    return a == b


def _told(rows: Rows) -> list[str]:
    both = rows.equal + rows.different
    lines = [*rows.notes]
    if rows.first is not None and rows.latest is not None:
        lines.append(f"rows differ from {_moment(rows.first)} on: {rows.different} of the {both} that both have")
        lines += _table(rows.first)
        if rows.different > 1:
            lines += ["", f"the last of them, {_moment(rows.latest)}:", *_table(rows.latest)]
    elif both:
        lines.append(f"rows are equal to the last digit: the {both} that both have")
    else:
        lines.append("no row is in both")
    for name, other, alone, last in zip("AB", "BA", rows.only, rows.last, strict=True):
        if alone:
            end = f"which ends at step {last}, {other} at step {sum(rows.last) - last}"
            lines.append(f"{alone} row{'s are' if alone > 1 else ' is'} in {name} alone, {end}")
    return lines


def _moment(pair: Pair) -> str:
    step, is_validation = row_key(pair[0])
    return f"the validation after step {step}" if is_validation else f"step {step}"


def _table(pair: Pair) -> list[str]:
    """The columns that differ, and by how much."""
    lines = ["", f"  {'':22}{'A':>18}{'B':>18}{'B - A':>18}"]
    for name in different_columns(*pair):
        a, b = (row.get(name, NOTHING[0]) for row in pair)
        lines.append(f"  {_line(name, 22):22}{_number(a):>18}{_number(b):>18}{_difference(a, b):>18}")
    return lines


def _number(value: Value) -> str:
    return f"{value:.10g}" if isinstance(value, float) else "null" if value is None else str(value)


def _difference(a: Value, b: Value) -> str:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return f"{b - a:+.3g}"
    return "-"


def _sections(launches: Sequence[Launch]) -> Iterator[tuple[str, list[Facts]]]:
    """What of two launches is held against each other, by heading."""
    yield "configuration", [_config(launch) for launch in launches]
    yield "code", [_code(launch) for launch in launches]
    yield "data and weights", [_data(launch) for launch in launches]
    yield "environment", [_environment(launch) for launch in launches]


def _config(launch: Launch) -> Facts:
    origins = launch.get("origins", {})
    values = dict(leaves(launch.get("config", {})))
    return {
        path: (inline(value), f" ({origins[path]})" if path in origins else "")
        for path, value in values.items()
        if path and path not in PLACES
    }


def _code(launch: Launch) -> Facts:
    code = launch.get("code", {"working directory": launch["git"] or "unknown"})
    return {name: (state, "") for name, state in (code | launch["versions"]).items()}


def _data(launch: Launch) -> Facts:
    digests = launch.get("data", {})
    files: dict[str, list[PurePath]] = {}
    for name in digests:
        key, is_file, file = name.partition(": ")
        if is_file:
            files.setdefault(key, []).append(PurePath(file))
    # The same files elsewhere are the same: their names begin below the folder that those of one key share.
    shared = {key: os.path.commonpath([file.parent for file in paths]) for key, paths in files.items()}
    return {_from(name, shared): (digest, "") for name, digest in digests.items()}


def _from(name: str, folders: Mapping[str, str]) -> str:
    key, _, file = name.partition(": ")
    return f"{key}: {PurePath(file).relative_to(folders[key])}" if key in folders else name


def _environment(launch: Launch) -> Facts:
    found: dict[str, Any] = {"device": launch["device"], "ranks": launch["world_size"]}
    # Another job is another job: its number says nothing.
    machine = {name: value for name, value in launch.get("environment", {}).items() if name != "job"}
    if "hosts" in machine:
        # How many ranks each has is told by those of all.
        machine["hosts"] = ", ".join(machine["hosts"])
    if "variables" in machine:
        machine["variables"] = {
            name: value for name, value in machine["variables"].items() if not TORCHRUN.fullmatch(name)
        }
    return {path: (inline(value), "") for path, value in leaves(found | machine)}


def _differing(a: Facts, b: Facts) -> list[str]:
    """The names whose values differ; another origin is no difference."""
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name, NOTHING)[0] != b.get(name, NOTHING)[0]]
    parents = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}
    # What is empty on one side is told by what the other has in it.
    return [
        name for name in names if name not in parents or not any(side.get(name, NOTHING)[0] in EMPTY for side in (a, b))
    ]


def _section(title: str, a: Facts, b: Facts) -> list[str]:
    if not a or not b:
        told = "neither run says" if not a and not b else f"{'B' if a else 'A'} does not say"
        return ["", f"{title}: {told}, in a record of an older version"]
    names = _differing(a, b)
    if not names:
        return ["", f"{title}: the same"]
    lines = ["", f"{title}: {len(names)} differ{'s' * (len(names) == 1)}"]
    for name in names:
        lines.append(f"  {_line(name, WIDTH - 2)}")
        for side, facts in zip("AB", (a, b), strict=True):
            value, origin = facts.get(name, NOTHING)
            lines.append(f"    {side} {_line(value + origin, WIDTH - 6)}")
    return lines


def _changed_on_the_way(name: str, run: Record) -> list[str]:
    """What changed between the launches of one run: its rows are of all of them, and the latest is what is compared."""
    lines = []
    for number, pair in enumerate(itertools.pairwise(run.launches), start=2):
        changed = [title for title, (a, b) in _sections(pair) if a and b and _differing(a, b)]
        if changed:
            step = pair[1]["resume_step"]
            start = "the start" if step is None else f"step {step}"
            lines.append(f"{name}: launch {number} of {len(run.launches)}, from {start}, changed {', '.join(changed)}")
    return ["", *lines] if lines else []


def _line(content: str, width: int) -> str:
    """The content on one line of at most that width."""
    return text.cut(" ".join(content.split()), width)
