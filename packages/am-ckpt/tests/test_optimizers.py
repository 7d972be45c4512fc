"""Every optimizer of torch goes on elsewhere: what a process chose for speed is not part of what it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import am_ckpt
from am_testing import run_distributed

# Arguments of the class, and what a process on one rank chooses besides.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, {"fused": True}),
    "Adagrad": (torch.optim.Adagrad, {}, {"fused": True}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}, {"fused": True}),
    "AdamW": (torch.optim.AdamW, {}, {"fused": True}),
    "NAdam": (torch.optim.NAdam, {}, {"foreach": True}),
    "RAdam": (torch.optim.RAdam, {}, {"foreach": True}),
    "Adadelta": (torch.optim.Adadelta, {}, {"foreach": True}),
    "Adamax": (torch.optim.Adamax, {}, {"foreach": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}, {"foreach": True}),
    "ASGD": (torch.optim.ASGD, {"t0": 1.0}, {"foreach": True}),
    # The Rprop of torch 2.11 takes no step on shards.
    **({"Rprop": (torch.optim.Rprop, {}, {"foreach": True})} if torch.__version__ >= "2.12" else {}),
    "Muon": (torch.optim.Muon, {}, {}),
}


def build(name: str, *, chosen: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=name != "Muon"), nn.Linear(4, 3, bias=name != "Muon"))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    kind, arguments, fast = OPTIMIZERS[name]
    return model, kind(model.parameters(), lr=0.01, **arguments, **(fast if chosen else {}))


def run(name: str, directory: str, steps: tuple[int, ...], chosen: bool, resume: bool) -> list[list[float]]:
    """Steps with gradients that depend on their number; the weights afterwards."""
    model, optimizer = build(name, chosen=chosen)
    state = {"model": model, "optimizer": optimizer}
    own = [{key: group.get(key) for key in ("fused", "foreach")} for group in optimizer.param_groups]
    if resume:
        assert am_ckpt.Checkpointer(directory).load(state) == steps[0] - 1
    assert [{key: group.get(key) for key in ("fused", "foreach")} for group in optimizer.param_groups] == own
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * step + 1
        optimizer.step()
    if not resume:
        am_ckpt.Checkpointer(directory).save(steps[-1], state)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [tensor.detach().flatten().tolist() for tensor in whole]


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_begun_on_one_process_and_resumed_on_two_and_back(name: str, tmp_path: Path) -> None:
    expected = run(name, str(tmp_path / "whole"), (1, 2, 3), True, False)
    run(name, str(tmp_path / "one"), (1, 2), True, False)
    two = run_distributed(run, 2, name, str(tmp_path / "one"), (3,), False, True)
    run_distributed(run, 2, name, str(tmp_path / "two"), (1, 2), False, False)
    one = run(name, str(tmp_path / "two"), (3,), True, True)
    for found in (*two, one):
        for weights, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(weights), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_groups_keep_what_belongs_to_the_process(tmp_path: Path) -> None:
    def state(lr: Any, **options: Any) -> dict[str, Any]:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW([*model.named_parameters()], lr=lr, **options)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, state(torch.tensor(0.5), foreach=False, weight_decay=0.25))
    loaded = state(0.1, foreach=True)
    assert checkpoints.load(loaded) == 1
    (group,) = loaded["optimizer"].param_groups
    # A learning rate that is a tensor is refused by foreach, unless it is capturable.
    assert (group["lr"], type(group["lr"])) == (0.5, float)
    assert (group["weight_decay"], group["foreach"], group["param_names"]) == (0.25, True, ["weight", "bias"])
    loaded["optimizer"].step()
    # The other way: the tensor that others hold gets the value.
    rate = torch.tensor(0.1, dtype=torch.float64)
    checkpoints.save(2, loaded)
    loaded = state(rate, foreach=False)
    checkpoints.load(loaded)
    assert loaded["optimizer"].param_groups[0]["lr"] is rate
    assert rate == 0.5


def names_of_stages(directory: str) -> str:
    rank = dist.get_rank()
    model = nn.ModuleDict({f"layer{rank}": nn.Linear(3, 2)})
    optimizer = torch.optim.SGD([*model.named_parameters()], lr=0.5)
    state = {"model": model, "optimizer": optimizer}
    am_ckpt.Checkpointer(directory).save(1, state)
    am_ckpt.Checkpointer(directory).load(state)
    return str(optimizer.param_groups[0]["param_names"])


def test_parameters_that_were_given_with_names_are_those_of_the_rank(tmp_path: Path) -> None:
    assert run_distributed(names_of_stages, 2, str(tmp_path)) == [
        f"['layer{rank}.weight', 'layer{rank}.bias']" for rank in (0, 1)
    ]
