"""What every package ships: its licence, a README whose links lead somewhere, the version that it says it has."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [*sorted((ROOT / "packages").iterdir()), ROOT / "recipes"]


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_distributions(folder: Path, tmp_path: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    subprocess.run(["uv", "build", "-q", "--no-sources", "-o", str(tmp_path), str(folder)], check=True)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    stem = source.name.removesuffix(".tar.gz")
    licence = (ROOT / "LICENSE").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{stem}.dist-info/licenses/LICENSE") == licence
        assert b"License-Expression: Apache-2.0\nLicense-File: LICENSE\n" in archive.read(f"{stem}.dist-info/METADATA")
    with tarfile.open(source) as archive:
        names = set(archive.getnames())
        assert (file := archive.extractfile(f"{stem}/LICENSE")) is not None
        assert file.read() == licence
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (folder / "README.md").read_text())
    assert [link for link in links if f"{stem}/{link}" not in names] == []
    module = importlib.import_module(project["name"].replace("-", "_"))
    assert module.__version__ == project["version"]


@pytest.mark.parametrize("command", [["am_ckpt"], ["am_data._cli"], ["am_recipes.cli"]])
def test_commands_say_their_version(command: list[str]) -> None:
    shown = subprocess.run([sys.executable, "-m", *command, "--version"], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"[a-z-]+ \d+\.\d+\.\d+\n", shown.stdout)
