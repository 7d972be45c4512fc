"""An optimised model computes what the stock model computes, however the tokens are laid out."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import CONFIGS, DECLARED, VOCABULARY, assert_close, config_of, documents, linear_cross_entropy, stock

import am_models

LENGTHS = [7, 1, 5, 9]


def pair(family: str, **changes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A stock model and an optimised one with the same weights."""
    reference = stock(family, **changes)
    model = copy.deepcopy(reference)
    am_models.optimize(model)
    return reference, model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def assert_same_gradients(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name].grad, f"gradient of {name}")


def stock_loss_per_document(reference: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The hand-written loop: each document alone through the stock forward, summed cross-entropy of its targets."""
    loss = torch.zeros(())
    for row in range(batch["input_ids"].shape[0]):
        for document in batch["document_ids"][row].unique().tolist():
            if document:
                here = batch["document_ids"][row] == document
                logits = reference(batch["input_ids"][row, here][None]).logits[0]
                labels = batch["shift_labels"][row, here]
                loss = loss + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_equal_stock(family):
    reference, model = pair(family)
    input_ids = tokens(2, 12)
    expected, actual = reference(input_ids).logits, model(input_ids).logits
    assert_close(actual, expected, "logits")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_documents_equal_each_document_alone(family):
    reference, model = pair(family)
    # Stock packing by position_ids has no document_ids to tell padding: it is left out there.
    batch = documents(LENGTHS, padding=0 if family == "gpt2" else 3)
    expected = stock_loss_per_document(reference, batch)
    actual = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    assert_close(actual, expected, "loss")
    expected.backward()
    actual.backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_rows_equal_each_row_alone(family):
    reference, model = pair(family)
    rows = [documents([length], padding=9 - length) for length in (9, 4, 2)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    batch["position_ids"] = torch.arange(9).expand(3, 9)
    expected = stock_loss_per_document(reference, batch)
    actual = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    assert_close(actual, expected, "loss")
    expected.backward()
    actual.backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("family", DECLARED)
def test_logits_of_packed_documents_equal_each_document_alone(family):
    reference, model = pair(family)
    batch = documents(LENGTHS, padding=2)
    labels = batch.pop("shift_labels")
    assert labels.shape == batch["input_ids"].shape
    packed = model(**batch).logits[0]
    assert packed.isfinite().all()
    start = 0
    for length in LENGTHS:
        alone = reference(batch["input_ids"][:, start : start + length]).logits[0]
        assert_close(packed[start : start + length], alone, f"document at {start}")
        start += length


@pytest.mark.parametrize("family", DECLARED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_mask_equals_stock(family, side):
    reference, model = pair(family)
    input_ids = tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    real = mask.bool()
    assert_close(
        model(input_ids, attention_mask=mask).logits[real],
        reference(input_ids, attention_mask=mask).logits[real],
        "logits",
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_generation_equals_stock_with_left_padding(family):
    reference, model = (model.eval() for model in pair(family))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = reference.generate(tokens(2, 7), **arguments)
    assert torch.equal(model.generate(tokens(2, 7), **arguments), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_moe"])
def test_static_cache_equals_stock(family):
    reference, model = (model.eval() for model in pair(family))
    arguments = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = reference.generate(tokens(2, 7), **arguments)
    assert torch.equal(model.generate(tokens(2, 7), **arguments), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_attention_in_both_directions_equals_stock(family):
    reference, model = pair(family)
    input_ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    for arguments in ({}, {"attention_mask": mask}):
        expected = reference(input_ids, is_causal=False, **arguments).logits[mask.bool()]
        assert_close(model(input_ids, is_causal=False, **arguments).logits[mask.bool()], expected, str(list(arguments)))
    assert (model(input_ids).logits - model(input_ids, is_causal=False).logits).abs().max() > 1e-2


def test_given_four_dimensional_masks_equal_stock():
    reference, model = pair("llama")
    input_ids = tokens(2, 9)
    allowed = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(4)) > 0.5
    allowed |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        assert_close(
            model(input_ids, attention_mask=mask).logits,
            reference(input_ids, attention_mask=mask).logits,
            str(mask.dtype),
        )


def test_packing_by_position_ids_alone_equals_stock():
    for family in ("llama", "mistral"):
        reference, model = pair(family)
        batch = {name: documents(LENGTHS)[name] for name in ("input_ids", "position_ids")}
        assert_close(model(**batch).logits, reference(**batch).logits, family)


# The name that every supported transformers has; newer ones announce another.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, use_reentrant):
    reference, model = pair(family)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    batch = documents(LENGTHS)
    stock_loss_per_document(reference, batch).backward()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch)).backward()
    assert len(calls) == 2
    assert_same_gradients(model, reference)


def test_bfloat16_stays_as_close_to_float32_as_stock():
    exact = stock("qwen3")
    reference, model = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    am_models.optimize(model)
    input_ids = tokens(2, 12)
    truth = exact(input_ids).logits
    error = (model(input_ids).logits - truth).norm()
    assert error <= 1.25 * (reference(input_ids).logits - truth).norm()


def test_hidden_states_and_router_logits_are_still_recorded():
    reference, model = pair("qwen3_moe")
    arguments = {"output_hidden_states": True, "output_router_logits": True}
    expected, actual = reference(tokens(1, 6), **arguments), model(tokens(1, 6), **arguments)
    for a, b in zip(
        actual.hidden_states + actual.router_logits, expected.hidden_states + expected.router_logits, strict=True
    ):
        assert_close(a, b, "recorded output")


def test_zero_targets_give_a_zero_that_reaches_every_parameter():
    for family in ("llama", "gpt2"):
        _, model = pair(family)
        batch = documents([4, 3])
        batch["shift_labels"] = torch.full_like(batch["shift_labels"], -100)
        loss = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
        loss.backward()
        assert loss.item() == 0.0
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_router_loss_is_refused():
    _, model = pair("qwen3_moe", output_router_logits=True)
    with pytest.raises(ValueError, match="output_router_logits"):
        am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, documents([4])))


def test_adapter_on_the_head_is_part_of_the_loss():
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    _, model = pair("llama")
    batch = documents([4, 3])
    logits = 2 * model(**{name: batch[name] for name in ("input_ids", "position_ids", "document_ids")}).logits
    head = Doubled(32, VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    expected = torch.nn.functional.cross_entropy(logits[0], batch["shift_labels"][0], reduction="sum")
    assert_close(
        am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch)), expected, "loss"
    )
    assert "logits" in am_models.optimize(model).loss


def test_attention_dropout_keeps_stock_attention():
    model = am_models.AutoModelForCausalLM.from_config(config_of("llama", attention_dropout=0.5))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attention_dropout"):
        am_models.optimize(model, kernels={"attention": True})
