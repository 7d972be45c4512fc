"""Folders of torch_checkpointing, as its own code wrote them (see data/README.md): merged, checked, or refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commit_seed import commit_seed
from safetensors.torch import load_file

import am_ckpt
from am_ckpt._cli import main

DATA = Path(__file__).parent / "data" / "torch_checkpointing"


@pytest.fixture(params=["torch_save", "safetensors"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / request.param, tmp_path / "source"))


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "torch_save", tmp_path / "source"))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "metadata.pkl"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_tensors_cut_on_two_axes_of_the_mesh_are_put_together(source: Path, tmp_path: Path) -> None:
    inventory = am_ckpt.inspect(source)
    assert (inventory.kind, inventory.section, inventory.problems) == ("torch_checkpointing", "model", [])
    assert inventory.sections.keys() == {"model", "optimizer"}
    assert am_ckpt.inspect(source, section="optimizer").tensors["state.up.weight.exp_avg"].shape == (9, 6)
    expected = load_file(DATA / "expected.safetensors")
    am_ckpt.merge(source, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    am_ckpt.merge(source, tmp_path / "moments", section="optimizer")
    moments = load_file(tmp_path / "moments" / "model.safetensors")
    assert all(torch.allclose(moments[f"state.{name}.exp_avg"], torch.tensor(0.05)) for name in ("up.bias", "scale"))
    am_ckpt.reshard(source, tmp_path / "again", mesh={"dp": 3})
    assert am_ckpt.diff(tmp_path / "again", tmp_path / "merged").differences == []
    report = am_ckpt.verify(source, full=True)
    assert (report.exit_code, report.problems) == (0, [])


def test_a_file_of_a_rank_is_missing_cut_or_changed(source: Path, capsys: Any) -> None:
    files = sorted(path for path in source.rglob("*") if path.suffix in (".pt", ".safetensors") and "_3" in str(path))
    assert len(files) == 2
    sections = am_ckpt.inspect(source).sections.values()
    chunks = [chunk for tensors in sections for tensor in tensors.values() for chunk in tensor.chunks]
    place_of = {chunk.path: chunk.begin for chunk in chunks}
    for path in files:
        content = path.read_bytes()
        path.unlink()
        assert main(["verify", str(source)]) == 3
        assert str(path) in capsys.readouterr().err
        path.write_bytes(content[:-40])
        assert main(["verify", str(source)]) == 2
        assert str(path) in capsys.readouterr().err
        path.rename(source.parent / "elsewhere")
        path.symlink_to(source.parent / "elsewhere")
        assert main(["verify", str(source)]) == 4
        path.unlink()
        # Of safetensors there is no digest.
        if path.suffix == ".pt":
            flipped = bytearray(content)
            flipped[place_of[path]] ^= 4
            path.write_bytes(flipped)
            assert main(["verify", str(source), "--full"]) == 2
            assert f"{path} is damaged" in "".join(capsys.readouterr())
        path.write_bytes(content)
    assert main(["verify", str(source), "--full"]) == 0


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("place", ["metadata.pkl", "model_0.pt", "optimizer_2.pt"])
def test_code_is_not_executed(place: str, pickled: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if place == "metadata.pkl":
        change(pickled, lambda metadata: metadata.update(more=Code()))
    else:
        torch.save({"embed.weight": Code()}, pickled / place)
    for command in (["inspect"], ["verify", "--full"], ["merge"]):
        target = [str(tmp_path / "merged")] if command == ["merge"] else []
        assert main([*command, str(pickled), *target]) == 4
        assert "posix.system, which a checkpoint does not need" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def model(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["metadata"]["model"]["nested_path_to_metadata"]['["up.weight"]'][0]


def data(metadata: dict[str, Any]) -> dict[str, Any]:
    return model(metadata)["sharding_metadata"]["data"]


def layouts(metadata: dict[str, Any], path: str) -> None:
    kind = {"type": "TorchSerialization"}
    metadata["metadata"]["model"]["rank_to_layout_info"][0] = {"file_path": path, "serialization_format": kind}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], int, str]] = {
    "a path out of the folder": (lambda m: layouts(m, "../secret.pt"), 4, "names the file '../secret.pt'"),
    "an absolute path": (lambda m: layouts(m, "/etc/passwd"), 4, "names the file '/etc/passwd'"),
    "another version": (lambda m: m.update(version="3.0"), 2, "has version '3.0'; this release reads version 2.0"),
    "no version": (lambda m: m.pop("version"), 2, "version is None"),
    "no items": (lambda m: m.update(metadata=[]), 2, "metadata is []"),
    "another kind of sharding": (lambda m: model(m)["sharding_metadata"].update(type="Mine"), 2, "described by 'Mine'"),
    "a rank that is not in the mesh": (lambda m: model(m).update(ranks=(9,)), 2, "rank 9"),
    "no ranks": (lambda m: model(m).update(ranks=None), 2, "is on the ranks None"),
    "a rank fewer": (lambda m: model(m).update(ranks=(0, 1, 3)), 3, "elements missing"),
    "another shape": (lambda m: data(m).update(global_shape=[13, 6]), 2, "are of different saves"),
    "a shape of text": (lambda m: data(m).update(global_shape=["x"]), 2, "has the shape ('x',)"),
    "another dtype": (lambda m: data(m).update(dtype="torch.int64"), 2, "are of different saves"),
    "partial sums": (lambda m: data(m).update(placements=[{"type": "Partial"}] * 2), 2, "is no cut of it"),
    "a dim it has not": (lambda m: data(m)["placements"][1].update(dim=7), 2, "split_factor is not known"),
    "a placement of text": (lambda m: data(m)["placements"].__setitem__(1, "Shard(0)"), 2, "is placed as ["),
    "another stride": (lambda m: data(m)["placements"][0].update(split_factor=3), 2, "split_factor is not known"),
    "a mesh of other ranks": (lambda m: data(m)["mesh_spec"].update(mesh_shape=(3, 2)), 2, "is on the mesh"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_metadata_that_does_not_describe_the_files(what: str, pickled: Path, capsys: Any) -> None:
    edit, code, message = REFUSED[what]
    change(pickled, edit)
    assert main(["inspect", str(pickled)]) == code
    assert message in "".join(capsys.readouterr())
    assert main(["merge", str(pickled), str(pickled.with_name("merged"))]) == code
    assert not pickled.with_name("merged").exists()


def test_without_metadata_nothing_is_guessed(pickled: Path, capsys: Any) -> None:
    (pickled / "metadata.pkl").unlink()
    assert main(["merge", str(pickled), str(pickled.with_name("merged"))]) == 4
    assert "may be a checkpoint of torch_checkpointing without metadata.pkl" in capsys.readouterr().err


def test_damaged_files_are_refused_or_read(source: Path, tmp_path: Path) -> None:
    """Whatever bytes change: no other error, and tensors of the shapes that the metadata says."""
    seed = commit_seed()
    files = [source / "metadata.pkl", *sorted(path for path in source.rglob("*") if path.suffix == ".pt")[:2]]
    for number in range(60):
        chance = random.Random(f"{seed} {number}")
        path = files[number % len(files)]
        original = path.read_bytes()
        content = bytearray(original)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(ValueError, OSError):
            am_ckpt.verify(source)
        path.write_bytes(original)
