"""Activation recomputation: keep a block's inputs, compute its activations again in the backward (Chen et al. 2016,
arXiv:1604.06174), or all of them but those that cost most to compute (Korthikanti et al. 2022, arXiv:2205.05198).

What is kept is chosen by operator, below autograd. An `autograd.Function` is seen as the operators that its forward
calls: one that writes into buffers must hide that in an operator of its own (`torch.library`), or a kept result would
be returned and the buffer left empty. Choices (the experts of a token) are recorded and replayed: a logit that rounds
otherwise the second time would send a token to another expert, with activations of other shapes.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from am_mesh._blocks import find_blocks

# Attention, grouped matrix products and functional collectives, whoever registered them, as `namespace::operator`.
KEPT = (
    "aten::_scaled_dot_product_*",
    "*::*attention*",
    "*::*attn*",
    "*::*grouped_mm*",
    "*::*grouped_gemm*",
    "_c10d_functional::all_*",
    "_c10d_functional::reduce_scatter_*",
)
MODES = ("full", "selective")


def recompute(
    model: nn.Module,
    mode: Literal["full", "selective"] = "full",
    *,
    blocks: Sequence[str] | None = None,
    keep: Sequence[str] = KEPT,
) -> nn.Module:
    """Recompute every block's activations in the backward instead of storing them; changes `model`, returns it.

    Results are unchanged: dropout is repeated, since the RNG state of the forward is restored for the second one, and
    tokens go to the same experts (`topk` and `argmax` choose what they chose). Parameter names stay. A block must not
    change its inputs: run models without a key-value cache.

    Args:
        mode: "full" keeps a block's inputs alone; "selective" also the results of the operators in `keep`.
        blocks: patterns for the names of the blocks, as in `parallelize`; None: the model's repeated layers.
        keep: patterns of operators, `"namespace::operator"`; the default is attention, grouped matrix products and
            collectives, each where it is one operator.

    Raises:
        ValueError: an unknown mode, no block is found, or, in a forward with gradients, a key-value cache.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose from {', '.join(map(repr, MODES))}")
    found = find_blocks(model, blocks)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of repeated layers to recompute; name them with blocks=(...)"
        )
    policy = _policy(tuple(keep)) if mode == "selective" else None
    for name, block in found.items():
        # On the instance: torch's wrapper class renames every parameter. Hooks of the block stay outside of it.
        vars(block)["forward"] = _recomputed(name, block.forward, policy)
    return model


def _recomputed(
    name: str, forward: Callable[..., Any], policy: Callable[..., CheckpointPolicy] | None
) -> Callable[..., Any]:
    # Whether the block makes choices: its first forward tells. To watch every operator of one that makes none costs
    # some microseconds each, half as much as a small block itself.
    chooses = True

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal chooses
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"{name} is recomputed and was given a key-value cache, which would grow twice; call the model with "
                "use_cache=False, or under torch.no_grad()"
            )
        if not chooses and policy is None:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        choices: list[Tensor] = []
        contexts = functools.partial(_contexts, policy, choices if chooses else None)
        output = checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        chooses = bool(choices)
        return output

    return run


def _policy(keep: tuple[str, ...]) -> Callable[..., CheckpointPolicy]:
    @functools.cache
    def of(operator: Any) -> CheckpointPolicy:
        kept = any(fnmatch.fnmatchcase(operator.name().partition(".")[0], pattern) for pattern in keep)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda context, operator, *args, **kwargs: of(operator)


def _contexts(
    policy: Callable[..., CheckpointPolicy] | None, choices: list[Tensor] | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the forward and of the recomputation of one call of a block."""
    first: list[AbstractContextManager[Any]] = [] if choices is None else [_RecordChoices(choices)]
    second: list[AbstractContextManager[Any]] = [] if choices is None else [_ReplayChoices(choices)]
    if policy is not None:
        recording, replaying = create_selective_checkpoint_contexts(policy)
        first.append(recording)
        second.append(replaying)
    return _Together(first), _Together(second)


class _Together(AbstractContextManager[None]):
    """Several contexts as one. It can be entered again: a backward in parts recomputes more than once."""

    def __init__(self, members: Sequence[AbstractContextManager[Any]]) -> None:
        self.members = members

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member)
            self.entered = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.entered.__exit__(*error)


_TOPK, _ARGMAX = torch.ops.aten.topk.default, torch.ops.aten.argmax.default


class _RecordChoices(TorchDispatchMode):
    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self.choices = choices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _TOPK:
            self.choices.append(out[1].clone())
        elif func is _ARGMAX:
            self.choices.append(out.clone())
        return out


class _ReplayChoices(TorchDispatchMode):
    """Gives the recorded indices, and of `topk` the values that now stand there."""

    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self.choices = choices
        self.position = 0

    def __enter__(self) -> Any:
        self.position = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _TOPK and func is not _ARGMAX:
            return func(*args, **(kwargs or {}))
        index = self.choices[self.position].clone()
        self.position += 1
        if func is _ARGMAX:
            return index
        scores, _, *rest = args
        return scores.gather(rest[0] if rest else (kwargs or {}).get("dim", -1), index), index
