"""What trains and what does not: a table by component that fits a screen, and the full one.

A component is the innermost container of layers: `self_attn`, `mlp`, a projector. A layer beside containers, such as
an embedding, a norm or the output head, is one of its own; a list of blocks is one as a whole, but for the largest,
which is opened. All is derived from names, whatever the model; LoRA factors are apart from what they adapt.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from torch import nn

from am_peft._names import FACTORS, named_parameters

# 80 columns; of more rows than these, with the header and the total a third of a screen, the frozen are folded.
_SCREEN_WIDTH = 80
_MOST_ROWS, _MOST_COMPONENTS = 6, 10


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """Tensors under one name, and their elements by trainability."""

    name: str
    num_tensors: int
    trainable: int
    frozen: int


@dataclasses.dataclass(frozen=True)
class TrainableReport:
    """Elements that train and that do not. `str(report)` is the table by component, without those that are
    frozen where they would be many, and one line where all trains; `report.full()` is the long one.

    - `rows`: by parameter name, with `*` for the layer's number.
    - `components`: at most 10, in the model's order; more are kept by their share of what trains or of what is frozen,
      the rest is `other`. A name is the component's own (`self_attn`), behind the part of the model that it belongs to
      unless that is the one with the largest list of blocks (`visual: merger`). LoRA factors are `<what they adapt>
      (lora)`.
    - `trainable`, `frozen`: of the whole model.
    """

    rows: tuple[ReportRow, ...]
    components: tuple[ReportRow, ...]
    trainable: int
    frozen: int

    def __str__(self) -> str:
        if not self.frozen:
            return self._total()
        rows = list(self.components)
        if len(rows) > _MOST_ROWS:
            frozen = [row for row in rows if not row.trainable]
            rows = [row for row in rows if row.trainable] + [_total(f"{len(frozen)} frozen components", frozen)]
        return self._table("component", rows, _SCREEN_WIDTH)

    def full(self) -> str:
        """The table with a line for every parameter of a layer."""
        return self._table("parameter", self.rows, None)

    def _table(self, header: str, rows: Sequence[ReportRow], width: int | None) -> str:
        """Names are cut in the middle so that no line is longer than `width`."""
        total = self.trainable + self.frozen
        digits = max(15, len(f"{total:,}"))
        names = max([len(row.name) for row in rows] + [len(header)]) if width is None else width - 13 - 2 * digits
        lines = [f"{header:{names}}  {'tensors':>7}  {'trainable':>{digits}}  {'frozen':>{digits}}"]
        for row in rows:
            name = row.name
            if len(name) > names:
                kept = names - 3
                name = f"{name[: kept // 2]}...{name[-(kept - kept // 2) :]}"
            lines.append(f"{name:{names}}  {row.num_tensors:>7}  {row.trainable:>{digits},}  {row.frozen:>{digits},}")
        return "\n".join([*lines, self._total()])

    def _total(self) -> str:
        total = self.trainable + self.frozen
        share = 100 * self.trainable / total if total else 0.0
        return f"{self.trainable:,} of {total:,} parameters train ({share:.2f} %)"


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count elements by parameter name and by component. Sharded parameters count whole; nothing is communicated."""
    listed = [
        ReportRow(name, 1, parameter.numel(), 0)
        if parameter.requires_grad
        else ReportRow(name, 1, 0, parameter.numel())
        for name, parameter in named_parameters(model)
    ]
    total = _total("", listed)
    names = [re.sub(r"\.\d+(?=\.)", ".*", row.name) for row in listed]
    rows, components = _grouped(names, listed), _grouped(_component_names(listed), listed)
    return TrainableReport(tuple(rows), tuple(_cut(components)), total.trainable, total.frozen)


def _total(name: str, rows: Sequence[ReportRow]) -> ReportRow:
    return ReportRow(
        name,
        sum(row.num_tensors for row in rows),
        sum(row.trainable for row in rows),
        sum(row.frozen for row in rows),
    )


def _grouped(names: Sequence[str], rows: Sequence[ReportRow]) -> list[ReportRow]:
    """One row per name, in order of first appearance."""
    groups: dict[str, list[ReportRow]] = {}
    for name, row in zip(names, rows, strict=True):
        groups.setdefault(name, []).append(row)
    return [_total(name, group) for name, group in groups.items()]


def _cut(rows: list[ReportRow]) -> list[ReportRow]:
    """At most as many rows as fit: kept are those with the largest share of what trains or of what is frozen."""
    if len(rows) <= _MOST_COMPONENTS:
        return rows
    total = _total("", rows)

    def share(row: ReportRow) -> float:
        return max(row.trainable / max(total.trainable, 1), row.frozen / max(total.frozen, 1))

    rest = sorted(rows, key=share, reverse=True)[_MOST_COMPONENTS - 1 :]
    return [row for row in rows if row not in rest] + [_total(f"other ({len(rest)} components)", rest)]


def _component_names(rows: Sequence[ReportRow]) -> list[str]:
    """The name of each parameter's component."""
    paths = _component_paths([row.name for row in rows])
    sizes: Counter[str] = Counter()
    for path, row in zip(paths, rows, strict=True):
        sizes[_list_of(path)] += row.trainable + row.frozen
    lists = sizes.keys() - {""}
    largest = max(lists, key=sizes.__getitem__, default="")
    towers = {tower for path in lists - {largest} if (tower := _tower(path, largest))}
    paths = [path if _list_of(path) in ("", largest) else _list_of(path) for path in paths]
    labels = {path: _label(path, towers) for path in paths}
    shared = {label for label, count in Counter(labels.values()).items() if count > 1}
    return [
        (path if labels[path] in shared else labels[path]) + (" (lora)" if row.name.endswith(FACTORS) else "")
        for path, row in zip(paths, rows, strict=True)
    ]


def _component_paths(names: Sequence[str]) -> list[str]:
    """Where the component of each parameter is, numbers as `*`: the layer's container if it holds layers alone."""
    # Of a LoRA factor the layer that it adapts.
    layers = [name.split(".")[: -2 if name.endswith(FACTORS) else -1] for name in names]
    # What holds a container, and so is more than a component: all above the containers of layers.
    above = {tuple(layer[:end]) for layer in layers for end in range(len(layer) - 1)}
    paths = []
    for layer in layers:
        container = layer[:-1]
        parts = layer if not container or tuple(container) in above else container
        paths.append(".".join("*" if part.isdecimal() else part for part in parts))
    return paths


def _list_of(path: str) -> str:
    """The outermost list that `path` is in, `""` for none."""
    before, star, _ = path.partition("*")
    return before.rstrip(".") if star else ""


def _tower(path: str, largest: str) -> str:
    """The part of the model that holds the list `path` but not the `largest` one; `""` where it is the list itself."""
    parts, others = path.split("."), largest.split(".")
    depth = next((depth for depth, pair in enumerate(zip(parts, others)) if pair[0] != pair[1]), len(others))
    return ".".join(parts[: depth + 1]) if depth < len(parts) - 1 else ""


def _label(path: str, towers: set[str]) -> str:
    parts = [part for part in path.split(".") if part not in ("*", "")]
    last = parts[-1] if parts else "(model)"
    for tower in towers:
        if path.startswith(f"{tower}."):
            return f"{tower.rpartition('.')[2]}: {last}"
    return last
