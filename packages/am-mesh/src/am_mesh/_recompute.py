"""Activation recomputation: keep a block's inputs, compute its activations again in the backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# The wrapper class in torch.distributed.algorithms renames every parameter; this one works by hooks and renames none.
from torch.distributed._composable.checkpoint_activation import checkpoint

from am_mesh._blocks import find_blocks


def recompute(model: nn.Module, *, blocks: Sequence[str] | None = None) -> nn.Module:
    """Recompute every block's activations in the backward instead of storing them; changes `model`, returns it.

    Results are unchanged, dropout included: the RNG state of the forward is restored for the second one. Parameter
    names stay. The blocks are the model's repeated layers, or those that the patterns in `blocks` name (see
    `parallelize`). A block must not change its inputs: run models without a key-value cache. Raises `ValueError` where
    no block is found.
    """
    found = find_blocks(model, blocks)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of repeated layers to recompute; name them with blocks=(...)"
        )
    for block in found.values():
        checkpoint(block)
    return model
