"""Gated experts stored as transformers stores them: `gate_up_proj [E, 2F, D]` and `down_proj [E, D, F]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from am_moe._grouped_mm import grouped_mm
from am_moe._permute import permute, unpermute


def experts_forward(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """What transformers' fused experts compute: `hidden [T, D]` to `[T, D]`, in the dtype of hidden.

    The sum over a token's choices of `weight * down(silu(gate(x)) * up(x))`, with `top_k_index [T, A]` int64 (indices
    outside `[0, E)` contribute nothing), `top_k_weights [T, A]`, `gate_up_proj [E, 2F, D]` (gate first), `down_proj
    [E, D, F]`. No token is dropped for capacity; the sum is in float32; unused experts get exactly zero gradients.
    """
    rows, permutation = permute(hidden, top_k_index, gate_up_proj.shape[0])
    rows = gated_experts(rows, gate_up_proj, down_proj, permutation.offsets)
    return unpermute(rows, top_k_weights, permutation)


def gated_experts(rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor, offsets: Tensor) -> Tensor:
    """`down(silu(gate(x)) * up(x))` of rows sorted by expert: `rows [R, D]` to `[R, D]`; offsets as in `grouped_mm`."""
    return grouped_mm(_SiluGate.apply(grouped_mm(rows, gate_up_proj, offsets)), down_proj, offsets)


class GroupedExperts(nn.Module):
    """E gated experts. Parameters `gate_up_proj [E, 2F, D]` and `down_proj [E, D, F]`, named and laid out as in
    transformers' fused experts, so that their state dicts are interchangeable.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Rows sorted by expert, `[R, D]` to `[R, D]`; `offsets [E]` int32 as in `grouped_mm`."""
        return gated_experts(rows, self.gate_up_proj, self.down_proj, offsets)


class _SiluGate(torch.autograd.Function):
    """`silu(gate) * up` of `[R, 2F]`; backward fills one `[R, 2F]` buffer instead of padding and adding two halves."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(F.silu(gate), grad, out=d_up)
        return out
