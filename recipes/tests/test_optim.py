"""Parameter groups and schedules against their closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from am_recipes.optim import build_optimizer, describe, schedule
from am_recipes.schedules import DECAY_TYPES, NEEDS_TOTAL_STEPS, STYLES
from am_testing import run_distributed


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"embed": nn.Embedding(8, 4), "linear": nn.Linear(4, 4), "norm": nn.RMSNorm(4)})
    layers.register_parameter("experts_bias", nn.Parameter(torch.zeros(2, 4)))
    return layers


def rates(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    net = model()
    assert rates(net, build_optimizer(net, lr=0.1, weight_decay=0.5)) == {
        "embed.weight": (0.1, 0.5),
        "linear.weight": (0.1, 0.5),
        "linear.bias": (0.1, 0.0),
        "norm.weight": (0.1, 0.0),
        "experts_bias": (0.1, 0.0),
    }


def test_the_first_matching_override_decides() -> None:
    net = model()
    overrides = [{"pattern": "^embed", "lr_mult": 0.5, "wd_mult": 0.0}, {"pattern": r"\.weight$", "lr_mult": 2.0}]
    got = rates(net, build_optimizer(net, lr=0.1, weight_decay=0.5, overrides=overrides))
    assert got["embed.weight"] == (0.05, 0.0)
    assert got["linear.weight"] == (0.2, 0.5)
    assert got["norm.weight"] == (0.2, 0.0)
    assert got["linear.bias"] == (0.1, 0.0)


def test_only_what_requires_a_gradient_is_trained() -> None:
    net = model()
    net["embed"].requires_grad_(False)
    assert "embed.weight" not in rates(net, build_optimizer(net, lr=0.1, weight_decay=0.0))
    with pytest.raises(ValueError, match=r"matches no trainable parameter; nearest names: norm\.weight"):
        build_optimizer(net, lr=0.1, overrides=[{"pattern": "norms.weight"}])
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 5 parameters"):
        build_optimizer(net, lr=0.1)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match="lr=-1"):
        build_optimizer(model(), lr=-1.0)
    with pytest.raises(ValueError, match=r"wd_mult=2\.0"):
        build_optimizer(model(), lr=0.1, overrides=[{"pattern": "norm", "wd_mult": 2.0}])
    with pytest.raises(ValueError, match="not a regular expression"):
        build_optimizer(model(), lr=0.1, overrides=[{"pattern": "*norm"}])
    with pytest.raises(TypeError, match="must have the key pattern"):
        build_optimizer(model(), lr=0.1, overrides=[{"pattern": "norm", "lr_scale": 2.0}])


def test_any_optimizer_with_its_own_defaults() -> None:
    net = model()
    adamw = build_optimizer(net, lr=0.1, betas=(0.8, 0.9))
    assert adamw.defaults["betas"] == (0.8, 0.9)
    assert rates(net, adamw)["linear.weight"] == (0.1, 0.01)
    assert adamw.defaults["fused"]
    chosen = build_optimizer(net, optimizer=torch.optim.AdamW, lr=0.1, foreach=True)
    assert chosen.defaults["foreach"]
    assert not chosen.defaults["fused"]
    sgd = build_optimizer(net, optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
    assert isinstance(sgd, torch.optim.SGD)
    assert describe(sgd).splitlines()[0] == "SGD (fused)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_equals_the_loop(dtype: torch.dtype) -> None:
    results = []
    for implementation in ({}, {"foreach": False}):
        net = model().to(dtype)
        optimizer = build_optimizer(net, lr=0.1, weight_decay=0.5, **implementation)
        for step in range(3):
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            optimizer.step()
        results.append(nn.utils.parameters_to_vector(net.parameters()))
    # bfloat16 keeps 8 bits, and the two round at different places.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


def sharded_step(shard_all: bool) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = model()
    linear = net["linear"]
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0), Shard(1)]))
    linear.bias = nn.Parameter(distribute_tensor(linear.bias.detach(), mesh["dp"], [Shard(0)]))
    if shard_all:
        net["norm"].weight = nn.Parameter(distribute_tensor(net["norm"].weight.detach(), mesh, [Replicate(), Shard(0)]))
        net["embed"].weight = nn.Parameter(distribute_tensor(net["embed"].weight.detach(), mesh["dp"], [Shard(0)]))
        net.experts_bias = nn.Parameter(distribute_tensor(net.experts_bias.detach(), mesh["dp"], [Shard(0)]))
    optimizer = build_optimizer(net, lr=0.1, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in net.parameters()]


@pytest.mark.parametrize("shard_all", [True, False], ids=["several-meshes", "some-not-sharded"])
def test_a_sharded_step_equals_the_single_process_step(shard_all: bool) -> None:
    net = model()
    optimizer = build_optimizer(net, lr=0.1, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    for rank_result in run_distributed(sharded_step, 4, shard_all):
        for got, want in zip(rank_result, net.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-7)


def rate_of_every_step(num_steps: int, **arguments: object) -> list[float]:
    """The learning rate that optimizer steps 1, 2, ... are taken with."""
    optimizer = build_optimizer(model(), lr=2.0)
    scheduler = schedule(optimizer, **arguments)
    taken = []
    for _ in range(num_steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_constant_after_warmup() -> None:
    assert rate_of_every_step(5, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rate_of_every_step(2, total_steps=2) == [2.0, 2.0]


def test_linear() -> None:
    got = rate_of_every_step(7, style="linear", warmup_steps=2, total_steps=6, min_lr=0.4)
    assert got == pytest.approx([1.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.4], abs=1e-12)
    assert rate_of_every_step(3, style="linear", total_steps=3) == [2.0, 1.0, 0.0]


def test_cosine() -> None:
    got = rate_of_every_step(9, style="cosine", warmup_steps=3, total_steps=7, min_lr=0.5)
    decay = [0.5 + 1.5 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)]
    assert got == pytest.approx([2 / 3, 4 / 3, 2.0, *decay, 0.5, 0.5, 0.5], abs=1e-12)


def test_wsd() -> None:
    got = rate_of_every_step(10, style="wsd", warmup_steps=2, total_steps=8, decay_steps=3, min_lr=0.5)
    # The last stable step is total_steps - decay_steps = 5, the first of the decay takes its first third.
    assert got == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.5, 0.5], abs=1e-12)
    assert rate_of_every_step(3, style="wsd", total_steps=3, decay_steps=1) == [2.0, 2.0, 0.0]


def test_wsd_decays_over_a_tenth_of_the_run_by_default() -> None:
    got = rate_of_every_step(20, style="wsd", total_steps=20)
    assert got == pytest.approx([2.0] * 18 + [1.0, 0.0], abs=1e-12)
    assert rate_of_every_step(6, style="wsd", warmup_steps=1, total_steps=5) == [2.0, 2.0, 2.0, 2.0, 0.0, 0.0]
    # The warm-up leaves one step for the decay, though a tenth of the run would be two.
    assert rate_of_every_step(20, style="wsd", warmup_steps=19, total_steps=20)[18:] == [2.0, 0.0]


def test_wsd_that_decays_at_once_is_linear() -> None:
    arguments = {"warmup_steps": 3, "total_steps": 9, "min_lr": 0.2}
    assert rate_of_every_step(10, style="wsd", decay_steps=6, **arguments) == pytest.approx(
        rate_of_every_step(10, style="linear", **arguments), abs=1e-12
    )


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_the_decays_of_wsd(decay_type: str) -> None:
    got = rate_of_every_step(
        12, style="wsd", warmup_steps=3, total_steps=10, decay_steps=4, min_lr=0.5, decay_type=decay_type
    )
    shares = {
        "linear": [3 / 4, 2 / 4, 1 / 4],
        "cosine": [(1 + math.cos(math.pi * p / 4)) / 2 for p in (1, 2, 3)],
        "1-sqrt": [1 - math.sqrt(p / 4) for p in (1, 2, 3)],
    }
    decay = [0.5 + 1.5 * share for share in shares[decay_type]]
    assert got == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0, 2.0, 2.0, *decay, 0.5, 0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_a_warmup_begins_where_it_is_told(style: str) -> None:
    arguments = {"style": style, "warmup_steps": 5, "total_steps": 9}
    got = rate_of_every_step(9, init_lr=0.4, **arguments)
    assert got[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0], abs=1e-12)
    assert got[5:] == rate_of_every_step(9, **arguments)[5:]
    assert rate_of_every_step(9, init_lr=2.0 / 5, **arguments) == pytest.approx(rate_of_every_step(9, **arguments))
    assert rate_of_every_step(2, init_lr=0.0, warmup_steps=2) == [0.0, 2.0]


def test_inverse_sqrt() -> None:
    got = rate_of_every_step(16, style="inverse_sqrt", warmup_steps=4, total_steps=9)
    want = [0.5, 1.0, 1.5, 2.0] + [2.0 * math.sqrt(4 / step) for step in range(5, 17)]
    # total_steps is no corner of it: step 16 goes on to half the rate.
    assert got == pytest.approx(want, abs=1e-12)
    assert got[15] == pytest.approx(1.0)
    assert rate_of_every_step(4, style="inverse_sqrt") == pytest.approx([2.0 / math.sqrt(s) for s in (1, 2, 3, 4)])
    floored = rate_of_every_step(5, style="inverse_sqrt", warmup_steps=1, min_lr=1.1)
    assert floored == pytest.approx([2.0, 2.0 / math.sqrt(2), 2.0 / math.sqrt(3), 1.1, 1.1])


@pytest.mark.parametrize("style", STYLES)
def test_the_length_of_the_run_matters_where_it_is_said_to(style: str) -> None:
    if style in NEEDS_TOTAL_STEPS:
        short, long = (rate_of_every_step(20, style=style, total_steps=total) for total in (20, 40))
        assert short != long
        with pytest.raises(ValueError, match="needs total_steps"):
            schedule(build_optimizer(model(), lr=2.0), style=style)
    else:
        assert rate_of_every_step(20, style=style) == rate_of_every_step(20, style=style, total_steps=5)


@pytest.mark.parametrize("style", STYLES)
def test_the_shortest_runs(style: str) -> None:
    assert rate_of_every_step(1, style=style, total_steps=1) == [2.0]
    assert rate_of_every_step(1, style=style, warmup_steps=1, total_steps=1) == [2.0]
    assert rate_of_every_step(3, style=style, warmup_steps=3, total_steps=3) == pytest.approx([2 / 3, 4 / 3, 2.0])


def test_groups_keep_their_proportion() -> None:
    optimizer = build_optimizer(model(), lr=2.0, weight_decay=0.0, overrides=[{"pattern": "norm", "lr_mult": 0.5}])
    scheduler = schedule(optimizer, style="linear", total_steps=2, min_lr=0.2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.1])


def test_a_schedule_continues_where_it_was_saved() -> None:
    arguments = {"style": "cosine", "warmup_steps": 3, "total_steps": 10}
    uninterrupted = rate_of_every_step(10, **arguments)
    optimizer = build_optimizer(model(), lr=2.0)
    first = schedule(optimizer, **arguments)
    for _ in range(4):
        optimizer.step()
        first.step()
    resumed_optimizer = build_optimizer(model(), lr=2.0)
    resumed = schedule(resumed_optimizer, **arguments)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(first.state_dict())
    rest = []
    for _ in range(6):
        rest.append(resumed_optimizer.param_groups[0]["lr"])
        resumed_optimizer.step()
        resumed.step()
    assert rest == uninterrupted[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "cosin", "total_steps": 5}, "style='cosin' is unknown"),
        ({"style": "cosine"}, "needs total_steps"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is negative"),
        ({"warmup_steps": 6, "total_steps": 5}, "warmup_steps=6 is longer than the run of total_steps=5"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"min_lr": -0.1}, "min_lr=-0.1"),
        ({"style": "linear", "total_steps": 5, "min_lr": 3.0}, "min_lr=3.0 is above the learning rate 2.0"),
        ({"style": "inverse_sqrt", "min_lr": 3.0}, "min_lr=3.0 is above the learning rate 2.0"),
        ({"style": "wsd", "total_steps": 9, "decay_steps": 0}, "decay_steps=0 must be between 1 and 8"),
        (
            {"style": "wsd", "total_steps": 9, "warmup_steps": 5, "decay_steps": 5},
            "decay_steps=5 must be between 1 and 4, the steps of total_steps=9 that follow step 5",
        ),
        ({"style": "cosine", "total_steps": 9, "decay_steps": 3}, "decay_steps=3 is for style='wsd'"),
        ({"style": "cosine", "total_steps": 9, "decay_type": "1-sqrt"}, "decay_type=1-sqrt is for style='wsd'"),
        (
            {"style": "wsd", "total_steps": 9, "decay_type": "sqrt"},
            "decay_type='sqrt' is unknown; choose one of linear",
        ),
        ({"warmup_steps": 3, "init_lr": 2.5}, "init_lr=2.5 is above the learning rate 2.0"),
        ({"warmup_steps": 3, "init_lr": -0.5}, "init_lr=-0.5 must be a finite number"),
        (
            {"warmup_steps": 1, "init_lr": 0.5},
            "init_lr=0.5 .* needs a warm-up after it, but warmup_steps=1; set that to 2",
        ),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(build_optimizer(model(), lr=2.0), **arguments)
