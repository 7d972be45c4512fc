"""Losses of `hidden @ weight.T` without ever holding the logits: the walk over the rows.

Rows are taken `chunk_size` at a time. Each chunk's logits are multiplied once, turned in place into their own gradient
by an `Objective`, and used at once for the gradients of `hidden`, `weight` and `bias`; the buffer then serves the next
chunk. So the forward pass already holds the gradients and the backward pass only scales them: three matrix products per
chunk as in the plain loss (four with a teacher), but no `[tokens, V]` tensor, and the passes over the logits run on
blocks that fit in the cache. The idea is that of Liger Kernel's fused linear losses (Hsu et al. 2024,
arXiv:2410.10989). `F.linear_cross_entropy` needs torch 2.13 and is slower than the plain loss on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from am_loss._head import Head, apply_scale_and_softcap, project
from am_loss._vocabulary import Vocabulary

Targets = Mapping[str, Tensor]

# Elements of the logits buffer: enough rows to keep the matrix products efficient at usual vocabularies.
_CHUNK_ELEMENTS = 2**23
_CHUNK_ROWS = (256, 4096)


class Objective(Protocol):
    """A sum over rows of logits, in one or more parts, that supplies its gradient by the logits itself.

    It sees a chunk's targets, then the logits of one block of the chunk's rows after another.
    """

    @property
    def weights(self) -> tuple[float, ...]:
        """One per part: the loss is the parts' weighted sum."""
        ...

    @property
    def block_elements(self) -> int:
        """Elements of logits that are visited together on a CPU, so that the buffers in use stay in its cache."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids whose logits it sees. Where other ranks hold others, its parts are this rank's share of the sums."""
        ...

    def of_chunk(self, targets: Targets) -> Targets:
        """What the chunk's blocks need, from the chunk's rows of the targets: tensors of as many rows."""
        ...

    def of_block(self, logits: Tensor, targets: Targets, with_gradient: bool) -> Tensor:
        """The parts, `[parts, any number]` to be summed over the last dim, of `logits [C, V]`, in float32 or float64.

        With `with_gradient` the logits are overwritten with the gradient of the weighted sum; else they are scratch.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients someone wants."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclasses.dataclass(frozen=True)
class _Walk:
    """All that the forward pass needs besides the tensors that get a gradient, which `head` holds as well."""

    head: Head
    index: Tensor | None
    targets: Targets
    objective: Objective
    wanted: _Wanted
    chunk_size: int


def chunked_sums(
    head: Head, index: Tensor | None, targets: Targets, objective: Objective, chunk_size: int | None
) -> tuple[Tensor, ...]:
    """The objective summed over rows, with a graph, and its detached parts: scalars, float32 (float64 for float64).

    Args:
        head: with `hidden [T, D]`, as `checked_head` gives it. Where ranks hold parts of the vocabulary, all of them
            call this with the same rows, and the sums and the gradient of `hidden` are complete on each.
        index: the rows `[N]` that count, None for all.
        targets: of these rows, `[N, ...]` each.
        chunk_size: rows whose logits exist at one time, None for a number that suits the vocabulary.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 row; pass None for the default")
    # Inside Function.forward the gradient mode is off and needs_input_grad ignores it: decide here.
    grad = torch.is_grad_enabled()
    wanted = _Wanted(
        hidden=grad and head.hidden.requires_grad,
        weight=grad and head.weight.requires_grad,
        bias=grad and head.bias is not None and head.bias.requires_grad,
    )
    num_rows = head.hidden.shape[0] if index is None else index.numel()
    # Not by what this rank holds: the ranks must cut the rows alike.
    size = chunk_size or _even_chunk(num_rows, objective.vocabulary.width)
    with torch.autocast(head.hidden.device.type, enabled=False):
        walk = _Walk(head, index, targets, objective, wanted, size)
        return _ChunkedLoss.apply(head.hidden, head.weight, head.bias, walk)


