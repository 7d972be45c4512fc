"""The tensors of a rank: which boxes they are, their bytes, and who writes what.

A tensor on this rank is a list of *pieces*, boxes
with the plain tensor that holds their values: one box for whole and evenly or unevenly sharded tensors, none for a
rank that got an empty shard, several only where a strided sharding interleaves. Ranks exchange boxes, so replicas (DDP,
HSDP, 0-d steps) are seen to be the same box and exactly one of their holders writes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from am_ckpt._boxes import Box, Shape, describe, require_exact_cover, split
from am_ckpt._dtypes import DTYPES, ITEM_BYTES
from am_ckpt._train.ranks import rank_and_size

# torch's types by the names of safetensors.
TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.torch) for name, dtype in DTYPES.items()}
# Of what ranks hold in common, to tell that it is the same.
_SAMPLE_BYTES = 2**16
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor and the plain local tensor of the same size that holds its values."""

    box: Box
    values: torch.Tensor


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """The safetensors name of `dtype`; `TypeError` naming `what` where the format has none."""
    if dtype not in DTYPE_NAMES:
        raise TypeError(f"{what} has dtype {dtype}, which safetensors cannot hold; supported are {', '.join(DTYPES)}")
    return DTYPE_NAMES[dtype]


def pieces(tensor: torch.Tensor, what: str) -> list[Piece]:
    """This rank's pieces of `tensor`, plain or DTensor; `what` names it in errors. Empty boxes are left out."""
    if not isinstance(tensor, DTensor):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise TypeError(f"{what} is a {type(tensor).__qualname__}; plain tensors and DTensors can be stored")
        box = Box((0,) * tensor.dim(), tuple(tensor.shape))
        return [Piece(box, tensor.detach())] if box.count else []
    local = tensor.to_local().detach()
    segments = _segments(tensor, what)
    if any(sum(size for _, size in row) == 0 for row in segments):
        return []
    if tuple(sum(size for _, size in row) for row in segments) != tuple(local.shape):
        raise AssertionError(f"{what}: placements {tensor.placements} describe {segments}, the shard is {local.shape}")
    result = []
    for choice in itertools.product(*(_with_local_starts(row) for row in segments)):
        part = local
        for dim, (_, size, start) in enumerate(choice):
            part = part.narrow(dim, start, size)
        result.append(Piece(Box(tuple(c[0] for c in choice), tuple(c[1] for c in choice)), part))
    return result


