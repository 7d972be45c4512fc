"""In which dtype what trains is kept, and in which it computes.

bfloat16 has 8 bits: added to a weight w, an update below |w| / 512 to |w| / 256 rounds to nothing, and fine-tuning
takes such steps: at a rate of 1e-5 five of six weights of standard deviation 0.02 never move. So what trains of a model
in half precision is kept in float32 (master weights, Micikevicius et al. 2018, arXiv:1710.03740), and so are its
optimizer state and its checkpoints; products are in bfloat16, and an export has the dtype that was there before.
float16 would need its losses scaled, or small gradients vanish: such models compute in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import am_mesh
from am_recipes.checks import embedding_weight
from am_recipes.run_config import RunConfig

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """What `choose` decided.

    trains: dtypes of what trains. computes: dtype of the hidden states. param_dtype: as `am_mesh.parallelize` takes it.
    exported: what an export rounds to, by parameter, as `am_ckpt.save_hf` takes it. key: of the config, which keeps
    half precision. lost: the share of what is kept there that a step of `lr` cannot change; known once there are
    weights.
    """

    trains: tuple[torch.dtype, ...]
    computes: torch.dtype
    param_dtype: torch.dtype | None
    exported: Mapping[str, torch.dtype]
    key: str
    lr: float
    lost: float | None = None

    def __str__(self) -> str:
        text = f"precision: trains in {_names(self.trains)}, computes in {_names((self.computes,))}"
        if self.exported:
            text += f", exports {_names(set(self.exported.values()))}"
        if self.lost is not None:
            text += (
                f"\nWARNING {self.key} rounds updates away: a step of {self.lr:g} (optimizer.lr) is too\n"
                f"small to change {self.lost:.1%} of the values that train. Leave the key out to keep\n"
                "them in float32, or raise the rate."
            )
        return text


def choose(model: PreTrainedModel, config: RunConfig) -> Precision:
    """Give what trains of `model`, on the meta device, the dtype that it is kept in; say what it computes in.

    With `model.dtype: auto` what is in half precision trains in float32. An adapter, and what trains whole beside it,
    has `peft.adapter_dtype`, by default float32 too. What is frozen keeps its dtype.
    """
    key, kept = "model.dtype", torch.float32 if config.model.dtype == "auto" else None
    if config.peft is not None:
        key, kept = "peft.adapter_dtype", config.peft.dtype() or torch.float32
    exported: dict[str, torch.dtype] = {}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if kept is not None and parameter.dtype in _HALF and parameter.dtype != kept:
            exported[name] = parameter.dtype
            # In place: a tied weight stays one parameter.
            parameter.data = parameter.data.to(kept)
    param_dtype: torch.dtype | None = config.distributed.options()["param_dtype"]
    if param_dtype is None and (exported or any(value.dtype == torch.float16 for value in model.parameters())):
        param_dtype = torch.bfloat16
    trains = tuple(dict.fromkeys(parameter.dtype for parameter in trained.values()))
    # An adapter casts to what it adapts.
    computes = param_dtype or embedding_weight(model).dtype
    return Precision(trains, computes, param_dtype, exported, key, config.optimizer.lr)


@torch.no_grad()
def measured(precision: Precision, model: nn.Module, dims: am_mesh.ParallelDims) -> Precision:
    """The same, with `lost` where something trains in half precision and has values. Every rank calls it."""
    kept = [value for value in model.parameters() if value.requires_grad and value.dtype in _HALF]
    if not kept or kept[0].is_meta:
        return precision
    device = dims.all_ranks.device_type
    lost, values = torch.zeros(2, dtype=torch.float64, device=device)
    for parameter in kept:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # Numbers of [2^(e-1), 2^e) lie eps * 2^(e-1) apart: what is less than half of that rounds back.
        exponent = torch.frexp(local.float()).exponent.float()
        spacing = torch.finfo(parameter.dtype).eps * torch.exp2(exponent - 1)
        lost += ((spacing / 2 > precision.lr) & (local != 0)).sum()
        values += local.numel()
    lost, values = am_mesh.sum_over(dims.all_ranks, torch.stack([lost, values])).tolist()
    return replace(precision, lost=lost / values)


def _names(dtypes: set[torch.dtype] | tuple[torch.dtype, ...]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
