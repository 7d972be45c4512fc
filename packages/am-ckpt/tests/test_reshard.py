"""Reshard: the same values in the files of another layout, which torch and Checkpointer load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import am_ckpt
from am_ckpt._cli import main
from am_testing import run_distributed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def build(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 14), nn.Linear(14, 5))
    model.register_buffer("count", torch.tensor(seed))
    model.register_buffer("empty", torch.zeros(0, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (seed + step))
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "noise": Noise(seed)}


class Noise:
    """State with a tensor in it."""

    def __init__(self, seed: int) -> None:
        self.values = torch.full((3,), float(seed))

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


def step_of(folder: Path) -> Path:
    files = {"config.json": "{}"}
    am_ckpt.Checkpointer(folder, files=files).save(7, build(3))
    return folder / "step_000007"


def test_state_whose_name_is_like_that_of_a_shard(tmp_path: Path) -> None:
    am_ckpt.Checkpointer(tmp_path / "run").save(1, {"model": nn.Linear(4, 2), "shard-state": Noise(3)})
    (tmp_path / "new").mkdir()
    am_ckpt.reshard(tmp_path / "run" / "step_000001", tmp_path / "new" / "step_000001", mesh={"dp": 2})
    noise = Noise(0)
    assert am_ckpt.Checkpointer(tmp_path / "new").load({"model": nn.Linear(4, 2), "shard-state": noise}) == 1
    assert noise.values.tolist() == [3.0, 3.0, 3.0]


PLACEMENTS = {"0.*": 0, "1.weight": 1}


def test_a_step_stays_a_step(tmp_path: Path) -> None:
    step = step_of(tmp_path / "run")
    (tmp_path / "new").mkdir()
    new = tmp_path / "new" / step.name
    report = am_ckpt.reshard(step, new, mesh={"dp": 2, "tp": 2}, placements=PLACEMENTS)
    assert report.kind == "am-ckpt"
    assert am_ckpt.verify(new, full=True).problems == []
    assert am_ckpt.diff(step, new).exit_code == 0
    # Every rank holds a quarter of what is cut on both axes, of the moments too, and rank 0 what cannot be cut.
    for section, name in (("model", "0.weight"), ("optim", "exp_avg/0.weight")):
        shapes = []
        for rank in range(1, 5):
            with safe_open(new / section / f"shard-{rank:05d}-model-00001-of-00001.safetensors", "pt") as file:
                shapes.append(tuple(file.get_slice(name).get_shape()))
                assert ("count" in file.keys()) == (section == "model" and rank == 1)  # noqa: SIM118
        assert shapes == [(4, 6), (4, 6), (3, 6), (3, 6)]
    loaded = build(4)
    assert am_ckpt.Checkpointer(tmp_path / "new").load(loaded) == 7
    expected = build(3)
    for name, value in expected["model"].state_dict().items():
        assert torch.equal(loaded["model"].state_dict()[name], value), name
    for index, slots in expected["optimizer"].state_dict()["state"].items():
        for slot, value in slots.items():
            assert torch.equal(loaded["optimizer"].state_dict()["state"][index][slot], value)
    assert torch.equal(loaded["noise"].values, expected["noise"].values)
    assert loaded["schedule"].state_dict()["last_epoch"] == expected["schedule"].state_dict()["last_epoch"]


def load_with_torch(folder: str) -> dict[str, torch.Tensor]:
    """Stock torch's reader into FSDP and tensor parallel shards; the full tensors."""
    model = build(5)["model"]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    state = {name: value for name, value in model.state_dict().items() if name not in ("count", "empty")}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
    assert dist.get_world_size() == 4
    return {name: value.full_tensor() for name, value in state.items() if isinstance(value, DTensor)}


