"""A loss on the router logits of mixture-of-experts families, added to the loss on the tokens."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tiny_models import EXPERTS, SMALL, assert_close, documents, image_rows, joined, linear_cross_entropy, stock

import am_models
from am_testing import run_distributed

FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral"]


def _weighted(router_logits, document_ids):
    """A sum over real tokens that tells layers and experts apart."""
    real = (document_ids.flatten() > 0).float()[:, None]
    return sum(
        0.1 * (layer + 1) * (logits.float().square() * real * torch.arange(1, logits.shape[1] + 1)).sum()
        for layer, logits in enumerate(router_logits)
    )


def _cross_entropy(hidden, weight, labels, *, bias=None, softcap=None, scale=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def expected_loss(reference: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stock, each document alone: its recorded router logits and its own cross-entropy."""
    loss = torch.zeros(())
    for document in range(1, int(batch["document_ids"].max()) + 1):
        here = batch["document_ids"][0] == document
        outputs = reference(batch["input_ids"][:, here], output_router_logits=True)
        labels = batch["shift_labels"][0, here]
        loss = loss + torch.nn.functional.cross_entropy(outputs.logits[0], labels, ignore_index=-100, reduction="sum")
        loss = loss + _weighted(outputs.router_logits, batch["document_ids"][:, here])
    return loss


def recompute(model: torch.nn.Module, *, use_reentrant: bool) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    layers = list(model.model.layers)
    apply_activation_checkpointing(
        model, partial(checkpoint_wrapper, checkpoint_impl=kind), check_fn=lambda module: module in layers
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_value_and_gradients_equal_stock(family, kernels, recomputed):
    reference = stock(family)
    model = copy.deepcopy(reference)
    report = am_models.optimize(model, kernels=kernels)
    assert report.router
    assert report.num_experts_per_token == reference.config.num_experts_per_tok == 2
    assert report.parts["experts"].startswith("am_moe" if kernels == "auto" else "stock")
    if recomputed:
        recompute(model, use_reentrant=False)
    batch = documents([7, 1, 5], padding=3)
    expected = expected_loss(reference, batch)
    actual = am_models.forward_with_loss(
        model, linear_cross_entropy, *am_models.split_batch(model, batch), router_loss=_weighted
    )
    assert_close(actual, expected, "loss")
    assert actual > am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch)) + 0.1
    expected.backward()
    actual.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        assert_close(parameter.grad, gradients[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_router_logits_changes_no_bit(family):
    model = stock(family)
    am_models.optimize(model)
    batch = documents([7, 1, 5], padding=3)
    plain = am_models.forward_with_loss(model, linear_cross_entropy, *am_models.split_batch(model, batch))
    recorded = am_models.forward_with_loss(
        model,
        linear_cross_entropy,
        *am_models.split_batch(model, batch),
        router_loss=lambda router_logits, _: router_logits[0].new_zeros(()),
    )
    assert torch.equal(recorded, plain)


def test_a_configured_router_loss_is_replaced_by_a_given_one():
    model = stock("qwen3_moe", output_router_logits=True)
    am_models.optimize(model)
    twin = stock("qwen3_moe")
    am_models.optimize(twin)
    batch = documents([7, 5])
    given = am_models.forward_with_loss(
        model, linear_cross_entropy, *am_models.split_batch(model, batch), router_loss=_weighted
    )
    assert torch.equal(
        given,
        am_models.forward_with_loss(
            twin, linear_cross_entropy, *am_models.split_batch(twin, batch), router_loss=_weighted
        ),
    )


def test_models_without_a_declared_router_refuse():
    for family in ("llama", "gpt2"):
        model = stock(family)
        report = am_models.optimize(model)
        assert not report.router
        assert report.num_experts_per_token is None
        with pytest.raises(ValueError, match=f"no router of {family} is declared; leave it out"):
            am_models.forward_with_loss(
                model, linear_cross_entropy, *am_models.split_batch(model, documents([4])), router_loss=_weighted
            )


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_a_model_of_images_and_text_has_no_router_loss(output_router_logits):
    text = {**SMALL, **EXPERTS, "model_type": "qwen3_moe", "output_router_logits": output_router_logits}
    model = stock("idefics3", text_config=text)
    report = am_models.optimize(model)
    assert report.parts["experts"] == "am_moe (2 layers)"
    assert not report.router
    assert report.num_experts_per_token is None
    inputs, targets = am_models.split_batch(model, joined("idefics3", image_rows("idefics3", [1])))
    am_models.forward_with_loss(model, linear_cross_entropy, inputs, targets).backward()
    assert model.model.text_model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="router_loss given, but idefics3 is a model of images and text"):
        am_models.forward_with_loss(model, linear_cross_entropy, inputs, targets, router_loss=_weighted)


def test_router_logits_without_a_graph_are_refused():
    model = stock("qwen3_moe")
    am_models.optimize(model)
    recompute(model, use_reentrant=True)
    with pytest.raises(ValueError, match="reentrant"):
        am_models.forward_with_loss(
            model, linear_cross_entropy, *am_models.split_batch(model, documents([4])), router_loss=_weighted
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate." not in name)
    am_models.forward_with_loss(
        model, linear_cross_entropy, *am_models.split_batch(model, documents([4])), router_loss=_weighted
    )


def _model():
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return am_models.AutoModelForCausalLM.from_config(config)


def _batch(seed):
    tokens = torch.randint(64, (1, 10), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": tokens, "shift_labels": tokens.roll(-1)}
    batch["position_ids"] = torch.tensor([[*range(6), *range(4)]])
    batch["document_ids"] = torch.tensor([[1] * 6 + [2] * 3 + [0]], dtype=torch.int32)
    return batch


def _sharded(base_model_alone):
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    model, rank = _model(), torch.distributed.get_rank()
    recompute(model, use_reentrant=False)
    for layer in model.model.layers:
        fully_shard(layer)
    if base_model_alone:
        fully_shard(model.model)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "forward_with_loss")
    loss = am_models.forward_with_loss(
        model, _cross_entropy, *am_models.split_batch(model, _batch(rank)), router_loss=_weighted
    )
    loss.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return loss.item(), {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients.items()}


def test_shards_with_recompute_equal_one_process():
    results = run_distributed(_sharded, 2, False)
    model = _model()
    losses = [
        am_models.forward_with_loss(
            model, _cross_entropy, *am_models.split_batch(model, _batch(rank)), router_loss=_weighted
        )
        for rank in range(2)
    ]
    sum(losses).backward()
    for result, loss in zip(results, losses, strict=True):
        assert abs(result[0] - loss.item()) <= 1e-5 * loss.item()
    for name, parameter in model.named_parameters():
        assert_close(results[0][1][name], parameter.grad, f"gradient of {name}")


def test_a_base_model_sharded_by_itself_is_refused():
    with pytest.raises(RuntimeError, match=r"ValueError: 0 of 2 routers of FSDPQwen3MoeModel were recorded"):
        run_distributed(_sharded, 2, True)
