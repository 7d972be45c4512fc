"""Tiny seeded models of the tested families, and batches for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

import am_models

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

IMAGE = 60
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 8, "patch_size": 2}
SHUFFLED = {
    "text_config": {"model_type": "llama", **SMALL},
    "vision_config": TOWER,
    "scale_factor": 2,
    "image_token_id": IMAGE,
    "pad_token_id": 0,
}
FIXED = {"image_token_id": IMAGE, "image_seq_length": 16}
GRID_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2}
GRID_TOWER |= {"out_hidden_size": 32}
GRID_TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def _axes(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


# Images are 8 x 8, or grids of 4 x 4 and 2 x 4 patches; a token stands for 2 x 2 patches, in llava for one.
VISION_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics3": ("Idefics3Config", SHUFFLED),
    "smolvlm": ("SmolVLMConfig", SHUFFLED),
    "llava": (
        "LlavaConfig",
        {
            **FIXED,
            "text_config": {"model_type": "qwen2", **SMALL},
            "vision_config": {"model_type": "siglip_vision_model", **TOWER},
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
    ),
    "llava_clip": (
        "LlavaConfig",
        {
            **FIXED,
            "text_config": {"model_type": "llama", **SMALL},
            "vision_config": {"model_type": "clip_vision_model", **TOWER},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            **GRID_TOKENS,
            "text_config": {**SMALL, **_axes(2, 1, 1)},
            "vision_config": {**GRID_TOWER, "window_size": 8, "fullatt_block_indexes": [1]},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            **GRID_TOKENS,
            "text_config": {**SMALL, **_axes(4, 2, 2), "head_dim": 16},
            "vision_config": {**GRID_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    ),
}
GRID_FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def config_of(family: str, **changes: Any) -> Any:
    name, facts = (CONFIGS | VISION_CONFIGS)[family]
    facts = facts if family in VISION_CONFIGS else {**SMALL, **facts}
    return getattr(transformers, name)(**{**copy.deepcopy(facts), **changes})


def stock(family: str, **changes: Any) -> torch.nn.Module:
    """A seeded stock model, its weights large enough that attention matters to the logits."""
    torch.manual_seed(0)
    # transformers 5.17 chooses sdpa for Gemma 2 and drops its soft-cap; later versions choose eager themselves.
    arguments = {"attn_implementation": "eager"} if family == "gemma2" else {}
    auto = transformers.AutoModelForImageTextToText if family in VISION_CONFIGS else transformers.AutoModelForCausalLM
    model = auto.from_config(config_of(family, **changes), **arguments).train()
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


def image_rows(family: str, numbers: list[int]) -> list[dict[str, torch.Tensor]]:
    """One unpadded row per entry: text with that many images in it, labels on the text alone; no positions yet."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length, number in enumerate(numbers, start=3):
        ids, sizes = torch.randint(3, 60, (length,), generator=generator).tolist(), []
        for image in range(number):
            grid = (1, 4, 4) if image == 0 else (1, 2, 4)
            sizes.append(grid)
            num_tokens = 16 if family.startswith("llava") else 4
            if family in GRID_FAMILIES:
                num_tokens = grid[1] * grid[2] // 4
            text = torch.randint(3, 60, (4,), generator=generator).tolist()
            ids += [62, *[IMAGE] * num_tokens, 63, *text]
        tokens = torch.tensor([ids])
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], dim=1)
        labels[labels == IMAGE] = -100
        row = {"input_ids": tokens, "shift_labels": labels, "document_ids": torch.ones_like(tokens, dtype=torch.int32)}
        if number and family in GRID_FAMILIES:
            row["image_grid_thw"] = torch.tensor(sizes)
            num_patches = int(row["image_grid_thw"].prod(-1).sum())
            row["pixel_values"] = torch.randn(num_patches, 3 * 2 * 2 * 2, generator=generator)
        elif number:
            row["pixel_values"] = torch.randn(number, 3, 8, 8, generator=generator)
            if family in ("idefics3", "smolvlm"):
                row["pixel_values"] = row["pixel_values"][None]
                row["pixel_attention_mask"] = torch.ones(1, number, 8, 8, dtype=torch.bool)
                row["pixel_attention_mask"][0, 0, :, 5:] = False
        rows.append(row)
    return rows


def joined(family: str, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows as one padded batch, with the position ids that the family takes."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name, padding in (("input_ids", 0), ("shift_labels", -100), ("document_ids", 0)):
        parts = [torch.nn.functional.pad(row[name], (0, length - row[name].shape[1]), value=padding) for row in rows]
        batch[name] = torch.cat(parts)
    for name in ("pixel_values", "pixel_attention_mask", "image_grid_thw"):
        parts = [row[name] for row in rows if name in row]
        if parts and family in ("idefics3", "smolvlm"):
            slots = max(part.shape[1] for part in parts)
            batch[name] = parts[0].new_zeros(len(rows), slots, *parts[0].shape[2:])
            for index, row in enumerate(rows):
                if name in row:
                    batch[name][index, : row[name].shape[1]] = row[name][0]
        elif parts:
            batch[name] = torch.cat(parts)
    if family in GRID_FAMILIES:
        batch["position_ids"] = am_models.multi_axis_positions(
            config_of(family), batch["input_ids"], image_grid_thw=batch.get("image_grid_thw")
        )
    else:
        batch["position_ids"] = torch.arange(length).expand(len(rows), -1)
    return batch


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
