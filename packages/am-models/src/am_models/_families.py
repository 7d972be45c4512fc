"""What each model family of transformers is made of: the declared facts that the swaps and the loss rely on.

`FAMILIES` describes language models by the `model_type` of their configuration, `VISION_FAMILIES` what surrounds the
language model (`config.text_config`) in a model of images and text.

A class is swapped only where this table names it, because what it computes was read and is tested against stock: two
classes called `...RMSNorm` can multiply by `weight` or by `1 + weight`. A family that is not here keeps its own code,
unless a row of the caller's own describes it: `optimize(model, family=Family(...))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Class names inside one modelling file and the arithmetic after the output head.

    module: a family of transformers, whose file is `transformers.models.<module>.modeling_<module>`, or the import path
        of a module of your own, such as `my_package.modeling_mine`.
    attention: takes part in transformers' attention registry and lets keyword arguments through to it.
    rotary: the attention's `apply_rotary_pos_emb` is the half-rotation of `am_kernels.rope`.
    norm: `weight * (x / rms(x)).to(x.dtype)`, epsilon in `variance_epsilon`.
    gated_mlp: `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
    experts: fused `gate_up_proj [E, 2F, D]` (gate first) and `down_proj [E, D, F]`, no bias, activation `act_fn`.
    activation: configuration key of that `act_fn`, of which silu alone is swapped; None: it is always silu.
    softcap: configuration key of `tanh(logits / c) * c`; None or a null value: not applied.
    scale, inverse_scale: configuration key whose value multiplies or divides the logits (before the soft-cap).
    router: class whose first output are the router logits [T, E] that transformers records and, when
        `config.output_router_logits` is set, adds a loss of. The configuration must have that key.
    experts_per_token: with a router, configuration key of how many experts a token uses.
    default_attention: beside sdpa, what transformers chooses where the user names no `attn_implementation`.
    """

    module: str
    attention: str
    rotary: bool = False
    norm: str | None = None
    gated_mlp: str | None = None
    experts: str | None = None
    activation: str | None = "hidden_act"
    softcap: str | None = None
    scale: str | None = None
    inverse_scale: str | None = None
    router: str | None = None
    experts_per_token: str = "num_experts_per_tok"
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
    "qwen2_moe": _llama_like("qwen2_moe", "Qwen2Moe", experts="Qwen2MoeExperts", router="Qwen2MoeTopKRouter"),
    "qwen3_moe": _llama_like("qwen3_moe", "Qwen3Moe", experts="Qwen3MoeExperts", router="Qwen3MoeTopKRouter"),
    "mixtral": Family(
        "mixtral",
        attention="MixtralAttention",
        rotary=True,
        norm="MixtralRMSNorm",
        experts="MixtralExperts",
        router="MixtralTopKRouter",
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
    "qwen2_5_vl_text": Family(
        "qwen2_5_vl",
        attention="Qwen2_5_VLAttention",
        rotary=True,
        norm="Qwen2_5_VLRMSNorm",
        gated_mlp="Qwen2MLP",
    ),
    "qwen3_vl_text": _llama_like("qwen3_vl", "Qwen3VLText"),
}


@dataclass(frozen=True)
class VisionFamily:
    """How images enter a model: facts on its base model (`model.base_model`).

    language_model: attribute of the base model that holds the language model.
    tower, projector: paths in the base model of what sees images and of what turns its features into the language
        model's hidden states (part of the tower in some families).
    blank: the smallest image that the tower takes, as keyword arguments of the base model's `get_image_features`.
    keys, optional_keys: the processor's tensors that the base model takes with images, always or where given.
    features: fields of the output of `get_image_features` that end in the token sequence.
    axes: of the rotary embedding; with more than one, images need `position_ids [axes, B, S]`.
    """

    language_model: str
    tower: str
    projector: tuple[str, ...]
    blank: Callable[[PreTrainedConfig], dict[str, torch.Tensor]]
    keys: tuple[str, ...] = ("pixel_values",)
    optional_keys: tuple[str, ...] = ()
    features: tuple[str, ...] = ("pooler_output",)
    axes: int = 1


def _blank_shuffled(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """One image [1, 1, C, side, side] of one token; all zeros would count as padding."""
    vision = config.vision_config
    side = vision.patch_size * config.scale_factor
    return {"pixel_values": torch.ones(1, 1, vision.num_channels, side, side)}


def _blank_fixed(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """One image [1, C, side, side]: these towers take one size."""
    vision = config.vision_config
    return {"pixel_values": torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)}


def _blank_grid(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """One image of one token: merge * merge patches of C * frames * side * side values."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(merge**2, values), "image_grid_thw": torch.tensor([[1, merge, merge]])}


_GRID_KEYS = ("pixel_values", "image_grid_thw")

VISION_FAMILIES = {
    "idefics3": VisionFamily(
        "text_model", "vision_model", ("connector",), _blank_shuffled, optional_keys=("pixel_attention_mask",)
    ),
    "smolvlm": VisionFamily(
        "text_model", "vision_model", ("connector",), _blank_shuffled, optional_keys=("pixel_attention_mask",)
    ),
    "llava": VisionFamily("language_model", "vision_tower", ("multi_modal_projector",), _blank_fixed),
    "qwen2_5_vl": VisionFamily("language_model", "visual", ("visual.merger",), _blank_grid, keys=_GRID_KEYS, axes=3),
    "qwen3_vl": VisionFamily(
        "language_model",
        "visual",
        ("visual.merger", "visual.deepstack_merger_list"),
        _blank_grid,
        keys=_GRID_KEYS,
        features=("pooler_output", "deepstack_features"),
        axes=3,
    ),
}
