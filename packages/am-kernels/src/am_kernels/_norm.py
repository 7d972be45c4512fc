"""RMSNorm with a hand-derived gradient: fewer passes over memory than autograd makes through transformers' formula.

With r = rsqrt(mean(x^2) + eps), y = x r w:  dx = r (g w - x r mean(g w x r)),  dw = sum over rows of g x r.
Only x, w and r (one number per row) are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root mean square norm over the last dimension of `x [..., D]`, times `weight [D]` (Zhang and Sennrich 2019).

    transformers' LlamaRMSNorm: normalised in float32, cast to the dtype of x, then multiplied by weight, so the result
    has the dtype of `weight * x`. Raises ValueError when weight is not `[D]`.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual, weight, eps), x + residual)`: the residual connection and the norm after it.

    `x` and `residual` are `[..., D]` of one shape and dtype, `weight` is `[D]`; ValueError otherwise.
    """
    _check(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, residual is {residual.dtype} {tuple(residual.shape)}; "
            "they must have one shape and dtype"
        )
    return _AddRMSNorm.apply(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)")


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(x, inverse).to(x.dtype)
    if torch.result_type(normed, weight) == normed.dtype:
        return normed.mul_(weight), inverse
    return normed * weight, inverse


def _backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (in the wide dtype) and weight."""
    D = x.shape[-1]
    normed = x * inverse
    product = grad * normed
    d_weight = product.reshape(-1, D).sum(0).to(weight.dtype)
    mean = torch.matmul(product, weight.to(product.dtype).unsqueeze(-1)).div_(-D)
    d_x = torch.addcmul((grad * weight).to(normed.dtype), normed, mean).mul_(inverse)
    return d_x, d_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        d_x, d_weight = _backward(grad, x, weight, inverse)
        return d_x.to(x.dtype), d_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        out, inverse = _forward(total, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        d_total, d_weight = _backward(grad, total, weight, inverse)
        d_total = d_total.add_(grad_total).to(total.dtype)
        return d_total, d_total, d_weight, None
