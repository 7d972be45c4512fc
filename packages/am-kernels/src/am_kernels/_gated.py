"""The gated activation of Llama-like MLPs, keeping two tensors for backward where autograd keeps three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020) of two tensors of one shape and dtype, ValueError otherwise.

    Equal to autograd's result and gradients; silu(gate) is computed again in backward instead of being kept.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}; "
            "they must have one shape and dtype"
        )
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up
