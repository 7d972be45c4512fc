"""Cross entropy of `hidden @ weight.T` without ever holding the logits."""

from __future__ import annotations

from torch import Tensor

from am_loss._chunks import chunked_sums
from am_loss._head import Head, checked_head
from am_loss._objectives import CrossEntropy
from am_loss._targets import check_z_loss, select_targets


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """`cross_entropy(F.linear(hidden, weight, bias), labels)` without holding the logits: a float32 SUM.

    Returns a float32 scalar (float64 for float64 inputs). Softmax and loss are computed in float32; the weight's
    gradient is accumulated in float32 over the chunks and rounded once. Without any target: a 0 that is connected to
    the graph, whose gradients are zeros. Only gradients that are required are computed: none under `torch.no_grad`,
    none of a frozen weight.

    Args:
        hidden: `[..., D]`, of one floating dtype with `weight` and `bias`; under `torch.autocast` the three are cast as
            `F.linear` would.
        weight: `[V, D]`. Under tensor parallelism a DTensor `Shard(0)` over a mesh of one axis, as `bias` then is: all
            ranks of it call this with the same `hidden` and labels, plain tensors, and get the whole sum and the whole
            gradient of `hidden`. No rank gathers the weight, or holds logits of ids that it does not hold.
        labels: `[...]` integers, already shifted.
        bias: `[V]`.
        ignore_index: positions with this label are never multiplied by the head; their gradient is zero.
        softcap: `z = softcap * tanh(z / softcap)`, after the scale.
        scale: `z = scale * (hidden @ weight.T + bias)`.
        z_loss: adds `z_loss * logsumexp(z)^2` of each target token (PaLM, arXiv:2204.02311, uses 1e-4).
        chunk_size: rows whose logits exist at one time; the default keeps the buffer near 8 M elements. The result
            does not depend on it beyond rounding.

    Raises:
        ValueError: a label outside `[0, V)`, an impossible option, shapes that do not fit, or labels that differ
            between ranks that hold parts of one head.
        TypeError: any other DTensor, or mixed dtypes.
        RuntimeError: when differentiated twice.
    """
    check_z_loss(z_loss)
    head, vocabulary = checked_head(Head(hidden, weight, bias, softcap, scale), labels)
    index, targets = select_targets(labels, vocabulary, ignore_index)
    loss, _ = chunked_sums(head, index, {"labels": targets}, CrossEntropy(vocabulary, z_loss), chunk_size)
    return loss
