"""One matrix product per expert over rows sorted by expert.

torch's grouped_mm needs strides that are multiples of 16 bytes and leaves rows past the last offset uninitialised; both
are handled here. On the CPU it pays for half precision only: in float32 a loop over the experts is faster, provided
that its backward writes into one weight gradient (autograd's `w[i]` allocates a full-size one per expert).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`rows[start_e:end_e] @ weight[e].T` for each expert: `rows [R, K], weight [E, N, K]` to `[R, N]`.

    `offsets [E]` int32 holds the end of each expert's rows, ascending. Rows past `offsets[-1]` are zeros in the result
    and in the gradient of rows, whatever they hold; an expert without rows gets an exactly zero gradient.
    The CPU loop reads offsets on the host. Raises ValueError or TypeError when shapes or dtypes do not fit.
    """
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        raise ValueError(
            f"rows {tuple(rows.shape)}, weight {tuple(weight.shape)}, offsets {tuple(offsets.shape)} do not fit; "
            "they are [R, K], [E, N, K], [E]"
        )
    if rows.dtype != weight.dtype:
        raise TypeError(f"rows are {rows.dtype} and weight is {weight.dtype}; they must have one dtype")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets are {offsets.dtype}; they must be torch.int32")
    return _GroupedMM.apply(rows, weight, offsets)


def _torch_can(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm takes these, and their gradients, and is the faster choice."""
    low_precision = rows.dtype in (torch.bfloat16, torch.float16)
    aligned = weight.is_contiguous() and all(n * weight.element_size() % 16 == 0 for n in weight.shape[1:])
    return low_precision and aligned and rows.shape[0] > 0


def _zero_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """Zero the rows past the last offset, in place."""
    if rows.device.type == "cpu":
        rows[int(offsets[-1]) :].zero_()
        return rows
    past = torch.arange(len(rows), device=rows.device) >= offsets[-1]
    return rows.masked_fill_(past[:, None], 0.0)


def _product(rows: Tensor, weight: Tensor, offsets: Tensor, use_torch: bool) -> Tensor:
    """`rows [R, K]` times `weight [E, K, N]` by group."""
    if use_torch:
        return _zero_tail(F.grouped_mm(rows, weight, offs=offsets), offsets)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
        start = end
    out[start:].zero_()
    return out


def _weight_gradient(grad: Tensor, rows: Tensor, offsets: Tensor, use_torch: bool) -> Tensor:
    """`grad[group].T @ rows[group]`: `[R, N], [R, K]` to `[E, N, K]`."""
    if use_torch:
        d_weight = F.grouped_mm(grad.transpose(0, 1), rows, offs=offsets)
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        return d_weight.masked_fill_((counts == 0)[:, None, None], 0.0)
    d_weight = grad.new_empty(len(offsets), grad.shape[1], rows.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(grad[start:end].transpose(0, 1), rows[start:end], out=d_weight[expert])
        else:
            d_weight[expert].zero_()
        start = end
    return d_weight


def _forward(rows: Tensor, weight: Tensor, offsets: Tensor, use_torch: bool) -> Tensor:
    return _product(rows, weight.transpose(1, 2), offsets, use_torch)


# One operator, by a name that says what it is, so that selective recomputation can keep its result: products that write
# into slices of a buffer, or are zeroed afterwards, cannot be kept one by one.
_LIBRARY = torch.library.Library("am_moe", "DEF")
_LIBRARY.define("grouped_mm(Tensor rows, Tensor weight, Tensor offsets, bool use_torch) -> Tensor")
_LIBRARY.impl("grouped_mm", _forward, "CompositeExplicitAutograd")


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        use_torch = _torch_can(rows, weight)
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, offsets)
        ctx.use_torch = use_torch
        out: Tensor = torch.ops.am_moe.grouped_mm(rows, weight, offsets, use_torch)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = _product(grad, weight, offsets, ctx.use_torch) if ctx.needs_input_grad[0] else None
        d_weight = _weight_gradient(grad, rows, offsets, ctx.use_torch) if ctx.needs_input_grad[1] else None
        return d_rows, d_weight, None
