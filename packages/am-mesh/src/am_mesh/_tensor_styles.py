"""How one module is split over the ranks of tensor parallelism: torch's ParallelStyle, computing on local tensors.

A parameter that a style lays out becomes a DTensor on the tensor mesh, so that FSDP2, optimizers and checkpoints know
its layout. During the forward of the module that owns it a hook puts the local tensor in its place: the module, its
kernels and its adapters see plain tensors alone, and autograd takes the gradient back to the DTensor. A parameter that
every rank has whole, while each computes a part of what it is used for, has a gradient that is a sum over the ranks: it
is marked so (Partial), and FSDP2 reduces it once, with the gradients of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

from am_mesh import _tensor_ops as ops

LayerPlacements = Callable[[nn.Module, str], Mapping[str, Placement] | None]
"""The placements of all parameters of a module, by their names in it, for a style; None where it does not know it."""


class Layout:
    """What the styles of one model share: the mesh, whether sequences are cut, and tensors in passing."""

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        sequence_parallel: bool = False,
        layer_placements: LayerPlacements | None = None,
    ) -> None:
        self.mesh = mesh
        self.group: dist.ProcessGroup = mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.sequence_parallel = sequence_parallel
        self.layer_placements = layer_placements
        # Tokens of a row of the forward that is running: what `gather_sequence` cuts its padding off by.
        self.length = 0
        self._entered: tuple[Tensor, Tensor] | None = None
        # By the identity of the original, which is kept, so that nothing else gets its identity.
        self._placed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def enter(self, x: Tensor, parts: Tensor) -> None:
        """`parts` is `x` for whoever computes a part of the result from it."""
        self._entered = (x, parts)

    def parts_of(self, x: Tensor) -> Tensor:
        """`x` whose gradient is summed over the ranks: one collective for all that ask for the same tensor in a row."""
        if self._entered is None or self._entered[0] is not x:
            self.enter(x, ops.copy_in(x, self.group))
        assert self._entered is not None
        return self._entered[1]

    def leave(self) -> None:
        """Nobody asks any more: keep no activation alive."""
        self._entered = None

    def place(self, owner: nn.Module, key: str, placement: Placement) -> None:
        """Make a DTensor of one parameter; tied ones stay tied. No communication: ranks hold equal values, or none."""
        parameter = owner._parameters[key]
        assert parameter is not None
        if isinstance(parameter, DTensor):
            return
        if id(parameter) not in self._placed:
            value = distribute_tensor(parameter.detach(), self.mesh, [placement], src_data_rank=None)
            laid_out = nn.Parameter(value, requires_grad=parameter.requires_grad)
            self._placed[id(parameter)] = (parameter, laid_out)
        owner._parameters[key] = self._placed[id(parameter)][1]


class Style(ParallelStyle):
    """One way to split a module over the tensor mesh, and what enters and leaves its forward."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.apply(module, Layout(device_mesh))
        return module

    def apply(self, module: nn.Module, layout: Layout) -> None:
        """Lay out the parameters of `module` and hook its forward."""
        owned = []
        for name, placement in self.placements(module, layout).items():
            path, _, key = name.rpartition(".")
            owner = module.get_submodule(path)
            if owner._parameters.get(key) is not None:
                layout.place(owner, key, placement)
                owned.append((owner, key, Partial() if isinstance(placement, Replicate) else placement))
        self.prepare(module, layout)
        _hook(self, module, layout, owned)

    def placements(self, module: nn.Module, layout: Layout) -> Mapping[str, Placement]:
        """Of the parameters of `module`, by their names in it."""
        raise NotImplementedError

    def prepare(self, module: nn.Module, layout: Layout) -> None:
        """What else changes once."""

    def adapted(self, name: str, value: Tensor, layout: Layout) -> Tensor:
        """The local tensor that stands for the parameter `name` during the forward."""
        return value

    def enter(self, module: nn.Module, args: tuple[Any, ...], layout: Layout) -> tuple[Any, ...]:
        return args

    def leave(self, module: nn.Module, output: Any, layout: Layout) -> Any:
        return output


class Colwise(Style):
    """A linear layer whose outputs are split: `weight [out, in]` and bias Shard(0). What enters is whole."""

    def __init__(self, gather_output: bool = False) -> None:
        self.gather_output = gather_output

    def placements(self, module: nn.Module, layout: Layout) -> Mapping[str, Placement]:
        return _of_linear(module, "colwise", {"weight": Shard(0), "bias": Shard(0)}, layout)

    def enter(self, module: nn.Module, args: tuple[Any, ...], layout: Layout) -> tuple[Any, ...]:
        x, *others = args
        return (ops.copy_in(x, layout.group) if self.gather_output else layout.parts_of(x), *others)

    def leave(self, module: nn.Module, output: Any, layout: Layout) -> Any:
        return ops.gather_last(output, _weight(module).shape[0], layout.group) if self.gather_output else output


