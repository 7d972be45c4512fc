"""What several versions and options of torch write into `.distcp` folders."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import am_ckpt
from am_ckpt._cli import main
from am_testing import run_distributed


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_of_torch_until_2_2(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    dcp.save({"model": {"w": weight}}, checkpoint_id=tmp_path / "step")
    metadata = FileSystemReader(tmp_path / "step").read_metadata()
    # The class that those versions pickled, which is still where it was.
    metadata.state_dict_metadata["model.w"].properties = TensorProperties(dtype=weight.dtype)
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert b"torch.distributed._shard.sharded_tensor.metadata" in (tmp_path / "step" / ".metadata").read_bytes()
    am_ckpt.merge(tmp_path / "step", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["w"], weight)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"rows": torch.randn(5, 4, generator=generator), "everywhere": torch.randn(3, generator=generator)}


def save_alone(folder: str) -> None:
    """Every rank plans for itself and writes metadata of its own."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    cut = {name: Shard(0) if name == "rows" else Replicate() for name in weights()}
    model = {name: distribute_tensor(tensor, mesh, [cut[name]]) for name, tensor in weights().items()}
    dcp.save({"model": model, "step": 3}, checkpoint_id=folder, use_collectives=False)


def test_metadata_of_every_rank(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "step"
    run_distributed(save_alone, 3, str(folder))
    assert sorted(path.name for path in folder.glob("*metadata")) == [f"__{rank}.metadata" for rank in range(3)]
    assert am_ckpt.verify(folder, full=True).problems == []
    am_ckpt.merge(folder, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    (folder / "__1.metadata").unlink()
    assert main(["merge", str(folder), str(tmp_path / "again")]) == 3
    assert "'rows' F32 [5, 4]: [2:4, 0:4] is in no file" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ranks_that_speak_of_different_saves(tmp_path: Path, capsys: Any) -> None:
    for rank, rows in enumerate((3, 4)):
        dcp.save({"model": {"w": torch.ones(rows)}}, checkpoint_id=tmp_path / str(rank))
        (tmp_path / str(rank) / ".metadata").rename(tmp_path / "0" / f"__{rank}.metadata")
    assert main(["inspect", str(tmp_path / "0")]) == 2
    expected = f"{tmp_path / '0' / '__1.metadata'}: 'model.w' is F32 [4], for earlier ranks F32 [3]"
    assert expected in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_bytes_that_metadata_does_not_name_are_noted(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "step")
    (file,) = (tmp_path / "step").glob("*.distcp")
    size = file.stat().st_size
    with open(file, "ab") as stream:
        stream.write(b"x")
    (warning,) = am_ckpt.verify(tmp_path / "step").warnings
    assert f"such as {file.name} with {size + 1} bytes instead of {size}: they may be of another save" in warning
