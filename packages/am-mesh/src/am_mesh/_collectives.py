"""Collectives that write into no tensor of the caller's: what selective recomputation can keep.

`torch.distributed`'s own fill a buffer they are given: to keep the result of such an operator would leave the buffer
empty. These are the operators under torch's functional collectives; each waits until its result is there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of the group, on each."""
    return _there(_ops.all_reduce(x.contiguous(), "sum", group.group_name))


def all_gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[n, ...]` of every rank, one after another: `[ranks * n, ...]`."""
    return _there(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def reduce_scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's `[n, ...]` of the sum of `[ranks * n, ...]`."""
    return _there(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


def _there(x: Tensor) -> Tensor:
    out: Tensor = _ops.wait_tensor(x)
    return out
