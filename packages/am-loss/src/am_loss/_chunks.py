"""Losses of ``hidden @ weight.T`` without ever holding the logits.

Rows are taken ``chunk_size`` at a time. Each chunk's logits are multiplied once, turned in place into their own
gradient (softmax minus one-hot), and used at once for the gradients of ``hidden`` and ``weight``; the buffer then
serves the next chunk. So the forward pass already holds both gradients and the backward pass only scales them: three
matrix products per chunk as in the plain loss (four with a teacher), but no ``[tokens, V]`` tensor, and the passes over
the logits run on blocks that fit in the cache. The idea is that of Liger Kernel's fused linear losses (Hsu et al. 2024,
arXiv:2410.10989). ``F.linear_cross_entropy`` needs torch 2.13 and is slower than the plain loss on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from am_loss._targets import check_floating, check_labels, check_softcap, refuse_dtensor

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

# Elements of the logits buffer: enough rows to keep the matrix products efficient at usual vocabularies.
_CHUNK_ELEMENTS = 2**23
_CHUNK_ROWS = (256, 4096)
# Elements that the softmax visits together: a block stays in a CPU's cache, and its thread barriers are few.
_BLOCK_ELEMENTS = 2**21
# With a teacher five buffers of a block are in use.
_TEACHER_BLOCK_ELEMENTS = 2**18


class Head(NamedTuple):
    """``logits = hidden [T, D] @ weight [V, D].T + bias [V]``, times ``scale``, then soft-capped."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float | None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is summed over the rows: ``(1 - kd_ratio) * (CE + z-loss) + kd_ratio * temperature^2 * divergence``.

    ``num_tokens``: the divergence is one of the first so many ids.
    """

    z_loss: float = 0.0
    kd_ratio: float = 0.0
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients someone wants."""

    hidden: bool
    weight: bool
    bias: bool


def checked_head(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    labels: Tensor,
) -> Head:
    """The head with ``hidden`` flattened to ``[T, D]``, cast as ``F.linear`` would under ``torch.autocast``.

    Raises ``TypeError`` or ``ValueError`` for what does not fit together; ``prefix`` stands before the names.
    """
    names = {f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias}
    refuse_dtensor(**names, labels=labels)
    check_labels(f"{prefix}hidden", hidden, labels)
    check_softcap(softcap, f"{prefix}softcap")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_floating(**dict(zip(names, (hidden, weight, bias))))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}; it must be [V, {hidden.shape[-1]}] to fit {prefix}hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}], one per row of {prefix}weight"
        )
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, softcap, scale)


