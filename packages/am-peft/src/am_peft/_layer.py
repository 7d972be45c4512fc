"""A linear layer with a low-rank update: `y = x W^T + b + scaling * (x A^T) B^T` (Hu et al. 2021, arXiv:2106.09685).

The layer keeps the base layer's parameter names (`weight`, `bias`) and adds `lora_A.weight [r, in]` and
`lora_B.weight [out, r]`, so weight maps, loaders and parallel plans of the base model keep working.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch.distributed.tensor import Placement

Initialisation = Literal["kaiming", "gaussian", "zeros"]


@dataclasses.dataclass(frozen=True)
class AppliedLora:
    """What `apply_lora` did to a model; every adapter layer of the model holds the same one.

    `target_modules` and `modules_to_save` are full module names; `config` is the caller's, unchanged; `wrappers` is the
    table of base class to adapter class that was in force.
    """

    config: LoraConfig
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    wrappers: Mapping[type[nn.Module], type[Wrapper]]


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """What one adapter layer is built with: PEFT's options, resolved for this layer.

    - `r`: rank. `lora_alpha`: the update is scaled by `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`).
      `lora_dropout`: dropout of the update's input while training.
    - `init_lora_weights`: True starts with B = 0, so that the update is none; False with both factors random.
    - `adapter_dtype`: dtype in which A and B are stored; None: float32, or float64 where the weight is. They are cast
      to the activations' dtype for the product, so float32 factors on a bfloat16 model are master weights, not a
      float32 computation.
    - `applied`: the record of the `apply_lora` call that makes the layer.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: bool | Literal["gaussian"]
    adapter_dtype: torch.dtype | None
    applied: AppliedLora


@runtime_checkable
class Wrapper(Protocol):
    """An adapter layer: a module that takes the place of one of the base class that its row of `wrappers` names.

    It keeps the names of the base's parameters and buffers and holds `lora_A` and `lora_B`, each a `LoraFactor`, whose
    `weight [r, in]` and `weight [out, r]` are what trains and what PEFT's files hold. `LoraLayer` does both.
    """

    applied: AppliedLora

    def __init__(self, base: nn.Linear, options: LoraOptions) -> None:
        """Take over what `base` holds; it is left alone. The factors get their values afterwards."""
        ...

    def cannot_merge(self) -> str | None:
        """Why the update cannot be added to the base's weight; None where it can."""
        ...

    def merge_(self) -> None:
        """Add the update to the base's weight and become a module without LoRA, in place.

        Called only where `cannot_merge` is None. Collective where the weight is a DTensor.
        """
        ...


