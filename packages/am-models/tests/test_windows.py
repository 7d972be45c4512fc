"""Sliding windows where queries are fewer than the window, or keys more: one token, chunks, caches."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DECLARED, VOCABULARY, assert_close, documents, linear_cross_entropy, stock
from transformers import DynamicCache, StaticCache

import am_models

# Their window is 4 tokens.
WINDOWED = ["mistral", "qwen2", "gemma2", "gemma3", "cohere2"]


def pair(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    reference = stock(family).eval()
    model = copy.deepcopy(reference)
    am_models.optimize(model)
    return reference, model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", DECLARED)
def test_one_token_equals_stock(family):
    reference, model = pair(family)
    expected, actual = reference(tokens(2, 1)).logits, model(tokens(2, 1)).logits
    assert_close(actual, expected, "logits")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, reference)]
    # Of all parameters at once: those of queries and keys are zeros but for rounding.
    assert_close(*gradients, "gradients")


@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, True) for family in WINDOWED), *(("mistral", name) for name in ("bucketed", "sdpa", "reference"))],
)
def test_a_batch_of_one_padding_token_is_a_zero_that_reaches_every_parameter(family, backend):
    _, model = pair(family)
    am_models.optimize(model, kernels={"attention": backend})
    # What a rank gets that has run out of rows.
    batch = {name: torch.zeros(1, 1, dtype=torch.long) for name in ("input_ids", "position_ids", "document_ids")}
    batch["shift_labels"] = torch.full((1, 1), -100)
    loss = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None for parameter in model.parameters())
    one = documents([1])
    one["shift_labels"][:] = 7
    loss = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, one))
    logits = stock(family).eval()(one["input_ids"]).logits[0]
    assert_close(loss, torch.nn.functional.cross_entropy(logits, one["shift_labels"][0], reduction="sum"), "loss")


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 9])
def test_generation_equals_stock(family, prompt):
    reference, model = pair(family)
    for further in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        arguments = {"max_new_tokens": 8, "do_sample": False, **further}
        expected = reference.generate(tokens(2, prompt), **arguments)
        assert torch.equal(model.generate(tokens(2, prompt), **arguments), expected), further


@pytest.mark.parametrize("family", ["llama", *WINDOWED])
@pytest.mark.parametrize("chunks", [[1, 1, 12], [3, 3, 3, 5], [4, 1, 1, 8], [5, 9], [12, 2]])
def test_a_prompt_in_chunks_equals_stock(family, chunks):
    reference, model = pair(family)
    input_ids = tokens(2, sum(chunks))
    expected = reference(input_ids, use_cache=False).logits
    for kind in (DynamicCache, StaticCache):
        options = {"max_cache_len": 16} if kind is StaticCache else {}
        cache, pieces = kind(config=model.config, **options), []
        for chunk in input_ids.split(chunks, dim=1):
            pieces.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        assert_close(torch.cat(pieces, dim=1), expected, kind.__name__)
