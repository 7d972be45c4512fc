"""Any loss over the logits of a linear head without ever holding all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from am_loss._chunks import Targets, chunked_sums
from am_loss._head import Head, checked_head
from am_loss._targets import refuse_dtensor, select_targets
from am_loss._vocabulary import Vocabulary

LABELS = "shift_labels"


class ChunkLoss(Protocol):
    """A loss of a few rows of logits, as `chunked` calls it once per chunk."""

    def __call__(self, logits: Tensor, targets: Mapping[str, Tensor], /) -> Tensor:
        """The SUM over the rows of `logits [C, V]`, a scalar; `targets` holds the same rows of every target.

        The logits are final (after scale and soft-cap), float32 (float64 for float64 heads). Autograd differentiates
        the result by them. Rows without a target are not among them; `C` varies and is at least 1.
        """
        ...


def chunked(
    head: Head,
    targets: Mapping[str, Tensor],
    loss: ChunkLoss,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    """The sum of `loss` over all rows with a target, a few rows of logits at a time: a float32 scalar.

    The gradients of `hidden`, `weight` and `bias` are computed in the forward pass, those that are required; nothing
    else gets one, not even parameters that `loss` uses. Memory: as `linear_cross_entropy`, plus what autograd keeps of
    `loss` for one block of rows.

    Args:
        head: whose logits the loss is about; under `torch.autocast` it is cast as `F.linear` would.
        targets: name to tensor, `[...]` or `[..., any]` with the leading dims of `hidden [..., D]`. `"shift_labels"`,
            integers, already shifted, must be among them: its positions with `ignore_index` are left out before
            anything is computed. Without any target the result is a 0 that is connected to the graph.
        loss: of the logits and targets of one chunk, see `ChunkLoss`. It must be a sum over rows that does not look at
            other rows, since where chunks begin and end is not its to know. A `torch.autograd.Function` in it may
            supply a gradient of its own.
        chunk_size: the most rows whose logits exist at one time; the default keeps the buffer near 8 M elements.

    Raises:
        ValueError: shapes or devices that do not fit, a label outside `[0, V)`, a target that requires a gradient, a
            result of `loss` that is no scalar or does not depend on the logits.
        TypeError: a DTensor, a head that is cut along the vocabulary included, or dtypes that differ.
        RuntimeError: when differentiated twice.
    """
    if LABELS not in targets:
        raise ValueError(f"targets has {sorted(targets)} but no {LABELS!r}, which says the rows that count; add it")
    labels = targets[LABELS]
    refuse_dtensor("and a loss of your own sees whole rows of logits", weight=head.weight, bias=head.bias)
    flat, vocabulary = checked_head(head, labels)
    _check_targets(head.hidden, targets)
    index, selected = select_targets(labels, vocabulary, ignore_index)
    rows = {name: _rows(tensor, labels.dim(), index) for name, tensor in targets.items() if name != LABELS}
    total, _ = chunked_sums(flat, index, {LABELS: selected, **rows}, _Differentiated(vocabulary, loss), chunk_size)
    return total


def _check_targets(hidden: Tensor, targets: Mapping[str, Tensor]) -> None:
    leading = hidden.shape[:-1]
    for name, tensor in targets.items():
        refuse_dtensor("and targets are those of every row", **{name: tensor})
        if tensor.shape[: len(leading)] != leading:
            raise ValueError(
                f"target {name!r} has shape {tuple(tensor.shape)}; it must start with {tuple(leading)}, "
                "the dims of hidden without its last"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"target {name!r} is on {tensor.device} but hidden is on {hidden.device}; move it there")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"target {name!r} requires a gradient, which targets do not get; pass {name}.detach()")


def _rows(tensor: Tensor, leading: int, index: Tensor | None) -> Tensor:
    """The rows `index` of `tensor` with its `leading` dims as one."""
    flat = tensor.detach().reshape(-1, *tensor.shape[leading:])
    return flat if index is None else flat[index]


@dataclasses.dataclass(frozen=True)
class _Differentiated:
    """A user's loss as an `Objective`: autograd supplies its gradient, block by block."""

    weights: ClassVar[tuple[float, ...]] = (1.0,)
    # The logits, what autograd keeps of them and their gradient are in use together, as the buffers of a teacher are.
    block_elements: ClassVar[int] = 2**18
    vocabulary: Vocabulary
    loss: ChunkLoss

    def of_chunk(self, targets: Targets) -> Targets:
        return targets

    def of_block(self, logits: Tensor, targets: Targets, with_gradient: bool) -> Tensor:
        # Hooks of the caller's, such as those of activation checkpointing, are not for a graph that ends here.
        with torch.set_grad_enabled(with_gradient), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            leaf = logits.detach().requires_grad_(with_gradient)
            total = self.loss(leaf, targets)
            if total.shape != ():
                raise ValueError(f"the loss returned shape {tuple(total.shape)}; return the sum over rows, a scalar")
            if with_gradient:
                logits.copy_(_gradient(total, leaf))
        return total.detach().to(logits.dtype).reshape(1, 1)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _gradient(total: Tensor, logits: Tensor) -> Tensor:
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, logits, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError("the loss does not depend on the logits that it was given; do not detach them")
