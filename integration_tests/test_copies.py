"""A recipe is one file to copy and change: a copy anywhere runs itself, and not the recipe it was copied from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from am_recipes import configs
from integration_tests import runs

FEW = ("--step_scheduler.max_steps", "2", "--lr_scheduler", "{}")
DONE = "            this.done("


def copied(recipe: str, folder: Path) -> Path:
    """A copy of the recipe that prints a line at every step and trains on half of the loss, by a module beside it."""
    text = (runs.ROOT / f"recipes/src/am_recipes/{recipe}.py").read_text()
    changes = {
        "import torch\n": "import torch\nimport beside\n",
        DONE: f'            print("changed:", this.step + 1, flush=True)\n{DONE}',
        "am_mesh.forward_backward(model, micro_batches, forward, targets)": "am_mesh.forward_backward(\n"
        "                model, micro_batches, beside.halved(forward), targets\n"
        "            )",
    }
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    folder.mkdir()
    (folder / "beside.py").write_text(
        "def halved(forward):\n"
        "    def half(number, batch):\n"
        "        return {name: value / 2 for name, value in forward(number, batch).items()}\n"
        "    return half\n"
    )
    file = folder / f"my{recipe}.py"
    file.write_text(text)
    return file


def first_loss(run_dir: Path) -> float:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return float(next(row["loss"] for row in rows if row["step"] == 1))


def arguments(recipe: str, run_dir: Path) -> list[str]:
    return ["-c", f"recipes/configs/{runs.TINY[recipe]}", "--run_dir", str(run_dir), *FEW]


@pytest.mark.parametrize(("recipe", "world_size"), [("sft", 1), ("sft", 2), ("pretrain", 1), ("kd", 1), ("vlm", 1)])
def test_a_changed_copy_runs_itself(tmp_path: Path, recipe: str, world_size: int) -> None:
    file = copied(recipe, tmp_path / "mine")
    original = runs.ROOT / f"recipes/src/am_recipes/{recipe}.py"
    losses = []
    for name, program, expected in (("copy", file, ["changed: 1", "changed: 2"]), ("original", original, [])):
        printed, run_dir = tmp_path / f"{name} printed", tmp_path / name
        processes = runs.start_file(program, arguments(recipe, run_dir), runs.ROOT, printed, world_size)
        assert runs.finish(processes) == 0, (printed / "0.txt").read_text()
        for rank in range(world_size):
            lines = (printed / f"{rank}.txt").read_text().splitlines()
            assert [line for line in lines if line.startswith("changed: ")] == expected
        losses.append(first_loss(run_dir))
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-5)


def test_a_copy_starts_several_processes_of_itself(tmp_path: Path) -> None:
    """As typed: with its own options, from another folder than its own."""
    file = copied("sft", tmp_path / "mine")
    command = [sys.executable, str(file), *arguments("sft", tmp_path / "run"), "--nproc-per-node", "2"]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("changed:") == 4


def test_a_copy_demands_the_config_of_its_recipe(tmp_path: Path) -> None:
    file, printed = copied("sft", tmp_path / "mine"), tmp_path / "printed"
    processes = runs.start_file(file, arguments("kd", tmp_path / "run"), runs.ROOT, printed)
    assert runs.finish(processes) == 2
    message = "recipes/configs/kd/tiny.yaml:2: recipe: the command runs 'sft', the config says 'kd'"
    assert (printed / "0.txt").read_text().startswith(message)


def test_a_copy_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Imported and called, twice in one process."""
    file = copied("sft", tmp_path / "mine")
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.chdir(runs.ROOT)
    import mysft

    for run in ("first", "second"):
        overrides = [("run_dir", str(tmp_path / run)), ("step_scheduler.max_steps", "2"), ("lr_scheduler", "{}")]
        assert mysft.main(configs.parse("recipes/configs/tiny.yaml", overrides)) == 0
        assert "changed: 2" in capsys.readouterr().out
    assert first_loss(tmp_path / "first") == first_loss(tmp_path / "second")
