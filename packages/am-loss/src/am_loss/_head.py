"""The linear layer whose logits a loss is about, and its parts that run on a few rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from am_loss._targets import check_floating, check_labels, check_softcap, refuse_dtensor
from am_loss._vocabulary import Vocabulary, check_same_ranks, own_part


class Head(NamedTuple):
    """`logits = hidden @ weight.T + bias`, times `scale`, then `softcap * tanh(logits / softcap)`.

    `hidden`: `[..., D]`, `weight`: `[V, D]`, `bias`: `[V]`, of one floating dtype.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | None = None


def checked_head(head: Head, labels: Tensor, prefix: str = "") -> tuple[Head, Vocabulary]:
    """The head with `hidden` flattened to `[T, D]`, cast as `F.linear` would under `torch.autocast`, and its ids.

    Of a head that is cut along the vocabulary, the rows that this rank holds, plain tensors with the graph.

    Raises `TypeError` or `ValueError` for what does not fit together; `prefix` stands before the names.
    """
    hidden, weight, bias, softcap, _ = head
    rows = {f"{prefix}hidden": hidden, "labels": labels}
    refuse_dtensor("and rows are the same on all ranks that hold a part of the head", **rows)
    check_labels(f"{prefix}hidden", hidden, labels)
    check_softcap(softcap, f"{prefix}softcap")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}; it must be [V, {hidden.shape[-1]}] to fit {prefix}hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}], one per row of {prefix}weight"
        )
    weight, vocabulary = own_part(f"{prefix}weight", weight, 0)
    if bias is not None:
        bias, of_bias = own_part(f"{prefix}bias", bias, 0)
        check_same_ranks((f"{prefix}weight", f"{prefix}bias"), vocabulary, of_bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_floating(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias})
    return head._replace(hidden=hidden.reshape(-1, hidden.shape[-1]), weight=weight, bias=bias), vocabulary


def project(head: Head, hidden_CD: Tensor, buffer: Tensor) -> Tensor:
    """Raw logits `[C, V]` (before scale and soft-cap) of `hidden_CD`, in the first `C` rows of `buffer`."""
    chunk = buffer[: hidden_CD.shape[0]]
    if head.bias is None:
        return torch.mm(hidden_CD, head.weight.t(), out=chunk)
    return torch.addmm(head.bias, hidden_CD, head.weight.t(), out=chunk)


def apply_scale_and_softcap(
    values: Tensor, scale: float | None, softcap: float | None, with_slope: bool
) -> Tensor | None:
    """Turn raw logits into the head's, in place; return the soft-cap's derivative if there is one and it is asked."""
    if scale is not None:
        values.mul_(scale)
    if softcap is None:
        return None
    values.div_(softcap).tanh_()
    # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
    slope = values.square().neg_().add_(1.0) if with_slope else None
    values.mul_(softcap)
    return slope
