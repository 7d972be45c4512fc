"""Rotary frequencies that depend on the length: those of each document alone, packed and padded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SMALL, assert_close, documents, linear_cross_entropy

import am_models

# Tokens that a document may have before its frequencies change.
ORIGINAL = 8
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL, "factor": 4.0}
LONG |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 6.0]}
CONFIGS: dict[str, Any] = {
    "llama dynamic": ("LlamaConfig", {"max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC}),
    "llama longrope": ("LlamaConfig", {"max_position_embeddings": 32, "rope_parameters": LONG}),
    "phi3 longrope": (
        "Phi3Config",
        {
            "max_position_embeddings": 32,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": LONG | {"partial_rotary_factor": 1.0},
            "resid_pdrop": 0.0,
        },
    ),
    "gemma3 dynamic": (
        "Gemma3TextConfig",
        {
            "max_position_embeddings": ORIGINAL,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def stock(name: str) -> torch.nn.Module:
    kind, facts = CONFIGS[name]
    torch.manual_seed(0)
    facts = {**SMALL, **copy.deepcopy(facts)}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**facts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def alone(name: str, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of each document through a stock model that has seen no other."""
    total, gradients = torch.zeros(()), {}
    for row in range(batch["input_ids"].shape[0]):
        for document in batch["document_ids"][row].unique().tolist():
            if document:
                model, here = stock(name), batch["document_ids"][row] == document
                logits = model(batch["input_ids"][row, here][None]).logits[0]
                loss = torch.nn.functional.cross_entropy(logits, batch["shift_labels"][row, here], reduction="sum")
                loss.backward()
                total = total + loss.detach()
                for key, parameter in model.named_parameters():
                    gradients[key] = gradients.get(key, 0) + parameter.grad
    return total, gradients


def padded(lengths: list[int], goes_on: bool) -> dict[str, torch.Tensor]:
    rows = [documents([length], padding=max(lengths) - length) for length in lengths]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if goes_on:
        batch["position_ids"] = torch.arange(max(lengths)).expand(len(lengths), -1)
    return batch


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["packed", "padded", "positions go on through padding"])
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_documents_of_any_length_equal_each_alone(name, layout, kernels):
    lengths = [5, 12, 8, 17, 9]
    batch = documents(lengths) if layout == "packed" else padded(lengths, layout != "padded")
    expected, gradients = alone(name, batch)
    model = stock(name)
    am_models.optimize(model, kernels=kernels)
    for _ in range(2):
        # Again, after it has seen longer ones.
        model.zero_grad()
        loss = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
        loss.backward()
        assert_close(loss, expected, "loss")
        for key, parameter in model.named_parameters():
            assert_close(parameter.grad, gradients[key], f"gradient of {key}", tolerance=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_past_the_original_length_equals_stock(name):
    model = stock(name)
    am_models.optimize(model)
    prompt = torch.arange(3, 9)[None]
    # Without a cache: transformers would mix keys of several frequencies, and as of when is its own affair.
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(prompt, **options), stock(name).generate(prompt, **options))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["llama dynamic", "llama longrope"])
def test_the_leak_check_sees_the_length_of_a_neighbour(name, packed):
    model = stock(name)
    with pytest.raises(ValueError, match=r"llama: the logits of a document move .* when its neighbour gets longer"):
        am_models.require_no_leak(model, packed=packed, document_length=ORIGINAL)
    for kernels in ("off", "auto"):
        model = stock(name)
        am_models.optimize(model, kernels=kernels)
        am_models.require_no_leak(model, packed=packed, document_length=ORIGINAL)
