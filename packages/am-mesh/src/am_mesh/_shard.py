"""Data parallelism with torch's fully_shard: sharded, replicated, or both.

Gradients are summed over the data-parallel ranks, never averaged: losses here are sums over tokens that the caller has
already divided by the number of tokens of the whole step. A parameter that got no gradient on a rank (an expert without
tokens) counts as zero there. torch leaves it out of the reduction, and ranks that leave out different ones hang or mix
up gradients; its switch against that, `set_reduce_scatter_unused_params`, is newer than torch 2.11, so zeros are filled
in here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as torch_fsdp
from torch import nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from am_mesh._blocks import find_blocks


def fully_shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    reshard_after_forward: bool | int | None = None,
    cpu_offload: bool = False,
    prefetch: int | None = None,
    forward_methods: Sequence[str] = (),
    blocks: Sequence[str] | None = None,
) -> nn.Module:
    """Shard the parameters, block by block, over `mesh`; changes `model` in place and returns it.

    `mesh` is 1-D (sharded) or 2-D (replicated over the first axis, sharded over the second: HSDP). Every rank of the
    mesh calls it with equal weights, or with weights on the meta device, to be loaded afterwards. Parameters become
    DTensors; names stay. Any size may be sharded over any number of ranks: some shards are then smaller, or empty. The
    other arguments are those of `parallelize`, which also says what is refused.
    """
    found = find_blocks(model, blocks)
    _check_dtypes(model, found)
    check_policy(mesh, reshard_after_forward, prefetch)
    # Pinned memory is what an accelerator copies from while it computes; without one there is none to ask for.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype)
    for block in found.values():
        torch_fsdp.fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
        )
    torch_fsdp.fully_shard(
        model,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype, output_dtype),
        offload_policy=offload,
        reshard_after_forward=reshard_after_forward,
    )
    for unit in model.modules():
        if not isinstance(unit, FSDPModule):
            continue
        unit.set_gradient_divide_factor(1.0)
        # Without it a factor becomes a PREMUL_SUM or AVG reduction, which gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)
    if prefetch is not None:
        _prefetch(model, list(found.values()), prefetch)
    _fill_missing_gradients(model, list(found.values()), forward_methods, mesh.mesh_dim_names or ())
    for name in forward_methods:
        register_fsdp_forward_method(model, name)
    _reshard_after_evaluation(model, forward_methods)
    return model


def check_policy(mesh: DeviceMesh, reshard_after_forward: bool | int | None, prefetch: int | None) -> None:
    """Refuse, before anything is changed, groups to reshard to that the ranks do not form, and a prefetch of none."""
    if prefetch is not None and prefetch < 1:
        raise ValueError(
            f"prefetch={prefetch} is not a number of blocks; choose at least 1, or None for torch's own order"
        )
    if reshard_after_forward is None or isinstance(reshard_after_forward, bool):
        return
    ranks = mesh.size(mesh.ndim - 1)
    legal = [size for size in range(2, ranks) if ranks % size == 0]
    choices = f"choose {' or '.join(map(str, legal))}, " if legal else "choose "
    if reshard_after_forward not in legal:
        raise ValueError(
            f"reshard_after_forward={reshard_after_forward} is not a smaller group of the {ranks} ranks that shard; "
            f"{choices}True for all of them, or False to keep parameters gathered"
        )
    if mesh.size() != dist.get_world_size():
        # torch makes the groups of each line of ranks by itself, which only works where there is one line.
        raise ValueError(
            f"reshard_after_forward={reshard_after_forward} needs all {dist.get_world_size()} ranks to shard or "
            f"replicate, and {mesh.size()} do; choose True or False with tensor parallelism"
        )


def _prefetch(model: nn.Module, blocks: list[nn.Module], number: int) -> None:
    """Gather the next `number` blocks while one computes: in the order of registration, and back.

    Without it torch gathers a block when the host reaches it, and in the backward the one before it.
    """
    units: list[FSDPModule] = [unit for unit in blocks if isinstance(unit, FSDPModule)]
    assert isinstance(model, FSDPModule)
    if units:
        model.set_modules_to_forward_prefetch(units[:number])
        model.set_modules_to_backward_prefetch(units[: -number - 1 : -1])
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + number])
        # An empty list would mean torch's own order, in which nothing is left before the first block anyway.
        unit.set_modules_to_backward_prefetch(units[max(index - number, 0) : index][::-1])


def replicate(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    forward_methods: Sequence[str] = (),
    blocks: Sequence[str] | None = None,
) -> nn.Module:
    """Keep all parameters on every rank of `mesh` and sum the gradients, block by block, during the backward.

    Changes `model` in place and returns it. Every rank calls it with equal weights, or with weights on the meta device.
    `mesh` is 1-D, such as `dims.mesh("dp")`, or 2-D with a second axis of one rank, `dims.mesh("replica", "whole")`:
    that one also takes a model that `tensor_parallel` has split over the `tp` beside it, and sums over `cp`.

    It is `fully_shard` with shards of one rank: DistributedDataParallel renames every parameter, averages, and runs its
    hooks for `forward` only; the composable `replicate` of torch is private and shares the last two.
    """
    if mesh.ndim == 1:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError(
                f"{type(model).__name__} is split by tensor parallelism, and the 1-D mesh {mesh.mesh_dim_names} has no "
                "root with it; give dims.mesh('replica', 'whole')"
            )
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert isinstance(alone, dist.ProcessGroup)
        mesh = DeviceMesh.from_group(
            [mesh.get_group(), alone],
            mesh.device_type,
            mesh=mesh.mesh.unsqueeze(1),
            mesh_dim_names=("dp_replicate", "dp_shard"),
        )
    if mesh.ndim != 2 or mesh.size(1) != 1:
        raise ValueError(
            f"mesh has the axes {mesh.mesh_dim_names} of {tuple(mesh.shape)} ranks; replicate takes one, such as "
            "dims.mesh('dp'), or dims.mesh('replica', 'whole')"
        )
    return fully_shard(
        model,
        mesh,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        output_dtype=output_dtype,
        # There is nothing to gather again, so there is nothing to free after the forward.
        reshard_after_forward=False,
        forward_methods=forward_methods,
        blocks=blocks,
    )


def _check_dtypes(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    seen: dict[str, tuple[torch.dtype, str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = next((block for block in blocks if name.startswith(f"{block}.")), "the root")
        dtype, other = seen.setdefault(block, (parameter.dtype, name))
        if dtype != parameter.dtype:
            raise ValueError(
                f"trainable parameters of {block} are stored in two dtypes: {other!r} in {dtype}, {name!r} in "
                f"{parameter.dtype}; convert them to one, and choose the dtype of the computation with param_dtype"
            )


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Around the forward and backward of one micro-batch: reduce gradients over the ranks only where `enabled`.

    Pass True for the last micro-batch of an optimizer step and False for the others: their gradients stay on the rank
    (unsharded, in `reduce_dtype`) and are added to the last one's before it is reduced. All ranks pass the same value.
    Does nothing for a model that `parallelize` returned unwrapped.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_requires_gradient_sync(enabled)
    model.set_is_last_backward(enabled)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_is_last_backward(True)


def _fill_missing_gradients(
    model: nn.Module, blocks: list[nn.Module], forward_methods: Sequence[str], data_axes: tuple[str, ...]
) -> None:
    """Give every trainable parameter that got no gradient a zero one before fully_shard reduces its block.

    A block is reduced when the gradient of its inputs is known: an identity on those inputs, inside fully_shard's own,
    runs just before. Blocks whose inputs need no gradient, and the root, are reduced by a callback at the end of the
    backward, queued when the root's output receives its gradient: a hook on that output, set before fully_shard's,
    queues ours first.
    """
    units = {*blocks, model}
    owners = {unit: list(_modules_with_parameters(unit, units)) for unit in units}

    @torch.compiler.disable
    def before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        inputs = [
            value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        if not inputs:
            return None
        outputs = dict(zip(map(id, inputs), _FillAfterBackward.apply(owners[module], data_axes, *inputs)))
        return (
            tuple(outputs.get(id(value), value) for value in args),
            {name: outputs.get(id(value), value) for name, value in kwargs.items()},
        )

    def after_root(output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(queue)

    def queue(gradient: torch.Tensor) -> None:
        Variable._execution_engine.queue_callback(fill_all)

    def fill_all() -> None:
        for modules in owners.values():
            _fill(modules, data_axes)

    for block in blocks:
        block.register_forward_pre_hook(before_block, with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: after_root(output), prepend=True)
    for name in forward_methods:
        setattr(model, name, _with_output_hook(getattr(model, name), after_root))


def _modules_with_parameters(module: nn.Module, units: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules of one unit that hold parameters themselves: not those of a unit inside it."""
    if next(module.parameters(recurse=False), None) is not None:
        yield module
    for child in module.children():
        if child not in units:
            yield from _modules_with_parameters(child, units)


