"""Sums over a mesh of plain numbers and tensors."""

from __future__ import annotations

from typing import overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@overload
def sum_over(mesh: DeviceMesh, value: int) -> int: ...
@overload
def sum_over(mesh: DeviceMesh, value: float) -> float: ...
@overload
def sum_over(mesh: DeviceMesh, value: torch.Tensor) -> torch.Tensor: ...
def sum_over(mesh: DeviceMesh, value: int | float | torch.Tensor) -> int | float | torch.Tensor:
    """The sum of `value` over the ranks of `mesh` (all its axes), of the same type as `value`.

    Every rank of the mesh calls it. An int is summed exactly in int64, a float in float64, a tensor in its own dtype
    and shape; the tensor given is not changed and the result carries no gradient. Raises `TypeError` for other types.
    """
    if isinstance(value, torch.Tensor):
        return _all_reduce(mesh, value.detach().clone(memory_format=torch.contiguous_format))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value={value!r} is a {type(value).__name__}; sum_over takes an int, a float or a tensor")
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    return _all_reduce(mesh, torch.tensor(value, dtype=dtype, device=mesh.device_type)).item()


def _all_reduce(mesh: DeviceMesh, tensor: torch.Tensor) -> torch.Tensor:
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor
