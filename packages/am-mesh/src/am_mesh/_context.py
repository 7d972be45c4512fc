"""Context parallelism: every rank has a piece of each sequence, and all keys and values for the time of an attention.

The queries stay where they are; keys and values of a layer are gathered in one collective, whose backward sums their
gradients and leaves each rank its own (the all-gather form of Llama 3, arXiv:2407.21783, section 3.3.2). With packed
documents a rank computes the documents that begin in its pieces at once, and for one that goes on from before the keys
since its beginning. In zig-zag order a rank has one piece from the front and its mirror image from the end, so that
causal attention is as much work on every rank.

A layer's all-gather hands every rank `(n - 1) / n * B * S * K * (P + P_v)` elements, n the ranks of the mesh, K the
key-value heads; its reduce-scatter in the backward as many, and recomputation gathers once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from am_mesh._collectives import all_gathered, reduce_scattered

Batch = Mapping[str, Any]


class Attention(Protocol):
    """`am_kernels.attention`, or what takes its place: q `[B, H, S, P]`, k `[B, K, S', P]` and v `[B, K, S', P_v]` to
    `[B, S, H, P_v]`. With fewer queries than keys the last query is at the last key. `document_ids [B, S]`: attention
    within documents, numbered from 1, zeros for padding (0).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        mask: Tensor | None = None,
        document_ids: Any = None,
        window: int | None = None,
        sink: Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor: ...


class _Options(TypedDict):
    """What an attention is asked besides its tensors and documents."""

    window: int | None
    sink: Tensor | None
    softcap: float | None
    scale: float | None
    backend: str | None


class _Piece(NamedTuple):
    """Consecutive tokens of one row that this rank has: `[first, end)` here, from `begin` in the row.

    The first `continued` of them go on with a document that began at `document` in the row.
    """

    row: int
    first: int
    end: int
    begin: int
    continued: int
    document: int


@dataclasses.dataclass(frozen=True)
class SequenceShard:
    """What a rank knows of the documents of a batch that was cut: it goes where `document_ids` went.

    local_ids: `[B, s]` int32, the document ids of this rank's tokens. positions: `[s]`, where in the rows they are.
    """

    local_ids: Tensor
    positions: Tensor
    mesh: DeviceMesh
    #: Of all tokens as gathered, rank after rank: where they are in the rows; None where that is their order.
    order: Tensor | None
    #: Of the documents that begin in this rank's pieces, 0 elsewhere.
    begun_ids: Tensor
    pieces: tuple[_Piece, ...]
    # What attentions made of `begun_ids`, once for all layers.
    derived: dict[Any, Any] = dataclasses.field(default_factory=dict)


def shard_sequence(batch: Batch, mesh: DeviceMesh, *, zigzag: bool = True) -> dict[str, Any]:
    """This rank's tokens of a batch: each tensor `[B, S]` becomes `[B, s]`, s = S / ranks, and `document_ids` a
    `SequenceShard`.

    Every rank of the 1-D `mesh` calls it with the same batch, labels shifted already and positions given; nothing is
    communicated. Without `document_ids` each row is one document. The batch of a mesh of one comes back as it is.

    Args:
        batch: `input_ids [B, S]`, `position_ids [B, S]` or `[A, B, S]`, and further tensors `[B, S]`.
        zigzag: of 2n equal pieces, rank r has number r and 2n - 1 - r; else of n pieces, number r.

    Raises `ValueError` where the length of the rows does not divide, for tensors of another shape, and without
    `position_ids`.
    """
    ranks = mesh.size()
    if ranks == 1:
        return dict(batch)
    rows, length = batch["input_ids"].shape
    multiple = 2 * ranks if zigzag else ranks
    if length % multiple:
        order = "2 * cp, for zig-zag order" if zigzag else "cp"
        raise ValueError(
            f"rows of {length} tokens are no multiple of {multiple} ({order}); pad them: pad_to_multiple_of={multiple}"
        )
    if "position_ids" not in batch:
        raise ValueError(f"the batch has no position_ids, only {sorted(batch)}; a piece of a row cannot count its own")
    ids = batch.get("document_ids")
    ids = torch.ones(rows, length, dtype=torch.int32) if ids is None else ids.cpu()
    places = [_places(length, ranks, rank, zigzag) for rank in range(ranks)]
    own = torch.cat([torch.arange(begin, end) for begin, end in places[mesh.get_local_rank()]])
    cut = {name: _cut(name, tensor, (rows, length), own) for name, tensor in batch.items() if name != "document_ids"}
    return {**cut, "document_ids": _shard(ids, own, places, mesh)}


def _places(length: int, ranks: int, rank: int, zigzag: bool) -> list[tuple[int, int]]:
    """The pieces of a rank, `[begin, end)` in the rows."""
    if not zigzag:
        size = length // ranks
        return [(rank * size, (rank + 1) * size)]
    size = length // (2 * ranks)
    return [(number * size, (number + 1) * size) for number in (rank, 2 * ranks - 1 - rank)]


def _cut(name: str, tensor: Tensor, shape: tuple[int, int], own: Tensor) -> Tensor:
    fits = tensor.shape == shape or (name == "position_ids" and tensor.dim() == 3 and tensor.shape[1:] == shape)
    if not fits:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, which is not one value for each of {list(shape)} tokens, and with "
            "cp > 1 nothing else can be cut (models of images and text: use cp=1)"
        )
    return tensor.index_select(-1, own.to(tensor.device))


