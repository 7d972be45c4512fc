"""What a configuration says to a layout, and the losses of models whose head is cut along the vocabulary."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import am_models
from am_testing import run_distributed


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 32}),
        ("gemma2", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        # The plan of phi3 gathers what its one projection gives, that of deepseek_v3 has no attention.
        ("phi3", {}),
        ("deepseek_v3", {}),
        ("gpt2", {"n_head": 12}),
        ("mamba", {}),
    ],
)
def test_sizes_that_tensor_parallel_ranks_must_divide(family, sizes):
    assert am_models.parallel_facts(transformers.CONFIG_MAPPING[family]()).must_divide == sizes


def test_what_a_layout_cannot_do_has_a_reason():
    facts = {name: am_models.parallel_facts(transformers.CONFIG_MAPPING[name]()) for name in ("qwen3", "gpt2", "llava")}
    assert (facts["qwen3"].no_tensor_plan, facts["qwen3"].no_context) == (None, None)
    assert facts["gpt2"].no_tensor_plan == "transformers has no tensor-parallel plan for gpt2"
    assert facts["gpt2"].no_context.startswith("the attention of gpt2 is not declared")
    assert facts["llava"].no_context.startswith("llava is a model of images and text")
    assert facts["llava"].must_divide == {"num_attention_heads": 32, "num_key_value_heads": 32}


def model_with_bias(family):
    """A tiny model whose output head has a bias, of 31 ids: no two ranks have equally many."""
    torch.manual_seed(0)
    small = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "pad_token_id": 0, "intermediate_size": 24}
    config = {"llama": transformers.LlamaConfig, "olmo2": transformers.Olmo2Config}[family](**small)
    model = am_models.AutoModelForCausalLM.from_config(config)
    model.lm_head = torch.nn.Linear(16, 31)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_and_gradients(family, cut):
    model, seen = model_with_bias(family), []
    if cut:
        mesh = init_device_mesh("cpu", (2,))
        # For a forward that ends in logits, they are gathered; a loss of hidden states is given the head as it is.
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
        assert model.lm_head.weight.placements == model.lm_head.bias.placements == (Shard(0),)

    def loss_fn(hidden, weight, labels, *, bias=None, softcap=None, scale=None):
        seen.extend(isinstance(tensor, DTensor) for tensor in (hidden, weight, labels, bias))
        logits = torch.nn.functional.linear(hidden, whole(weight), whole(bias))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    tokens = torch.arange(1, 23).view(2, 11)
    batch = {"input_ids": tokens, "shift_labels": tokens.roll(-1, 1)}
    loss = am_models.forward_with_loss(model, loss_fn, *am_models.split_batch(model, batch))
    loss.backward()
    return seen, loss.item(), {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_head_that_is_cut_along_the_vocabulary(family):
    _, loss, gradients = loss_and_gradients(family, False)
    for seen, of_parts, gradients_of_parts in run_distributed(loss_and_gradients, 2, family, True):
        # The loss of olmo2, which is not declared, is made of materialised logits.
        assert seen == ([False, True, False, True] if family == "llama" else [])
        assert abs(of_parts - loss) <= 1e-5 * abs(loss)
        for name, gradient in gradients.items():
            assert (gradients_of_parts[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
