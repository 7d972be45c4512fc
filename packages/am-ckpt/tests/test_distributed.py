"""Saving on N ranks and loading on M: bit-equal in every layout, and failures that reach every rank."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from commit_seed import commit_seed, drawn_from
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import am_ckpt
from am_testing import run_distributed

# Name and number of ranks.
LAYOUTS = {
    "plain": 1,
    "fsdp1": 1,
    "fsdp2": 2,
    "tp2": 2,
    "ddp2": 2,
    "fsdp3": 3,
    "tp3": 3,
    "fsdp4": 4,
    "tp4": 4,
    "hsdp4": 4,
    "fsdp_tp4": 4,
}
# Dims that tensor parallelism cuts; the others are replicated. Two of them are too short for four ranks.
TP_DIMS = {"embedding.weight": 1, "middle.weight": 0, "middle.bias": 0, "thin": 1}


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty; a tied head; 0-d, integer, bool and fp8 buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.middle = nn.Linear(6, 5)
        self.thin = nn.Parameter(torch.randn(1, 3))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("codes", torch.randint(-(2**62), 2**62, (3, 5)))
        self.register_buffer("mask", torch.rand(11) > 0.5)
        self.register_buffer("scales", torch.randn(2, 3).to(torch.float8_e4m3fn))


class Cursor:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def tensor_parallel(model: Net, mesh: DeviceMesh) -> None:
    for name, parameter in list(model.named_parameters()):
        placement = Shard(TP_DIMS[name]) if name in TP_DIMS else Replicate()
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[key] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
    model.head.weight = model.embedding.weight


def build(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    if layout == "ddp2":
        # gloo cannot broadcast fp8; the seed has made all ranks equal.
        model = nn.parallel.DistributedDataParallel(model, init_sync=False)
    elif layout.startswith("tp"):
        tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    elif layout == "hsdp4":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    elif layout == "fsdp_tp4":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        tensor_parallel(model, mesh["tp"])
        fully_shard(model, mesh=mesh["fsdp"])
    elif layout.startswith("fsdp"):
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.1 if seed == 0 else 0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 3 + 1
    optimizer.step()


def whole(tensor: torch.Tensor) -> numpy.ndarray:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, numpy.ndarray]:
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    result = {name: whole(tensor) for name, tensor in bare.named_parameters()}
    result.update({name: whole(tensor) for name, tensor in bare.named_buffers()})
    for name, parameter in bare.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            result[f"{slot}/{name}"] = whole(value)
            if slot != "step" and isinstance(parameter, DTensor):
                assert value.placements == parameter.placements
    result["lr"] = numpy.array([group["lr"] for group in optimizer.param_groups])
    return result


def save(layout: str, directory: str) -> dict[str, numpy.ndarray]:
    model, optimizer = build(layout, 0)
    step(model, optimizer)
    am_ckpt.Checkpointer(directory).save(3, {"model": model, "optimizer": optimizer, "data": Cursor((3, "x"))})
    return everything(model, optimizer)


def load(layout: str, directory: str) -> dict[str, numpy.ndarray]:
    model, optimizer = build(layout, 1)
    data = Cursor(None)
    assert am_ckpt.Checkpointer(directory).load({"model": model, "optimizer": optimizer, "data": data}) == 3
    assert data.value == (3, "x")
    loaded = everything(model, optimizer)
    # The optimizer must be able to go on, with state that it did not make itself.
    step(model, optimizer)
    return loaded


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_loads_what_another_saved(source: str, share: int, tmp_path: Path) -> None:
    saved = run_distributed(save, LAYOUTS[source], source, str(tmp_path))[0]
    assert saved["exp_avg/embedding.weight"].any()
    # With each commit, others.
    for target in drawn_from(list(LAYOUTS), share, f"{commit_seed()} {source}"):
        for loaded in run_distributed(load, LAYOUTS[target], target, str(tmp_path)):
            assert loaded.keys() == saved.keys()
            for name, value in saved.items():
                # Bit-equal: bytes, not numbers.
                assert loaded[name].tobytes() == value.tobytes(), (source, target, name)


def read_by_torch(layout: str, directory: str) -> dict[str, numpy.ndarray]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    model, _ = build(layout, 1)
    for section in ("model",):
        target = {name: p.detach() for name, p in model.named_parameters()}
        dcp.load(target, storage_reader=HuggingFaceStorageReader(f"{directory}/step_000003/{section}"))
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("source", ["fsdp4", "hsdp4", "fsdp_tp4"])
def test_torch_distributed_checkpoint_reads_the_shards(source: str, tmp_path: Path) -> None:
    saved = run_distributed(save, LAYOUTS[source], source, str(tmp_path))[0]
    for target in ("plain", "fsdp2"):
        loaded = run_distributed(read_by_torch, LAYOUTS[target], target, str(tmp_path))[0]
        for name, value in loaded.items():
            assert value.tobytes() == saved[name].tobytes(), name


def replicas(directory: str) -> int:
    model, optimizer = build("ddp2", 0)
    step(model, optimizer)
    am_ckpt.Checkpointer(directory).save(3, {"model": model, "optimizer": optimizer})
    return 0


def test_replicas_are_written_once_and_shared_between_their_holders(tmp_path: Path) -> None:
    run_distributed(replicas, 2, str(tmp_path))
    files = sorted((tmp_path / "step_000003" / "optim").iterdir())
    assert [file.name for file in files] == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    from safetensors import safe_open

    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    assert len(names) == len(set(names)) == 3 * sum(1 for _ in Net().parameters())


def failing(directory: str, kind: str) -> tuple[str, str]:
    """One rank alone cannot write, or read what it is to copy, or has state that cannot be stored."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    am_ckpt.Checkpointer(directory).save(1, {"model": model, "data": Cursor(1)})
    checkpoints = am_ckpt.Checkpointer(directory, files={"a.json": Path("gone.json")} if kind == "file" else None)
    data = Cursor(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        elif kind == "type":
            data = Cursor(object())
        elif kind == "differs":
            data = Cursor(3)
    try:
        checkpoints.save(2, {"model": model, "data": data})
    except (OSError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "", ""


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("limit", "OSError", "File too large"),
        ("type", "TypeError", r"data['value'] has type builtins.object"),
        ("differs", "ValueError", "state ['data'] differs between rank 0 and rank 1"),
        ("file", "FileNotFoundError", "No such file or directory: 'gone.json'"),
    ],
)
def test_a_failure_of_one_rank_is_the_same_error_on_all(kind: str, error: str, text: str, tmp_path: Path) -> None:
    outcomes = run_distributed(failing, 2, str(tmp_path), kind)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == error
    assert text in outcomes[0][1]
    assert "step 2 was not saved" in outcomes[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]


