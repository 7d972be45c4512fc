"""What the losses ask of their arguments, and which rows they keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from am_loss._vocabulary import Vocabulary, check_same_labels, is_dtensor


def refuse_dtensor(reason: str, **tensors: Tensor | None) -> None:
    """Raise `TypeError` for a DTensor: its shards would be treated as the whole vocabulary or batch."""
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise TypeError(f"{name} is a DTensor, {reason}; pass a plain tensor, {name}.full_tensor() has all of it")


def check_labels(name: str, rows: Tensor, labels: Tensor) -> None:
    """`rows` is `[..., X]`: `labels` must be integers of shape `[...]` on the same device."""
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels has dtype {labels.dtype}; pass class indices, for example labels.long()")
    if rows.dim() == 0 or rows.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but {name} has shape {tuple(rows.shape)}; "
            f"labels must have the shape of {name} without its last dim"
        )
    if rows.device != labels.device:
        raise ValueError(f"labels is on {labels.device} but {name} is on {rows.device}; move both to one device")


def check_floating(**tensors: Tensor | None) -> None:
    """All given tensors must share one floating dtype."""
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    if not first.is_floating_point or any(dtype != first for dtype in given.values()):
        described = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise TypeError(f"dtypes differ or are not floating: {described}; cast them to one floating dtype")


def check_softcap(softcap: float | None, name: str = "softcap") -> None:
    """A soft-cap divides the logits."""
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{name}={softcap} must be positive; pass None for no soft-cap")


def check_z_loss(z_loss: float) -> None:
    """A negative z-loss would reward a growing normaliser."""
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} must be finite and not negative; pass 0.0 for none")


def select_targets(labels: Tensor, vocabulary: Vocabulary, ignore_index: int) -> tuple[Tensor | None, Tensor]:
    """Positions with a target, and their targets: `index [N]` into the flattened labels (None: all), `targets [N]`.

    Both int64; `labels` are integers of any shape. Raises `ValueError` for a target outside `[0, vocabulary)`. On CUDA
    this waits for the device (so does the selection itself). Ranks that hold parts of the vocabulary must agree.
    """
    labels_T = labels.reshape(-1).long()
    found = (labels_T != ignore_index).nonzero().squeeze(1)
    index = None if found.numel() == labels_T.numel() else found
    targets = labels_T if index is None else labels_T[index]
    check_same_labels(labels_T, targets.numel(), vocabulary)
    if targets.numel() > 0:
        lowest, highest = torch.stack(targets.aminmax()).tolist()
        if lowest < 0 or highest >= vocabulary.size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"label {wrong} is outside [0, {vocabulary.size}) and is not ignore_index={ignore_index}; "
                f"use labels of this vocabulary and mark positions without a target with {ignore_index}"
            )
    return index, targets


def selected_rows(values: Tensor, labels: Tensor, index: Tensor | None) -> Tensor:
    """Of `values [..., X]`, as `[N, X]`, the rows of `index` (None: all) into the flattened `labels [...]`."""
    # Not -1: X may be 0.
    rows = values.reshape(labels.numel(), values.shape[-1])
    return rows if index is None else rows[index]
