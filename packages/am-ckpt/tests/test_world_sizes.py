"""Every number of ranks loads what every other saved, to the bit; and training goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from test_distributed import Net, everything, step, tensor_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import am_ckpt
from am_testing import Pool, run_distributed

# How a model is laid out, and on how many ranks.
SIZES = {
    "fsdp": (1, 2, 3, 4, 8),
    "tp": (1, 2, 3, 4, 8),
    "hsdp": (2, 4, 8),
    "fsdp_tp": (2, 4, 8),
    "pp": (1, 2, 3, 4, 8),
    "ep": (1, 2, 3, 4, 8),
}


class Stages(nn.Module):
    """What a pipeline stage holds: some of eight layers, by their global numbers."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for index in range(8):
            layer = nn.Linear(3, 2 + index)
            if index * size // 8 == rank:
                self.layers[str(index)] = layer


class Experts(nn.Module):
    """Seven experts, 3-D, and a router that every rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(7, 4, 3))
        self.down = nn.Parameter(torch.randn(7, 3, 4))
        self.router = nn.Linear(3, 7, bias=False)


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = Stages(rank, size) if kind == "pp" else Experts() if kind == "ep" else Net()
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (size,)))
    elif kind == "fsdp_tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("fsdp", "tp"))
        tensor_parallel(model, mesh["tp"])
        fully_shard(model, mesh=mesh["fsdp"])
    elif kind == "ep":
        mesh = init_device_mesh("cpu", (size,))
        for name in ("up", "down"):
            whole = model.get_parameter(name).detach()
            model.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def save(kind: str, directory: str) -> dict[str, numpy.ndarray]:
    model, optimizer = build(kind, 0)
    step(model, optimizer)
    layout = "direct" if dist.get_world_size() in (2, 8) else "sharded"
    am_ckpt.Checkpointer(directory, layout=layout).save(1, {"model": model, "optimizer": optimizer})
    return everything(model, optimizer)


def load(kind: str, directory: str) -> dict[str, numpy.ndarray]:
    model, optimizer = build(kind, 1)
    assert am_ckpt.Checkpointer(directory).load({"model": model, "optimizer": optimizer}) == 1
    return everything(model, optimizer)


@pytest.fixture(scope="module")
def eight() -> Iterator[Pool]:
    pool = Pool(8)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_every_number_of_ranks_loads_what_another_saved(kind: str, eight: Pool, tmp_path: Path) -> None:
    others = {"pp": "pp", "ep": "ep"}
    for source in SIZES[kind]:
        directory = str(tmp_path / str(source))
        saved = {name: value for part in eight.run(save, source, kind, directory) for name, value in part.items()}
        # A layout of its own kind, and another.
        for other in {kind: None, others.get(kind, "fsdp"): None}:
            for target in SIZES[other]:
                loaded = eight.run(load, target, other, directory)
                assert {name for part in loaded for name in part} == saved.keys()
                for part in loaded:
                    for name, value in part.items():
                        assert value.tobytes() == saved[name].tobytes(), (source, other, target, name)


class Random:
    """The state of torch's generator, equal on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])


def train(directory: str, stop: int | None, layout: str) -> tuple[list[bytes], dict[str, numpy.ndarray], bytes]:
    """Six steps; or, with `stop`, as many, and then the rest from the checkpoint by other objects."""
    losses: list[bytes] = []

    def run(first: int, last: int, seed: int, resume: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))
        if dist.get_world_size() > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        state = {"model": model, "optimizer": optimizer, "schedule": schedule, "random": Random()}
        checkpoints = am_ckpt.Checkpointer(directory, layout=layout)
        if resume:
            assert checkpoints.load(state) == first
        for number in range(first, last):
            rows = torch.arange(8 * 5, dtype=torch.float32).view(8, 5).sin() * (number + 1 + dist.get_rank())
            loss = model(rows).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach().numpy().tobytes())
        if last == stop:
            checkpoints.save(last, state)
        return model, optimizer

    if stop is not None:
        run(0, stop, 0, False)
    model, optimizer = run(stop or 0, 6, 0 if stop is None else 7, stop is not None)
    return losses, everything(model, optimizer), torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("layout", ["sharded", "direct"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_half_the_steps_and_half_again_are_all_steps(world_size: int, layout: str, tmp_path: Path) -> None:
    straight = run_distributed(train, world_size, str(tmp_path / "none"), None, layout)
    resumed = run_distributed(train, world_size, str(tmp_path / "some"), 3, layout)
    for rank in range(world_size):
        assert resumed[rank][0] == straight[rank][0]
        assert {name: value.tobytes() for name, value in resumed[rank][1].items()} == {
            name: value.tobytes() for name, value in straight[rank][1].items()
        }
        assert resumed[rank][2] == straight[rank][2]
    assert len(set(straight[0][0])) == 6