def chunked_loss(
    student: Head,
    teacher: Head | None,
    index: Tensor | None,
    targets: Tensor,
    objective: Objective,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective summed over the rows ``index`` (``None``: all), with a graph; and its detached parts.

    Returns float32 scalars (float64 for float64 inputs): the loss, the cross entropy (with z-loss) and the divergence
    (times ``temperature^2``). A part that is not in the loss is 0 and not computed: the divergence where ``teacher`` is
    ``None``, the cross entropy where ``kd_ratio`` is 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 row; pass None for the default")
    # Inside Function.forward the gradient mode is off and needs_input_grad ignores it: decide here.
    grad = torch.is_grad_enabled()
    wanted = _Wanted(
        hidden=grad and student.hidden.requires_grad,
        weight=grad and student.weight.requires_grad,
        bias=grad and student.bias is not None and student.bias.requires_grad,
    )
    size = chunk_size or _even_chunk(targets.numel(), student.weight.shape[0])
    with torch.autocast(student.hidden.device.type, enabled=False):
        return _ChunkedLoss.apply(*student, teacher, index, targets, objective, wanted, size)


def _even_chunk(rows: int, vocabulary: int) -> int:
    """Rows per chunk: as many as the buffer allows, the chunks of nearly equal size."""
    lowest, highest = _CHUNK_ROWS
    most = min(max(_CHUNK_ELEMENTS // vocabulary, lowest), highest)
    num_chunks = max(-(-rows // most), 1)
    return max(-(-rows // num_chunks), 1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float | None,
        teacher: Head | None,
        index: Tensor | None,
        targets: Tensor,
        objective: Objective,
        wanted: _Wanted,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Head(hidden_TD, weight, bias, softcap, scale)
        if index is not None:
            student = student._replace(hidden=hidden_TD[index])
            teacher = None if teacher is None else teacher._replace(hidden=teacher.hidden[index])
        losses, gradients = _losses_and_gradients(student, teacher, targets, objective, wanted, chunk_size)
        ctx.save_for_backward(*gradients, index)
        ctx.hidden_shape = hidden_TD.shape
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(*losses)
        cross_entropy, divergence = losses
        loss = (1 - objective.kd_ratio) * cross_entropy + objective.kd_ratio * divergence
        return loss, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients were computed without a graph: under create_graph=True they would pass as constants, silently.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a linear loss cannot be differentiated twice (create_graph=True); "
                "use cross_entropy or distillation of F.linear(hidden, weight) for second derivatives"
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
        return hidden_grad, weight_grad, bias_grad, *[None] * 8


def _losses_and_gradients(
    student: Head, teacher: Head | None, targets: Tensor, objective: Objective, wanted: _Wanted, chunk_size: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Cross entropy and divergence summed over ``N`` rows, and the loss's gradients by rows, weight and bias."""
    rows_ND, weight = student.hidden, student.weight
    num_rows, vocabulary = rows_ND.shape[0], weight.shape[0]
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    size = min(chunk_size, max(num_rows, 1))

    losses_2N = rows_ND.new_zeros(2, num_rows, dtype=dtype)
    logits_CV = rows_ND.new_empty(size, vocabulary)
    teacher_CV = None if teacher is None else teacher.hidden.new_empty(size, teacher.weight.shape[0])
    # The softmax runs in float32: in place where the logits have that dtype, else in a block of its own.
    block_elements = _BLOCK_ELEMENTS if teacher is None else _TEACHER_BLOCK_ELEMENTS
    block_size = size if rows_ND.is_cuda else min(max(block_elements // vocabulary, 1), size)
    block = None if logits_CV.dtype == dtype else logits_CV.new_empty(block_size, vocabulary, dtype=dtype)
    hidden_grad = torch.empty_like(rows_ND) if wanted.hidden else None
    # One chunk needs no accumulation, so its product is rounded once in any case and can have the weight's dtype.
    sum_dtype = dtype if num_rows > size else weight.dtype
    weight_grad = weight.new_zeros(weight.shape, dtype=sum_dtype) if wanted.weight else None
    partial = torch.empty_like(weight) if wanted.weight and sum_dtype != weight.dtype else None
    bias_grad = weight.new_zeros(vocabulary, dtype=dtype) if wanted.bias else None
    any_grad = wanted.hidden or wanted.weight or wanted.bias

    for start in range(0, num_rows, size):
        chunk_range = slice(start, start + size)
        rows_CD = rows_ND[chunk_range]
        chunk = _project(student, chunk_range, logits_CV)
        teacher_chunk = None if teacher is None else _project(teacher, chunk_range, teacher_CV)
        for first in range(0, chunk.shape[0], block_size):
            part = chunk[first : first + block_size]
            values = part if block is None else block[: part.shape[0]].copy_(part)
            teacher_values = None if teacher_chunk is None else teacher_chunk[first : first + block_size].to(dtype)
            block_range = slice(start + first, start + first + part.shape[0])
            losses_2N[:, block_range] = _block_losses(
                values, teacher_values, targets[block_range], student, teacher, objective, any_grad
            )
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
    return (losses_2N[0].sum(), losses_2N[1].sum()), (hidden_grad, weight_grad, bias_grad)


def _project(head: Head, rows: slice, buffer: Tensor) -> Tensor:
    """Raw logits ``[C, V]`` of ``rows`` of the head's hidden states, written to the first ``C`` rows of ``buffer``."""
    hidden_CD = head.hidden[rows]
    chunk = buffer[: hidden_CD.shape[0]]
    if head.bias is None:
        return torch.mm(hidden_CD, head.weight.t(), out=chunk)
    return torch.addmm(head.bias, hidden_CD, head.weight.t(), out=chunk)


def _block_losses(
    values: Tensor,
    teacher_values: Tensor | None,
    targets: Tensor,
    student: Head,
    teacher: Head | None,
    objective: Objective,
    any_grad: bool,
) -> Tensor:
    """Cross entropies and divergences ``[2, C]`` of raw logits ``values [C, V]`` and ``teacher_values [C, V']``.

    If ``any_grad``, ``values`` are overwritten with the gradients of the objective; else they and ``teacher_values``
    are scratch.
    """
    losses_2C = values.new_zeros(2, values.shape[0])
    kd_ratio, temperature, num_tokens = objective.kd_ratio, objective.temperature, objective.num_tokens
    slope = _apply_scale_and_softcap(values, student, any_grad)
    if teacher is not None and teacher_values is not None:
        _apply_scale_and_softcap(teacher_values, teacher, False)
        losses_2C[1], gradient = _divergence(
            values[:, :num_tokens] / temperature, teacher_values[:, :num_tokens] / temperature, objective.divergence
        )
        losses_2C[1] *= temperature**2
    if kd_ratio < 1:
        losses_2C[0] = _cross_entropy(values, targets, objective.z_loss, any_grad)
    if not any_grad:
        return losses_2C
    if teacher is not None:
        # Not 0 * values, which may be infinite.
        values.mul_(1 - kd_ratio) if kd_ratio < 1 else values.zero_()
        # The divergence is one of logits / temperature, and counts temperature^2 times.
        values[:, :num_tokens].add_(gradient, alpha=kd_ratio * temperature)
    if slope is not None:
        values.mul_(slope)
    if student.scale is not None:
        values.mul_(student.scale)
    return losses_2C


def _apply_scale_and_softcap(values: Tensor, head: Head, any_grad: bool) -> Tensor | None:
    """Turn raw logits into the head's, in place; return the soft-cap's derivative if there is one and ``any_grad``."""
    if head.scale is not None:
        values.mul_(head.scale)
    if head.softcap is None:
        return None
    values.div_(head.softcap).tanh_()
    # d softcap * tanh(x / softcap) / dx = 1 - tanh^2
    slope = values.square().neg_().add_(1.0) if any_grad else None
    values.mul_(head.softcap)
    return slope


def _softmax(values: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``[C, V]`` of ``values [C, V]``; the rows' largest values ``[C, 1]`` and their log probabilities.

    ``log sum exp(x) = max x - log max p``, and max p is at least 1 / V. ``out`` may be ``values``.
    """
    largest = values.amax(1, keepdim=True)
    probabilities = torch.softmax(values, 1, out=out)
    return probabilities, largest, probabilities.amax(1, keepdim=True).log_()


def _cross_entropy(values: Tensor, targets: Tensor, z_loss: float, any_grad: bool) -> Tensor:
    """Losses ``[C]`` of logits ``values [C, V]``, which are overwritten with their gradients if ``any_grad``."""
    targets = targets.unsqueeze(1)
    target_values = values.gather(1, targets)
    # A loss is log sum exp - x[target]: exact where p[target] itself would underflow.
    _, largest, log_largest = _softmax(values, out=values)
    log_sums = largest - log_largest
    losses = log_sums - target_values
    if z_loss != 0.0:
        losses += z_loss * log_sums.square()
    if any_grad:
        if z_loss != 0.0:
            values.mul_(1.0 + 2.0 * z_loss * log_sums)
        values.scatter_add_(1, targets, torch.full_like(target_values, -1.0))
    return losses.squeeze(1)


def _divergence(student: Tensor, teacher: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Divergences ``[C]`` of the distributions with logits ``[C, N]``, and their gradients by the student's logits.

    Both inputs are overwritten. With P, Q the teacher's and the student's distribution and q = softmax(x): a gradient g
    by q becomes ``q * (g - sum(q * g))`` by x.
    """
    p, teacher_largest, teacher_log_largest = _softmax(teacher)
    q, largest, log_largest = _softmax(student)
    # log p/q from the logits, since p and q underflow. The difference of the log sums is taken part by part: rounding
    # the sums themselves would cost the digits that a small divergence lives in.
    log_sums_ratio = (teacher_largest - largest) - (teacher_log_largest - log_largest)
    log_ratio = teacher.sub_(student).sub_(log_sums_ratio)
    if divergence == "forward_kl":
        return log_ratio.mul_(p).sum(1), q.sub_(p)
    if divergence == "reverse_kl":
        product = log_ratio.mul_(q).neg_()
        losses = product.sum(1)
        return losses, product.sub_(q.mul_(losses.unsqueeze(1)))
    log_q_over_m = log_ratio_to_middle(log_ratio)
    product = torch.mul(log_q_over_m, q, out=student)
    reverse = product.sum(1)
    losses = (p.mul_(log_q_over_m.add_(log_ratio)).sum(1) + reverse) / 2
    return losses, product.sub_(q.mul_(reverse.unsqueeze(1))).div_(2)


def log_ratio_to_middle(log_ratio: Tensor) -> Tensor:
    """``log q/m`` where ``m = (p + q) / 2``, from ``log_ratio = log p/q``; ``log p/m`` is larger by ``log_ratio``."""
    # The default threshold of 20 is coarse in float64.
    return math.log(2.0) - F.softplus(log_ratio, threshold=40.0)
