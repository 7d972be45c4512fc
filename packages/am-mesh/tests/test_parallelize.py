"""A model that trains on several ranks is the model that trains on one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from am_testing import run_distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from am_mesh import (
    ParallelDims,
    clip_grad_norm_,
    grad_norm,
    gradient_sync,
    parallelize,
    process_group,
    recompute,
    sum_over,
)

VOCABULARY, WIDTH, HEADS, SAMPLES, LENGTH = 37, 16, 2, 8, 6


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        # Seven rows over two or four ranks: shards of different sizes.
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        B, S, _ = hidden.shape
        q, k, v = self.qkv(self.norm(hidden)).view(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, -1)
        hidden = hidden + self.dropout(self.out(attended))
        return hidden + self.dropout(self.down(F.gelu(self.up(hidden))))


class Transformer(nn.Module):
    """Three blocks; `forward` gives logits [B, S, V], `forward_with_loss` the summed cross entropy."""

    def __init__(self, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(input_ids))

    def forward_with_loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(self.hidden(input_ids), self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def build(**options: Any) -> Transformer:
    torch.manual_seed(1)
    return Transformer(**options)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator) for _ in range(2))


def train_step(model: nn.Module, rank: int, world_size: int, accumulation: int = 1) -> float:
    """Loss (this rank's part) and gradients of all samples, divided by the global number of targets."""
    input_ids, labels = (rows.chunk(world_size)[rank].chunk(accumulation) for rows in data())
    total = 0.0
    for index in range(accumulation):
        with gradient_sync(model, index == accumulation - 1):
            loss = model.forward_with_loss(input_ids[index], labels[index]) / (SAMPLES * LENGTH)
            loss.backward()
        total += loss.item()
    return total


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            whole[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return whole


def worker(axes: dict[str, int], options: dict[str, Any], model_options: dict[str, Any], accumulation: int) -> Any:
    """Loss summed over ranks, whole gradients, their norm, and parameter names of one step."""
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        model = parallelize(build(**model_options), dims, forward_methods=("forward_with_loss",), **options)
        assert isinstance(model, FSDPModule)
        mesh = dims.mesh("dp")
        loss = sum_over(mesh, train_step(model, mesh.get_local_rank(), mesh.size(), accumulation))
        return loss, gradients(model), grad_norm(model).item(), [name for name, _ in model.named_parameters()]


def reference(**model_options: Any) -> tuple[float, dict[str, torch.Tensor], float, list[str]]:
    model = build(**model_options)
    loss = train_step(model, 0, 1)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients(model).values()))
    return loss, gradients(model), norm, [name for name, _ in model.named_parameters()]


def differences(actual: Any, expected: Any) -> dict[str, float]:
    """max|a-b| / max|b| of the loss, the norm and each gradient."""
    loss, grads, norm, _ = actual
    expected_loss, expected_grads, expected_norm, _ = expected
    assert grads.keys() == expected_grads.keys()
    found = {"loss": abs(loss - expected_loss) / abs(expected_loss), "norm": abs(norm - expected_norm) / expected_norm}
    for name, gradient in expected_grads.items():
        found[name] = ((grads[name] - gradient).abs().max() / gradient.abs().max()).item()
    return found


# A key bias shifts all scores of a query alike, so its true gradient is zero: the k part of qkv.bias is rounding noise, but
# relative to the largest entry of the whole bias it is far below the tolerance.
TOLERANCE = 1e-5

LAYOUTS = [
    pytest.param(2, {}, {"strategy": "fsdp2"}, id="fsdp-2"),
    pytest.param(4, {}, {"strategy": "fsdp2"}, id="fsdp-4"),
    pytest.param(4, {"dp_replicate": 2}, {"strategy": "fsdp2"}, id="hsdp-2x2"),
    pytest.param(2, {}, {"strategy": "ddp"}, id="ddp-2"),
    pytest.param(4, {"dp_replicate": 2}, {"strategy": "ddp"}, id="ddp-4"),
]


@pytest.mark.parametrize(("world_size", "axes", "options"), LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_layout_gives_the_gradients_of_one_process(world_size, axes, options, accumulation):
    expected = reference()
    for actual in run_distributed(worker, world_size, axes, options, {}, accumulation):
        assert actual[3] == expected[3]
        assert max(differences(actual, expected).values()) <= TOLERANCE
