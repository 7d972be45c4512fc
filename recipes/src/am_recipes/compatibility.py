"""What of a config has been proven together: `compatibility.json`, which the equivalence table of this project writes.

    {"features": {"tp": {"distributed.tp_size": ">1"}, ...},
     "pairs": [{"a": "cp", "b": "vlm", "status": "refused", "reason": "...", "nearest": "..."}, ...]}

A feature is active where every condition on it holds: the value at a dotted path of the config, or of what is known of
its model (`facts.tied`, `facts.experts`, `facts.micro_batches`), is the one named; `>N` is a larger number, `null` and
`not null` are what they say. A pair that is not listed has not been tried. Read without torch.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

# Of a path that the recipe has no key for, or a fact that nobody knows yet: no condition on it holds.
_MISSING = object()


@dataclass(frozen=True)
class Pair:
    """Two features, and whether they have been proven together; `reason` and `nearest` (legal choice) where refused."""

    a: str
    b: str
    status: Literal["supported", "refused", "untested"]
    reason: str | None = None
    nearest: str | None = None


@dataclass(frozen=True)
class Table:
    """Features by their conditions, dotted path to what it must be, and what is known of pairs of them."""

    features: Mapping[str, Mapping[str, Any]]
    pairs: Mapping[frozenset[str], Pair]

    def active(self, values: Mapping[str, Any]) -> list[str]:
        """The features of a config, given as plain values."""
        return [
            name
            for name, conditions in self.features.items()
            if all(_holds(condition, _at(values, path)) for path, condition in conditions.items())
        ]

    def pairs_of(self, values: Mapping[str, Any]) -> Iterator[Pair]:
        """What is known of every two features of a config."""
        for a, b in itertools.combinations(self.active(values), 2):
            yield self.pairs.get(frozenset((a, b)), Pair(a, b, "untested"))

    def refused(self, values: Mapping[str, Any]) -> tuple[str, str] | None:
        """Of the first pair that does not go together: the key that asks for it, and the message; None without one."""
        for pair in self.pairs_of(values):
            if pair.status == "refused":
                path = next((path for name in (pair.a, pair.b) for path in self._layout_keys(name)), "distributed")
                asked = " and ".join(f"{name} ({self._shown(name, values)})" for name in (pair.a, pair.b))
                return path, f"{asked} do not go together: {pair.reason}; choose {pair.nearest}"
        return None

    def untested(self, values: Mapping[str, Any]) -> str | None:
        """A line on pairs of which one is a layout, and that nobody has held against one process; None without any."""
        layouts = {name for name in self.features if self._layout_keys(name)}
        pairs = [
            f"{pair.a} x {pair.b}"
            for pair in self.pairs_of(values)
            if pair.status == "untested" and not layouts.isdisjoint((pair.a, pair.b))
        ]
        if not pairs:
            return None
        return f"not held against one process in the table of equivalence: {', '.join(pairs)}"

    def _layout_keys(self, name: str) -> list[str]:
        return [path for path in self.features[name] if path.startswith("distributed.")]

    def _shown(self, name: str, values: Mapping[str, Any]) -> str:
        return ", ".join(f"{path}={_at(values, path)}" for path in self.features[name])


@functools.cache
def table() -> Table:
    """The table of this release."""
    return read(resources.files("am_recipes").joinpath("compatibility.json").read_text(encoding="utf-8"))


def read(text: str) -> Table:
    """A table from its JSON. Raises ValueError for a pair of unknown features, and a refusal that does not say why."""
    found = json.loads(text)
    pairs = [Pair(**pair) for pair in found["pairs"]]
    for pair in pairs:
        unknown = {pair.a, pair.b} - found["features"].keys()
        if unknown:
            raise ValueError(f"pair {pair.a} x {pair.b}: no feature {', '.join(sorted(unknown))}; describe it")
        if pair.status == "refused" and not (pair.reason and pair.nearest):
            raise ValueError(
                f"pair {pair.a} x {pair.b} is refused without a reason or a nearest legal choice; add both"
            )
    return Table(found["features"], {frozenset((pair.a, pair.b)): pair for pair in pairs})


def _at(values: Mapping[str, Any], path: str) -> Any:
    here: Any = values
    for part in path.split("."):
        if not isinstance(here, Mapping):
            # Below a section that is null, everything is.
            return None if here is None else _MISSING
        here = here.get(part, _MISSING)
    return here


def _holds(condition: Any, value: Any) -> bool:
    if value is _MISSING:
        return False
    if condition == "null":
        return value is None
    if condition == "not null":
        return value is not None
    if isinstance(condition, str) and condition.startswith(">"):
        return isinstance(value, int | float) and value > float(condition[1:])
    return bool(value == condition)
