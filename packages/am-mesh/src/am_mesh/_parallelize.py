"""From a model and axis sizes to a model that trains on all ranks, in order: tensor, recomputation, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from am_mesh._dims import ParallelDims
from am_mesh._recompute import recompute as recompute_blocks
from am_mesh._shard import check_policy, fully_shard, replicate
from am_mesh._tensor import tensor_parallel
from am_mesh._tensor_styles import LayerPlacements

STRATEGIES = ("fsdp2", "ddp")
RECOMPUTE = ("none", "selective", "full")


def parallelize(
    model: nn.Module,
    dims: ParallelDims,
    *,
    strategy: Literal["fsdp2", "ddp", "megatron_fsdp"] = "fsdp2",
    tp_plan: Mapping[str, str | ParallelStyle] | None = None,
    sequence_parallel: bool = False,
    layer_placements: LayerPlacements | None = None,
    must_divide: Mapping[str, int] | None = None,
    recompute: Literal["none", "selective", "full"] = "none",
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    reshard_after_forward: bool | int | None = None,
    cpu_offload: bool = False,
    prefetch: int | None = None,
    forward_methods: Sequence[str] = (),
    blocks: Sequence[str] | None = None,
) -> nn.Module:
    """Make `model` train over `dims`; changes it in place and returns it.

    Every rank calls it with equal weights, or with a model on the meta device, whose shards are filled afterwards.
    Gradients are SUMMED over the data-parallel ranks in `reduce_dtype`: divide the loss by a count over all ranks.
    Parameter names, tied weights and `requires_grad` stay as they are; frozen parameters may have another dtype. Every
    rank must run every block in every micro-batch; parameters within one may go unused: a gradient of zero.

    Args:
        dims: what `ParallelDims.build` returned. `dp_replicate > 1` under "fsdp2" is HSDP.
        strategy: "fsdp2" shards parameters, gradients and optimizer state; "ddp" keeps them whole on every rank.
            "megatron_fsdp" is refused until it is proven on GPUs.
        tp_plan: how tensor parallelism splits the model, `sequence_parallel`, `layer_placements`, `must_divide`: see
            `tensor_parallel`. Of no effect with `tp=1`.
        recompute: "full" recomputes each block in the backward instead of storing its activations; "selective" keeps
            the results of attention, grouped matrix products and collectives (see `recompute`).
        param_dtype: dtype of parameters and floating-point inputs in forward and backward (None: as stored). The
            parameters that the optimizer sees keep their dtype.
        output_dtype: dtype of the floating-point outputs of the model (None: as computed).
        reshard_after_forward: free gathered parameters between forward and backward; None: of the blocks, not of the
            root. False trades memory for communication; a number of ranks that divides those that shard is between:
            parameters are gathered for the backward among so many. "fsdp2" only.
        cpu_offload: keep parameters, gradients and optimizer state in the memory of the host, where the optimizer
            computes; load the weights there. "fsdp2" only.
        prefetch: gather so many blocks ahead of the one that computes (None: torch's own order). "fsdp2" only.
        forward_methods: names of methods of `model` besides `forward` that run a forward, such as "forward_with_loss".
        blocks: patterns for the names of the repeated layers, such as `("model.layers.*",)`, where `*` stays between
            two dots. None: the members of the outermost module lists of one class. Without any, the model is one unit.

    A world of one whose parameters are already stored in `param_dtype` (or None) is returned unwrapped; with another
    `param_dtype` it is wrapped, so that mixed precision means the same on one rank as on many.

    With `cp > 1` gradients are summed over its ranks too; cutting sequences is the caller's, with `shard_sequence` and
    `context_attention`.

    Raises `ValueError` for an unknown strategy or recompute mode, a non-floating dtype, `pp` or `ep` above 1, a name in
    `forward_methods` that the model lacks, and for what `tensor_parallel` refuses.
    """
    _check_request(model, dims, strategy, recompute, (param_dtype, reduce_dtype, output_dtype), forward_methods)
    _check_sharding(strategy, reshard_after_forward, cpu_offload, prefetch)
    check_policy(_data_mesh(dims, strategy), reshard_after_forward, prefetch)
    if dims.tp > 1:
        tensor_parallel(
            model,
            _view(dims, strategy)["tp"],
            plan=tp_plan,
            sequence_parallel=sequence_parallel,
            layer_placements=layer_placements,
            must_divide=must_divide,
            blocks=blocks,
        )
    if recompute != "none":
        recompute_blocks(model, recompute, blocks=blocks)
    if dims.world_size == 1 and not cpu_offload and output_dtype is None and _stored_in(model, param_dtype):
        return model
    if strategy == "ddp":
        return replicate(
            model,
            _data_mesh(dims, strategy),
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            output_dtype=output_dtype,
            forward_methods=forward_methods,
            blocks=blocks,
        )
    return fully_shard(
        model,
        _data_mesh(dims, strategy),
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        output_dtype=output_dtype,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
        prefetch=prefetch,
        forward_methods=forward_methods,
        blocks=blocks,
    )


def _view(dims: ParallelDims, strategy: str) -> DeviceMesh:
    """All ranks of a model: one parameter is split over axes of one view."""
    return dims.mesh("replica", "whole", "tp") if strategy == "ddp" else dims.mesh("dp_replicate", "fsdp", "tp")


def _data_mesh(dims: ParallelDims, strategy: str) -> DeviceMesh:
    """What parameters are copied and sharded over."""
    view = _view(dims, strategy)
    if strategy == "ddp":
        return view["replica", "whole"]
    return view["dp_replicate", "fsdp"] if dims.dp_replicate > 1 else view["fsdp"]


def _check_request(
    model: nn.Module,
    dims: ParallelDims,
    strategy: str,
    recompute: str,
    dtypes: tuple[torch.dtype | None, ...],
    forward_methods: Sequence[str],
) -> None:
    """Refuse what `parallelize` cannot honour, before anything is changed."""
    _check(strategy, (*STRATEGIES, "megatron_fsdp"), "strategy")
    _check(recompute, RECOMPUTE, "recompute")
    for axis in ("pp", "ep"):
        if dims.sizes[axis] > 1:
            raise ValueError(f"{axis}={dims.sizes[axis]} is not supported by parallelize yet; use {axis}=1")
    for name, dtype in zip(("param_dtype", "reduce_dtype", "output_dtype"), dtypes, strict=True):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"{name}={dtype} is not a floating-point dtype; choose torch.bfloat16 or torch.float32")
    missing = [name for name in forward_methods if name not in dir(model)]
    if missing:
        raise ValueError(
            f"forward_methods={missing} are not methods of {type(model).__name__}; install them before parallelize"
        )


def _check_sharding(
    strategy: str, reshard_after_forward: bool | int | None, cpu_offload: bool, prefetch: int | None
) -> None:
    """Refuse options of sharding where nothing is sharded, and the strategy that nobody has proven."""
    given = {"reshard_after_forward": reshard_after_forward, "cpu_offload": cpu_offload or None, "prefetch": prefetch}
    for name, value in given.items():
        if strategy == "ddp" and value is not None:
            raise ValueError(f"{name}={value} needs strategy='fsdp2': ddp shards nothing")
    if strategy == "megatron_fsdp":
        raise ValueError(
            "strategy='megatron_fsdp' needs a GPU, and none has proven it yet against one process; choose 'fsdp2', "
            "which shards the same"
        )


def _check(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(map(repr, choices))}")


def _stored_in(model: nn.Module, dtype: torch.dtype | None) -> bool:
    return dtype is None or all(
        parameter.dtype == dtype for parameter in model.parameters() if parameter.is_floating_point()
    )
