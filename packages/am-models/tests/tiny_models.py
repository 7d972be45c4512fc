"""Tiny seeded models of the tested families, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 64

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 4, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, "sliding_window": 4, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
}
DECLARED = [name for name in CONFIGS if name != "gpt2"]


def config_of(family: str, **changes: Any) -> Any:
    name, facts = CONFIGS[family]
    return getattr(transformers, name)(**{**SMALL, **facts, **changes})


def stock(family: str, **changes: Any) -> torch.nn.Module:
    """A seeded stock model, its weights large enough that attention matters to the logits."""
    torch.manual_seed(0)
    # transformers 5.17 chooses sdpa for Gemma 2 and drops its soft-cap; later versions choose eager themselves.
    arguments = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes), **arguments).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def documents(lengths: list[int], padding: int = 0) -> dict[str, torch.Tensor]:
    """One packed row: documents of these lengths, then padding; the last token of a document has no target."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (sum(lengths) + padding,), generator=generator)
    labels, positions, ids, start = torch.full_like(input_ids, -100), [], [], 0
    for number, length in enumerate(lengths, start=1):
        labels[start : start + length - 1] = input_ids[start + 1 : start + length]
        positions += range(length)
        ids += [number] * length
        start += length
    return {
        "input_ids": input_ids[None],
        "position_ids": torch.tensor([positions + [0] * padding]),
        "document_ids": torch.tensor([ids + [0] * padding], dtype=torch.int32),
        "shift_labels": labels[None],
    }


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The loss contract in its plainest form: the float32 sum over targets."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    logits = logits if scale is None else logits * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """`max|a - b| <= tolerance * max|b|`, and finite."""
    limit = tolerance * max(expected.abs().max().item(), 1e-3)
    distance = (actual - expected).abs().max().item()
    assert distance <= limit, f"{what}: {distance:.3g} > {limit:.3g}"
