"""Diff: the same tensors in any kind of checkpoint are equal, and every other one is named with what differs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

import am_ckpt
from am_ckpt._cli import main


class Tied(nn.Module):
    """An embedding, a fused stack of experts and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(9, 4)
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


MAPPING = [
    {"file": f"experts.{i}.weight", "parameter": "experts", "slice": [[i, i + 1], None, None], "transpose": True}
    for i in range(3)
]


def saved(folder: Path, model: nn.Module, mapping: list[dict[str, Any]] | None = None) -> Path:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    am_ckpt.Checkpointer(folder, mapping=mapping).save(1, {"model": model, "optimizer": optimizer})
    return folder / "step_000001"


def plain(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_kind_against_every_other(tmp_path: Path) -> None:
    model = Tied()
    step = saved(tmp_path / "run", model)
    dcp.save({"model": model.state_dict()}, storage_writer=FileSystemWriter(tmp_path / "distcp"))
    am_ckpt.merge(step, tmp_path / "merged", max_shard_size=100)
    folders = [step, tmp_path / "distcp", tmp_path / "merged"]
    for a in folders:
        for b in folders:
            report = am_ckpt.diff(a, b)
            # .distcp holds the head under its own name, the merged folder does not hold it at all.
            only = [item.name for item in report.differences]
            assert only == (["lm_head.weight"] if {a, b} == set(folders[1:]) else [])
            assert report.num_equal >= 2


def test_a_step_with_a_mapping_against_what_it_was_merged_to(tmp_path: Path) -> None:
    step = saved(tmp_path / "run", Tied(), MAPPING)
    am_ckpt.merge(step, tmp_path / "merged")
    for pair in ((step, tmp_path / "merged"), (tmp_path / "merged", step)):
        report = am_ckpt.diff(*pair)
        assert (report.num_equal, report.differences) == (4, [])


def test_optimizers_of_steps_are_compared(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    for step in (1, 2):
        model.experts.grad = torch.full_like(model.experts, float(step))
        optimizer.step()
        checkpoints.save(step, {"model": model, "optimizer": optimizer})
    report = am_ckpt.diff(tmp_path / "step_000001", tmp_path / "step_000002")
    found = {item.name: item.first for item in report.differences}
    assert found.keys() == {f"optim/{slot}/experts" for slot in ("exp_avg", "exp_avg_sq", "step")}
    assert (found["optim/step/experts"], found["optim/exp_avg/experts"]) == ([], [0, 0, 0])


def test_what_differs_is_said(tmp_path: Path, capsys: Any) -> None:
    big = torch.arange(3 * 2**20, dtype=torch.float32).reshape(3, -1)
    changed = big.clone()
    changed[2, 5] += 2.0
    changed[2, 2**20 - 1] -= 0.5
    ones = torch.ones(2, 3)
    one = {"big": big, "gone": ones, "shape": ones, "dtype": ones, "same": ones}
    two = {"big": changed, "new": ones, "shape": ones.T.contiguous(), "dtype": ones.bfloat16() * 3, "same": ones}
    a, b = plain(tmp_path / "a", one), plain(tmp_path / "b", two)
    assert main(["diff", str(a), str(b), "--json"]) == 7
    report = json.loads(capsys.readouterr().out)
    found = {item["name"]: item for item in report["differences"]}
    assert (report["kinds"], report["num_equal"], len(found)) == (["huggingface"] * 2, 1, 5)
    assert found["big"]["what"] == "values"
    assert (found["big"]["num_different"], found["big"]["max_abs_difference"], found["big"]["first"]) == (
        2,
        2.0,
        [2, 5],
    )
    assert (found["gone"]["what"], found["gone"]["a"], found["gone"]["b"]) == ("only in a", "F32 [2, 3]", None)
    assert (found["new"]["what"], found["new"]["b"]) == ("only in b", "F32 [2, 3]")
    assert (found["shape"]["what"], found["shape"]["b"]) == ("shape", "F32 [3, 2]")
    assert (found["dtype"]["what"], found["dtype"]["num_different"], found["dtype"]["max_abs_difference"]) == (
        "dtype",
        6,
        2.0,
    )
    assert main(["diff", str(a), str(b)]) == 7
    shown = capsys.readouterr().out
    assert "big: F32 [3, 1048576]: 2 elements differ, at most by 2, first at [2, 5]" in shown
    assert "1 tensors are equal, 5 are not" in shown
    assert main(["diff", str(a), str(b), "--tensors", "same"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_nan_infinity_zero_and_tolerances(dtype: torch.dtype, tmp_path: Path) -> None:
    largest = torch.finfo(dtype).max
    nan = math.nan
    a = plain(tmp_path / "a", {"w": torch.tensor([0.0, nan, 1.0, largest, nan]).to(dtype)})
    b = plain(tmp_path / "b", {"w": torch.tensor([-0.0, nan, 1.5, largest, 1.0]).to(dtype)})
    (item,) = am_ckpt.diff(a, b).differences
    assert (item.num_different, item.max_abs_difference, item.first) == (2, math.inf, [2])
    (item,) = am_ckpt.diff(a, b, atol=0.1, rtol=0.3).differences
    # Nothing is close to a NaN.
    assert (item.num_different, item.first) == (1, [4])
    assert json.loads(json.dumps(am_ckpt.diff(a, b).to_json()))["differences"][0]["max_abs_difference"] == "inf"
    for path, value in ((tmp_path / "c", 1.0), (tmp_path / "d", 1.25)):
        plain(path, {"w": torch.tensor([value, 2.0]).to(dtype)})
    assert am_ckpt.diff(tmp_path / "c", tmp_path / "d", atol=0.25).exit_code == 0
    assert am_ckpt.diff(tmp_path / "c", tmp_path / "d", rtol=0.2).exit_code == 0
    assert am_ckpt.diff(tmp_path / "c", tmp_path / "d", atol=0.125).exit_code == 7


def test_integers_and_complex_numbers_are_exact(tmp_path: Path) -> None:
    limits = torch.iinfo(torch.int64)
    one = {"i": torch.tensor([2**62, limits.min]), "b": torch.tensor([True, False]), "c": torch.tensor([3j])}
    two = {"i": torch.tensor([2**62 + 1, limits.max]), "b": torch.tensor([True, True]), "c": torch.tensor([4.0 + 0j])}
    report = am_ckpt.diff(plain(tmp_path / "a", one), plain(tmp_path / "b", two))
    found = {item.name: (item.num_different, item.max_abs_difference) for item in report.differences}
    assert found == {"i": (2, float(2**64 - 1)), "b": (1, 1.0), "c": (1, 5.0)}


def test_bad_arguments_and_broken_checkpoints(tmp_path: Path, capsys: Any) -> None:
    a = plain(tmp_path / "a", {"w": torch.ones(3)})
    nowhere = tmp_path / "nowhere"
    for pair in ((a, nowhere), (nowhere, a)):
        assert main(["diff", *map(str, pair)]) == 1
        assert f"{nowhere} is not a folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        am_ckpt.diff(a, nowhere)
    assert main(["diff", str(a), str(a), "--tensors", "x*"]) == 1
    assert "no tensor" in capsys.readouterr().err
    assert main(["diff", str(a), str(a), "--atol", "-1"]) == 1
    step = saved(tmp_path / "run", Tied())
    next((step / "model").glob("*.safetensors")).unlink()
    assert main(["diff", str(a), str(step)]) == 3


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_the_config_ties_is_there(tied: bool, tmp_path: Path) -> None:
    weight = torch.randn(9, 4)
    one = plain(tmp_path / "a", {"embed_tokens.weight": weight, "lm_head.weight": weight})
    two = plain(tmp_path / "b", {"embed_tokens.weight": weight})
    (two / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    for pair in ((one, two), (two, one)):
        report = am_ckpt.diff(*pair)
        assert (report.num_equal, len(report.differences)) == ((2, 0) if tied else (1, 1))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_section_is_that_of_the_folder_that_has_some(tmp_path: Path, capsys: Any) -> None:
    dcp.save({"student": {"w": torch.ones(3)}, "teacher": {"w": torch.zeros(3)}}, checkpoint_id=tmp_path / "a")
    merged = am_ckpt.merge(tmp_path / "a", tmp_path / "b", section="student").destination
    assert main(["diff", str(tmp_path / "a"), merged, "--section", "student"]) == 0
    assert main(["diff", merged, str(tmp_path / "a"), "--section", "teacher"]) == 7
    capsys.readouterr()
    assert main(["diff", merged, merged, "--section", "teacher"]) == 1
    assert "section='teacher': only .distcp folders have sections" in capsys.readouterr().err


def test_no_torch_for_ordinary_dtypes(tmp_path: Path) -> None:
    a = plain(tmp_path / "a", {"w": torch.ones(3).bfloat16(), "v": torch.ones(3)})
    b = plain(tmp_path / "b", {"w": torch.zeros(3).bfloat16(), "v": torch.ones(3)})
    code = "import sys; from am_ckpt._cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "diff", str(a), str(b)], check=True, capture_output=True)
