"""Activation recomputation: keep a block's inputs, compute its activations again in the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        # On the instance: torch's wrapper class renames every parameter. Hooks of the block stay outside of it.
        vars(block)["forward"] = _recomputed(block.forward)
    return model


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
