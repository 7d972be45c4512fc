"""A linear layer with a low-rank update: ``y = x W^T + b + scaling * (x A^T) B^T`` (Hu et al. 2021, arXiv:2106.09685).

The layer keeps the base layer's parameter names (``weight``, ``bias``) and adds ``lora_A.weight [r, in]`` and
``lora_B.weight [out, r]``, so weight maps, loaders and parallel plans of the base model keep working.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import LoraConfig

Initialisation = Literal["kaiming", "gaussian", "zeros"]


@dataclasses.dataclass(frozen=True)
class AppliedLora:
    """What :func:`am_peft.apply_lora` did to a model; every :class:`LoraLinear` of the model holds the same one.

    ``target_modules`` and ``modules_to_save`` are full module names; ``config`` is the caller's, unchanged.
    """

    config: LoraConfig
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]


class LoraFactor(nn.Module):
    """One factor of the update: ``weight [rows, columns]``, and how it starts."""

    def __init__(
        self, rows: int, columns: int, initialisation: Initialisation, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.initialisation = initialisation
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill ``weight``: Kaiming uniform with ``a = sqrt(5)``, normal with ``std = 1 / r``, or zeros, as PEFT does.

        The full value is drawn in float32 on the CPU from ``generator`` (default: torch's CPU generator), then cut to
        this rank's shard and cast: it depends on the generator alone, not on device, dtype or layout. Ranks that share
        a DTensor must pass equal generators; nothing is communicated. On the meta device nothing happens.
        """
        if self.weight.is_meta:
            return
        full = torch.empty(self.weight.shape, device="cpu")
        if self.initialisation == "kaiming":
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        elif self.initialisation == "gaussian":
            nn.init.normal_(full, std=1 / self.weight.shape[0], generator=generator)
        else:
            nn.init.zeros_(full)
        copy_full(self.weight, full)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{rows}, {columns}, initialisation={self.initialisation}"


class LoraLinear(nn.Linear):
    """``nn.Linear`` plus a low-rank update, sharing the base layer's parameters.

    - ``base``: the layer to extend; its ``weight [out, in]`` and ``bias`` are taken over, not copied.
    - ``r``: rank. ``lora_alpha``: the update is scaled by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with
      ``use_rslora``). ``lora_dropout``: dropout of the update's input while training.
    - ``adapter_dtype``: dtype in which A and B are stored. They are cast to the activations' dtype for the product, so
      float32 factors on a bfloat16 model are master weights, not a float32 computation.
    - ``applied``: the record of the ``apply_lora`` call that made this layer.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | Literal["gaussian"],
        adapter_dtype: torch.dtype,
        applied: AppliedLora,
    ) -> None:
        # Not nn.Linear's: it would allocate a second weight.
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.applied = applied
        first: Initialisation = "gaussian" if init_lora_weights == "gaussian" else "kaiming"
        second: Initialisation = "zeros" if init_lora_weights else "kaiming"
        device = base.weight.device
        self.lora_A = LoraFactor(r, base.in_features, first, device=device, dtype=adapter_dtype)
        self.lora_B = LoraFactor(base.out_features, r, second, device=device, dtype=adapter_dtype)
        self.train(base.training)

    def reset_lora_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise A, then B, from ``generator``; the base weight is left alone. See ``LoraFactor``."""
        self.lora_A.reset_parameters(generator)
        self.lora_B.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        flat = x.reshape(-1, self.in_features)
        out = F.linear(flat, self.weight, self.bias)
        if self.lora_dropout > 0.0:
            flat = F.dropout(flat, self.lora_dropout, self.training)
        low = F.linear(flat, self.lora_A.weight.to(flat.dtype)).to(out.dtype)
        # In place: the update needs no [tokens, out] tensor of its own (a custom autograd.Function gained below 5 %).
        out = out.addmm_(low, self.lora_B.weight.to(out.dtype).t(), alpha=self.scaling)
        return out.view(*x.shape[:-1], self.out_features)

    def merge_(self) -> None:
        """Add the update to ``weight`` and become a plain ``nn.Linear``. Collective where the weight is a DTensor.

        The sum is made in float32 (float64 for float64 weights) and rounded once to the weight's dtype.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            a, b = _factors_of_shard(self.lora_A.weight, self.lora_B.weight, self.weight)
            local = local_part(self.weight)
            merged = torch.addmm(local.to(dtype), b.to(dtype), a.to(dtype), alpha=self.scaling)
            local.copy_(merged)
        del self.lora_A, self.lora_B, self.r, self.lora_alpha, self.lora_dropout, self.scaling, self.applied
        # The module object stays: FSDP, hooks and other owners hold references to it.
        self.__class__ = nn.Linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


def local_part(tensor: Tensor) -> Tensor:
    """The shard that this rank holds of a DTensor; a plain tensor itself. Writing to it writes to the tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole value, detached. A collective of the DTensor's mesh."""
    from torch.distributed.tensor import DTensor

    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def copy_full(target: Tensor, full: Tensor) -> None:
    """Write the whole value ``full`` into ``target``, each rank its shard. Every rank passes the same ``full``."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(target, DTensor):
            local = full.to(target.to_local().device)
            # No source rank: every rank has the value, so nothing is sent.
            shard = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(shard.to_local())
        else:
            target.copy_(full)


def _factors_of_shard(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[r, in']`` and B ``[out', r]`` whose product is the update of this rank's shard of ``weight``."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    a, b = full_tensor(a), full_tensor(b)
    if not isinstance(weight, DTensor):
        return a, b
    if not all(type(placement) in (Shard, Replicate) for placement in weight.placements):
        raise ValueError(
            f"cannot merge into a weight with placements {weight.placements}; only Shard and Replicate are known: "
            "save the adapter and merge it in one process"
        )
    rows = [placement if placement.is_shard(0) else Replicate() for placement in weight.placements]
    columns = [placement if placement.is_shard(1) else Replicate() for placement in weight.placements]
    mesh = weight.device_mesh
    return (
        distribute_tensor(a, mesh, columns, src_data_rank=None).to_local(),
        distribute_tensor(b, mesh, rows, src_data_rank=None).to_local(),
    )
