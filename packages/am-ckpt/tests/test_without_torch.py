"""The base install has numpy and xxhash and no torch: reading, merging and checking work, the rest says what it needs.

`AM_CKPT_BARE_PYTHON`: the Python of an environment that `pip install am-ckpt` made; `nox -s alone` gives it. Without
it, this Python with nothing on its path but the three packages stands for it.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file
from test_cli import shard
from torch import nn
from without_torch import check, tensors

import am_ckpt

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MODEL = {
    "a.weight": torch.arange(24, dtype=torch.float32).view(4, 6),
    "b.weight": torch.arange(8, dtype=torch.bfloat16).view(4, 2),
    "c.weight": torch.arange(8, dtype=torch.float32).view(4, 2).to(torch.float8_e4m3fn),
}


# Runs a script, its path and arguments after a folder that goes on the path.
START = (
    "import runpy, sys; sys.path.insert(0, sys.argv[1]); del sys.argv[:2]; runpy.run_path(sys.argv[0], {}, '__main__')"
)


@pytest.fixture
def python(tmp_path: Path) -> list[str]:
    """The start of a command line: a Python that has no torch."""
    given = os.environ.get("AM_CKPT_BARE_PYTHON")
    if given is not None:
        return [given]
    packages = tmp_path / "site-packages"
    packages.mkdir()
    for package in (am_ckpt, numpy, xxhash):
        folder = Path(str(package.__file__)).parent
        (packages / folder.name).symlink_to(folder)
        # Shared libraries of a wheel, where it has any.
        if (libraries := folder.with_name(f"{folder.name}.libs")).is_dir():
            (packages / libraries.name).symlink_to(libraries)
    return [sys.executable, "-I", "-S", "-c", START, str(packages)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of one model of each kind, what a merge of them holds, and a model that differs a little."""
    folder = tmp_path / "checkpoints"
    dcp.save({"model": MODEL}, checkpoint_id=folder / "distcp")
    halves = [
        {name: (tensor[rows], [rows.start, 0]) for name, tensor in MODEL.items()} for rows in (slice(0, 2), slice(2, 4))
    ]
    for rank, half in enumerate(halves, 1):
        shard(folder / "shards", rank, half)
    model = nn.Module()
    for name, tensor in MODEL.items():
        child = nn.Module()
        child.register_parameter("weight", nn.Parameter(tensor, requires_grad=False))
        model.add_module(name[0], child)
    am_ckpt.Checkpointer(folder / "steps").save(3, {"model": model})
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    other = {**MODEL, "b.weight": MODEL["b.weight"].clone(), "c.weight": MODEL["c.weight"].clone()}
    other["b.weight"][0, 0] = 0.5
    other["c.weight"][0, 0] = -0.25
    am_ckpt.merge(folder / "distcp", folder / "whole")
    (folder / "expected.json").write_text(json.dumps(tensors(folder / "whole" / "model.safetensors")))
    dcp.save({"model": other}, checkpoint_id=folder / "other")
    return folder


def test_what_needs_no_torch_works_without_it(folder: Path, python: list[str]) -> None:
    subprocess.run([*python, str(Path(__file__).with_name("without_torch.py")), str(folder)], check=True)
    for kind in ("distcp", "shards", "step_000003"):
        merged = load_file(folder / f"merged-{kind}" / "model.safetensors")
        assert merged.keys() == MODEL.keys()
        assert all(
            torch.equal(merged[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in MODEL.items()
        )


def test_the_check_needs_an_environment_without_torch(folder: Path) -> None:
    with pytest.raises(AssertionError, match="torch is installed"):
        check(folder)


def test_torch_is_imported_by_train_alone() -> None:
    """At module level; what a cast or `.distcp` output needs is imported where it is done."""
    names = [
        module.name
        for module in pkgutil.walk_packages(am_ckpt.__path__, "am_ckpt.")
        if not module.name.startswith("am_ckpt._train") and not module.name.endswith("__main__")
    ]
    assert {name.split(".")[1] for name in names} >= {"_copy", "_files", "_tools", "errors"}
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names}]; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
