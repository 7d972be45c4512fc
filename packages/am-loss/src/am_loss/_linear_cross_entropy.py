"""Cross entropy of ``hidden @ weight.T`` without ever holding the logits.

Rows are taken ``chunk_size`` at a time. Each chunk's logits are multiplied once, turned in place into their own
gradient (softmax minus one-hot), and used at once for the gradients of ``hidden`` and ``weight``; the buffer then
serves the next chunk. So the forward pass already holds both gradients and the backward pass only scales them: three
matrix products per chunk as in the plain loss, but no ``[tokens, V]`` tensor, and the passes over the logits run on
blocks that fit in the cache. The idea is that of Liger Kernel's fused linear cross entropy (Hsu et al. 2024,
arXiv:2410.10989). ``F.linear_cross_entropy`` needs torch 2.13 and is slower than the plain loss on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from am_loss._targets import check_floating, check_labels, check_softcap, refuse_dtensor, select_targets

# Elements of the logits buffer: enough rows to keep the matrix products efficient at usual vocabularies.
_CHUNK_ELEMENTS = 2**23
_CHUNK_ROWS = (256, 4096)
# Elements that the softmax visits together: a block stays in a CPU's cache, and its thread barriers are few.
_BLOCK_ELEMENTS = 2**21


@dataclasses.dataclass(frozen=True)
class _Options:
    """``softcap`` and ``scale`` of the logits, rows per chunk, and which gradients someone wants."""

    softcap: float | None
    scale: float | None
    chunk_size: int
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy(F.linear(hidden, weight, bias), labels)`` without holding the logits: a float32 SUM.

    - ``hidden``: ``[..., D]``, ``weight``: ``[V, D]``, ``bias``: ``[V]``, of one floating dtype. ``labels``: ``[...]``
      integers, already shifted. Under ``torch.autocast`` the three are cast as ``F.linear`` would.
    - ``z = hidden @ weight.T + bias``, times ``scale`` if given, then ``softcap * tanh(z / softcap)`` if given.
    - Positions with label ``ignore_index`` are never multiplied by the head; their gradient is zero.
    - ``chunk_size``: rows whose logits exist at one time; the default keeps the buffer near 8 M elements. The result
      does not depend on it beyond rounding.
    - Returns a float32 scalar (float64 for float64 inputs). Softmax and loss are computed in float32; the weight's
      gradient is accumulated in float32 over the chunks and rounded once. Without any target: a 0 that is connected
      to the graph, whose gradients are zeros.
    - Only gradients that are required are computed: none under ``torch.no_grad``, none of a frozen weight.
    - Raises ``ValueError`` for a label outside ``[0, V)`` or shapes that do not fit, ``TypeError`` for DTensors or
      mixed dtypes, ``RuntimeError`` when differentiated twice.
    """
    refuse_dtensor(hidden=hidden, weight=weight, labels=labels, bias=bias)
    check_labels("hidden", hidden, labels)
    check_softcap(softcap)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_floating(hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [V, {hidden.shape[-1]}] to fit hidden")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}], one per row of weight")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 row; pass None for the default")
    vocabulary = weight.shape[0]
    index, targets = select_targets(labels, vocabulary, ignore_index)
    # Inside Function.forward the gradient mode is off and needs_input_grad ignores it: decide here.
    grad = torch.is_grad_enabled()
    options = _Options(
        softcap=softcap,
        scale=scale,
        chunk_size=chunk_size or _even_chunk(targets.numel(), vocabulary),
        hidden_grad=grad and hidden.requires_grad,
        weight_grad=grad and weight.requires_grad,
        bias_grad=grad and bias is not None and bias.requires_grad,
    )
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, index, targets, options)


