"""Tensor and sequence parallelism of plain modules against one process: logits and every gradient."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard

import am_mesh
from am_testing import run_distributed

WIDTH, HEADS, HEAD, VOCABULARY, EXPERTS = 16, 4, 4, 31, 3
OWN_PLAN = {
    "layers.*.attention.q_proj": "colwise",
    "layers.*.attention.k_proj": "colwise",
    "layers.*.attention.v_proj": "colwise",
    "layers.*.attention.q_norm": "replicated_with_grad_allreduce",
    "layers.*.attention.sinks": "colwise",
    "layers.*.attention": "local_params",
    "layers.*.attention.o_proj": "rowwise",
    "layers.*.mlp.experts.gate_up": "packed_colwise",
    "layers.*.mlp.experts.down": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.shared.up": "colwise_gather_output",
    "layers.*.mlp.shared.down": "rowwise_split_input",
    "layers.*.mlp.dense": "colwise",
}


class Attention(nn.Module):
    """Heads of their own on each rank, a norm of queries that all share, a number per head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, HEADS * HEAD, bias=True) for _ in range(3))
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH, bias=True)
        self.q_norm = nn.RMSNorm(HEAD)
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, hidden_states: torch.Tensor, scale: float) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, HEAD)
        q, k, v = (layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.o_proj((out * self.sinks[:, None, None].exp()).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(EXPERTS, 2 * 8, WIDTH))
        self.down = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 8))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = (hidden @ self.gate_up.transpose(1, 2)).chunk(2, -1)
        out = (F.silu(gate) * up) @ self.down.transpose(1, 2)
        return (out * weights.T.unsqueeze(-1)).sum(0)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.normalize(self.up(hidden), dim=-1))