@pytest.mark.parametrize("kind", ["step", "distcp"])
def test_torch_loads_the_shards(kind: str, tmp_path: Path) -> None:
    expected = build(3)["model"].state_dict()
    if kind == "step":
        am_ckpt.reshard(step_of(tmp_path / "run"), tmp_path / "new", mesh={"dp": 3})
        folder = tmp_path / "new" / "model"
    else:
        dcp.save({"model": expected}, storage_writer=FileSystemWriter(tmp_path / "distcp"))
        am_ckpt.reshard(tmp_path / "distcp", tmp_path / "new", mesh={"dp": 2, "tp": 2}, placements=PLACEMENTS)
        folder = tmp_path / "new"
        report = am_ckpt.diff(tmp_path / "distcp", folder)
        assert (report.num_equal, report.differences) == (6, [])
    for name, value in run_distributed(load_with_torch, 4, str(folder))[0].items():
        assert torch.equal(value, expected[name]), name


def test_an_interrupted_reshard_is_resumed(tmp_path: Path) -> None:
    step = step_of(tmp_path / "run")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        am_ckpt.reshard(step, tmp_path / "new", mesh={"dp": 2}, progress=interrupt, threads=1)
    assert not (tmp_path / "new").exists()
    report = am_ckpt.reshard(step, tmp_path / "new", mesh={"dp": 2}, resume=True)
    assert 0 < report.resumed_bytes < report.num_bytes
    assert am_ckpt.verify(tmp_path / "new", full=True).problems == []
    assert am_ckpt.diff(step, tmp_path / "new").exit_code == 0


def test_a_damaged_step_does_not_get_new_digests(tmp_path: Path) -> None:
    step = step_of(tmp_path / "run")
    (chunk,) = am_ckpt.inspect(step).tensors["0.weight"].chunks
    content = bytearray(chunk.path.read_bytes())
    content[chunk.begin] ^= 1
    chunk.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: bytes .* '0.weight'"):
        am_ckpt.reshard(step, tmp_path / "new", mesh={"dp": 2})
    assert not (tmp_path / "new").exists()


def test_the_command_and_its_mistakes(tmp_path: Path, capsys: Any) -> None:
    step = step_of(tmp_path / "run")
    plan = tmp_path / "placements.json"
    plan.write_text(json.dumps(PLACEMENTS))
    new = str(tmp_path / "new")
    assert main(["reshard", str(step), new, "--mesh", "dp=2,tp=2", "--placements", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tensors"] == 6 + 12
    assert main(["reshard", str(step), new, "--mesh", "dp=2"]) == 6
    other = str(tmp_path / "other")
    mistakes = {
        "dp=0": "at least 1",
        "pp=2": "dp and tp",
        "four": "dp=4,tp=2",
        "dp=2,dp=3": "twice",
        "tp=2,dp=2": "dp first",
    }
    for mesh, expected in mistakes.items():
        assert main(["reshard", str(step), other, "--mesh", mesh]) == 1
        assert expected in capsys.readouterr().err
    plan.write_text(json.dumps({"count": 0}))
    assert main(["reshard", str(step), other, "--mesh", "dp=1,tp=2", "--placements", str(plan)]) == 1
    assert "placements cut 'count' [] on dim 0" in capsys.readouterr().err
    plan.write_text(json.dumps({"*.q_prj.weight": 0}))
    assert main(["reshard", str(step), other, "--mesh", "dp=1,tp=2", "--placements", str(plan)]) == 1
    assert "no tensor has a name like '*.q_prj.weight'" in capsys.readouterr().err
    for file in (tmp_path / "nowhere.json", plan):
        plan.write_text("{")
        assert main(["reshard", str(step), other, "--mesh", "dp=1,tp=2", "--placements", str(file)]) == 1
        assert str(file) in capsys.readouterr().err
    plan.write_text("[]")
    assert main(["reshard", str(step), other, "--mesh", "dp=1,tp=2", "--placements", str(plan)]) == 1
    assert "must map patterns of names to dims" in capsys.readouterr().err
    assert not Path(other).exists()
