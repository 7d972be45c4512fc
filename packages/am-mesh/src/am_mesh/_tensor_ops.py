"""What crosses the ranks of tensor parallelism, as plain tensors: what each function does, and what its backward is.

"Whole" means that every rank holds the same; a "part" is one summand of a sum over the ranks; a "slice" is a piece.
Sequences that the ranks do not divide are padded with zeros inside the collective and cut again after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from am_mesh._collectives import all_gathered, all_reduced, reduce_scattered


def copy_in(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole to whole, unchanged; gradients, of which each rank has a part, are summed."""
    out: Tensor = _CopyIn.apply(x, group)
    return out


def sum_out(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts to their sum, whole; the gradient, whole, is that of every part."""
    out: Tensor = _SumOut.apply(x, group)
    return out


def gather_last(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """Slices of the last dim, in the order of the ranks, to the whole `[..., size]`; the gradient, whole, is sliced."""
    out: Tensor = _GatherLast.apply(x, size, group)
    return out


def split_last(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole to this rank's slice of the last dim, which the ranks divide; the gradients are put together."""
    out: Tensor = _SplitLast.apply(x, group)
    return out


def split_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole `[B, S, ...]` to this rank's slice `[B, s, ...]`, s = ceil(S / ranks); gradients are put together."""
    out: Tensor = _SplitSequence.apply(x, group)
    return out


def gather_sequence(x: Tensor, length: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Slices `[B, s, ...]` to the whole `[B, length, ...]`, twice: for what computes the same on every rank, whose
    gradient is whole and is sliced, and for what computes a part, whose gradients are summed and sliced.
    """
    out: tuple[Tensor, Tensor] = _GatherSequence.apply(x, length, group)
    return out


def scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts `[B, S, ...]` to this rank's slice `[B, s, ...]` of their sum; the gradients are put together."""
    out: Tensor = _ScatterSum.apply(x, group)
    return out


def _slice_length(length: int, group: dist.ProcessGroup) -> int:
    return -(-length // dist.get_world_size(group))


def _padded(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[B, S, ...]` with zeros up to the next multiple of the ranks, the sequence first: `[S', B, ...]`, contiguous."""
    missing = _slice_length(x.shape[1], group) * dist.get_world_size(group) - x.shape[1]
    x = x.transpose(0, 1)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


def _own_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    first = _padded(x, group)
    size = first.shape[0] // dist.get_world_size(group)
    return first.narrow(0, dist.get_rank(group) * size, size).transpose(0, 1).contiguous()


def _together(x: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """A fresh `[B, length, ...]`: FSDP2 warns of modules that return views."""
    if x.shape[0] == 1 and x.shape[1] * group.size() == length:
        # As it came: this view counts as none.
        return torch.ops.aten._unsafe_view(all_gathered(x[0], group), [1, length, *x.shape[2:]])
    whole = all_gathered(x.transpose(0, 1), group)[:length].transpose(0, 1)
    return whole.clone(memory_format=torch.contiguous_format)


def _summed_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return reduce_scattered(_padded(x, group), group).transpose(0, 1)


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Autograd may hand the same tensor to others.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        ranks = dist.get_world_size(group)
        # As torch chunks: all slices have the size of the first, but for those at the end.
        width = -(-size // ranks)
        ctx.begin = min(dist.get_rank(group) * width, size)
        padded = torch.nn.functional.pad(x, (0, width - x.shape[-1])).contiguous()
        slices = all_gathered(padded[None], group)
        lengths = [max(min(width, size - rank * width), 0) for rank in range(ranks)]
        return torch.cat([x[..., :length] for x, length in zip(slices, lengths)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(-1, ctx.begin, ctx.width), None, None


class _SplitLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        slices = [torch.empty_like(grad) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(slices, grad, group=ctx.group)
        return torch.cat(slices, -1), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return _own_slice(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _together(grad, ctx.length, ctx.group), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        whole = _together(x, length, group)
        return whole, whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, whole: Tensor | None, parts: Tensor | None) -> tuple[Tensor | None, None, None]:
        own = None if whole is None else _own_slice(whole, ctx.group)
        if parts is not None:
            summed = _summed_slice(parts, ctx.group)
            own = summed if own is None else own + summed
        return own, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        return _summed_slice(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _together(grad, ctx.length, ctx.group), None
