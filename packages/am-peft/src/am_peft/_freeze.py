"""Ordered rules that set which parameters train."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from am_peft._names import FACTORS, named_parameters, nearest
from am_peft._report import TrainableReport, trainable_report


def freeze(model: nn.Module, rules: Sequence[Mapping[str, str]]) -> TrainableReport:
    """Apply `[{"freeze": pattern}, {"unfreeze": pattern}, ...]` in order, the last match of a parameter deciding.

    A pattern is matched against full parameter names as `fnmatch` does (`*` crosses dots), or names a module and
    means all below it. LoRA factors are touched only by patterns that contain `lora_`: freezing a tower does not
    silently freeze the adapters in it. Raises `ValueError` for an unknown action or a pattern that matches nothing.
    Returns the resulting `trainable_report`.
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
            and ("lora_" in pattern or not name.endswith(FACTORS))
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
