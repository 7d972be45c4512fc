"""Muon with AdamW against the formula in float64, torch's own Muon, and itself on other layouts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

import am_ckpt
import am_peft
from am_recipes.optim import build_optimizer, describe, schedule
from am_testing import run_distributed

ADAMW = {"lr": 0.01, "betas": (0.8, 0.9)}
MATRICES = ("wide.weight", "tall.weight", "few.weight")


class Net(nn.Module):
    """Matrices of 5, 33 and 3 rows: uneven on 2 ranks, and on 4 the last has a rank without any row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.wide = nn.Linear(17, 5)
        self.tall = nn.Linear(8, 33, bias=False)
        self.few = nn.Linear(6, 3, bias=False)
        self.norm = nn.RMSNorm(6)
        self.experts = nn.Parameter(torch.randn(2, 5, 4))
        self.experts_bias = nn.Parameter(torch.randn(2, 5))
        self.head = nn.Linear(6, 7, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.few(hidden)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def build(model: Net, **arguments: Any) -> torch.optim.Optimizer:
    arguments = {"lr": 0.05, "weight_decay": 0.3, "adamw": ADAMW, "adamw_modules": (model.head,)} | arguments
    return build_optimizer(model, optimizer=torch.optim.Muon, **arguments)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Optimizer steps with the same gradients for any layout; on a DTensor, this rank's part of them."""
    for step in steps:
        optimizer.zero_grad()
        given = gradients(model, step)
        for name, parameter in model.named_parameters():
            grad = given[name]
            if isinstance(parameter, DTensor):
                whole = [Replicate()] * parameter.device_mesh.ndim
                grad = DTensor.from_local(grad, parameter.device_mesh, whole, run_check=False)
                grad = grad.redistribute(placements=parameter.placements)
            parameter.grad = grad
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def algorithms(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["algorithm"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_who_trains_what() -> None:
    model = net()
    optimizer = build(model, overrides=[{"pattern": "few|norm", "lr_mult": 0.5}, {"pattern": "^wide", "wd_mult": 2.0}])
    assert algorithms(model, optimizer) == {
        "embed.weight": ("adamw", 0.01, 0.3),
        "wide.weight": ("muon", 0.05, 0.6),
        "wide.bias": ("adamw", 0.01, 0.0),
        "tall.weight": ("muon", 0.05, 0.3),
        "few.weight": ("muon", 0.025, 0.3),
        "norm.weight": ("adamw", 0.005, 0.0),
        "experts": ("adamw", 0.01, 0.3),
        "experts_bias": ("adamw", 0.01, 0.0),
        "head.weight": ("adamw", 0.01, 0.3),
    }
    assert describe(optimizer).splitlines()[0] == "MuonWithAdamW (fused)"
    assert "  muon, 1 tensors, 264 values: lr 0.05, weight decay 0.3" in describe(optimizer)
    assert (
        "  adamw, 3 tensors, 124 values: lr 0.01, weight decay 0.3; 1 of more than two dims (fused experts, "
        "convolutions)" in describe(optimizer)
    )


def llama(**changes: Any) -> transformers.PreTrainedModel:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_model_names_its_output_layer(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, optimizer=torch.optim.Muon, lr=0.05, adamw=ADAMW)
    muon = {name for name, (kind, _, _) in algorithms(model, optimizer).items() if kind == "muon"}
    layer = model.model.layers[0]
    assert muon == {f"model.layers.0.{name}.weight" for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    assert len(muon) == 7


def test_the_rate_of_the_adamw_part() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"lr=0\.05 is Muon's rate.*give adamw="):
        build(model, adamw=None)
    shared = build(model, adamw={"betas": (0.8, 0.9)}, adjust_lr_fn="match_rms_adamw")
    assert algorithms(model, shared)["norm.weight"] == ("adamw", 0.05, 0.0)
    assert {group["betas"] for group in shared.param_groups if group["algorithm"] == "adamw"} == {(0.8, 0.9)}
    # Without weight_decay each class has its own default: 0.1 and 0.01.
    defaults = algorithms(model, build(model, weight_decay=None))
    assert (defaults["tall.weight"][2], defaults["embed.weight"][2]) == (0.1, 0.01)
    own = algorithms(model, build(model, adamw=ADAMW | {"weight_decay": 0.7}))
    assert (own["tall.weight"][2], own["embed.weight"][2]) == (0.3, 0.7)


def test_refusals() -> None:
    model = net()
    with pytest.raises(ValueError, match="Net does not say which module is its output layer"):
        build(model, adamw_modules=None)
    with pytest.raises(TypeError, match="is for optimizer=torch"):
        build_optimizer(model, lr=0.1, adamw={"lr": 1})
    with pytest.raises(TypeError, match="adamw_modules"):
        build_optimizer(model, lr=0.1, adamw_modules=())
    with pytest.raises(ValueError, match="lr of adamw=-1"):
        build(model, adamw={"lr": -1})
    with pytest.raises(TypeError, match="beta"):
        build(model, adamw={"lr": 1, "beta": 0.9})
    for name in MATRICES:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 6 trainable parameters of Net is one"):
        build(model)
    adapted = llama()
    am_peft.apply_lora(adapted, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="LoRA trains two factors"):
        build_optimizer(adapted, optimizer=torch.optim.Muon, lr=0.05, adamw=ADAMW)


def test_muon_alone_where_nothing_else_is_trained() -> None:
    model = net().requires_grad_(False)
    model.tall.weight.requires_grad_(True)
    optimizer = build(model)
    before = weights(model)
    train(model, optimizer, range(2))
    assert [name for name, value in weights(model).items() if not torch.equal(value, before[name])] == ["tall.weight"]


def reference(weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    """The weight after Muon steps with these gradients, from the formulas, all in float64."""
    lr, momentum = options["lr"], options.get("momentum", 0.95)
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    rows, columns = weight.shape
    ratio = {
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
    }[options.get("adjust_lr_fn", "original")]
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad.double()
        update = momentum * buffer + (1 - momentum) * grad.double() if options.get("nesterov", True) else buffer
        x = update / update.norm()
        for _ in range(options.get("ns_steps", 5)):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = weight - lr * options["weight_decay"] * weight - lr * ratio * x
    return weight


OPTIONS = [
    {},
    {"nesterov": False, "momentum": 0.8},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4},
    {"momentum": 0.0, "weight_decay": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_update_is_the_formula(options: dict[str, Any]) -> None:
    options = {"lr": 0.05, "weight_decay": 0.3} | options
    model = net()
    start = weights(model)
    train(model, build(model, **options), range(3))
    for name in MATRICES:
        want = reference(start[name], [gradients(model, step)[name] for step in range(3)], **options)
        moved = (want - start[name]).abs().max()
        error = (model.get_parameter(name) - want).abs().max() / moved
        # Newton-Schulz in bfloat16 (8 bits, five iterations) against float64.
        assert error < 0.05, (name, error)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_update_is_that_of_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not options.get("nesterov", True) and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 orthogonalises a bfloat16 momentum buffer in place, so its next step is wrong")
    options = {"lr": 0.05, "weight_decay": 0.3} | options
    model, stock = net(dtype), net(dtype)
    muon = torch.optim.Muon([stock.get_parameter(name) for name in MATRICES], **options)
    decay = options["weight_decay"]
    adamw = torch.optim.AdamW([stock.embed.weight, stock.head.weight], weight_decay=decay, fused=True, **ADAMW)
    optimizer = build(model, **options)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        for name, grad in gradients(stock, step).items():
            stock.get_parameter(name).grad = grad
        muon.step()
        adamw.step()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for name in (*MATRICES, "embed.weight", "head.weight"):
        torch.testing.assert_close(model.get_parameter(name), stock.get_parameter(name), rtol=tolerance, atol=tolerance)


def sharded(hsdp: bool) -> Net:
    world_size = torch.distributed.get_world_size()
    mesh = (
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if hsdp else init_device_mesh("cpu", (world_size,))
    )
    model = net()
    fully_shard(model, mesh=mesh)
    return model


def sharded_steps(hsdp: bool) -> tuple[dict[str, Tensor], list[int]]:
    model = sharded(hsdp)
    optimizer = build(model)
    train(model, optimizer, range(3))
    buffers = [optimizer.state[model.get_parameter(name)]["momentum_buffer"] for name in MATRICES]
    return weights(model), [buffer.to_local().numel() for buffer in buffers]


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want}


@pytest.mark.parametrize(("world_size", "hsdp"), [(2, False), (4, False), (4, True)], ids=["2", "4", "2x2"])
def test_sharded_steps_equal_those_of_one_process(world_size: int, hsdp: bool) -> None:
    model = net()
    start = weights(model)
    train(model, build(model), range(3))
    want = weights(model)
    assert all(error > 0.01 for error in relative_errors(start, want).values())
    results = run_distributed(sharded_steps, world_size, hsdp)
    for got, _ in results:
        assert max(relative_errors(got, want).values()) <= 1e-5
    shards = 2 if hsdp else world_size
    for index, name in enumerate(MATRICES):
        # Each rank holds its rows of the momentum, no more.
        held = [sizes[index] for _, sizes in results]
        assert sum(held) == want[name].numel() * world_size // shards
        assert max(held) == math.ceil(len(want[name]) / shards) * want[name].shape[1]


def tensor_parallel_steps() -> dict[str, Tensor]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = net()
    parallelize_module(
        model, mesh["tp"], {"tall": ColwiseParallel(), "few": RowwiseParallel(), "wide": ColwiseParallel()}
    )
    fully_shard(model, mesh=mesh["dp"])
    train(model, build(model), range(3))
    return weights(model)


def test_fsdp_over_tensor_parallel_equals_one_process() -> None:
    model = net()
    train(model, build(model), range(3))
    for got in run_distributed(tensor_parallel_steps, 4):
        assert max(relative_errors(got, weights(model)).values()) <= 1e-5


def torch_alone() -> dict[str, Tensor]:
    model = sharded(hsdp=False)
    train(model, torch.optim.Muon([model.tall.weight], lr=0.05, weight_decay=0.3), range(3))
    return weights(model)


def test_torch_alone_does_not_hold_on_shards() -> None:
    """The reason for `am_recipes.muon`: when this fails, torch.optim.Muon may do instead."""
    model = net()
    train(model, build(model), range(3))
    error = relative_errors(run_distributed(torch_alone, 2)[0], weights(model))["tall.weight"]
    assert error > 1e-4


def interrupted(folder: Path, shard: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after 6 steps, and after 3 steps, a checkpoint, and 3 steps of another process's objects."""

    def fresh(seed: int) -> tuple[Net, dict[str, Any]]:
        model = sharded(hsdp=False) if shard else net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + seed)
        optimizer = build(model)
        scheduler = schedule(optimizer, style="linear", warmup_steps=2, total_steps=8)
        return model, {"model": model, "optimizer": optimizer, "schedule": scheduler}

    def run(state: dict[str, Any], steps: range) -> None:
        for step in steps:
            train(state["model"], state["optimizer"], range(step, step + 1))
            state["schedule"].step()

    model, state = fresh(0)
    checkpoints = am_ckpt.Checkpointer(folder)
    run(state, range(3))
    checkpoints.save(3, state)
    run(state, range(3, 6))

    resumed, other = fresh(1)
    # Steps before the load: what it replaces must not stay in use.
    run(other, range(1))
    assert checkpoints.load(other) == 3
    run(other, range(3, 6))
    return weights(model), weights(resumed)


def test_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    one, resumed = interrupted(tmp_path / "one", shard=False)
    assert all(torch.equal(one[name], resumed[name]) for name in one)
    for want, got in run_distributed(interrupted, 2, tmp_path / "two", True):
        assert all(torch.equal(want[name], got[name]) for name in want)
        assert max(relative_errors(got, one).values()) <= 1e-5


def test_state_dict_continues_bit_for_bit() -> None:
    model = net()
    optimizer = build(model)
    train(model, optimizer, range(2))
    other = net()
    other.load_state_dict(model.state_dict())
    loaded = build(other, lr=1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for current, using in ((model, optimizer), (other, loaded)):
        train(current, using, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_schedule_moves_both_kinds_in_proportion() -> None:
    model = net()
    optimizer = build(model)
    scheduler = schedule(optimizer, style="linear", total_steps=3, min_lr=0.025)
    train(model, optimizer, range(1))
    scheduler.step()
    assert {kind: lr for kind, lr, _ in algorithms(model, optimizer).values()} == pytest.approx(
        {"muon": 0.0375, "adamw": 0.0075}
    )
    for _ in range(2):
        before = weights(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, range(1, 2))
        # The rate in the groups is the one that both kinds take.
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        optimizer.load_state_dict(optimizer.state_dict())


def test_zero_grad_and_a_missing_gradient() -> None:
    model = net()
    optimizer = build(model)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = weights(model)
    model.few.weight.grad = torch.ones_like(model.few.weight)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert [name for name, value in weights(model).items() if not torch.equal(value, before[name])] == ["few.weight"]