def _with_local_starts(row: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    starts = itertools.accumulate((size for _, size in row), initial=0)
    return [(offset, size, start) for (offset, size), start in zip(row, starts, strict=False)]


def _segments(tensor: DTensor, what: str) -> list[list[tuple[int, int]]]:
    """Per dim, the (offset, size) runs of the global tensor that this rank's shard holds, in local order."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return [[] for _ in tensor.shape] or [[]]
    rows: list[list[tuple[int, int]]] = [[(0, size)] for size in tensor.shape]
    for dim in range(tensor.dim()):
        sharded = [
            (placement, tensor.device_mesh.size(axis), coordinate[axis])
            for axis, placement in enumerate(tensor.placements)
            if not isinstance(placement, Replicate) and _shard_dim(placement, tensor.dim(), what) == dim
        ]
        if sharded and _is_cut_last(*sharded):
            # The later axes cut first, however evenly, and what each rank then had was cut again.
            sharded = [(Shard(0), parts, index) for _, parts, index in reversed(sharded)]
        if any(isinstance(placement, _StridedShard) for placement, _, _ in sharded):
            indices = torch.arange(tensor.shape[dim])
            for placement, parts, index in sharded:
                # A placement cuts its own dim; here the tensor has only that one.
                own = (
                    _StridedShard(0, split_factor=placement.split_factor)
                    if isinstance(placement, _StridedShard)
                    else Shard(0)
                )
                indices = own._split_tensor(indices, parts, with_padding=False)[0][index]
            rows[dim] = _runs(indices.tolist())
        else:
            start, size = 0, tensor.shape[dim]
            for _, parts, index in sharded:
                chunk = -(-size // parts)
                begin = min(chunk * index, size)
                start, size = start + begin, min(chunk, size - begin)
            rows[dim] = [(start, size)]
    return rows


def _is_cut_last(first: tuple[Placement, int, int], *later: tuple[Placement, int, int]) -> bool:
    """Whether the first axis cut what the later ones had left: sharding over tensor parallelism."""
    plain = all(type(placement) is Shard for placement, _, _ in later)
    parts = math.prod(parts for _, parts, _ in later)
    return bool(later) and plain and isinstance(first[0], _StridedShard) and bool(first[0].split_factor == parts)


def _shard_dim(placement: object, num_dims: int, what: str) -> int:
    if isinstance(placement, (Shard, _StridedShard)):
        return placement.dim % num_dims
    raise ValueError(f"{what} is placed as {placement}; reduce it to a sharded or replicated tensor before saving")


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, as bytes."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(bytearray())


def is_direct(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be read and written in place: contiguous and on the CPU."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The view of `tensor` that `box` describes."""
    for dim, (start, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def plain_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor of any device and layout, row-major; no copy where memory allows."""
    return as_bytes(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())


def byte_blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The values of a tensor of any device and layout, row-major, as blocks of bytes; no copy where memory allows."""
    if is_direct(tensor):
        yield as_bytes(tensor)
        return
    for box in split(tuple(tensor.shape), tensor.element_size()):
        yield plain_bytes(cut(tensor, box))


@dataclass(frozen=True)
class Held:
    """What one rank holds of one tensor: exchanged between ranks, so plain data only.

    `samples`: of each box the digest of its first values, or of all, where other ranks could hold the same box.
    """

    dtype: str
    shape: Shape
    boxes: tuple[Box, ...]
    samples: tuple[str, ...] = ()


def held(tensor: torch.Tensor, what: str, *, equal: bool = False) -> Held:
    """What this rank holds of `tensor`, which `what` names in errors; `equal`: all of what ranks have in common is."""
    parts = pieces(tensor, what)
    samples = tuple(_sample(part.values, equal) for part in parts) if _may_be_replica(tensor, equal) else ()
    return Held(dtype_name(tensor.dtype, what), tuple(tensor.shape), tuple(part.box for part in parts), samples)


def _may_be_replica(tensor: torch.Tensor, equal: bool) -> bool:
    # Replicas of buffers may differ: each rank counts its own batches in them.
    size = rank_and_size()[1]
    if size == 1 or not (equal or isinstance(tensor, torch.nn.Parameter)):
        return False
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() < size:
        return True
    return any(isinstance(placement, Replicate) for placement in tensor.placements)


def _sample(values: torch.Tensor, whole: bool) -> str:
    if whole:
        hasher = xxhash.xxh3_64()
        for block in byte_blocks(values):
            hasher.update(block)
        return hasher.hexdigest()
    first = next(split(tuple(values.shape), values.element_size(), _SAMPLE_BYTES))
    return xxhash.xxh3_64_hexdigest(plain_bytes(cut(values, first)))


def assign(held: Sequence[dict[str, Held]]) -> tuple[dict[str, Held], list[dict[str, list[Box]]]]:
    """Decide who writes what, from what every rank holds (index = rank). Every rank computes the same answer.

    Returns each tensor with all its distinct boxes, and per rank the boxes it writes. A box held by several ranks goes
    to the one with the fewest bytes so far. Raises `ValueError` where ranks disagree on dtype or shape, where they
    hold other values of the same box, or where the boxes do not tile the tensor.
    """
    names = list(dict.fromkeys(name for rank in held for name in rank))
    merged: dict[str, Held] = {}
    shares: list[dict[str, list[Box]]] = [{} for _ in held]
    load = [0] * len(held)
    replicated: list[tuple[str, Box, list[int]]] = []
    for name in names:
        holders: dict[Box, list[int]] = {}
        described = {(rank[name].dtype, rank[name].shape) for rank in held if name in rank}
        if len(described) > 1:
            raise ValueError(f"{name!r} differs between ranks: {sorted(described)}")
        for index, rank in enumerate(held):
            for box in rank[name].boxes if name in rank else ():
                holders.setdefault(box, []).append(index)
        _require_replicas(name, held)
        ((dtype, shape),) = described
        require_exact_cover(repr(name), shape, list(holders))
        merged[name] = Held(dtype, shape, tuple(sorted(holders)))
        for box, ranks in holders.items():
            if len(ranks) == 1:
                shares[ranks[0]].setdefault(name, []).append(box)
                load[ranks[0]] += box.count * ITEM_BYTES[dtype]
            else:
                replicated.append((name, box, ranks))
    for name, box, ranks in replicated:
        owner = min(ranks, key=lambda index: (load[index], index))
        shares[owner].setdefault(name, []).append(box)
        load[owner] += box.count * ITEM_BYTES[merged[name].dtype]
    return merged, shares


def _require_replicas(name: str, held: Sequence[dict[str, Held]]) -> None:
    """Refuse ranks that mean different tensors by one name."""
    seen: dict[Box, tuple[int, str]] = {}
    for index, rank in enumerate(held):
        for box, sample in zip(rank[name].boxes, rank[name].samples, strict=False) if name in rank else ():
            first, other = seen.setdefault(box, (index, sample))
            if sample != other:
                raise ValueError(
                    f"{name!r} {describe(box)} has other values on rank {index} than on rank {first}, and one of them "
                    "would be lost: tensors of one name are replicas. Stages of a pipeline must name their layers as "
                    "the whole model does, not each from 0"
                )
