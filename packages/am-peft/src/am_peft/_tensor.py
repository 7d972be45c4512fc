"""How an adapter layer is split over ranks that split its base layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from am_peft._layer import Wrapper

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


def tensor_placements(module: nn.Module, style: str) -> Mapping[str, Placement] | None:
    """Where the parameters of an adapter layer lie on ranks that split its base layer, by their names in it.

    `style`: "colwise" splits the outputs `[..., out]`, "rowwise" the inputs `[..., in]`, of which each rank's result is
    then a part of the sum. None for a module without an adapter, and for another style. It is what
    `am_mesh.parallelize(layer_placements=)` asks.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not isinstance(module, Wrapper):
        return None
    # Columns of the base are rows of B, rows of it columns of A: the other factor is whole, and its gradient a sum.
    if style == "colwise":
        return {"weight": Shard(0), "bias": Shard(0), "lora_A.weight": Replicate(), "lora_B.weight": Shard(0)}
    if style == "rowwise":
        return {"weight": Shard(1), "bias": Replicate(), "lora_A.weight": Shard(1), "lora_B.weight": Replicate()}
    return None
