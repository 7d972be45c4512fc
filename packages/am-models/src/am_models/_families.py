"""What each model family of transformers is made of: the declared facts that the swaps and the loss rely on.

A class is swapped only where this table names it, because what it computes was read and is tested against stock: two
classes called `...RMSNorm` can multiply by `weight` or by `1 + weight`. A family that is not here keeps its own code.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """Class names inside ``transformers.models.<module>.modeling_<module>`` and the arithmetic after the output head.

    attention: takes part in transformers' attention registry and lets keyword arguments through to it.
    rotary: the attention's `apply_rotary_pos_emb` is the half-rotation of :func:`am_kernels.rope`.
    norm: `weight * (x / rms(x)).to(x.dtype)`, epsilon in `variance_epsilon`.
    gated_mlp: `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
    experts: fused `gate_up_proj [E, 2F, D]` (gate first) and `down_proj [E, D, F]`, no bias, activation `act_fn`.
    softcap: configuration key of `tanh(logits / c) * c`; None or a null value: not applied.
    scale, inverse_scale: configuration key whose value multiplies or divides the logits (before the soft-cap).
    router_loss: the stock forward adds a router loss when `config.output_router_logits` is set.
    default_attention: beside sdpa, what transformers chooses where the user names no `attn_implementation`.
    """

    module: str
    attention: str
    rotary: bool = False
    norm: str | None = None
    gated_mlp: str | None = None
    experts: str | None = None
    softcap: str | None = None
    scale: str | None = None
    inverse_scale: str | None = None
    router_loss: bool = False
    default_attention: str = "sdpa"


def _llama_like(module: str, prefix: str, **facts: Any) -> Family:
    return Family(module, f"{prefix}Attention", rotary=True, norm=f"{prefix}RMSNorm", gated_mlp=f"{prefix}MLP", **facts)


FAMILIES = {
    "llama": _llama_like("llama", "Llama"),
    "mistral": _llama_like("mistral", "Mistral"),
    "qwen2": _llama_like("qwen2", "Qwen2"),
    "qwen3": _llama_like("qwen3", "Qwen3"),
    "smollm3": _llama_like("smollm3", "SmolLM3"),
    "granite": _llama_like("granite", "Granite", inverse_scale="logits_scaling"),
    "qwen2_moe": _llama_like("qwen2_moe", "Qwen2Moe", experts="Qwen2MoeExperts", router_loss=True),
    "qwen3_moe": _llama_like("qwen3_moe", "Qwen3Moe", experts="Qwen3MoeExperts", router_loss=True),
    "mixtral": Family(
        "mixtral",
        attention="MixtralAttention",
        rotary=True,
        norm="MixtralRMSNorm",
        experts="MixtralExperts",
        router_loss=True,
    ),
    "gemma": Family("gemma", attention="GemmaAttention", rotary=True),
    "gemma2": Family(
        "gemma2",
        attention="Gemma2Attention",
        rotary=True,
        softcap="final_logit_softcapping",
        default_attention="eager",
    ),
    "gemma3_text": Family("gemma3", attention="Gemma3Attention", rotary=True, softcap="final_logit_softcapping"),
    "cohere": Family("cohere", attention="CohereAttention", gated_mlp="CohereMLP", scale="logit_scale"),
    "cohere2": Family("cohere2", attention="Cohere2Attention", gated_mlp="Cohere2MLP", scale="logit_scale"),
}


def family_class(family: Family, name: str) -> type[nn.Module]:
    """The class `name` of the family's modelling file; AttributeError where the installed transformers has none."""
    return getattr(importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}"), name)


def modules_of(model: nn.Module, cls: type[nn.Module]) -> list[nn.Module]:
    """The submodules that run `cls.forward`: `cls` itself and wrappers such as FSDP2's that inherit its forward."""
    return [module for module in model.modules() if isinstance(module, cls) and type(module).forward is cls.forward]