class LoraFactor(nn.Module):
    """One factor of the update: `weight [rows, columns]`, and how it starts."""

    def __init__(
        self, rows: int, columns: int, initialisation: Initialisation, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.initialisation = initialisation
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill `weight`: Kaiming uniform with `a = sqrt(5)`, normal with `std = 1 / r`, or zeros, as PEFT does.

        The full value is drawn in float32 on the CPU from `generator` (default: torch's CPU generator), then cut to
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


class LoraLayer(nn.Module):
    """The state of a base layer and two factors: what an adapter class for a linear layer starts from.

    `class LoraX(LoraLayer, X)` adds `forward`, which is X's with `add_update`, and `cannot_merge` and `merge_` of
    `Wrapper`, the latter ending with `take_out_`. Everything that the base holds (parameters, buffers, attributes,
    hooks) is taken over under its name, not copied.
    """

    lora_A: LoraFactor
    lora_B: LoraFactor

    def __init__(self, base: nn.Linear, options: LoraOptions) -> None:
        # Not super(): the base class would allocate a second weight.
        nn.Module.__init__(self)
        # Dicts of their own, so that the base gets no factors: those of parameters, buffers, children and hooks.
        state = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(base).items()}
        vars(self).update(state)
        self.base_class = type(base)
        self.r = options.r
        self.lora_alpha = options.lora_alpha
        self.lora_dropout = options.lora_dropout
        self.scaling = options.lora_alpha / (math.sqrt(options.r) if options.use_rslora else options.r)
        self.applied = options.applied
        first: Initialisation = "gaussian" if options.init_lora_weights == "gaussian" else "kaiming"
        second: Initialisation = "zeros" if options.init_lora_weights else "kaiming"
        device, dtype = base.weight.device, options.adapter_dtype
        if dtype is None:
            dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        self.lora_A = LoraFactor(options.r, base.in_features, first, device=device, dtype=dtype)
        self.lora_B = LoraFactor(base.out_features, options.r, second, device=device, dtype=dtype)
        self.train(base.training)

    def reset_lora_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise A, then B, from `generator`; the base weight is left alone. See `LoraFactor`."""
        self.lora_A.reset_parameters(generator)
        self.lora_B.reset_parameters(generator)

    def add_update(self, out: Tensor, x: Tensor) -> Tensor:
        """`out [..., out]` plus the update of `x [..., in]`, written into `out`: it must not be in use elsewhere."""
        if out.dim() != 2:
            return self.add_update(out.reshape(-1, out.shape[-1]), x).view(out.shape)
        flat = x.reshape(-1, x.shape[-1])
        if self.lora_dropout > 0.0:
            flat = F.dropout(flat, self.lora_dropout, self.training)
        low = F.linear(flat, self.lora_A.weight.to(flat.dtype)).to(out.dtype)
        # In place: the update needs no [tokens, out] tensor of its own (a custom autograd.Function gained below 5 %).
        return out.addmm_(low, self.lora_B.weight.to(out.dtype).t(), alpha=self.scaling)

    def update_of_shard(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A `[r, in']` and B `[out', r]` whose product times `scaling` is the update of this rank's shard of `weight`.

        They are whole for a plain weight; a collective of a DTensor's mesh.
        """
        return _factors_of_shard(self.lora_A.weight, self.lora_B.weight, weight)

    def take_out_(self) -> None:
        """Drop the factors and become a module of the base's class again."""
        base_class = self.base_class
        del self.lora_A, self.lora_B, self.r, self.lora_alpha, self.lora_dropout, self.scaling, self.applied
        del self.base_class
        # The module object stays: FSDP, hooks and other owners hold references to it. mypy knows one class per object.
        self.__class__ = base_class  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


class LoraLinear(LoraLayer, nn.Linear):
    """`nn.Linear` plus a low-rank update, sharing the base layer's parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        # Not in_features and out_features: under tensor parallelism the forward runs on this rank's part of them.
        flat = x.reshape(-1, x.shape[-1])
        out = self.add_update(F.linear(flat, self.weight, self.bias), flat)
        return out.view(*x.shape[:-1], out.shape[-1])

    def cannot_merge(self) -> str | None:
        return None

    def merge_(self) -> None:
        """Add the update to `weight` and become a plain `nn.Linear`. Collective where the weight is a DTensor.

        The sum is made in float32 (float64 for float64 weights) and rounded once to the weight's dtype.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            a, b = self.update_of_shard(self.weight)
            local = local_part(self.weight)
            merged = torch.addmm(local.to(dtype), b.to(dtype), a.to(dtype), alpha=self.scaling)
            local.copy_(merged)
        self.take_out_()


def tensor_placements(module: nn.Module, style: str) -> Mapping[str, Placement] | None:
    """How tensor parallelism splits an adapter layer: placements of its parameters by name; None for other modules.

    For `am_mesh.parallelize(layer_placements=am_peft.tensor_placements)`. style: "colwise" (outputs are split: B is,
    and every rank has A) or "rowwise" (inputs are: A is, and every rank has B). Raises `ValueError` for another style.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not isinstance(module, LoraLinear):
        return None
    if style == "colwise":
        return {"weight": Shard(0), "bias": Shard(0), "lora_A.weight": Replicate(), "lora_B.weight": Shard(0)}
    if style == "rowwise":
        return {"weight": Shard(1), "bias": Replicate(), "lora_A.weight": Shard(1), "lora_B.weight": Replicate()}
    raise ValueError(f"style {style!r} splits no adapter layer; choose colwise or rowwise")


def local_part(tensor: Tensor) -> Tensor:
    """The shard that this rank holds of a DTensor; a plain tensor itself. Writing to it writes to the tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole value, detached. A collective of the DTensor's mesh."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.full_tensor()


def copy_full(target: Tensor, full: Tensor) -> None:
    """Write the whole value `full` into `target`, each rank its shard. Every rank passes the same `full`."""
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
    """A `[r, in']` and B `[out', r]` whose product is the update of this rank's shard of `weight`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    a, b = full_tensor(a), full_tensor(b)
    if not isinstance(weight, DTensor):
        return a, b
    cuts = {axis: each.dim for axis, each in enumerate(weight.placements) if isinstance(each, (Shard, _StridedShard))}
    if not all(each.is_replicate() or axis in cuts for axis, each in enumerate(weight.placements)):
        raise ValueError(
            f"cannot merge into a weight with placements {weight.placements}; it must be whole or cut along its dims: "
            "save the adapter and merge it in one process"
        )
    rows, columns = (
        [each if cuts.get(axis) == dim else Replicate() for axis, each in enumerate(weight.placements)]
        for dim in (0, 1)
    )
    mesh = weight.device_mesh
    return (
        distribute_tensor(a, mesh, columns, src_data_rank=None).to_local(),
        distribute_tensor(b, mesh, rows, src_data_rank=None).to_local(),
    )
