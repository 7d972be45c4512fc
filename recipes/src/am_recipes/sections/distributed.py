"""How the ranks share the work. Read without torch: what the sizes of a config alone tell is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from am_recipes.sections.kinds import Dtype, OneRank, PositiveInt, torch_dtype
from am_recipes.settings import ArgumentError, Check

_Resharding = Annotated[
    bool | int | None,
    Check(lambda value: value is None or isinstance(value, bool) or value >= 2, "must be true, false or at least 2"),
]


@dataclass(frozen=True)
class Distributed:
    """How the ranks share the work: dp_size * tp_size * cp_size ranks; the results do not depend on it."""

    strategy: Literal["fsdp2", "ddp", "megatron_fsdp"] = "fsdp2"
    """fsdp2 shards weights and optimizer over the ranks, ddp copies them; megatron_fsdp waits for a GPU."""
    dp_size: PositiveInt | None = None
    """Data-parallel ranks, replicas included; null: all there are."""
    dp_replicate_size: PositiveInt = 1
    """Copies of the sharded model; above 1 is HSDP."""
    tp_size: PositiveInt = 1
    """Ranks that split each matrix; must divide the attention and key-value heads."""
    cp_size: PositiveInt = 1
    """Ranks that split each sequence."""
    pp_size: OneRank = 1
    """Ranks that split the layers."""
    ep_size: OneRank = 1
    """Ranks that split the experts."""
    sequence_parallel: bool = False
    """With tp_size above 1: norms and residuals split along the sequence too, which saves activations."""
    tp_plan: Mapping[str, str] | None = None
    """With tp_size above 1: pattern of module names to style, such as colwise; null: the model's own plan."""
    cp_layout: Literal["zigzag", "contiguous"] = "zigzag"
    """With cp_size above 1, which tokens a rank gets; zigzag gives all equal work."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full computes activations anew in the backward pass: less memory, more time; selective keeps the dear ones."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer in main memory; of fsdp2."""
    reshard_after_forward: _Resharding = None
    """Free gathered weights until the backward; a number: over so many ranks. Null: of all blocks. Of fsdp2."""
    prefetch: PositiveInt | None = None
    """How many blocks ahead weights are gathered; null: one. Of fsdp2."""
    param_dtype: Dtype | None = None
    """Of the products, where it is not the weights' own."""
    reduce_dtype: Dtype = "float32"
    """In which gradients are summed over ranks."""
    timeout_minutes: PositiveInt = 30
    """How long a rank waits for the others before the run fails."""

    def __post_init__(self) -> None:
        self._require_strategy()
        if self.dp_size is not None and self.dp_size % self.dp_replicate_size:
            raise ValueError(
                f"dp_size={self.dp_size} is not a multiple of dp_replicate_size={self.dp_replicate_size}; "
                "dp_size counts all data-parallel ranks, replicas included"
            )
        for name, value in {"sequence_parallel": self.sequence_parallel, "tp_plan": self.tp_plan}.items():
            if value and self.tp_size == 1:
                raise ArgumentError(
                    name,
                    f"{name}={value} says how matrices are split, and tp_size=1 splits none; raise it or remove this",
                )
        if self.tp_plan is not None and not self.tp_plan:
            raise ArgumentError("tp_plan", "tp_plan={} splits nothing; null takes the model's own plan")

    def _require_strategy(self) -> None:
        if self.strategy == "megatron_fsdp":
            raise ArgumentError(
                "strategy",
                "strategy=megatron_fsdp needs a GPU, and none has proven it yet against one process; choose fsdp2, "
                "which shards the same",
            )
        if self.strategy != "ddp":
            return
        of_fsdp2 = {
            "cpu_offload": (self.cpu_offload, False),
            "reshard_after_forward": (self.reshard_after_forward, None),
            "prefetch": (self.prefetch, None),
        }
        for name, (value, default) in of_fsdp2.items():
            if value != default:
                raise ArgumentError(name, f"{name}={value} is of fsdp2, and strategy=ddp shards nothing; remove one")

    def sizes(self) -> dict[str, int]:
        """The arguments of `am_mesh.ParallelDims`; a `dp_shard` of -1 takes the ranks that are left."""
        shard = -1 if self.dp_size is None else self.dp_size // self.dp_replicate_size
        others = {"cp": self.cp_size, "tp": self.tp_size, "pp": self.pp_size, "ep": self.ep_size}
        return {"dp_replicate": self.dp_replicate_size, "dp_shard": shard} | others

    def fewest_ranks(self) -> int:
        """The smallest world of this layout."""
        return (self.dp_size or self.dp_replicate_size) * self.cp_size * self.tp_size * self.pp_size

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_mesh.parallelize`."""
        return {
            "strategy": self.strategy,
            "tp_plan": self.tp_plan,
            "sequence_parallel": self.sequence_parallel,
            "recompute": self.activation_checkpointing,
            "param_dtype": torch_dtype(self.param_dtype),
            "reduce_dtype": torch_dtype(self.reduce_dtype),
            "reshard_after_forward": self.reshard_after_forward,
            "cpu_offload": self.cpu_offload,
            "prefetch": self.prefetch,
        }
