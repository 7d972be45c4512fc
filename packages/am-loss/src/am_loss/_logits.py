"""Losses of logits that exist, cut along the vocabulary: each rank has `[T, V_here]` of its own ids.

As the linear losses do, the forward pass turns a float32 copy of them into their gradient, so that the ranks exchange
nothing in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from am_loss._chunks import Objective, Targets
from am_loss._head import apply_scale_and_softcap


def sum_of_logits(
    rows: Tensor, targets: Targets, objective: Objective, *, softcap: float | None = None, scale: float | None = None
) -> Tensor:
    """The objective summed over `rows [N, V_here]` and over the ranks that hold its vocabulary, a scalar with a graph.

    targets: of these rows, as the objective takes them per block.
    """
    wanted = torch.is_grad_enabled() and rows.requires_grad
    with torch.autocast(rows.device.type, enabled=False):
        return _LogitsLoss.apply(rows, targets, objective, softcap, scale, wanted)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        targets: Targets,
        objective: Objective,
        softcap: float | None,
        scale: float | None,
        wanted: bool,
    ) -> Tensor:
        values = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        slope = apply_scale_and_softcap(values, scale, softcap, wanted)
        parts = objective.of_block(values, targets, wanted)
        if slope is not None:
            values.mul_(slope)
        if wanted and scale is not None:
            values.mul_(scale)
        ctx.save_for_backward(values if wanted else None)
        ctx.dtype = rows.dtype
        weighted = [factor * part.sum() for factor, part in zip(objective.weights, parts, strict=True)]
        return objective.vocabulary.sum_(torch.stack(weighted).sum())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a loss of logits that are cut along the vocabulary cannot be differentiated twice (create_graph=True)"
            )
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None, None, None
