"""Which ids of a vocabulary this rank holds: all of them, or one range where a DTensor is cut along the vocabulary.

A loss over such a head takes the ranks' own ranges as they are. Per row of logits the ranks exchange a few numbers (the
largest logit and the logarithm of its probability, of each distribution), per loss the sums and the gradient of
`hidden`; the head and the logits stay where they are.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` ids, of which this rank holds those in `[start, stop)`.

    The ranks of `group`, of which this is `rank`, hold one range each, in order, of `width` ids as long as there are
    some: as `Shard` cuts. None: this rank holds all.
    """

    size: int
    width: int
    start: int
    stop: int
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def range_of(self, rank: int, most: int | None = None) -> tuple[int, int]:
        """The ids of a rank of the group, those below `most` if it is given."""
        end = self.size if most is None else min(most, self.size)
        return min(rank * self.width, end), min((rank + 1) * self.width, end)

    def num_here(self, most: int) -> int:
        """How many of the first `most` ids this rank holds."""
        return min(max(most - self.start, 0), self.stop - self.start)

    def position_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where this rank holds `ids`, within its range (anywhere for an id that it does not hold), and whether."""
        positions = ids - self.start
        last = self.stop - self.start - 1
        return positions.clamp(0, max(last, 0)), (positions >= 0) & (positions <= last)

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every rank, `[num_ranks, *values.shape]`. Every rank of the group calls it."""
        gathered = values.new_empty(self.num_ranks * values.numel())
        if values.numel() > 0:
            dist.all_gather_into_tensor(gathered, values.flatten(), group=self.group)
        return gathered.view(self.num_ranks, *values.shape)

    def sum_(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place; as they are where one rank holds all."""
        if self.group is not None and values.numel() > 0:
            dist.all_reduce(values, group=self.group)
        return values


def whole(size: int) -> Vocabulary:
    """All ids are here."""
    return Vocabulary(size, size, 0, size)


def own_part(name: str, tensor: Tensor, dim: int) -> tuple[Tensor, Vocabulary]:
    """What this rank holds of `tensor`, whose dim `dim` is the vocabulary: a plain tensor, with the graph, and the ids.

    Raises `TypeError` for a DTensor that is cut in any other way than along the vocabulary over a mesh of one axis.
    """
    if not is_dtensor(tensor):
        return tensor, whole(tensor.shape[dim])
    shards: Any = tensor
    mesh, placements = shards.device_mesh, shards.placements
    dim %= tensor.dim()
    if mesh.ndim != 1 or not placements[0].is_shard(dim):
        raise TypeError(
            f"{name} is a DTensor with placements {placements} on a mesh of shape {tuple(mesh.shape)}; a loss takes a "
            f"plain tensor that holds the whole vocabulary ({name}.full_tensor(), or call the loss where FSDP has "
            f"gathered {name}), or one that is Shard({dim}) over the one axis of a tensor-parallel mesh"
        )
    size, num_ranks, rank = tensor.shape[dim], mesh.size(), mesh.get_local_rank()
    if num_ranks == 1:
        return shards.to_local(), whole(size)
    width = -(-size // num_ranks)
    start, stop = min(rank * width, size), min((rank + 1) * width, size)
    local = shards.to_local()
    if local.shape[dim] != stop - start:
        raise ValueError(
            f"{name} holds {local.shape[dim]} of {size} ids on rank {rank} of {num_ranks}, where Shard({dim}) holds "
            f"{stop - start}; cut it with torch.distributed.tensor.distribute_tensor"
        )
    return local, Vocabulary(size, width, start, stop, rank, mesh.get_group())


def is_dtensor(tensor: Tensor | None) -> bool:
    # A DTensor exists only once its module is imported, and importing it costs two seconds: so look, do not import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_same_ranks(names: tuple[str, str], first: Vocabulary, second: Vocabulary) -> None:
    """Raise `ValueError` unless the ranks that hold `second` are those that hold `first`, in the same order."""
    ranks = [None if part.group is None else dist.get_process_group_ranks(part.group) for part in (first, second)]
    if ranks[0] != ranks[1]:
        held = ["whole on each rank" if of_ranks is None else f"cut over the ranks {of_ranks}" for of_ranks in ranks]
        raise ValueError(
            f"{names[0]} is {held[0]} and {names[1]} is {held[1]}; cut both over the same ranks in the same order"
        )


def check_same_labels(labels: Tensor, num_targets: int, vocabulary: Vocabulary) -> None:
    """Raise `ValueError` unless every rank that holds a part of the vocabulary has the same `labels [T]` and its size.

    The sizes differ where a DTensor was made of uneven parts by `DTensor.from_local` without their whole shape.
    """
    if vocabulary.group is None:
        return
    places = torch.arange(1, labels.numel() + 1, device=labels.device)
    # Products wrap around: this is a checksum.
    mine = torch.stack(
        [places.new_tensor(vocabulary.size), places.new_tensor(num_targets), ((labels + 1) * places).sum()]
    )
    of_ranks = vocabulary.gather(mine)
    if torch.equal(of_ranks, mine.expand_as(of_ranks)):
        return
    ranks, sizes = dist.get_process_group_ranks(vocabulary.group), of_ranks[:, 0].tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the ranks {ranks} hold parts of vocabularies of {sizes} ids, which must be one size; cut the whole with "
            "torch.distributed.tensor.distribute_tensor, or give DTensor.from_local its shape and stride"
        )
    raise ValueError(
        f"the ranks {ranks} hold parts of one vocabulary and have different labels, {of_ranks[:, 1].tolist()} targets; "
        "give all ranks of a tensor-parallel mesh the same rows"
    )


def rows_for(rows: Tensor, held: Vocabulary, wanted: Vocabulary, most: int) -> Tensor:
    """The rows of the ids below `most` that `wanted` has on this rank, of `rows`, which are those that `held` has here.

    Where the ranges of two vocabularies of different size differ, ranks exchange the rows in which they do. No graph.
    """
    rows = rows.detach()
    start, stop = wanted.range_of(wanted.rank, most)
    if held.group is None:
        return rows[start:stop]
    ranks = range(held.num_ranks)
    ranges = [(held.range_of(rank), wanted.range_of(rank, most)) for rank in ranks]
    if all(have[0] <= want[0] and want[1] <= have[1] for have, want in ranges if want[0] < want[1]):
        first, last = _overlap((held.start, held.stop), (start, stop))
        return rows[first - held.start : last - held.start]
    sent = [_overlap((held.start, held.stop), want) for _, want in ranges]
    received = [_overlap(have, (start, stop)) for have, _ in ranges]
    result = rows.new_empty(stop - start, *rows.shape[1:])
    dist.all_to_all_single(
        result,
        torch.cat([rows[first - held.start : last - held.start] for first, last in sent]),
        [last - first for first, last in received],
        [last - first for first, last in sent],
        group=held.group,
    )
    return result


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    # An empty range, where it can be sliced.
    return (start, stop) if start < stop else (one[0], one[0])
