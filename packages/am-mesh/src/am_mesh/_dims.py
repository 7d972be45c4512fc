"""How many ranks each kind of parallelism gets, and the device meshes that follow from it.

The world is one block of ranks seen in five ways. Outer to inner:

    pp, dp_replicate, dp_shard, cp, tp      every axis
    pp, dp_replicate, fsdp, tp              fsdp = dp_shard x cp: what dense parameters are sharded over
    pp, dp, cp, tp                          dp = dp_replicate x dp_shard: what batches are split over
    pp, dp_replicate, ep_shard, ep          the ranks as experts see them: ep x ep_shard = dp_shard x cp x tp
    pp, replica, whole, tp                  replica = dp x cp: whole parameters on each; whole = 1 rank

Who trains asks for ranks by what they do, not by axes (`ParallelDims.row_ranks`, `loss_ranks`, `all_ranks`), so that
another axis changes no caller. A view is a mesh of its own (slicing a flattened axis out of its parent is deprecated in
torch), but axes that span the same ranks share one process group, so the five views cost one communicator per distinct
set of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# In the order in which `mesh` looks for a name: fsdp and tp must come from one mesh to shard one parameter.
VIEWS = (
    ("pp", "dp_replicate", "fsdp", "tp"),
    AXES,
    ("pp", "dp", "cp", "tp"),
    ("pp", "dp_replicate", "ep_shard", "ep"),
    ("pp", "replica", "whole", "tp"),
)
NAMES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "dp", "fsdp", "ep", "ep_shard", "replica", "whole")


@dataclasses.dataclass(frozen=True)
class ParallelDims:
    """Sizes of the parallel axes; `build` checks them against the world and makes the meshes.

    `dp_shard=-1` means "what is left of the world". `pp * dp_replicate * dp_shard * cp * tp` is the world size; `ep`
    does not multiply it, it divides `dp_shard * cp * tp`. Every size is an int of at least 1.

    Raises `TypeError` for a size that is not an int and `ValueError` for one that is out of range or does not fit; the
    message names the nearest sizes that do.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    _views: tuple[DeviceMesh, ...] = dataclasses.field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in (*AXES, "ep"):
            size = self._declared(name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}={size!r} is a {type(size).__name__}; axis sizes are ints")
            if size < 1 and not (name == "dp_shard" and size == -1):
                choices = "at least 1, or -1 for what is left of the world" if name == "dp_shard" else "at least 1"
                raise ValueError(f"{name}={size} is not a legal size; choose {choices}")
        if self.dp_shard != -1:
            self._check_ep()

    def _declared(self, name: str) -> int:
        declared = {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
            "ep": self.ep,
        }
        return declared[name]

    def _check_ep(self) -> None:
        ranks = self.dp_shard * self.cp * self.tp
        if ranks % self.ep:
            nearest = sorted(_divisors(ranks), key=lambda size: (abs(math.log(size / self.ep)), size))[:3]
            raise ValueError(
                f"ep={self.ep} does not divide dp_shard * cp * tp = {self.dp_shard} * {self.cp} * {self.tp} = {ranks}; "
                f"nearest legal: {', '.join(f'ep={size}' for size in nearest)}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis name that `mesh` knows. Needs a resolved `dp_shard` (`resolve` or `build`)."""
        if self.dp_shard == -1:
            raise ValueError(
                "dp_shard=-1 has no size before the world is known; call resolve(world_size) or build(device_type)"
            )
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
            "dp": self.dp_replicate * self.dp_shard,
            "fsdp": self.dp_shard * self.cp,
            "ep": self.ep,
            "ep_shard": self.dp_shard * self.cp * self.tp // self.ep,
            "replica": self.dp_replicate * self.dp_shard * self.cp,
            "whole": 1,
        }

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of pp, dp_replicate, dp_shard, cp and tp."""
        return math.prod(self.sizes[name] for name in AXES)

    def resolve(self, world_size: int) -> ParallelDims:
        """The same sizes with `dp_shard` filled in, checked against `world_size`. Needs no process group."""
        if world_size < 1:
            raise ValueError(f"world_size={world_size} is not a legal size; choose at least 1")
        others = self.pp * self.dp_replicate * self.cp * self.tp
        dp_shard = world_size // others if self.dp_shard == -1 else self.dp_shard
        if others * dp_shard != world_size:
            terms = " * ".join(
                f"{name}={self._declared(name)}" for name in AXES if name != "dp_shard" or self.dp_shard != -1
            )
            if self.dp_shard == -1:
                problem = f"world_size={world_size} is not divisible by {terms} = {others}"
            else:
                problem = f"{terms} = {others * dp_shard} is not world_size={world_size}"
            raise ValueError(f"{problem}; {self._nearest(world_size)}")
        return dataclasses.replace(self, dp_shard=dp_shard)

    def _nearest(self, world_size: int) -> str:
        """The legal factorisations of `world_size` that change the fewest axes by the smallest factors."""

        def distance(sizes: tuple[int, ...]) -> tuple[float, ...]:
            # A dp_shard of -1 adapts to the others, so moving it costs nothing.
            fixed = [(size, self._declared(name)) for name, size in zip(AXES, sizes) if self._declared(name) != -1]
            changed = sum(size != wanted for size, wanted in fixed)
            return (changed, sum(abs(math.log(size / wanted)) for size, wanted in fixed), *sizes)

        legal = (sizes for sizes in _factorisations(world_size, len(AXES)) if math.prod(sizes[2:]) % self.ep == 0)
        nearest = sorted(legal, key=distance)[:3]
        if not nearest:
            return f"no factorisation of {world_size} leaves dp_shard * cp * tp divisible by ep={self.ep}"
        return "nearest legal: " + " or ".join(
            "(" + ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes)) + ")" for sizes in nearest
        )

    def build(self, device_type: str) -> ParallelDims:
        """Resolve against the default process group and make the meshes: returns the resolved copy `mesh` works on.

        Every rank of the default process group calls it, once, with equal sizes. `device_type` is "cuda" or "cpu".
        Raises `RuntimeError` without a default process group, `ValueError` where the sizes do not make up the world.
        """
        if not dist.is_initialized():
            raise RuntimeError("no default process group; call build inside `with am_mesh.process_group():`")
        resolved = self.resolve(dist.get_world_size())
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        views = tuple(_view(names, resolved.sizes, device_type, groups) for names in VIEWS)
        # The dataclass is frozen for its users; the meshes are filled in once, here.
        object.__setattr__(resolved, "_views", views)
        return resolved

    def mesh(self, *names: str) -> DeviceMesh:
        """The mesh of one axis (`mesh("fsdp")`) or of several axes of one view (`mesh("dp_replicate", "fsdp")`).

        Names: pp, dp_replicate, dp_shard, cp, tp; dp = dp_replicate x dp_shard; fsdp = dp_shard x cp; ep, ep_shard;
        replica = dp x cp, whole = 1.
        No communication. Raises `ValueError` for a name that does not exist and for axes that overlap or are given
        inner to outer, `RuntimeError` before `build`.
        """
        unknown = [name for name in names if name not in NAMES]
        if unknown or not names:
            raise ValueError(
                f"unknown mesh axis {', '.join(map(repr, unknown)) or '()'}; choose from {', '.join(NAMES)}"
            )
        if not self._views:
            raise RuntimeError("these ParallelDims have no meshes yet; use what `.build(device_type)` returns")
        for view_names, view in zip(VIEWS, self._views):
            if names == tuple(name for name in view_names if name in names):
                return view[names if len(names) > 1 else names[0]]
        raise ValueError(
            f"mesh axes {names} are not distinct axes of one view in outer-to-inner order; the views are "
            + "; ".join(", ".join(view_names) for view_names in VIEWS)
        )

    @property
    def row_ranks(self) -> DeviceMesh:
        """The ranks, this one among them, that split the rows of a batch: one axis, `dp`.

        A loader deals rows out over them; what is counted of whole rows (targets, tokens) adds up over them.
        """
        return self.mesh("dp")

    @property
    def sequence_ranks(self) -> DeviceMesh:
        """The ranks, this one among them, that split every sequence: one axis, `cp`. They have the same rows."""
        return self.mesh("cp")

    @property
    def loss_ranks(self) -> DeviceMesh:
        """The ranks, this one among them, whose parts of a loss add up to the loss: `pp`, `dp` and `cp`.

        Every one of them has other rows, another part of the sequence, or other layers; the ranks of `tp` hold the same
        loss. This rank's coordinate is what a random number of the training may depend on.
        """
        return self.mesh("pp", "dp", "cp")

    def row_multiple(self, *, sequence_parallel: bool = False, zigzag: bool = True) -> int:
        """What the length of a padded row must be a multiple of: `2 * cp` in zig-zag order, `cp` in order, times `tp`
        where sequences are cut within the blocks too, so that no rank computes on padding alone. 1: any length.
        """
        sequence = 1 if self.cp == 1 else self.cp * (2 if zigzag else 1)
        return sequence * (self.tp if sequence_parallel else 1)

    @property
    def all_ranks(self) -> DeviceMesh:
        """Every rank: whoever must agree on something, such as when to stop, agrees over it."""
        return self.mesh("pp", "dp", "cp", "tp")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write `number` as a product of `count` positive ints."""
    if count == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in _factorisations(number // first, count - 1):
            yield (first, *rest)


def _view(
    names: tuple[str, ...], sizes: dict[str, int], device_type: str, groups: dict[tuple[int, ...], dist.ProcessGroup]
) -> DeviceMesh:
    """One way to see the ranks, reusing from `groups` (rank tuple -> group) what an earlier view has made."""
    ranks = torch.arange(dist.get_world_size(), dtype=torch.int).view([sizes[name] for name in names])
    here = (ranks == dist.get_rank()).nonzero()[0].tolist()
    axis_groups = []
    for axis in range(ranks.ndim):
        line = tuple(
            ranks[tuple(slice(None) if other == axis else here[other] for other in range(ranks.ndim))].tolist()
        )
        if line not in groups:
            groups[line] = _group(line)
        axis_groups.append(groups[line])
    return DeviceMesh.from_group(axis_groups, device_type, mesh=ranks, mesh_dim_names=names)


def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if len(ranks) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    # Each rank makes only the group it belongs to: the lines of one axis are disjoint and every rank meets the axes
    # in the same order, so this cannot deadlock, and it costs O(1) instead of O(world) groups per axis.
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
