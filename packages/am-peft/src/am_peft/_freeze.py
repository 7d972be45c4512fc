"""Which parameters train: ordered rules to set it, a table to see it."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

from torch import nn

from am_peft._names import named_parameters, nearest


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """Parameters that differ in their layer number only: ``name`` with ``*`` for it, and elements by trainability."""

    name: str
    num_tensors: int
    trainable: int
    frozen: int


@dataclasses.dataclass(frozen=True)
class TrainableReport:
    """Elements that train and that do not, in all and by row. ``str(report)`` is a table."""

    rows: tuple[ReportRow, ...]
    trainable: int
    frozen: int

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [9])
        lines = [f"{'parameter':{width}}  {'tensors':>7}  {'trainable':>15}  {'frozen':>15}"]
        lines += [
            f"{row.name:{width}}  {row.num_tensors:>7}  {row.trainable:>15,}  {row.frozen:>15,}" for row in self.rows
        ]
        total = self.trainable + self.frozen
        share = 100 * self.trainable / total if total else 0.0
        lines.append(f"{self.trainable:,} of {total:,} parameters train ({share:.2f} %)")
        return "\n".join(lines)


def freeze(model: nn.Module, rules: Sequence[Mapping[str, str]]) -> TrainableReport:
    """Apply ``[{"freeze": pattern}, {"unfreeze": pattern}, ...]`` in order, the last match of a parameter deciding.

    A pattern is matched against full parameter names as ``fnmatch`` does (``*`` crosses dots), or names a module and
    means all below it. LoRA factors are touched only by patterns that contain ``lora_``: freezing a tower does not
    silently freeze the adapters in it. Raises ``ValueError`` for an unknown action or a pattern that matches nothing.
    Returns the resulting :func:`trainable_report`.
    """
    parameters = dict(named_parameters(model))
    steps = []
    for rule in rules:
        if len(rule) != 1 or next(iter(rule)) not in ("freeze", "unfreeze"):
            raise ValueError(f"rule {dict(rule)!r} must be {{'freeze': pattern}} or {{'unfreeze': pattern}}")
        action, pattern = next(iter(rule.items()))
        found = [
            name
            for name in parameters
            if (fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}."))
            and ("lora_" in pattern or not name.endswith((".lora_A.weight", ".lora_B.weight")))
        ]
        if not found:
            raise ValueError(
                f"{action} pattern {pattern!r} matches no parameter; nearest: {nearest(pattern, parameters)}"
            )
        steps.append((found, action == "unfreeze"))
    # Only once all rules are known to be right: an error leaves the model as it was.
    for found, trainable in steps:
        for name in found:
            parameters[name].requires_grad_(trainable)
    return trainable_report(model)


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count elements by parameter name, layers folded. Sharded parameters count whole; nothing is communicated."""
    rows: dict[str, list[int]] = {}
    for name, parameter in named_parameters(model):
        row = rows.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), [0, 0, 0])
        row[0] += 1
        row[1 if parameter.requires_grad else 2] += parameter.numel()
    listed = tuple(ReportRow(name, *counts) for name, counts in rows.items())
    return TrainableReport(listed, sum(row.trainable for row in listed), sum(row.frozen for row in listed))