def other_shape(directory: str) -> str:
    model = nn.Linear(4, 2 if dist.get_rank() == 0 else 3)
    try:
        am_ckpt.Checkpointer(directory).save(1, {"model": model})
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path: Path) -> None:
    first, second = run_distributed(other_shape, 2, str(tmp_path))
    assert first == second
    assert "'weight' differs between ranks" in first


class Counting(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), float(count)))
        self.count = count

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "scale": torch.tensor([float(self.count)])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["scale"].tolist() == [state["count"]]
        self.count = state["count"]


def stages(directory: str) -> int:
    """Each rank is a stage with a module that has state of its own kind."""
    rank = dist.get_rank()
    checkpoints = am_ckpt.Checkpointer(directory)
    checkpoints.save(1, {"model": nn.ModuleDict({f"layer{rank}": Counting(5 + rank)})})
    fresh = Counting(0)
    checkpoints.load({"model": nn.ModuleDict({f"layer{rank}": fresh})})
    assert fresh.weight.tolist() == [5.0 + rank] * 3
    return fresh.count


def test_stages_have_extra_state_of_their_own(tmp_path: Path) -> None:
    assert run_distributed(stages, 2, str(tmp_path)) == [5, 6]


def counted_from_zero(directory: str, what: str) -> str:
    """Stages whose names are alike, of plain tensors or of shards on a mesh each; or replicas that differ in state."""
    rank = dist.get_rank()
    torch.manual_seed(rank if what != "sharded" else rank // 2)
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if what == "sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"])
    elif what == "extra":
        model = Counting(0)
        model.count = rank
    try:
        if what == "export":
            am_ckpt.save_hf(model, f"{directory}/out")
        else:
            am_ckpt.Checkpointer(directory).save(1, {"model": model})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("plain", "'0.weight' [0:4, 0:4] has other values on rank 1 than on rank 0"),
        ("sharded", "'0.weight' [0:2, 0:4] has other values on rank 2 than on rank 0"),
        ("export", "'0.weight' [0:4, 0:4] has other values on rank 1 than on rank 0"),
        ("extra", "'_extra_state' differs between rank 0 and rank 1"),
    ],
)
def test_different_tensors_of_one_name_are_refused(what: str, text: str, tmp_path: Path) -> None:
    outcomes = run_distributed(counted_from_zero, 4 if what == "sharded" else 2, str(tmp_path), what)
    assert text in outcomes[0]
    assert len(set(outcomes)) == 1
    assert not any(tmp_path.iterdir())
