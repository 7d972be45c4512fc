"""The norm of all gradients together, wherever their parts live.

Each gradient contributes the sum of |g|^p over the elements this rank holds. Contributions are grouped by the mesh axes
a gradient is sharded over and summed over exactly those axes, so an element is counted once whether it is sharded,
replicated or both (HSDP), and tensors of different meshes may be mixed.
torch.nn.utils.get_total_norm stacks the norms instead, which fails as soon as meshes or DTensors and tensors are mixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

Parameters: TypeAlias = nn.Module | torch.Tensor | Iterable[torch.Tensor]


@torch.no_grad()
def grad_norm(parameters: Parameters, norm_type: float = 2.0) -> torch.Tensor:
    """The p-norm of all gradients of a model (or of some parameters) seen as one vector: a float32 scalar tensor.

    Every rank that holds a part of the parameters calls it, all with the same parameters in the same order; the result
    is the same on all of them. Parameters without a gradient count as zero. Plain tensors count as replicated.
    Accumulates in float64. `norm_type` is p > 0, or `math.inf` for the largest absolute value. Non-finite gradients
    give a non-finite norm. Raises `ValueError` for another `norm_type`.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type} is not a norm; choose a positive number or math.inf")
    parameters = _as_list(parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (mesh, axes), gradients in _by_sharded_axes(parameters).items():
        partial = _reduce_local([_powered_norm(gradient, norm_type) for gradient in gradients], norm_type)
        operation = dist.ReduceOp.SUM
        if math.isinf(norm_type):
            operation = dist.ReduceOp.MAX
            # Backends may drop a NaN from a maximum, never an infinity.
            partial = partial.nan_to_num(nan=math.inf, posinf=math.inf)
        if mesh is not None:
            # Where the ranks communicate: gradients may have been offloaded to the host.
            partial = partial.to(mesh.device_type)
        for axis in axes:
            assert mesh is not None
            dist.all_reduce(partial, op=operation, group=mesh.get_group(axis))
        total = _reduce_local([total, partial.to(device)], norm_type)
    return (total if math.isinf(norm_type) else total ** (1.0 / norm_type)).float()


@torch.no_grad()
def clip_grad_norm_(parameters: Parameters, max_norm: float | None, norm_type: float = 2.0) -> torch.Tensor:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`; returns the norm before that, as `grad_norm` has it.

    Called by the same ranks as `grad_norm`. `max_norm=None` leaves the gradients alone and still returns their norm.
    A norm that is not finite leaves them alone too, so that the caller sees it in the result and decides; nothing is
    scaled to NaN. Raises `ValueError` for a `max_norm` that is not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(
            f"max_norm={max_norm} would erase or flip the gradients; choose a positive number, or None for no clipping"
        )
    parameters = _as_list(parameters)
    norm = grad_norm(parameters, norm_type)
    if max_norm is None:
        return norm
    # Selected on the device: asking the host whether the norm is finite would stall the GPU every step.
    scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.ones_like(norm))
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            # A float32 scalar: rounded to the gradient's dtype, a bfloat16 scale would miss max_norm by 0.4 %.
            local.mul_(scale.to(local.device))
    return norm


def _as_list(parameters: Parameters) -> list[torch.Tensor]:
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    if isinstance(parameters, torch.Tensor):
        return [parameters]
    return list(parameters)


def _by_sharded_axes(
    parameters: list[torch.Tensor],
) -> dict[tuple[DeviceMesh | None, tuple[int, ...]], list[torch.Tensor]]:
    """Local gradients grouped by (mesh, the axes of it that split them); (None, ()) holds what every rank has whole."""
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[torch.Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(parameter, DTensor):
            # Without a gradient here it still takes part: another rank may have one, and all must reduce alike.
            layout, local = parameter, parameter.to_local().new_zeros(0)
            if isinstance(gradient, DTensor):
                layout = _without_partial_sums(gradient)
                local = layout.to_local()
            mesh, kinds = layout.device_mesh, layout.placements
            axes = tuple(axis for axis, kind in enumerate(kinds) if not kind.is_replicate() and mesh.size(axis) > 1)
            groups.setdefault((mesh, axes) if axes else (None, ()), []).append(local)
        elif gradient is not None:
            groups.setdefault((None, ()), []).append(gradient)
    return groups


def _without_partial_sums(gradient: DTensor) -> DTensor:
    whole = [Replicate() if isinstance(kind, Partial) else kind for kind in gradient.placements]
    return gradient if list(gradient.placements) == whole else gradient.redistribute(placements=whole)


def _powered_norm(gradient: torch.Tensor, norm_type: float) -> torch.Tensor:
    """Sum of |g|^p (the largest |g| for p = inf) as a float64 scalar; 0 for an empty tensor."""
    if gradient.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=gradient.device)
    norm = torch.linalg.vector_norm(gradient, norm_type, dtype=torch.float64)
    return norm if math.isinf(norm_type) else norm**norm_type


def _reduce_local(values: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    stacked = torch.stack(values)
    return stacked.amax() if math.isinf(norm_type) else stacked.sum()
