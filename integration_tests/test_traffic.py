"""What a step sends by axis: the formulas that the guides give, to the byte."""

from __future__ import annotations

import pytest
import torch
import transformers

import am_kernels
import am_loss
import am_mesh
import am_models
from am_testing import run_distributed
from am_testing.traffic import SentBytes

RANKS, ROWS, LENGTH = 2, 2, 32
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD = 64, 32, 48, 3, 4, 2, 8
TOKENS = ROWS * LENGTH
LAYER = HIDDEN * HEAD * (HEADS + 2 * KV_HEADS) + HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
ROOT = 2 * VOCABULARY * HIDDEN + HIDDEN
ALL_REDUCE, OTHERS = 2 * (RANKS - 1) / RANKS, (RANKS - 1) / RANKS
FSDP = OTHERS * 4 * (3 * LAYERS * LAYER + 2 * ROOT)
CONTEXT = OTHERS * 4 * 2 * LAYERS * TOKENS * KV_HEADS * 2 * HEAD
# Hidden states, forward and backward; then what the loss needs of the ranks.
TENSOR = ALL_REDUCE * 4 * ((4 * LAYERS + 2) * TOKENS * HIDDEN + 1) + (RANKS - 1) * (8 * TOKENS + 24)


def sent_in_a_step(axis, recompute):
    """Bytes in all, and those of flat tensors that are gathered or reduced and cut: FSDP2's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model = am_models.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
    dims = am_mesh.ParallelDims(**{axis: RANKS}).build("cpu")
    tokens = torch.arange(TOKENS).view(ROWS, LENGTH)
    batch = {"input_ids": tokens, "shift_labels": tokens, "position_ids": torch.arange(LENGTH).repeat(ROWS, 1)}
    if axis == "cp":
        attention = am_mesh.context_attention(am_kernels.attention, dims.mesh("cp"))
        am_models.optimize(model, kernels={"attention": attention})
        batch = am_mesh.shard_sequence(batch, dims.sequence_ranks)
    model = am_mesh.parallelize(model, dims, recompute=recompute, forward_methods=("forward_with_loss",))

    def forward(_, batch):
        inputs, targets = am_models.split_batch(model, batch)
        return {"loss": am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, targets)}

    with SentBytes(RANKS) as sent:
        am_mesh.forward_backward(model, [batch], forward, TOKENS)
    flat = sum(one.num_bytes for one in sent.collectives if len(one.shape) == 1 and one.kind != "all_reduce")
    return sent.num_bytes, round(flat)


@pytest.mark.parametrize(
    ("axis", "recompute", "expected"),
    [
        ("dp_shard", "none", (FSDP, FSDP)),
        ("cp", "none", (FSDP + CONTEXT, FSDP)),
        # Keys and values are gathered once more.
        ("cp", "full", (FSDP + CONTEXT * 1.5, FSDP)),
        ("tp", "none", (TENSOR, (RANKS - 1) * (8 * TOKENS + 24))),
        # So is what attention gives; the MLP's sum, the last of a layer, nobody needs twice.
        ("tp", "full", (TENSOR + ALL_REDUCE * 4 * LAYERS * TOKENS * HIDDEN, (RANKS - 1) * (8 * TOKENS + 24))),
    ],
)
def test_bytes_of_a_step_are_those_of_the_formula(axis, recompute, expected):
    assert run_distributed(sent_in_a_step, RANKS, axis, recompute) == [tuple(map(round, expected))] * RANKS
