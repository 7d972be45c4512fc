"""Verify: every flipped bit of a step is found and named, and folders that would not serve are told apart."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import am_ckpt
from am_ckpt._cli import main


@pytest.fixture
def step(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    # More than one block of 16 MiB, cut inside a tensor.
    model.register_parameter("large", nn.Parameter(torch.randn(3, 2**21)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.numel() < 2**20])
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1
    optimizer.step()
    files = {"config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x"}
    am_ckpt.Checkpointer(tmp_path, files=files).save(3, {"model": model, "optimizer": optimizer})
    return tmp_path / "step_000003"


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_every_flipped_bit_of_a_step_is_found(step: Path) -> None:
    assert am_ckpt.verify(step, full=True).problems == []
    chance = random.Random(0)
    files = sorted(path for path in step.rglob("*") if path.is_file())
    for path in files:
        for _ in range(4):
            place = chance.randrange(path.stat().st_size), chance.randrange(8)
            flip(path, *place)
            if path.name == "manifest.json":
                with pytest.raises(ValueError, match=r"manifest\.json"):
                    am_ckpt.verify(step, full=True)
            else:
                report = am_ckpt.verify(step, full=True)
                assert report.exit_code == 2
                assert all(str(path) in problem for problem in report.problems)
            flip(path, *place)
    assert am_ckpt.verify(step, full=True).problems == []


def test_a_sample_of_the_corruption_sweep() -> None:
    script = Path(__file__).with_name("corruption_sweep.py")
    command = [sys.executable, "-W", "ignore", str(script), "--flips", "40", "--mutations", "800"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["step"]["found"], result["mutations"], result["failures"]) == (40, 800, {})
    # Data of a folder without digests: nobody can tell.
    assert result["merged folder"]["found"] < 40


def test_damage_is_named_by_file_tensor_and_range(step: Path, capsys: Any) -> None:
    (chunk,) = am_ckpt.inspect(step).tensors["large"].chunks
    # In the second block of 16 MiB, which holds nothing else.
    flip(chunk.path, chunk.begin + 17 * 2**20, 3)
    assert main(["verify", str(step)]) == 0
    capsys.readouterr()
    assert main(["verify", str(step), "--full"]) == 2
    shown = capsys.readouterr().out
    begin = chunk.begin - chunk.begin % 4096 + 16 * 2**20
    assert f"{chunk.path} is damaged: bytes {begin} to " in shown
    assert "they hold 'large', '" in shown or "they hold 'large':" in shown
    assert "1 problems (all data read)" in shown


def test_what_is_missing_is_3_and_what_is_cut_is_2(step: Path, capsys: Any) -> None:
    file = next((step / "optim").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert main(["verify", str(step), "--json"]) == 2
    assert f"{file} has {len(content) - 1} bytes" in json.loads(capsys.readouterr().out)["problems"][0]
    file.unlink()
    assert main(["verify", str(step)]) == 3
    assert f"{file}, written by rank 0, is missing" in capsys.readouterr().out


def hugging_face(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    return folder


def test_a_whole_folder_is_ok_and_warnings_say_what_is_not_there(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "model", {"layers.0.w": torch.ones(2)}, num_hidden_layers=1)
    report = am_ckpt.verify(folder, full=True)
    assert (report.kind, report.problems, report.warnings, report.exit_code) == ("huggingface", [], [], 0)
    (folder / "chat_template.jinja").unlink()
    save_file({"old": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    first, second = am_ckpt.verify(folder).warnings
    assert "model-00001-of-00002.safetensors" in first
    assert "no chat template" in second
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in am_ckpt.verify(folder).warnings[-1]
    (folder / "config.json").unlink()
    report = am_ckpt.verify(folder)
    assert (report.exit_code, "no config.json" in report.problems[0]) == (3, True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, but layer 1 of model.layers has no tensor (1 layers missing)"),
        ({"vocab_size": 9}, "vocab_size=9, but 'model.embed_tokens.weight' has 8 rows"),
        ({"hidden_size": 5}, "hidden_size=5, but 'model.embed_tokens.weight' has 4 columns"),
        ({"text_config": {"num_experts": 4}}, "4 experts, but model.layers.0.experts.1 has no tensor (3 are there)"),
    ],
)
def test_config_against_tensors(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4), "model.layers.2.w": torch.ones(1)}
    tensors |= {f"model.layers.0.experts.{index}.w": torch.ones(1) for index in (0, 2, 3)}
    report = am_ckpt.verify(hugging_face(tmp_path / "model", tensors, **config))
    assert report.exit_code == 3
    assert expected in report.problems[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.full((700, 900), 1.0)
    tensor[699, 3] = value
    folder = hugging_face(tmp_path / "model", {"layers.0.w": tensor.to(dtype), "zero": torch.zeros(3).to(dtype)})
    assert am_ckpt.verify(folder).exit_code == 0
    report = am_ckpt.verify(folder, full=True)
    assert (report.exit_code, len(report.problems)) == (2, 1)
    assert "'layers.0.w'" in report.problems[0]
    assert "is NaN or infinite at [699, 3] (model.safetensors" in report.problems[0]
    assert report.warnings == ["'zero' holds nothing but zeros (model.safetensors)"]


def test_the_largest_finite_values_are_fine(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.full((5,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    tensors["ids"] = torch.full((3,), -1)
    assert am_ckpt.verify(hugging_face(tmp_path / "model", tensors), full=True).problems == []
