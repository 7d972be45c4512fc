"""Recomputation of transformers' own blocks with the kernels in them: what is computed again, by operator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import am_kernels
import am_loss
import am_mesh
import am_models
from am_testing import run_distributed
from integration_tests.equivalence import COMMON, FAMILIES, Layout, full, make_loader

LAYERS = COMMON["num_hidden_layers"]


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def backward(mode: str, layout: Layout) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients of one packed batch, and the operators of the backward."""
    dims = layout.dims().build("cpu")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**COMMON, **FAMILIES["moe"])
    model = am_models.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in model.model.layers)
    names = list(model.state_dict())
    if layout.cp > 1:
        plan = am_kernels.document_segments
        attention = am_mesh.context_attention(am_kernels.attention, dims.sequence_ranks, plan=plan)
        am_models.optimize(model, kernels={"attention": attention})
    am_mesh.parallelize(
        model,
        dims,
        sequence_parallel=layout.sequence_parallel,
        recompute=mode,
        forward_methods=("forward_with_loss",),
    )
    assert list(model.state_dict()) == names
    model.train()
    batch = next(iter(make_loader(layout, dims)))[0]
    inputs, targets = am_models.split_batch(model, dict(am_mesh.shard_sequence(batch, dims.sequence_ranks)))
    loss = am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, targets)
    with Count() as count:
        loss.backward()
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}, count.of


def again(layout: Layout, operators: tuple[str, ...]) -> dict[str, list[int]]:
    """For either mode how often each operator runs again in the backward; gradients are the same."""
    gradients, stored = backward("none", layout)
    repeated = {}
    for mode in ("full", "selective"):
        other, count = backward(mode, layout)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())
        repeated[mode] = [count[operator] - stored[operator] for operator in operators]
    return repeated


OPERATORS = (
    "am_kernels::bucketed_attention",
    "am_moe::grouped_mm",
    "aten::topk",
    "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::reduce_scatter_tensor",
)
# Per layer, in mode "full". The last collective of a block has run when what the backward needs is there.
CASES = [
    pytest.param(Layout(packed=True), (1, 2, 0, 0, 0), id="alone"),
    pytest.param(Layout(2, packed=True), (1, 2, 0, 0, 0), id="fsdp"),
    pytest.param(Layout(2, tp=2, sequence_parallel=True, packed=True), (1, 2, 0, 2, 1), id="tp-sp"),
    pytest.param(Layout(2, cp=2, packed=True), (1, 2, 0, 1, 0), id="cp"),
]


@pytest.mark.parametrize(("layout", "in_full"), CASES)
def test_selective_computes_no_attention_product_choice_or_collective_again(layout, in_full):
    for repeated in run_distributed(again, layout.world_size, layout, OPERATORS):
        assert repeated == {"full": [LAYERS * number for number in in_full], "selective": [0] * len(OPERATORS)}
