"""The installed method and the leak test on FSDP2 shards."""

from __future__ import annotations

import torch

from am_testing import run_distributed


def _loss(hidden, weight, labels, *, bias=None, softcap=None, scale=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def _model(family):
    import transformers

    import am_models

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": family == "llama"}
    config = transformers.LlamaConfig(**small)
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**small, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2)
    torch.manual_seed(0)
    return am_models.AutoModelForCausalLM.from_config(config).eval()


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(64, (1, 10), generator=generator)
    return {
        "input_ids": tokens,
        "position_ids": torch.tensor([[*range(6), *range(4)]]),
        "document_ids": torch.tensor([[1] * 6 + [2] * 4], dtype=torch.int32),
        "shift_labels": tokens.roll(-1),
    }


def _sharded_gradients(family):
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    import am_models

    model, rank = _model(family), torch.distributed.get_rank()
    for layer in model.transformer.h if family == "gpt2" else model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "forward_with_loss")
    am_models.require_no_leak(model, packed=True)
    loss = am_models.forward_with_loss(model, _loss, *am_models.split_batch(model, _batch(rank)))
    loss.backward()
    return loss.item(), {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def test_loss_and_gradients_of_shards_equal_one_process():
    import am_models

    for family in ("llama", "qwen3_moe", "gpt2"):
        results = run_distributed(_sharded_gradients, 2, family)
        model = _model(family)
        losses = [
            am_models.forward_with_loss(model, _loss, *am_models.split_batch(model, _batch(rank))) for rank in range(2)
        ]
        sum(losses).backward()
        assert all(
            abs(result[0] - loss.item()) < 1e-5 * loss.item() for result, loss in zip(results, losses, strict=True)
        )
        for name, parameter in model.named_parameters():
            distance = (results[0][1][name] - parameter.grad).abs().max()
            assert distance <= 1e-5 * parameter.grad.abs().max(), f"{family} {name}: {distance}"
