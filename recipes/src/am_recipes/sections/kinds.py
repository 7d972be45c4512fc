"""Values with a constraint, as the fields of sections use them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Literal

from am_recipes.settings import Check, NumberAsText, Target

if TYPE_CHECKING:
    import torch

PositiveInt = Annotated[int, Check(lambda number: number >= 1, "must be at least 1")]
NonNegativeInt = Annotated[int, Check(lambda number: number >= 0, "must be at least 0")]
PositiveFloat = Annotated[float, Check(lambda number: 0 < number < math.inf, "must be greater than 0")]
NonNegativeFloat = Annotated[float, Check(lambda number: 0 <= number < math.inf, "must be at least 0")]
Fraction = Annotated[float, Check(lambda number: 0 <= number < 1, "must be in [0, 1)")]
Ratio = Annotated[float, Check(lambda ratio: 0 <= ratio <= 1, "must be in [0, 1]")]
OneRank = Annotated[int, Check(lambda size: size == 1, "must be 1: no recipe splits this yet")]
Text = Annotated[str, Check(bool, "must not be empty")]
Pattern = Annotated[str, Check(lambda text: _compiles(text), "must be a regular expression")]
# What `seconds` reads.
Time = Annotated[
    str,
    NumberAsText(),
    Check(
        lambda text: seconds(text) is not None,
        "must be a time longer than 0 as SLURM writes it: 90 (minutes), 90:00, 12:30:00, 1-12 (days and hours), "
        "1-12:30 or 1-12:30:00",
    ),
]
Dtype = Literal["float32", "bfloat16"]
# A folder in Hugging Face's layout: its path, a Hub id, or a target that returns its path (see `am_recipes.sources`).
Source = Text | Target


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype by its name, None for None."""
    import torch

    return {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


# minutes, minutes:seconds, hours:minutes:seconds; days-hours, days-hours:minutes, days-hours:minutes:seconds.
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def seconds(time: str) -> int | None:
    """How long a `Time` is; None of a text that is none, and of 0, which SLURM takes for no limit at all."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    numbers = [int(number) for number in match.groups()[1:] if number is not None]
    if match[1] is not None:
        days, (hours, minutes, rest) = int(match[1]), (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        days, (hours, minutes, rest) = 0, numbers
    else:
        days, hours, (minutes, rest) = 0, 0, (*numbers, 0)[:2]
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or None


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
