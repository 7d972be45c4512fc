"""The best model is what one gets when one asks for it, and a run that no longer improves ends."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from am_recipes import sft
from integration_tests import runs
from integration_tests.test_resume import CONFIG, changes, tiny

# Rates that make each recipe's model worse after it was better.
RISING = {"sft": 0.05, "kd": 0.2, "pretrain": 0.05, "vlm": 0.05}
LORA = {"r": 2, "lora_alpha": 64, "target_modules": "all-linear"}
# Validations at 2, 4, 6, ... with the lowest at 4; checkpoints at 3, 6, ...
UP_AGAIN = {
    "optimizer__lr": "0.02",
    "lr_scheduler": "{}",
    "step_scheduler__val_every_steps": "2",
    "step_scheduler__ckpt_every_steps": "3",
}


def validations(run_dir: Path) -> dict[int, float]:
    """The loss of the first validation set by step, those after the first step."""
    return {row["step"]: row["val_loss"] for row in runs.metrics(run_dir) if "val_loss" in row and row["step"]}


def best_step(run_dir: Path) -> int:
    losses = validations(run_dir)
    return min(losses, key=lambda step: losses[step])


def same_weights(folder: Path, other: Path) -> bool:
    mine, theirs = (runs.tensors(place) for place in (folder, other))
    mine, theirs = ({name.partition("/")[2]: tensor for name, tensor in each.items()} for each in (mine, theirs))
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("recipe", "peft"), [(recipe, None) for recipe in runs.TINY] + [("sft", LORA)])
def test_the_best_validation_is_exported(tmp_path: Path, recipe: str, peft: dict[str, Any] | None) -> None:
    config = runs.shipped(runs.TINY[recipe])
    steps = {"max_steps": 4, "max_tokens": None, "val_every_steps": 1, "ckpt_every_steps": None}
    change = {
        "step_scheduler": steps,
        "export": {"which": "best"},
        "generate": None,
        "optimizer": {"lr": RISING[recipe]},
    }
    runs.merge(config, change | {"lr_scheduler": None, "checkpoint": {"keep_last": 1}})
    if peft is not None:
        config |= {"peft": peft, "model": {"name_or_path": str(tiny_model(tmp_path))}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_dir = tmp_path / "run"
    assert runs.command(str(tmp_path / "config.yaml"), "--run_dir", str(run_dir)) == (0, "")
    best, checkpoints = best_step(run_dir), run_dir / "checkpoints"
    assert best < 4
    assert {path.name for path in checkpoints.glob("step_*")} == {f"step_{best:06d}", "step_000004"}
    assert same_weights(run_dir / "export", checkpoints / f"step_{best:06d}" / "model")
    assert not same_weights(run_dir / "export", checkpoints / "step_000004" / "model")


def tiny_model(folder: Path) -> Path:
    """A folder with weights, which an adapter can name."""
    run_dir = folder / "base"
    assert sft.main(tiny(run_dir, step_scheduler__max_steps="1", lr_scheduler="{}")) == 0
    return run_dir / "export"


def test_every_validation_counts_for_the_best_checkpoint(tmp_path: Path) -> None:
    """Not only those that fall on a step with a checkpoint."""
    assert sft.main(tiny(tmp_path, step_scheduler__max_steps="8", checkpoint__keep_best="2", **UP_AGAIN)) == 0
    losses = validations(tmp_path)
    lowest = sorted(losses, key=lambda step: losses[step])[:2]
    assert lowest[0] == 4
    assert (tmp_path / "checkpoints/best").readlink() == Path("step_000004")
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {*lowest, 8}


def test_a_worse_last_validation_is_told_and_the_same_command_exports_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"step_scheduler__max_steps": "8", "checkpoint__keep_best": "1", **UP_AGAIN}
    assert sft.main(tiny(tmp_path, **run)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "after step 8 and was" in told
    assert "after step 4; the same command with --export.which best exports that one" in told
    assert not same_weights(tmp_path / "export", tmp_path / "checkpoints/step_000004/model")
    rows = runs.metrics(tmp_path)
    assert sft.main(tiny(tmp_path, **run, export__which="best")) == 0
    assert same_weights(tmp_path / "export", tmp_path / "checkpoints/step_000004/model")
    assert runs.metrics(tmp_path) == rows
    capsys.readouterr()
    assert sft.main(tiny(tmp_path, **run, export__which="best")) == 0
    assert "holds this run, finished" in capsys.readouterr().out


def test_a_best_step_that_was_not_kept_is_refused_before_anything_happens(tmp_path: Path) -> None:
    run = {"step_scheduler__max_steps": "8", **UP_AGAIN}
    assert sft.main(tiny(tmp_path, **run)) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"export.which: best so far is step 4 with val_loss .* no checkpoint of it"):
        sft.main(tiny(tmp_path, **run, export__which="best"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_early_stopping_ends_the_run_as_finished_also_when_it_was_killed(tmp_path: Path) -> None:
    early = {"early_stopping": "{patience: 2}", "step_scheduler__max_steps": "30", "checkpoint__keep_last": "2"}
    assert sft.main(tiny(tmp_path / "whole", **early, **UP_AGAIN)) == 0
    assert list(validations(tmp_path / "whole")) == [2, 4, 6, 8]
    record = json.loads((tmp_path / "whole/run.json").read_text())
    assert record["status"].startswith("finished: early, after step 8 of 30, as val_loss has not fallen below 6.")
    assert (tmp_path / "whole/checkpoints/latest").readlink() == Path("step_000008")
    assert (tmp_path / "whole/export/config.json").exists()
    assert sft.main(tiny(tmp_path / "whole", **early, **UP_AGAIN)) == 0
    assert len(json.loads((tmp_path / "whole/run.json").read_text())["launches"]) == 1

    # Its patience is in the checkpoint of step 6: one validation brought nothing.
    processes = runs.start(CONFIG, tmp_path / "killed", changes(early | UP_AGAIN))
    runs.kill_when(processes, tmp_path / "killed/checkpoints/step_000006")
    assert sft.main(tiny(tmp_path / "killed", **early, **UP_AGAIN)) == 0
    runs.assert_same_run(tmp_path / "killed", tmp_path / "whole")

    # Without it the same run goes on.
    on = early | {"early_stopping": "null", "step_scheduler__max_steps": "30", "step_scheduler__val_every_steps": "30"}
    assert sft.main(tiny(tmp_path / "whole", **(UP_AGAIN | on))) == 0
    assert runs.metrics(tmp_path / "whole")[-1]["step"] == 30


def test_checkpoints_by_time_and_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    none = {"step_scheduler__ckpt_every_steps": "null", "step_scheduler__val_every_steps": "null"}

    def steps(name: str, **overrides: str) -> list[str]:
        assert sft.main(tiny(tmp_path / name, **none, **overrides)) == 0
        return sorted(path.name for path in (tmp_path / name / "checkpoints").glob("step_*"))

    three = {"step_scheduler__max_steps": "3", "lr_scheduler": "{}"}
    assert steps("end", **three) == ["step_000003"]
    # Those by time are there until the next one is, or as long as somebody wants one.
    pin = tmp_path / "minutes/checkpoints/step_000001.pin"
    pin.parent.mkdir(parents=True)
    pin.touch()
    assert steps("minutes", step_scheduler__ckpt_every_minutes="1e-9", **three) == [
        *("step_000001", "step_000001.pin"),
        "step_000003",
    ]
    epochs = {"dataset__split": "train[:24]", "step_scheduler__ckpt_every_epoch": "true"}
    found = steps("epochs", **epochs)
    rows = [row for row in runs.metrics(tmp_path / "epochs") if "loss" in row]
    ends = [row["step"] for row, after in itertools.pairwise(rows) if after["epoch"] > row["epoch"]]
    assert ends
    assert found == [f"step_{step:06d}" for step in [*ends, 10]]
