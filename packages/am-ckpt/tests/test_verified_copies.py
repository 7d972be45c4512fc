"""`merge`, `convert` and `reshard` hold what they copy against the digests that are stored with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import am_ckpt
from am_ckpt._cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]

COPIES = {
    "merge": ["merge"],
    "hf": ["convert", "--to", "hf"],
    "sharded": ["convert", "--to", "sharded"],
    "dcp": ["convert", "--to", "dcp"],
    "reshard": ["reshard", "--mesh", "dp=2", "--model-only"],
}


def saved(directory: Path, layout: Any = "sharded") -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoints = am_ckpt.Checkpointer(directory, layout=layout, files={"generation_config.json": '{"a": 1}\n'})
    checkpoints.save(1, {"model": model, "optimizer": optimizer, "rows": 3})
    return directory / "step_000001"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("layout", ["sharded", "direct"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_flipped_bit_of_a_step_is_not_copied(copy: str, layout: str, tmp_path: Path, capsys: Any) -> None:
    step = saved(tmp_path / "run", layout)
    (weights,) = (step / "model").glob("*.safetensors")
    for path in (weights, step / "model" / "generation_config.json"):
        flip(path, -1)
        before = sorted(os.listdir(tmp_path))
        command = [*COPIES[copy], str(step), str(tmp_path / "out")]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{path} is damaged" in said
        assert path != weights or ("bytes " in said and "'1.weight'" in said)
        assert sorted(os.listdir(tmp_path)) == before
        assert main([*command, "--no-verify"]) == 0
        assert (tmp_path / "out").is_dir()
        (tmp_path / "out").rename(tmp_path / f"out of a damaged {path.name}")
        flip(path, -1)
    assert main([*COPIES[copy], str(step), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("copy", COPIES)
def test_what_is_not_copied_is_not_verified(copy: str, tmp_path: Path) -> None:
    step = saved(tmp_path / "run")
    for path in (step / "optim").glob("*.safetensors"):
        flip(path, -1)
    assert main([*COPIES[copy], str(step), str(tmp_path / "out")]) == 0


def test_a_merge_does_not_vouch_for_damage(tmp_path: Path, capsys: Any) -> None:
    step = saved(tmp_path / "run")
    (weights,) = (step / "model").glob("*.safetensors")
    flip(weights, -1)
    assert main(["merge", str(step), str(tmp_path / "out"), "--digest"]) == 2
    assert main(["merge", str(step), str(tmp_path / "out"), "--digest", "--no-verify"]) == 1
    assert main(["reshard", str(step), str(tmp_path / "out"), "--mesh", "dp=2", "--no-verify"]) == 1
    assert capsys.readouterr().err.count("new digests must not vouch for old damage") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copy", COPIES)
def test_what_merge_digested_is_held_against_its_digests(copy: str, tmp_path: Path, capsys: Any) -> None:
    merged = tmp_path / "merged"
    am_ckpt.merge(saved(tmp_path / "run"), merged, digest=True)
    command = [*COPIES[copy], str(merged), str(tmp_path / "out")]
    for name in ("model.safetensors", "generation_config.json"):
        flip(merged / name, -1)
        assert main(command) == 2
        assert str(merged / name) in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        flip(merged / name, -1)
    flip(merged / "model.safetensors", -1)
    assert main([*command, "--no-verify"]) == 0
    flip(merged / "model.safetensors", -1)
    (tmp_path / "out").rename(tmp_path / "out of damaged weights")
    assert main(command) == 0


def test_a_bit_that_flipped_between_two_runs_of_a_merge_is_found(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    step = saved(tmp_path / "run")
    (weights,) = (step / "model").glob("*.safetensors")
    with pytest.raises(KeyboardInterrupt):
        am_ckpt.merge(step, tmp_path / "out", dtype="bfloat16", threads=1, progress=interrupt)
    flip(weights, -1)
    with pytest.raises(ValueError, match=r"is damaged: bytes .* they hold"):
        am_ckpt.merge(step, tmp_path / "out", dtype="bfloat16", resume=True)
    flip(weights, -1)
    am_ckpt.merge(step, tmp_path / "out", dtype="bfloat16", resume=True)


@pytest.mark.parametrize("copy", COPIES)
def test_a_number_of_threads_that_is_none(copy: str, tmp_path: Path, capsys: Any) -> None:
    step = saved(tmp_path / "run")
    assert main([*COPIES[copy], str(step), str(tmp_path / "out"), "--threads", "0"]) == 1
    assert "threads=0 must be at least 1" in capsys.readouterr().err
