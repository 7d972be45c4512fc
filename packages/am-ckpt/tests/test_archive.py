"""State dicts of `torch.save`: merged like any other checkpoint, and nothing in them is executed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import am_ckpt
from am_ckpt._cli import main


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "strided": base.t(),
        "part": base[2:4, 1:7],
        "again": base,
        "expanded": torch.randn(3, 1).expand(3, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "half": torch.randn(70, 90).bfloat16(),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "ids": torch.arange(5),
        "flag": torch.tensor([True, False]),
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        and torch.equal(
            found[name].contiguous().reshape(-1).view(torch.uint8), value.contiguous().reshape(-1).view(torch.uint8)
        )
        for name, value in expected.items()
    )


def saved(folder: Path, value: Any, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name)
    return folder


def test_views_of_shared_storages_and_every_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", OrderedDict(tensors()))
    assert am_ckpt.inspect(folder).kind == "torch"
    assert am_ckpt.verify(folder, full=True).exit_code == 0
    am_ckpt.merge(folder, tmp_path / "merged")
    assert same(load_file(tmp_path / "merged" / "model.safetensors"), tensors())
    assert am_ckpt.diff(folder, tmp_path / "merged").differences == []


def test_no_torch_is_imported(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tensors())
    code = "import sys; from am_ckpt._cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "merge", str(folder), str(tmp_path / "merged")]
    subprocess.run(command, check=True, capture_output=True)


def test_a_model_of_transformers_with_an_index_and_a_tied_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**small, num_attention_heads=2, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    state = model.state_dict()
    halves = [dict(list(state.items())[:5]), dict(list(state.items())[5:])]
    for number, half in enumerate(halves, start=1):
        saved(folder, half, f"pytorch_model-0000{number}-of-00002.bin")
    home = {name: f"pytorch_model-0000{1 + (name in halves[1])}-of-00002.bin" for name in state}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    report = am_ckpt.merge(folder, tmp_path / "merged")
    assert any("lm_head.weight is tied" in note for note in report.notes)
    assert report.files == ["config.json", "model.safetensors"]
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert same(opened.state_dict(), state)
    index.write_text(json.dumps({"weight_map": {**home, "x": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere\.bin'; only bin files of the folder itself are read"):
        am_ckpt.inspect(folder)
    index.write_text(json.dumps({"weight_map": {**home, "x": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(ValueError, match=r"places 'x' in pytorch_model-00001-of-00002\.bin, which lacks it"):
        am_ckpt.inspect(folder)
    index.write_text(json.dumps({"weight_map": {**home, "x": "pytorch_model-00003-of-00002.bin"}}))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00003-of-00002\.bin is missing; .* expects 3 files"):
        am_ckpt.inspect(folder)


def test_the_model_beside_an_optimizer(tmp_path: Path, capsys: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": model.weight}
    folder = saved(tmp_path / "model", whole, "pytorch_model_fsdp.bin")
    inventory = am_ckpt.inspect(folder, section="model")
    assert (inventory.tensors.keys(), inventory.section) == ({"weight", "bias"}, "model")
    assert "epoch" in inventory.others
    am_ckpt.merge(folder, tmp_path / "merged", section="model")
    assert same(load_file(tmp_path / "merged" / "model.safetensors"), dict(model.state_dict()))
    assert main(["merge", str(folder), str(tmp_path / "again"), "--section", "teacher"]) == 1
    assert "section='teacher' is not in" in capsys.readouterr().err


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def of_itself() -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.ones(2)}
    state["again"] = state
    return state


@pytest.mark.parametrize(
    ("value", "code", "expected"),
    [
        (
            {"w": torch.ones(2), "args": Code()},
            4,
            "refers to posix.mkdir, which a checkpoint does not need; nothing was",
        ),
        (nn.Linear(2, 2), 4, "refers to torch.nn.modules.linear.Linear"),
        ([torch.ones(2)], 2, "holds list, a state dict was expected"),
        (of_itself(), 2, "in several places"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, 2, "holds 'complex128', which cannot be copied"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, 2, "'w' has {'conj': True}, which cannot be copied"),
        ({"w": torch.zeros(1).expand(2**40)}, 2, "'w' is F32 [1099511627776], expanded from 4 bytes"),
        ({f"w{i}": torch.zeros(1).expand(2**16) for i in range(9)}, 2, "expanded from 4 bytes"),
        ({"w": torch.zeros(1).expand(2**61)}, 2, "size (2305843009213693952,), strides (0,)"),
    ],
)
def test_other_content_is_refused(
    value: Any, code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "model", value)
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == code
    error = capsys.readouterr().err
    assert (expected in error, str(folder / "pytorch_model.bin") in error) == (True, True), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_file_of_torch_before_1_6(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert main(["verify", str(folder)]) == 4
    assert "was written by torch before 1.6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # In the list of members at the end: a name that is no text, one that is another; and no list.
        (b"pytorch_model/data/0", b"pytorch_model/data/\x85", "can't decode byte 0x85"),
        (b"pytorch_model/data.pkl", b"pytorch_model/data.pkx", "the archive has no data.pkl"),
        (b"PK\5\6", b"PK\5\7", "File is not a zip file"),
    ],
)
def test_a_damaged_list_of_members(old: bytes, new: bytes, expected: str, tmp_path: Path, capsys: Any) -> None:
    folder = saved(tmp_path / "model", tensors())
    file = folder / "pytorch_model.bin"
    before, _, after = file.read_bytes().rpartition(old)
    assert before
    file.write_bytes(before + new + after)
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert (str(file) in error, expected in error) == (True, True), error


@pytest.mark.parametrize("name", ["model/data/0", "other/data/0", "other/data/9"])
def test_members_of_which_torch_reads_others(name: str, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"w": torch.ones(4)}, tmp_path / "sound")
    with (
        zipfile.ZipFile(tmp_path / "sound") as sound,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive,
        warnings.catch_warnings(action="ignore"),
    ):
        for info in sound.infolist():
            archive.writestr(info.filename.replace("sound/", "model/"), sound.read(info))
        archive.writestr(name, b"\0" * 16)
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'pytorch_model.bin'} is damaged: its member {name!r} is there twice or misplaced" in error


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["bin", "distcp", "safetensors", "step"])
def test_a_disk_that_fails_is_not_a_damaged_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "model"
    if kind == "distcp":
        dcp.save({"w": torch.ones(4)}, checkpoint_id=folder)
    elif kind == "step":
        am_ckpt.Checkpointer(tmp_path).save(1, {"model": nn.Linear(3, 2)})
        folder = tmp_path / "step_000001"
    else:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        torch.save({"w": torch.ones(4)}, folder / "pytorch_model.bin")
        if kind == "safetensors":
            save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    read = os.preadv

    def failing(descriptor: int, *arguments: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith((".bin", ".distcp", ".safetensors")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", failing)
    for command in (["verify", "--full"], ["merge", str(tmp_path / "merged")]):
        assert main([command[0], str(folder), *command[1:]]) == 5
        shown = capsys.readouterr()
        assert f"Input/output error: '{folder}/" in shown.out + shown.err


def test_a_disk_that_fails_while_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = saved(tmp_path / "model", tensors())

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        # The header was written.
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return len(data)

    monkeypatch.setattr(os, "pwrite", failing)
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 5
    assert "Input/output error: 'model.safetensors'" in capsys.readouterr().err


def test_a_cut_file(tmp_path: Path, capsys: Any) -> None:
    folder = saved(tmp_path / "model", tensors())
    file = folder / "pytorch_model.bin"
    content = file.read_bytes()
    for end in range(0, len(content), 1999):
        file.write_bytes(content[:end])
        assert main(["inspect", str(folder)]) == 2
        assert str(file) in capsys.readouterr().err
