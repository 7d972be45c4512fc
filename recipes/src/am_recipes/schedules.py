"""The learning rate of a step: the styles, what fits together, and the share of the full rate that a step takes.

Plain numbers: a config is held against these rules without torch, and `am_recipes.optim.schedule` follows them.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Literal

Style = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
STYLES: tuple[Style, ...] = typing.get_args(Style)
# How wsd decays, by transformers' names.
DecayType = Literal["linear", "cosine", "1-sqrt"]
DECAY_TYPES: tuple[DecayType, ...] = typing.get_args(DecayType)
# The styles in which the length of the run decides the rate of a step: a run with another length is another run.
NEEDS_TOTAL_STEPS: tuple[Style, ...] = ("linear", "cosine", "wsd")


def require_fit(
    style: Style,
    *,
    lr: float,
    warmup_steps: int,
    min_lr: float,
    decay_steps: int | None,
    total_steps: int | None,
    init_lr: float | None = None,
    decay_type: DecayType | None = None,
    length: str = "total_steps",
) -> None:
    """Refuse numbers that do not fit each other: ValueError.

    Args:
        lr: the full rate.
        decay_steps: how many of the last steps of `wsd` decay; None leaves that to the schedule.
        init_lr: the rate of the first step; None leaves that to the warm-up.
        decay_type: how `wsd` decays; None is linear.
        total_steps: how long the run is at most; None where that is not known yet.
        length: what `total_steps` is called where it was set.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} is negative; use 0 for no warm-up")
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"{length}={total_steps} must be at least 1")
    if total_steps is not None and warmup_steps > total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} is longer than the run of {length}={total_steps}; lower it")
    require_rate("min_lr", min_lr)
    if style != "constant" and min_lr > lr:
        raise ValueError(f"min_lr={min_lr} is above the learning rate {lr}; lower it, or use style='constant'")
    if init_lr is not None:
        require_rate("init_lr", init_lr)
        if init_lr > lr:
            raise ValueError(f"init_lr={init_lr} is above the learning rate {lr}, which the warm-up rises to; lower it")
        if warmup_steps < 2:
            raise ValueError(
                f"init_lr={init_lr} is the rate of the first step and needs a warm-up after it, but warmup_steps="
                f"{warmup_steps}; set that to 2 or more, or leave init_lr out"
            )
    if decay_type is not None and decay_type not in DECAY_TYPES:
        raise ValueError(f"decay_type={decay_type!r} is unknown; choose one of {', '.join(DECAY_TYPES)}")
    for name, value in (("decay_steps", decay_steps), ("decay_type", decay_type)):
        if value is not None and style != "wsd":
            raise ValueError(f"{name}={value} is for style='wsd'; style={style!r} has no such phase, leave it out")
    full_rate = max(warmup_steps, 1)
    if decay_steps is not None and total_steps is not None and not 1 <= decay_steps <= total_steps - full_rate:
        raise ValueError(
            f"decay_steps={decay_steps} must be between 1 and {total_steps - full_rate}, the steps of {length}="
            f"{total_steps} that follow step {full_rate}, the first at the full rate; change it, or warmup_steps"
        )


def require_rate(name: str, value: float) -> None:
    """Refuse a rate that is negative or no finite number: ValueError."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} must be a finite number, 0 or more")


def multiplier(
    style: Style,
    *,
    lr: float,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    min_lr: float = 0.0,
    decay_steps: int | None = None,
    init_lr: float | None = None,
    decay_type: DecayType | None = None,
) -> Callable[[int], float]:
    """The share of the full rate `lr` that a step takes, as a function of how many steps were done before it.

    The formulas are those of `am_recipes.optim.schedule`. Raises ValueError where `require_fit` does, and where a style
    of `NEEDS_TOTAL_STEPS` has no `total_steps`.
    """
    require_fit(
        style,
        lr=lr,
        warmup_steps=warmup_steps,
        min_lr=min_lr,
        decay_steps=decay_steps,
        total_steps=total_steps,
        init_lr=init_lr,
        decay_type=decay_type,
    )
    if total_steps is None and style in NEEDS_TOTAL_STEPS:
        raise ValueError(f"style={style!r} needs total_steps: it decides the rate of every step")
    peak_step = max(warmup_steps, 1)
    floor = min_lr / lr if lr > 0 else 0.0
    shape = _shape(style, decay_type or "linear", peak_step, total_steps, decay_steps, floor)
    first = 1 / peak_step if init_lr is None or lr == 0 else init_lr / lr

    def factor(steps_done: int) -> float:
        step = steps_done + 1
        if step < peak_step:
            return first + (1 - first) * (step - 1) / (peak_step - 1)
        return 1.0 if step == peak_step else shape(step)

    return factor


def _shape(
    style: Style,
    decay_type: DecayType,
    peak_step: int,
    total_steps: int | None,
    decay_steps: int | None,
    floor: float,
) -> Callable[[int], float]:
    """The share of a step after `peak_step`; `floor` is the share of `min_lr`."""
    if style == "inverse_sqrt":
        return lambda step: max(floor, math.sqrt(peak_step / step))
    if style == "constant" or total_steps is None:
        return lambda step: 1.0
    left = total_steps - peak_step
    length = left
    form: str = style
    if style == "wsd":
        length = min(max(total_steps // 10, 1), left) if decay_steps is None else decay_steps
        form = decay_type

    def decaying(step: int) -> float:
        # max: a run without a step after the peak still has a rate for what follows its end.
        progress = min(max((step - (total_steps - length)) / max(length, 1), 0.0), 1.0)
        if form == "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        else:
            remaining = 1 - (math.sqrt(progress) if form == "1-sqrt" else progress)
        return floor + (1 - floor) * remaining

    return decaying