class Mlp(nn.Module):
    """A router that every rank has, experts of which each has a part, and what is gathered in between."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.shared = nn.Linear(WIDTH, EXPERTS), Experts(), Shared()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, WIDTH)
        weights = self.router(flat).softmax(-1)
        out = self.experts(flat, weights.argsort(-1), weights) + self.shared(flat)
        return out.view(hidden.shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(hidden_states=self.first(hidden), scale=0.7)
        return hidden + self.mlp(self.second(hidden))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=20)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @property
    def tp_plan(self) -> dict[str, str]:
        return OWN_PLAN

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def build(tied: bool = False) -> Model:
    torch.manual_seed(1)
    model = Model(tied).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCABULARY, (2, length), generator=generator)
    ids[0, 0] = 20
    return ids, torch.randn(2, length, VOCABULARY, generator=generator, dtype=torch.float64)


def whole(tied: bool, length: int) -> dict[str, torch.Tensor]:
    model = build(tied)
    ids, weights = batch(length)
    logits = model(ids)
    (logits * weights).sum().backward()
    return {"logits": logits.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def split(tied: bool, length: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    dims = am_mesh.ParallelDims(tp=torch.distributed.get_world_size()).build("cpu")
    model = build(tied)
    names = [name for name, _ in model.named_parameters()]
    am_mesh.parallelize(model, dims, reduce_dtype=torch.float64, **options)
    assert [name for name, _ in model.named_parameters()] == names
    ids, weights = batch(length)
    logits = model(ids)
    (logits * weights).sum().backward()
    assert all(p.grad.placements == p.placements for p in model.parameters())
    return {"logits": logits.detach()} | {name: together(p.grad) for name, p in model.named_parameters()}


def together(gradient: DTensor) -> torch.Tensor:
    """The whole of what is sharded over `tp` alone: torch 2.11 has no `full_tensor` of two packed matrices."""
    placement = gradient.placements[-1]
    if not isinstance(placement, _StridedShard):
        return gradient.full_tensor()
    halves = gradient.to_local().chunk(placement.split_factor, placement.dim)
    mesh = gradient.device_mesh["tp"]
    return torch.cat([DTensor.from_local(half, mesh, [Shard(placement.dim)]).full_tensor() for half in halves], 1)


@pytest.mark.parametrize(
    ("tied", "length", "options"),
    [
        (False, 6, {}),
        (True, 7, {"recompute": "full"}),
        (True, 7, {"sequence_parallel": True, "recompute": "full"}),
        (False, 1, {"sequence_parallel": True}),
        (True, 5, {"sequence_parallel": True, "strategy": "ddp"}),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_result_is_that_of_one_process(ranks: int, tied: bool, length: int, options: dict[str, Any]) -> None:
    expected = whole(tied, length)
    for result in run_distributed(split, ranks, tied, length, options):
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-12 * max(1, tensor.abs().max().item()))


def layouts(layer_placements: bool) -> tuple[dict[str, Any], int]:
    mesh = am_mesh.ParallelDims(tp=2).build("cpu").mesh("tp")
    model = build(tied=True)
    plan: dict[str, Any] = OWN_PLAN | {"layers.*.attention.v_proj": ColwiseParallel()}
    plan |= {"layers.*.mlp.shared.up": "colwise", "layers.*.mlp.shared.down": RowwiseParallel()}
    del plan["layers.*.mlp.dense"]
    given = (lambda module, style: {"weight": Replicate(), "bias": Replicate()}) if layer_placements else None
    report = am_mesh.tensor_parallel(model, mesh, plan=plan, layer_placements=given)
    placements = {
        name: parameter.placements if isinstance(parameter, DTensor) else None
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    assert model.head.weight is model.embed.weight
    return placements, len(report.applied)


def test_what_becomes_of_parameters() -> None:
    placements, applied = run_distributed(layouts, 2, False)[0]
    assert applied == len(OWN_PLAN) - 1
    expected = {
        "embed.weight": Shard(0),
        "head.weight": Shard(0),
        "layers.1.attention.q_proj.bias": Shard(0),
        "layers.1.attention.v_proj.weight": Shard(0),
        "layers.1.attention.q_norm.weight": Replicate(),
        "layers.1.attention.o_proj.weight": Shard(1),
        "layers.1.attention.o_proj.bias": Replicate(),
        "layers.1.attention.sinks": Shard(0),
        "layers.1.mlp.experts.down": Shard(2),
        "layers.1.mlp.shared.down.weight": Shard(1),
    }
    assert {name: placements[name] for name in expected} == {name: (each,) for name, each in expected.items()}
    whole = {"first.weight", "second.weight", "second.bias", "mlp.router.weight", "mlp.router.bias"}
    assert {name for name, each in placements.items() if each is None} == {
        f"layers.{number}.{name}" for number in (0, 1) for name in whole
    }
    placements, _ = run_distributed(layouts, 2, True)[0]
    assert placements["layers.0.attention.q_proj.weight"] == (Replicate(),)


def refusals() -> list[str]:
    mesh = am_mesh.ParallelDims(tp=2).build("cpu").mesh("tp")
    without_norm = {name: style for name, style in OWN_PLAN.items() if "q_norm" not in name and "dense" not in name}
    odd = build()
    odd.layers[1].attention.o_proj = nn.Linear(HEADS * HEAD + 1, WIDTH)
    adapted = build()
    adapted.layers[0].attention.q_proj.extra = nn.Parameter(torch.zeros(3))
    plain = nn.Sequential(nn.Linear(4, 4))
    wide = build()
    wide.layers[1].mixer = nn.Linear(WIDTH, WIDTH)
    attempts = [
        (build(), {"must_divide": {"num_key_value_heads": 3}}),
        (build(), {"plan": {"layers.*.attention.q_pro": "colwise"}}),
        (build(), {"plan": {"layers.*.attention.q_proj": "colwize"}}),
        (build(), {"plan": without_norm}),
        (build(), {"plan": {"layers.*.attention.sinks": "colwise"}}),
        (odd, {}),
        (adapted, {}),
        (plain, {}),
        (wide, {"sequence_parallel": True}),
        (plain, {"plan": {"0": "colwise"}, "sequence_parallel": True}),
    ]
    found = []
    for model, options in attempts:
        with pytest.raises(ValueError) as error:
            am_mesh.tensor_parallel(model, mesh, **options)
        found.append(str(error.value))
    return found


def test_what_cannot_be_split_is_refused_by_name() -> None:
    expected = [
        "tp=2 does not divide num_key_value_heads=3; choose 1 or 3",
        "layers.*.attention.q_pro of the plan matches no module or parameter of Model; the nearest are layers",
        "layers.*.attention.q_proj: unknown style 'colwize'; did you mean colwise",
        "parameter 'layers.0.attention.q_norm.weight' is in 'layers.0.attention', which the plan splits",
        "layers.0.attention.sinks is a parameter, and its module has no style that takes it",
        "tp=2 does not divide 17, dim 1 of layers.1.attention.o_proj.weight; choose a divisor of it",
        "Linear holds the parameters ['extra'] beside weight and bias, and nothing says how 'colwise' splits them",
        "Sequential has no plan for tensor parallelism of its own; give one",
        "layers.1.mixer.weight is outside of what the plan splits and would see a slice of each sequence",
        "Sequential has no list of repeated layers to cut sequences in; name them: blocks=",
    ]
    for message, start in zip(run_distributed(refusals, 2)[0], expected, strict=True):
        assert re.match(re.escape(start), message), message