def _shard(ids: Tensor, own: Tensor, places: list[list[tuple[int, int]]], mesh: DeviceMesh) -> SequenceShard:
    order = torch.cat([torch.arange(begin, end) for pieces in places for begin, end in pieces])
    begun = ids[:, own].clone()
    found = []
    for row in range(len(ids)):
        first = 0
        for begin, end in places[mesh.get_local_rank()]:
            continued, document = 0, begin
            if begin and ids[row, begin] != 0 and ids[row, begin - 1] == ids[row, begin]:
                here = ids[row] == ids[row, begin]
                document = int(here.nonzero()[0])
                continued = int(here[begin:end].sum())
                begun[row, first : first + continued] = 0
            found.append(_Piece(row, first, first + end - begin, begin, continued, document))
            first += end - begin
    in_order = bool((order == torch.arange(len(order))).all())
    return SequenceShard(ids[:, own].contiguous(), own, mesh, None if in_order else order, begun, tuple(found))


class ContextAttention:
    """What `context_attention` returns: an `Attention` over the ranks of `mesh`."""

    def __init__(self, attention: Attention, mesh: DeviceMesh, plan: Callable[[Tensor], Any] | None) -> None:
        self.attention = attention
        self.mesh = mesh
        self.plan = plan

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        mask: Tensor | None = None,
        document_ids: Any = None,
        window: int | None = None,
        sink: Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        options = _Options(window=window, sink=sink, softcap=softcap, scale=scale, backend=backend)
        if not isinstance(document_ids, SequenceShard):
            if torch.is_grad_enabled() and q.requires_grad and self.mesh.size() > 1:
                raise ValueError(
                    f"attention over {self.mesh.size()} ranks of cp got a batch that was not cut; train on "
                    "shard_sequence(batch, mesh): whole rows on every rank would count them as many times"
                )
            return self.attention(q, k, v, causal=causal, mask=mask, document_ids=document_ids, **options)
        if mask is not None or not causal:
            raise ValueError(
                f"causal={causal}, mask={None if mask is None else list(mask.shape)}: over cut sequences attention is "
                "causal within documents and has no other mask; use cp=1 for this model"
            )
        return _cut_attention(self, q, k, v, document_ids, options)


def context_attention(
    attention: Attention, mesh: DeviceMesh, *, plan: Callable[[Tensor], Any] | None = None
) -> ContextAttention:
    """`attention` over sequences that `shard_sequence` cut over the 1-D `mesh`: same signature, same result.

    What it is called with is this rank's: q `[B, H, s, P]`, k and v `[B, K, s, P]`, and the `SequenceShard` as
    `document_ids`. Grouped heads, sliding windows, sinks and soft-caps are the attention's own. Every rank calls it
    equally often, also where it has padding alone. On whole rows (`document_ids` a tensor or None) it is `attention`
    itself, for generation and evaluation; with gradients that is a `ValueError`.

    plan: makes of `document_ids [B, s]` what `attention` takes as such, once per batch, such as
    `am_kernels.document_segments`.
    """
    return ContextAttention(attention, mesh, plan)


def _cut_attention(
    self: ContextAttention, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, options: _Options
) -> Tensor:
    keys, values = _gathered(k, v, shard)
    out = _begun_documents(self, q, k, v, shard, options)
    if not any(piece.continued for piece in shard.pieces):
        # Every rank takes part in the gradients of the others, whatever it used.
        return out + (keys[..., :0].sum() + values[..., :0].sum())
    window = options["window"]
    parts: list[list[Tensor]] = [[] for _ in range(len(q))]
    for row, first, end, begin, continued, document in shard.pieces:
        if continued:
            since = document if window is None else max(document, begin - window + 1)
            seen = slice(since, begin + continued)
            here = slice(row, row + 1)
            own = self.attention(
                q[here, :, first : first + continued],
                keys[here, :, seen],
                values[here, :, seen],
                causal=True,
                **options,
            )
            parts[row].append(own[0])
        parts[row].append(out[row, first + continued : end])
    return torch.cat([part for row in parts for part in row]).unflatten(0, (len(q), -1))


def _begun_documents(
    self: ContextAttention, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, options: _Options
) -> Tensor:
    """Attention within the documents that begin here, zeros elsewhere: `[B, s, H, P_v]`."""
    if not bool(shard.begun_ids.any()):
        connected = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]) + connected
    if self.plan not in shard.derived:
        shard.derived[self.plan] = shard.begun_ids if self.plan is None else self.plan(shard.begun_ids)
    return self.attention(q, k, v, causal=True, document_ids=shard.derived[self.plan], **options)


def _gathered(k: Tensor, v: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole rows, `[B, K, S, P]`, in one collective."""
    # The sequence first, which is what ranks put after one another.
    own = torch.cat([k, v], dim=-1).permute(2, 0, 1, 3)
    order = None if shard.order is None else shard.order.to(own.device)
    whole = _GatherRows.apply(own, order, shard.mesh.get_group()).permute(1, 2, 0, 3)
    # Not two slices: the gradient of each would be as large as both, zeros for the other's part.
    keys, values = whole.split([k.shape[-1], v.shape[-1]], dim=-1)
    return keys, values


class _GatherRows(torch.autograd.Function):
    """`[s, ...]` of every rank to `[S, ...]` in the order of the rows; the backward sums and leaves each its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.order, ctx.group = order, group
        gathered = all_gathered(x, group)
        return gathered if order is None else torch.empty_like(gathered).index_copy_(0, order, gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous() if ctx.order is None else grad.index_select(0, ctx.order)
        return reduce_scattered(grad, ctx.group), None, None
