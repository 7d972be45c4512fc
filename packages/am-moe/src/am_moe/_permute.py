"""Tokens sorted by expert, and back. Gathers only, in both directions of both passes: deterministic, no index_add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Permutation:
    """How R = T * A slots (slot t * A + a is token t's a-th choice) are sorted by expert, stable in slot order.

    `order [R]`: the slot of each sorted row. `inverse [R]`: the sorted row of each slot. `offsets [E]` int32: where
    each expert's rows end; dropped slots come after `offsets[-1]`. `dropped [T, A]` bool, None if no slot is dropped.
    `top_k`: A.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    dropped: Tensor | None
    top_k: int


def permute(hidden: Tensor, top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Permutation]:
    """Rows of `hidden [T, D]` repeated for each choice and sorted by expert: `(rows [R, D], permutation)`.

    `top_k_index [T, A]` int64. An index outside `[0, num_experts)` drops that choice (padding, experts of other ranks):
    its row is sorted last and `unpermute` ignores it. Raises ValueError when the token counts differ.
    """
    T, A = top_k_index.shape
    if hidden.shape[0] != T:
        raise ValueError(f"hidden has {hidden.shape[0]} tokens, top_k_index has {T}; they must be equal")
    outside = (top_k_index < 0) | (top_k_index >= num_experts)
    expert = top_k_index.masked_fill(outside, num_experts).view(-1)
    order = torch.argsort(expert, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    offsets = counts[:num_experts].cumsum(0).to(torch.int32)
    # Asking costs a synchronisation on an accelerator; there the mask is always applied.
    none_dropped = outside.device.type == "cpu" and not bool(outside.any())
    permutation = Permutation(order, inverse, offsets, None if none_dropped else outside, A)
    return _Spread.apply(hidden, permutation), permutation


def unpermute(rows: Tensor, top_k_weights: Tensor, permutation: Permutation) -> Tensor:
    """Each token's rows times its weights, summed in float32: `rows [R, D], top_k_weights [T, A]` to `[T, D]`.

    The result has the dtype of rows. Dropped choices contribute nothing, whatever their rows hold.
    """
    T, A = top_k_weights.shape
    if permutation.top_k != A or rows.shape[0] != T * A:
        raise ValueError(
            f"rows {tuple(rows.shape)} and top_k_weights {tuple(top_k_weights.shape)} do not fit a permutation of "
            f"{len(permutation.order)} rows with {permutation.top_k} choices per token"
        )
    wide = torch.promote_types(rows.dtype, torch.float32)
    by_slot = _Unsort.apply(rows, permutation).view(T, A, rows.shape[1])
    weights = top_k_weights.to(wide)
    if permutation.dropped is not None:
        by_slot = by_slot.masked_fill(permutation.dropped[..., None], 0.0)
        weights = weights.masked_fill(permutation.dropped, 0.0)
    return torch.bmm(weights[:, None], by_slot.to(wide))[:, 0].to(rows.dtype)


class _Spread(torch.autograd.Function):
    """hidden [T, D] to sorted rows [R, D]; backward sums a token's rows in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return hidden.index_select(0, permutation.order // permutation.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        permutation = ctx.permutation
        by_slot = grad.index_select(0, permutation.inverse).view(-1, permutation.top_k, grad.shape[-1])
        if permutation.dropped is not None:
            by_slot = by_slot.masked_fill(permutation.dropped[..., None], 0.0)
        wide = torch.promote_types(grad.dtype, torch.float32)
        return by_slot.sum(dim=1, dtype=wide).to(grad.dtype), None


class _Unsort(torch.autograd.Function):
    """Sorted rows [R, D] to slot order [R, D]; backward is the opposite gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return rows.index_select(0, permutation.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.permutation.order), None
