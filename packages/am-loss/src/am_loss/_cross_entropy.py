"""Cross entropy of logits that exist."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from am_loss._logits import sum_of_logits
from am_loss._objectives import CrossEntropy
from am_loss._targets import (
    check_floating,
    check_labels,
    check_softcap,
    check_z_loss,
    refuse_dtensor,
    select_targets,
    selected_rows,
)
from am_loss._vocabulary import own_part


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over target tokens of `-log softmax(z)[label]`, in float32.

    `z = logits`, times `scale` if given, then `softcap * tanh(z / softcap)` if given. Returns a float32 scalar (float64
    for float64 logits): a SUM; divide by the number of targets of the whole optimizer step. Without any target it is a
    0 that is connected to the graph. Use `linear_cross_entropy` where the head's weight is at hand: it never holds the
    logits.

    Args:
        logits: `[..., V]`, floating; or a DTensor that is `Shard` along V over a mesh of one axis, whose ranks all call
            this with the same labels.
        labels: `[...]` integers, already shifted.
        ignore_index: positions with this label are left out before anything is computed, so what stands there (NaN
            included) has no effect and gets a zero gradient.
        z_loss: adds `z_loss * logsumexp(z)^2` of each target token (PaLM, arXiv:2204.02311, uses 1e-4).

    Raises:
        ValueError: a label outside `[0, V)`, or shapes that do not fit.
        TypeError: any other DTensor, or a dtype that does not fit.
    """
    refuse_dtensor("and rows are the same on all ranks", labels=labels)
    check_floating(logits=logits)
    check_labels("logits", logits, labels)
    check_softcap(softcap)
    check_z_loss(z_loss)
    logits, vocabulary = own_part("logits", logits, -1)
    index, targets = select_targets(labels, vocabulary, ignore_index)
    rows = selected_rows(logits, labels, index)
    if vocabulary.group is not None:
        objective = CrossEntropy(vocabulary, z_loss)
        return sum_of_logits(rows, {"labels": targets}, objective, softcap=softcap, scale=scale)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if scale is not None:
        rows = rows * scale
    if softcap is not None:
        rows = softcap * torch.tanh(rows / softcap)
    loss = F.cross_entropy(rows, targets, reduction="sum")
    return loss if z_loss == 0.0 else loss + z_loss * torch.logsumexp(rows, 1).square().sum()
