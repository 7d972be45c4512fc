"""Forwards put on single module instances: the module, its class, its parameters and their names stay."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import nn

import am_kernels
import am_moe

EXPERTS_NAME = "am_moe"


class _Norm(Protocol):
    weight: torch.Tensor
    variance_epsilon: float


class _GatedMlp(Protocol):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


class _Experts(Protocol):
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor


def rms_norm_forward(self: _Norm, hidden_states: torch.Tensor) -> torch.Tensor:
    """`weight * (x / rms(x))` of x [..., D], as every Llama-like RMSNorm of transformers computes it."""
    return am_kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def swiglu_mlp_forward(self: _GatedMlp, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))` for x [..., D]."""
    return self.down_proj(am_kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb` for q [B, H, S, P], k [B, K, S, P], cos and sin [B, S, P]."""
    if unsqueeze_dim != 1:
        raise ValueError(f"unsqueeze_dim={unsqueeze_dim}: heads are dim 1 here; use kernels={{'rope': False}}")
    return am_kernels.rope(q, k, cos, sin)


def with_rotation(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The attention forward of a family, run with its global `apply_rotary_pos_emb` bound to `rotate`.

    A new function with its own globals: the modelling code stays the single implementation and its module is untouched.
    """
    # Without `__name__`, torch.compile reads these globals instead of those of the module that is named there.
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    scope["apply_rotary_pos_emb"] = rotate
    rebound = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    rebound.__module__ = __name__
    return rebound


def experts_forward(
    self: _Experts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden_states [T, D], top_k_index and top_k_weights [T, A] to [T, D]."""
    return am_moe.experts_forward(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def register_experts() -> None:
    """Make `experts_forward` known to transformers under our own name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts_forward)


def install(module: nn.Module, function: Callable[..., Any]) -> None:
    """Make `function` the forward of this one instance."""
    module.forward = MethodType(function, module)


def is_ours(module: nn.Module) -> bool:
    """Whether `install` was the last to replace the forward of this instance."""
    return vars(module)["forward"].__module__ == __name__
