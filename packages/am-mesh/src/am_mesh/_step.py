"""The forwards and backwards of one optimizer step: what pipeline parallelism does otherwise, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from am_mesh._shard import gradient_sync

Batch = TypeVar("Batch")


def forward_backward(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    forward: Callable[[int, Batch], Mapping[str, torch.Tensor]],
    divisor: int,
) -> dict[str, torch.Tensor]:
    """Run `forward` and its backward for every micro-batch of a step; gradients are left in the parameters.

    Every rank of the model calls it, with equally many micro-batches. Gradients are communicated with the last one.

    Args:
        model: what `parallelize` returned, or any module.
        micro_batches: those of this rank, at least one.
        forward: called with the number of the micro-batch, from 0, and the micro-batch itself. Gives scalars by name,
            each a SUM over the micro-batch, the same names for every one: `"loss"` has the graph, the others are only
            added up.
        divisor: what the sums of the whole step are divided by: its number of targets over all ranks, at least 1.

    Returns:
        This rank's part of each sum of the step, divided, detached: add them up over `ParallelDims.loss_ranks`.

    Raises:
        ValueError: no micro-batch, a divisor below 1, a forward without `"loss"`, with other names than the first
            micro-batch had, or with a sum that is no scalar.
    """
    if not micro_batches or not divisor >= 1:
        raise ValueError(
            f"{len(micro_batches)} micro-batches and divisor={divisor}: a step needs at least one of each, since its "
            "loss is a mean over targets; look for rows whose labels are all -100, cut too short, or leave the step out"
        )
    totals: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro_batches):
        with gradient_sync(model, number == len(micro_batches) - 1):
            sums = forward(number, batch)
            _check(sums, totals if number else sums)
            parts = {name: value / divisor for name, value in sums.items()}
            parts["loss"].backward()
        for name, part in parts.items():
            totals[name] = totals[name] + part.detach() if number else part.detach()
    return totals


def _check(sums: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if "loss" not in sums or sums.keys() != expected.keys():
        raise ValueError(
            f"forward gave the sums {sorted(sums)}; it must give 'loss', and for every micro-batch of a step the same "
            f"names: {sorted({'loss', *expected})}"
        )
    for name, value in sums.items():
        if value.dim() != 0:
            raise ValueError(f"forward gave {name!r} of shape {tuple(value.shape)}; give the sum over the micro-batch")
