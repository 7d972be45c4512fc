"""Context parallelism with an attention of plain PyTorch against the same attention on whole rows, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import am_mesh
from am_testing import run_distributed

ROWS, HEADS, KV_HEADS, LENGTH, HEAD, VALUE = 2, 4, 2, 32, 6, 5
DOCUMENTS = {
    # Of the second row half is padding; a document ends at a cut, one goes over three pieces, one has a single token.
    "packed": [[5, 14, 2, 10, 1], [8, 8]],
    "one": [[32], [32]],
    "padding": [[8], [4, 4]],
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Of every pair of tokens; the last query is at the last key."""
    assert (causal, mask, backend) == (True, None, None)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * (scale or 1.0)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(k.shape[2])[-q.shape[2] :, None] - torch.arange(k.shape[2])[None]
    allowed = (distance >= 0) & (distance < (window or k.shape[2]))
    real = torch.ones(len(q), q.shape[2], dtype=torch.bool)
    if document_ids is not None:
        real = document_ids > 0
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~real[:, None, :, None], 0.0)
    sinks = torch.zeros(HEADS) if sink is None else sink
    beside = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    out = weights @ v.repeat_interleave(groups, 1)
    return (out * real[:, None, :, None]).transpose(1, 2)


def ids_of(kind: str) -> Tensor:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    for row, lengths in enumerate(DOCUMENTS[kind]):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            ids[row, begin : begin + length] = number
            begin += length
    return ids


def data() -> list[Tensor]:
    """q, k, v, a sink per head, and weights of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, HEADS, LENGTH, HEAD), (ROWS, KV_HEADS, LENGTH, HEAD), (ROWS, KV_HEADS, LENGTH, VALUE), (HEADS,))
    shapes = (*shapes, (ROWS, LENGTH, HEADS, VALUE))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def whole(kind: str, options: dict[str, Any]) -> list[Tensor]:
    *inputs, weights = [tensor.requires_grad_() for tensor in data()]
    out = attention(*inputs[:3], document_ids=ids_of(kind), sink=inputs[3], **options)
    (out * weights).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def cut(kind: str, options: dict[str, Any], zigzag: bool) -> list[Tensor]:
    mesh = am_mesh.ParallelDims(cp=torch.distributed.get_world_size()).build("cpu").sequence_ranks
    ids = ids_of(kind)
    batch = {"input_ids": ids.long(), "position_ids": ids.long(), "document_ids": ids, "weight": ids.double()}
    mine = am_mesh.shard_sequence(batch, mesh, zigzag=zigzag)
    shard = mine["document_ids"]
    assert torch.equal(shard.local_ids, ids[:, shard.positions])
    assert torch.equal(mine["weight"], ids[:, shard.positions].double())
    q, k, v, sink, weights = data()
    inputs = [x[:, :, shard.positions].clone().requires_grad_() for x in (q, k, v)] + [sink.requires_grad_()]
    over_ranks = am_mesh.context_attention(attention, mesh)
    with CommDebugMode() as traffic:
        out = over_ranks(*inputs[:3], document_ids=shard, sink=inputs[3], **options)
        (out * weights[:, shard.positions]).sum().backward()
    # One for keys and values together, and its gradient.
    assert traffic.get_total_counts() == 2
    sink_gradient = torch.zeros_like(sink) if sink.grad is None else sink.grad
    return [shard.positions, out.detach(), *(tensor.grad for tensor in inputs[:3]), sink_gradient]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("packed", {}),
        ("packed", {"window": 6}),
        ("packed", {"softcap": 2.0, "scale": 0.3}),
        ("one", {}),
        ("padding", {}),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("zigzag", [True, False])
def test_the_result_is_that_of_whole_rows(kind: str, options: dict[str, Any], ranks: int, zigzag: bool) -> None:
    out, *gradients, sink_gradient = whole(kind, options)
    found = [torch.zeros_like(tensor) for tensor in (out, *gradients)]
    sinks = torch.zeros_like(sink_gradient)
    for positions, own, *own_gradients, own_sink in run_distributed(cut, ranks, kind, options, zigzag):
        found[0][:, positions] = own
        for tensor, mine in zip(found[1:], own_gradients, strict=True):
            tensor[:, :, positions] = mine
        sinks += own_sink
    for tensor, expected in zip((*found, sinks), (out, *gradients, sink_gradient), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-13)


def refusals() -> list[str]:
    mesh = am_mesh.ParallelDims(cp=2).build("cpu").sequence_ranks
    ids = torch.ones(1, 6, dtype=torch.int64)
    batch = {"input_ids": ids, "position_ids": ids}
    over_ranks = am_mesh.context_attention(attention, mesh)
    q = torch.zeros(1, HEADS, 6, HEAD, requires_grad=True)
    shard = am_mesh.shard_sequence(batch, mesh, zigzag=False)["document_ids"]
    attempts = [
        lambda: am_mesh.shard_sequence(batch, mesh),
        lambda: am_mesh.shard_sequence({"input_ids": ids}, mesh, zigzag=False),
        lambda: am_mesh.shard_sequence(batch | {"pixel_values": torch.zeros(1, 3, 6)}, mesh, zigzag=False),
        lambda: over_ranks(q, q, q),
        lambda: over_ranks(q, q, q, document_ids=shard, mask=torch.ones(1, 1, 6, 6)),
        lambda: over_ranks(q, q, q, document_ids=shard, causal=False),
    ]
    found = []
    for attempt in attempts:
        with pytest.raises(ValueError) as error:
            attempt()
        found.append(str(error.value))
    with torch.no_grad():
        assert torch.equal(over_ranks(q, q, q), attention(q, q, q))
    three_axes = am_mesh.shard_sequence(batch | {"position_ids": ids.expand(3, 1, 6)}, mesh, zigzag=False)
    assert three_axes["position_ids"].shape == (3, 1, 3)
    return found


def test_what_cannot_be_cut_is_refused() -> None:
    expected = [
        "rows of 6 tokens are no multiple of 4 (2 * cp, for zig-zag order); pad them: pad_to_multiple_of=4",
        "the batch has no position_ids, only ['input_ids']; a piece of a row cannot count its own",
        "pixel_values has shape [1, 3, 6], which is not one value for each of [1, 6] tokens",
        "attention over 2 ranks of cp got a batch that was not cut; train on shard_sequence(batch, mesh)",
        "causal=True, mask=[1, 1, 6, 6]: over cut sequences attention is causal within documents and has no other mask",
        "causal=False, mask=None: over cut sequences attention is causal within documents",
    ]
    for message, start in zip(run_distributed(refusals, 2)[0], expected, strict=True):
        assert message.startswith(start), message


def alone() -> None:
    mesh = am_mesh.ParallelDims().build("cpu").sequence_ranks
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.int64)}
    assert am_mesh.shard_sequence(batch, mesh) == batch


def test_a_mesh_of_one_leaves_the_batch_alone() -> None:
    run_distributed(alone, 1)