class Rowwise(Style):
    """A linear layer whose inputs are split: weight Shard(1), and a bias that is added once. What leaves is the sum.

    scatter: of the sum, each rank keeps its slice of the sequence.
    """

    def __init__(self, split_input: bool = False, scatter: bool = False) -> None:
        self.split_input, self.scatter = split_input, scatter

    def placements(self, module: nn.Module, layout: Layout) -> Mapping[str, Placement]:
        return _of_linear(module, "rowwise", {"weight": Shard(1), "bias": Replicate()}, layout)

    def adapted(self, name: str, value: Tensor, layout: Layout) -> Tensor:
        return value if name != "bias" or layout.rank == 0 else value * 0.0

    def enter(self, module: nn.Module, args: tuple[Any, ...], layout: Layout) -> tuple[Any, ...]:
        layout.leave()
        x, *others = args
        return (ops.split_last(x, layout.group) if self.split_input else x, *others)

    def leave(self, module: nn.Module, output: Any, layout: Layout) -> Any:
        return ops.scatter_sum(output, layout.group) if self.scatter else ops.sum_out(output, layout.group)


class Replicated(Style):
    """Parameters that every rank has whole, of a module that sees other heads, or other tokens, on each."""

    def placements(self, module: nn.Module, layout: Layout) -> Mapping[str, Placement]:
        return {name: Replicate() for name, _ in module.named_parameters()}


class Owner(Style):
    """A module with bare parameters that are split, such as attention sinks: `split` says how, by their names."""

    def __init__(self, split: Mapping[str, Placement]) -> None:
        self.split = split

    def placements(self, module: nn.Module, layout: Layout) -> Mapping[str, Placement]:
        return self.split


class Experts(Owner):
    """Fused experts, of each of which every rank has a slice: `forward(hidden, index, weights)`, whole, to the sum."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], layout: Layout) -> tuple[Any, ...]:
        hidden, index, weights, *others = args
        # The weights are the router's, whose gradient every rank has a part of too.
        return (ops.copy_in(hidden, layout.group), index, ops.copy_in(weights, layout.group), *others)

    def leave(self, module: nn.Module, output: Any, layout: Layout) -> Any:
        return ops.sum_out(output, layout.group)


class Embedding(Style):
    """An embedding whose rows are split over the vocabulary. Tokens of other ranks give zeros before the sum."""

    def placements(self, module: nn.Module, layout: Layout) -> Mapping[str, Placement]:
        return {"weight": Shard(0)}

    def prepare(self, module: nn.Module, layout: Layout) -> None:
        embedding = cast(nn.Embedding, module)
        self.begin, self.rows = slice_of(len(embedding.weight), layout.mesh)
        if embedding.padding_idx is not None:
            # Its row gets no gradient: on the rank that has it.
            inside = self.begin <= embedding.padding_idx < self.begin + self.rows
            embedding.padding_idx = cast(int, embedding.padding_idx - self.begin if inside else None)

    def enter(self, module: nn.Module, args: tuple[Any, ...], layout: Layout) -> tuple[Any, ...]:
        ids, *others = args
        local = ids - self.begin
        self.outside = (local < 0) | (local >= self.rows)
        return (local.masked_fill(self.outside, 0), *others)

    def leave(self, module: nn.Module, output: Any, layout: Layout) -> Any:
        outside, self.outside = self.outside, torch.empty(0)
        return ops.sum_out(output.masked_fill(outside.unsqueeze(-1), 0.0), layout.group)


def slice_of(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Where this rank's slice of a dim begins and how long it is, as Shard cuts it: all equal but those at the end."""
    width = -(-size // mesh.size())
    begin = min(mesh.get_local_rank() * width, size)
    return begin, min(width, size - begin)


def bare(parameter: Tensor, style: str) -> Placement:
    """Of a bare parameter `[..., out, in]`, such as fused experts; packed ones hold two of them along the dim."""
    axis = -1 if style.endswith("rowwise") or parameter.dim() == 1 else -2
    dim = parameter.dim() + axis
    return _StridedShard(dim, split_factor=2) if style.startswith("packed") else Shard(dim)


def _of_linear(
    module: nn.Module, style: str, placements: Mapping[str, Placement], layout: Layout
) -> Mapping[str, Placement]:
    given = None if layout.layer_placements is None else layout.layer_placements(module, style)
    if given is not None:
        return given
    unknown = sorted({name for name, _ in module.named_parameters()} - set(placements))
    if unknown:
        raise ValueError(
            f"{type(module).__name__} holds the parameters {unknown} beside weight and bias, and nothing says how "
            f"{style!r} splits them; give layer_placements=am_peft.tensor_placements, or a callable like it"
        )
    return placements


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _hook(style: Style, module: nn.Module, layout: Layout, owned: list[tuple[nn.Module, str, Placement]]) -> None:
    """Put local tensors in the place of the parameters during the forward, between what enters and what leaves."""
    # A forward inside the same forward (a recomputation) would put back what it found.
    found: list[list[nn.Parameter | None]] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        args = style.enter(module, args, layout)
        found.append([owner._parameters[key] for owner, key, _ in owned])
        for owner, key, gradient in owned:
            parameter = owner._parameters[key]
            assert isinstance(parameter, DTensor)
            local = parameter.to_local(grad_placements=[gradient])
            owner._parameters[key] = cast(nn.Parameter, style.adapted(key, local, layout))
        return args

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for (owner, key, _), parameter in zip(owned, found.pop(), strict=True):
            owner._parameters[key] = parameter
        # None: the forward failed, and this hook is called to tidy up.
        return output if output is None else style.leave(module, output, layout)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