def _reshard_after_evaluation(model: nn.Module, forward_methods: Sequence[str]) -> None:
    """Put the shards back after a forward without gradients.

    fully_shard leaves what it does not free after the forward (the root by default) gathered until the backward. After
    an evaluation none follows, and `named_parameters` would go on giving tensors that the optimizer does not know.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def reshard(output: Any) -> None:
        if not torch.is_grad_enabled():
            for unit in units:
                unit.reshard()

    model.register_forward_hook(lambda module, args, output: reshard(output))
    for name in forward_methods:
        setattr(model, name, _with_output_hook(getattr(model, name), reshard))


def _with_output_hook(method: Callable[..., Any], hook: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        hook(output)
        return output

    return run


class _FillAfterBackward(torch.autograd.Function):
    """Identity; its backward runs once that of the block it feeds is done."""

    @staticmethod
    def forward(
        ctx: Any, modules: list[nn.Module], data_axes: tuple[str, ...], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.modules, ctx.data_axes = modules, data_axes
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        _fill(ctx.modules, ctx.data_axes)
        return (None, None, *gradients)


def _is_gathered(parameter: DTensor, data_axes: tuple[str, ...]) -> bool:
    """Whether what is left of the layout is that of tensor parallelism."""
    return not set(data_axes) & set(parameter.device_mesh.mesh_dim_names or data_axes)


def _fill(modules: list[nn.Module], data_axes: tuple[str, ...]) -> None:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            # The shard: its unit has already been reduced, or took no part in this backward.
            is_shard = isinstance(parameter, DTensor) and not _is_gathered(parameter, data_axes)
            if parameter.requires_grad and parameter.grad is None and not is_shard:
                parameter.grad = torch.zeros_like(parameter)