def _even_chunk(rows: int, vocabulary: int) -> int:
    """Rows per chunk: as many as the buffer allows, the chunks of nearly equal size."""
    lowest, highest = _CHUNK_ROWS
    most = min(max(_CHUNK_ELEMENTS // vocabulary, lowest), highest)
    num_chunks = max(-(-rows // most), 1)
    return max(-(-rows // num_chunks), 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        targets: Tensor,
        options: _Options,
    ) -> Tensor:
        rows_ND = hidden_TD if index is None else hidden_TD[index]
        loss, hidden_grad, weight_grad, bias_grad = _loss_and_gradients(rows_ND, weight, bias, targets, options)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad, index)
        ctx.hidden_shape = hidden_TD.shape
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients were computed without a graph: under create_graph=True they would pass as constants, silently.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy cannot be differentiated twice (create_graph=True); "
                "use cross_entropy(F.linear(hidden, weight), labels) for second derivatives"
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
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _loss_and_gradients(
    rows_ND: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss summed over ``N`` rows and its gradients by rows ``[N, D]``, weight ``[V, D]`` and bias ``[V]``."""
    num_rows, vocabulary = rows_ND.shape[0], weight.shape[0]
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    size = min(options.chunk_size, max(num_rows, 1))

    losses_N = rows_ND.new_empty(num_rows, dtype=dtype)
    logits_CV = rows_ND.new_empty(size, vocabulary)
    # The softmax runs in float32: in place where the logits have that dtype, else in a block of its own.
    block_size = size if rows_ND.is_cuda else min(max(_BLOCK_ELEMENTS // vocabulary, 1), size)
    block = None if logits_CV.dtype == dtype else logits_CV.new_empty(block_size, vocabulary, dtype=dtype)
    hidden_grad = torch.empty_like(rows_ND) if options.hidden_grad else None
    # One chunk needs no accumulation, so its product is rounded once in any case and can have the weight's dtype.
    sum_dtype = dtype if num_rows > size else weight.dtype
    weight_grad = weight.new_zeros(weight.shape, dtype=sum_dtype) if options.weight_grad else None
    partial = torch.empty_like(weight) if options.weight_grad and sum_dtype != weight.dtype else None
    bias_grad = weight.new_zeros(vocabulary, dtype=dtype) if options.bias_grad else None
    any_grad = options.hidden_grad or options.weight_grad or options.bias_grad

    for start in range(0, num_rows, size):
        chunk_range = slice(start, start + size)
        rows_CD = rows_ND[chunk_range]
        chunk = logits_CV[: rows_CD.shape[0]]
        if bias is None:
            torch.mm(rows_CD, weight.t(), out=chunk)
        else:
            torch.addmm(bias, rows_CD, weight.t(), out=chunk)
        for first in range(0, chunk.shape[0], block_size):
            part = chunk[first : first + block_size]
            values = part if block is None else block[: part.shape[0]].copy_(part)
            block_range = slice(start + first, start + first + part.shape[0])
            losses_N[block_range] = _softmax(values, targets[block_range], options, any_grad)
            if bias_grad is not None:
                bias_grad += values.sum(0)
            if any_grad and block is not None:
                part.copy_(values)
        if hidden_grad is not None:
            torch.mm(chunk, weight, out=hidden_grad[chunk_range])
        if weight_grad is not None and partial is not None:
            weight_grad += torch.mm(chunk.t(), rows_CD, out=partial)
        elif weight_grad is not None and start == 0:
            # Writing is faster than adding to zeros.
            torch.mm(chunk.t(), rows_CD, out=weight_grad)
        elif weight_grad is not None:
            weight_grad.addmm_(chunk.t(), rows_CD)
    return losses_N.sum(), hidden_grad, weight_grad, bias_grad


def _softmax(values: Tensor, targets: Tensor, options: _Options, any_grad: bool) -> Tensor:
    """Losses ``[C]`` of raw logits ``values [C, V]``, which are overwritten with their gradients if ``any_grad``."""
    targets = targets.unsqueeze(1)
    slope = None
    if options.scale is not None:
        values.mul_(options.scale)
    if options.softcap is not None:
        values.div_(options.softcap).tanh_()
        # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
        slope = values.square().neg_().add_(1.0) if any_grad else None
        values.mul_(options.softcap)
    target_values = values.gather(1, targets)
    largest = values.amax(1, keepdim=True)
    torch.softmax(values, 1, out=values)
    # log sum exp(x) = max x - log max p, and max p >= 1 / V: exact where p[target] itself would underflow.
    losses = (largest - values.amax(1, keepdim=True).log_() - target_values).squeeze(1)
    if any_grad:
        values.scatter_add_(1, targets, torch.full_like(target_values, -1.0))
        if slope is not None:
            values.mul_(slope)
        if options.scale is not None:
            values.mul_(options.scale)
    return losses
