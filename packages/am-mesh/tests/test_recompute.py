"""What is computed twice, what is kept, and that neither changes a number."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from am_mesh import ParallelDims, parallelize, process_group, recompute
from am_testing import run_distributed

WIDTH, HEADS, EXPERTS, LAYERS = 16, 2, 4, 3

# A product that fills a buffer and is then changed in place, as one operator.
LIBRARY = torch.library.Library("recompute_test", "DEF")
LIBRARY.define("grouped_mm(Tensor rows, Tensor weight) -> Tensor")


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(rows), len(weight))
    torch.mm(rows, weight.T, out=out)
    return out.mul_(2.0)


LIBRARY.impl("grouped_mm", product, "CompositeExplicitAutograd")


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.ops.recompute_test.grouped_mm(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weight = ctx.saved_tensors
        return 2 * grad @ weight, 2 * grad.T @ rows


class Block(nn.Module):
    """Attention, then the two best experts of each token."""

    def __init__(self, drift: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 4)
        self.norm = nn.LayerNorm(WIDTH)
        self.drift, self.chosen = drift, []

    def forward(self, hidden: torch.Tensor, past_key_values: None = None) -> torch.Tensor:
        B, S, _ = hidden.shape
        q, k, v = self.qkv(hidden).view(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, -1)
        hidden = hidden + F.dropout(self.out(attended), 0.3)
        tokens = self.norm(hidden).view(-1, WIDTH)
        # What an arithmetic that rounds otherwise each time would do, much enlarged.
        logits = self.router(tokens) + self.drift * len(self.chosen) * torch.arange(EXPERTS)
        values, index = logits.softmax(-1).topk(2)
        # In place, as transformers' Qwen3-MoE has it: what was kept of topk itself would be spoilt.
        values /= values.sum(-1, keepdim=True)
        self.chosen.append(index)
        out = torch.zeros_like(tokens)
        for expert in range(EXPERTS):
            token, slot = (index == expert).nonzero(as_tuple=True)
            out = out.index_add(
                0, token, Product.apply(tokens[token], self.experts[expert]) * values[token, slot, None]
            )
        return hidden + out.view(B, S, -1).sin()


class Model(nn.Module):
    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Block(drift) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, **options)
        return hidden


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.name().partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


IDS = torch.arange(14).view(2, 7) % 11
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], Counter[str], Counter[str]]:
    torch.manual_seed(3)
    with Count() as forward:
        output = model(IDS)
    with Count() as backward:
        output.square().sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}, forward.of, backward.of


def test_selective_keeps_attention_and_grouped_products_and_both_keep_the_choices():
    output, gradients, stored, backward = run(Model())
    results = {}
    for mode in ("full", "selective"):
        model = recompute(Model(), mode)
        for _ in range(2):
            model.zero_grad()
            results[mode] = run(model)
            assert torch.equal(results[mode][0], output)
            torch.testing.assert_close(results[mode][1], gradients, rtol=0, atol=0)
            assert results[mode][2][ATTENTION] == stored[ATTENTION] == LAYERS
    costly = {ATTENTION: LAYERS, "grouped_mm": LAYERS * EXPERTS}
    repeated = {
        mode: {name: results[mode][3][name] - backward[name] for name in (*costly, "topk", "addmm")} for mode in results
    }
    assert repeated["full"] == costly | {"topk": 0, "addmm": 3 * LAYERS}
    assert repeated["selective"] == dict.fromkeys(costly, 0) | {"topk": 0, "addmm": 3 * LAYERS}


def test_keep_names_other_operators():
    backward = run(Model())[3]
    model = recompute(Model(), "selective", keep=("aten::addmm",))
    counts = run(model)[3]
    assert (counts["addmm"] - backward["addmm"], counts[ATTENTION]) == (0, LAYERS)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_tokens_go_to_the_experts_of_the_forward_whatever_the_router_says_the_second_time(mode):
    model = recompute(Model(drift=3.0), mode)
    run(model)
    plain = Model(drift=3.0)
    first = [run(plain), [layer.chosen[-1] for layer in plain.layers]][1]
    second = [run(plain), [layer.chosen[-1] for layer in plain.layers]][1]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for layer, expected in zip(model.layers, first, strict=True):
        forward, replayed = layer.chosen
        assert torch.equal(forward, expected)
        assert torch.equal(replayed, expected)


def test_a_key_value_cache_and_an_unknown_mode_are_refused():
    model = recompute(Model())
    with pytest.raises(ValueError, match=r"layers\.0 is recomputed and was given a key-value cache.*use_cache=False"):
        model(IDS, past_key_values=object())
    with torch.no_grad():
        model(IDS, past_key_values=object())
    with pytest.raises(ValueError, match="mode='some' is unknown; choose from 'full', 'selective'"):
        recompute(Model(), "some")


PLAN = {"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise"}


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, 8), "down": nn.Linear(8, WIDTH)})
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mlp["down"](F.gelu(self.mlp["up"](hidden)))).sin()


class SplitModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Split() for _ in range(LAYERS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def collectives_worker(strategy: str) -> list[tuple[int, int]]:
    """For each mode the collectives of tensor parallelism in the forward, and those repeated in the backward."""
    counts = []
    with process_group() as device:
        dims = ParallelDims(tp=2).build(device.type)
        hidden = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(4))
        reference = SplitModel()
        reference(hidden).square().sum().backward()
        for mode in ("none", "full", "selective"):
            model = parallelize(SplitModel(), dims, strategy=strategy, tp_plan=PLAN, recompute=mode)
            with Count() as forward:
                output = model(hidden)
            with Count() as backward:
                output.square().sum().backward()
            for name, parameter in model.named_parameters():
                expected = reference.get_parameter(name).grad * dims.row_ranks.size()
                difference = (parameter.grad.full_tensor() - expected).abs().max() / expected.abs().max()
                assert difference < 1e-5, (mode, name)
            counts.append((forward.of["all_reduce"], backward.of["all_reduce"]))
    return counts


@pytest.mark.parametrize(("world_size", "strategy"), [(2, "fsdp2"), (4, "ddp")])
def test_selective_repeats_no_collective_of_tensor_parallelism(world_size, strategy):
    for counts in run_distributed(collectives_worker, world_size, strategy):
        # One of each layer in the backward is the gradient of the bias, of which every rank has a part.
        assert counts == [(LAYERS, LAYERS), (LAYERS, 2 * LAYERS), (LAYERS, LAYERS)]
