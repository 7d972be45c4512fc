"""Losses of logits that the model's own forward materialises, under tensor parallelism, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import am_ckpt
import am_loss
import am_mesh
import am_models
import am_peft
from am_testing import run_distributed
from integration_tests.equivalence import COMMON, DRIFT, check, drift, full

# What olmo2 does after its head is not declared; for llama it is, but an adapter makes the head more than linear.
CASES = {"undeclared": ("olmo2", False), "undeclared tied": ("olmo2", True), "adapter on the head": ("llama", False)}


def step(folder: str, adapter: bool, tp: int, sequence_parallel: bool) -> dict[str, Any]:
    """The loss, the gradient norm and all gradients, whole, of two micro-batches, and what the loss was made of."""
    dims = am_mesh.ParallelDims(tp=tp).build("cpu")
    with torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    if adapter:
        from peft import LoraConfig

        # B random too: where it starts at zero, A has no gradient.
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        am_peft.apply_lora(model, config)
    made_of = am_models.optimize(model).loss
    am_mesh.parallelize(
        model,
        dims,
        sequence_parallel=sequence_parallel,
        layer_placements=am_peft.tensor_placements,
        must_divide=am_models.parallel_facts(model).must_divide,
        forward_methods=("forward_with_loss",),
    )
    am_ckpt.load_hf(model, folder, mapping=am_models.weight_map(model), initialise=("*lora_*",))
    model.train()
    ids = torch.arange(1, 89).mul(7).remainder(97).view(8, 11)
    labels = ids.roll(-1, 1)
    labels[:, :4] = -100
    # Row 3 has no target.
    labels[3] = -100
    rank, ranks = dims.row_ranks.get_local_rank(), dims.row_ranks.size()
    divisor = int((labels != -100).sum())
    batches = [{"input_ids": ids[rows], "shift_labels": labels[rows]} for rows in torch.arange(8).view(2, 4)]
    mine = [{name: tensor[rank::ranks] for name, tensor in batch.items()} for batch in batches]

    def forward(number: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs, targets = am_models.split_batch(model, batch)
        return {"loss": am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, targets)}

    loss = am_mesh.forward_backward(model, mine, forward, divisor)["loss"]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "made of": made_of,
        "loss": am_mesh.sum_over(dims.loss_ranks, loss),
        "norm": am_mesh.grad_norm(model),
        "gradients": {name: full(parameter.grad) for name, parameter in trainable.items()},
    }


@pytest.mark.parametrize("case", CASES)
def test_materialised_logits_under_tensor_parallelism(case: str, tmp_path: Path) -> None:
    family, tied = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    adapter = family == "llama"
    (expected,) = run_distributed(step, 1, str(tmp_path), adapter, 1, False)
    assert expected["made of"].startswith("logits")
    # Of 97 ids the ranks hold 49 and 48.
    for world_size, sequence_parallel in ((2, False), (4, True)):
        for result in run_distributed(step, world_size, str(tmp_path), adapter, 2, sequence_parallel):
            check("loss", result["loss"], expected["loss"])
            check("norm", result["norm"], expected["norm"])
            assert result["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                check(name, result["gradients"][name], gradient)
            assert abs(drift(result["gradients"], expected["gradients"])) <= DRIFT
