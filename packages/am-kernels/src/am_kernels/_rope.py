"""Rotary position embedding without the rotated copies that autograd keeps: the gradient is the opposite rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from am_kernels import reference


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate `q [B, H, S, P]` and `k [B, K, S, P]` by `cos, sin [B or 1, S, P]`; transformers' half rotation.

    `x * cos + rotate_half(x) * sin`, with `rotate_half((a, b)) = (-b, a)` on halves of P (Su et al. 2021). The results
    keep the memory order of q and k. Raises ValueError when cos or sin do not have the P of q and k.
    """
    P = q.shape[-1]
    if k.shape[-1] != P or cos.shape != sin.shape or cos.shape[-1] != P:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit; "
            "cos and sin are [B, S, P] with the P of q and k: pass only the rotated part of partly rotated heads"
        )
    # The hand-derived gradient covers q and k in one dtype, which is what models do.
    if q.dtype == k.dtype == cos.dtype == sin.dtype and not cos.requires_grad and not sin.requires_grad:
        return _Rope.apply(q, k, cos, sin)
    return reference.rope(q, k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = grad.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    out = grad * cos
    out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_back(grad_q, cos, sin), _rotate_back(grad_k, cos, sin), None, None