def _even_chunk(rows: int, vocabulary: int) -> int:
    """Rows per chunk: as many as the buffer allows, the chunks of nearly equal size."""
    lowest, highest = _CHUNK_ROWS
    most = min(max(_CHUNK_ELEMENTS // vocabulary, lowest), highest)
    num_chunks = max(-(-rows // most), 1)
    return max(-(-rows // num_chunks), 1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight: Tensor, bias: Tensor | None, walk: _Walk) -> tuple[Tensor, ...]:
        head = Head(
            hidden_TD if walk.index is None else hidden_TD[walk.index], weight, bias, walk.head.softcap, walk.head.scale
        )
        parts, gradients = _walk_chunks(head, walk)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, walk.index)
        ctx.hidden_shape = hidden_TD.shape
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(*parts)
        weighted = [factor * part for factor, part in zip(walk.objective.weights, parts, strict=True)]
        return torch.stack(weighted).sum(), *parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients were computed without a graph: under create_graph=True they would pass as constants, silently.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a linear loss cannot be differentiated twice (create_graph=True); compute it from the logits "
                "F.linear(hidden, weight) for second derivatives, with cross_entropy, distillation or your own loss"
            )
        hidden_grad, weight_grad, bias_grad, index = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grad
            if index is not None:
                hidden_grad = hidden_grad.new_zeros(ctx.hidden_shape).index_copy_(0, index, hidden_grad)
        if weight_grad is not None:
            weight_grad = (weight_grad * grad).to(ctx.dtype)
        if bias_grad is not None:
            bias_grad = (bias_grad * grad).to(ctx.dtype)
        return hidden_grad, weight_grad, bias_grad, None


class _Gradients:
    """The loss's gradients by `hidden [N, D]`, weight and bias, those that are wanted, added up over the chunks."""

    def __init__(self, head: Head, wanted: _Wanted, chunk_size: int) -> None:
        rows_ND, weight = head.hidden, head.weight
        dtype = torch.promote_types(rows_ND.dtype, torch.float32)
        # One chunk needs no accumulation, so its product is rounded once in any case and can have the weight's dtype.
        sum_dtype = dtype if rows_ND.shape[0] > chunk_size else weight.dtype
        self.rows_ND = rows_ND
        self.head_weight = weight
        self.hidden = torch.empty_like(rows_ND) if wanted.hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=sum_dtype) if wanted.weight else None
        self.product = torch.empty_like(weight) if wanted.weight and sum_dtype != weight.dtype else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=dtype) if wanted.bias else None

    def add_block(self, gradient: Tensor) -> None:
        """`gradient [C, V]` by the raw logits of a block, in float32 or float64: what the bias gets of it."""
        if self.bias is not None:
            self.bias += gradient.sum(0)

    def add_chunk(self, rows: slice, gradient: Tensor) -> None:
        """`gradient [C, V]` by the raw logits of `rows`, in the weight's dtype: what hidden and weight get of it."""
        if self.hidden is not None:
            torch.mm(gradient, self.head_weight, out=self.hidden[rows])
        if self.weight is None:
            return
        if self.product is not None:
            self.weight += torch.mm(gradient.t(), self.rows_ND[rows], out=self.product)
        elif rows.start == 0:
            # Writing is faster than adding to zeros.
            torch.mm(gradient.t(), self.rows_ND[rows], out=self.weight)
        else:
            self.weight.addmm_(gradient.t(), self.rows_ND[rows])


def _walk_chunks(head: Head, walk: _Walk) -> tuple[list[Tensor], _Gradients]:
    """The objective's parts summed over the `N` rows of `head.hidden`, and the gradients of their weighted sum."""
    objective, with_gradient = walk.objective, walk.wanted.any
    rows_ND, vocabulary = head.hidden, objective.vocabulary
    num_rows = rows_ND.shape[0]
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    size = min(walk.chunk_size, max(num_rows, 1))
    logits_CV = rows_ND.new_empty(size, head.weight.shape[0])
    # The objective sees float32: in place where the logits have that dtype, else in a block of its own.
    block_size = size if rows_ND.is_cuda else min(max(objective.block_elements // vocabulary.width, 1), size)
    buffer = None if logits_CV.dtype == dtype else logits_CV.new_empty(block_size, head.weight.shape[0], dtype=dtype)
    gradients = _Gradients(head, walk.wanted, size)

    parts = [rows_ND.new_zeros(len(objective.weights), 0, dtype=dtype)]
    for rows in _slices(num_rows, size):
        chunk = project(head, rows_ND[rows], logits_CV)
        targets = objective.of_chunk(_rows_of(walk.targets, rows))
        for block_rows in _slices(chunk.shape[0], block_size):
            block = chunk[block_rows]
            values = block if buffer is None else buffer[: block.shape[0]].copy_(block)
            slope = apply_scale_and_softcap(values, head.scale, head.softcap, with_gradient)
            parts.append(objective.of_block(values, _rows_of(targets, block_rows), with_gradient))
            if not with_gradient:
                continue
            if slope is not None:
                values.mul_(slope)
            if head.scale is not None:
                values.mul_(head.scale)
            gradients.add_block(values)
            if buffer is not None:
                block.copy_(values)
        gradients.add_chunk(rows, chunk)
    sums = [part.sum() for part in torch.cat(parts, 1)]
    if vocabulary.group is None:
        return sums, gradients
    if gradients.hidden is not None:
        vocabulary.sum_(gradients.hidden)
    return list(vocabulary.sum_(torch.stack(sums)).unbind()), gradients


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    """Ranges of `size` rows, the last one shorter."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _rows_of(targets: Targets, rows: slice) -> Targets:
    return {name: tensor[rows] for name, tensor in targets.items()}
