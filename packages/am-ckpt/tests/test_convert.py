"""Convert: the same model in every kind of folder, opened by the programs that such folders are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader

import am_ckpt
from am_ckpt._cli import main
from am_testing import small_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {f"{str(dtype)[6:]}.w": torch.randn(5, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    named["small"] = torch.randn(4).to(torch.float8_e4m3fn)
    named["large"] = torch.randn(700, 1030)
    named |= {
        "ids": torch.arange(5),
        "flag": torch.tensor(True),
        "scalar": torch.tensor(2.5),
        "empty": torch.ones(0, 3),
    }
    return named


def same(found: dict[str, torch.Tensor]) -> bool:
    expected = tensors()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        and (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        for name, value in expected.items()
    )


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_to_dcp_and_back(plain: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", str(plain), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    assert "8 tensors" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "dcp").iterdir()) == [".metadata", "__0_0.distcp", "config.json"]
    state: dict[str, Any] = {"model": {name: torch.zeros_like(value) for name, value in tensors().items()}}
    dcp.load(state, storage_reader=FileSystemReader(tmp_path / "dcp"), no_dist=True)
    assert same(state["model"])
    assert am_ckpt.diff(plain, tmp_path / "dcp").exit_code == 0
    am_ckpt.convert(tmp_path / "dcp", tmp_path / "back", to="hf")
    assert same(load_file(tmp_path / "back" / "model.safetensors"))


def test_to_shards(plain: Path, tmp_path: Path) -> None:
    am_ckpt.convert(plain, tmp_path / "sharded", to="sharded")
    wanted = {name: torch.zeros_like(value) for name, value in tensors().items() if value.dim() and value.numel()}
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(tmp_path / "sharded")), no_dist=True)
    assert all(torch.equal(value.float(), tensors()[name].float()) for name, value in wanted.items())
    assert am_ckpt.diff(plain, tmp_path / "sharded").exit_code == 0


def test_a_step_of_ours_for_those_who_read_only_theirs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    am_ckpt.Checkpointer(tmp_path).save(1, {"model": model, "optimizer": optimizer})
    for to in ("hf", "sharded", "dcp"):
        am_ckpt.convert(tmp_path / "step_000001", tmp_path / to, to=to)
        report = am_ckpt.diff(tmp_path / "step_000001", tmp_path / to)
        assert (report.num_equal, report.differences) == (2, [])


def test_what_cannot_be_converted(plain: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    for to in ("dcp", "sharded"):
        assert main(["convert", str(adapter), str(tmp_path / "out"), "--to", to]) == 1
    with pytest.raises(ValueError, match="to='gguf'; choose hf, sharded, dcp"):
        am_ckpt.convert(plain, tmp_path / "out", to="gguf")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert main(["convert", str(plain), str(tmp_path / "there"), "--to", "dcp"]) == 6
    capsys.readouterr()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    with small_files(2**20), pytest.raises(OSError, match=r"torch could not write to|File too large"):
        am_ckpt.convert(plain, tmp_path / "out", to="dcp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
