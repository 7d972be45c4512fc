"""A run directory has one run at a time, whoever else starts in it and however: whole, and without a file of another's.

pytest integration_tests/test_start.py -m slow      40 pairs of commands at random offsets
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from am_recipes import cli, lock, run_dir, sft
from integration_tests import runs
from integration_tests.test_resume import CONFIG, ROOT, SHORT, changes, tiny

OTHER = {"optimizer.lr": "0.05"}


def _automodel(arguments: list[str], output: Path) -> None:
    os.chdir(ROOT)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        status = cli.main(arguments)
    os._exit(status)


def automodel(run_dir: Path, output: Path, overrides: Mapping[str, str] | None = None) -> Any:
    """The process of the command, with its output in a file."""
    options = [f"--{key}={value}" for key, value in changes(dict(overrides or {})).items()]
    arguments = [str(CONFIG), f"--run_dir={run_dir}", "--nproc-per-node=1", *options]
    process = runs.SERVER.Process(target=_automodel, args=(arguments, output))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of the two runs alone."""
    folder = tmp_path_factory.mktemp("whole")
    return {"0.002": runs.train(folder, "one", CONFIG, SHORT), "0.05": runs.train(folder, "two", CONFIG, SHORT | OTHER)}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def race(tmp_path: Path, whole: Mapping[str, Path], second: Mapping[str, str], offset: float) -> str:
    """Start the tiny run and, `offset` seconds later, `second` in the same directory; what the loser was told."""
    target, outputs = tmp_path / "run", [tmp_path / "first.txt", tmp_path / "second.txt"]
    first = automodel(target, outputs[0])
    time.sleep(offset)
    processes = [first, automodel(target, outputs[1], second)]
    runs.finish(processes)
    statuses, texts = [process.exitcode for process in processes], [output.read_text() for output in outputs]
    assert sorted(statuses) in ([0, 1], [0, 2], [0, 0]), texts
    if statuses == [0, 0]:
        assert "holds this run, finished" in texts[1]
        assert not second
    loser = statuses.index(max(statuses)) if any(statuses) else 1
    config = yaml.safe_load((target / "config.yaml").read_text())
    won = "0.002" if loser == 1 or not second else "0.05"
    assert str(config["optimizer"]["lr"]) == won, texts
    runs.assert_same_run(target, whole[won])
    assert files(target) == files(whole[won])
    record = json.loads((target / "run.json").read_text())
    assert (record["status"], len(record["launches"])) == ("finished", 1)
    return texts[loser]


@pytest.mark.parametrize(("second", "offset"), [({}, 0.0), (OTHER, 0.0), (OTHER, 0.6)])
def test_two_commands_at_the_same_time(
    tmp_path: Path, whole: dict[str, Path], second: dict[str, str], offset: float
) -> None:
    told = race(tmp_path, whole, second, offset)
    assert "is in use by process" in told or "finished" in told or "a different run" in told


@pytest.mark.slow
@pytest.mark.parametrize("second", [{}, OTHER])
def test_two_commands_at_twenty_offsets(tmp_path: Path, whole: dict[str, Path], second: dict[str, str]) -> None:
    generator = random.Random(3)
    told = []
    for attempt in range(20):
        (tmp_path / str(attempt)).mkdir()
        told.append(race(tmp_path / str(attempt), whole, second, generator.uniform(0, 2)))
    print(*(text.splitlines()[-2:] for text in told), sep="\n")
    # How many come while the first one trains depends on the machine.
    assert sum("is in use by process" in text for text in told) >= 2


def wait_for(path: Path) -> None:
    while not path.is_symlink():
        time.sleep(0.01)


def test_ctrl_c_commits_and_says_where_the_run_goes_on(tmp_path: Path, whole: dict[str, Path]) -> None:
    process = automodel(tmp_path / "run", tmp_path / "output")
    wait_for(tmp_path / "run/checkpoints/latest")
    os.kill(process.pid, signal.SIGINT)
    assert runs.finish([process]) == 75
    told = (tmp_path / "output").read_text()
    assert "Ctrl-C received: the current step is finished and committed. Ctrl-C again quits at once" in told
    step = runs.metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {step} of 10, which is committed; the same command continues with step {step + 1}" in (
        told.replace("\n", " ")
    )
    assert files(tmp_path / "run") >= {f"checkpoints/step_{step:06d}"}

    assert runs.finish([automodel(tmp_path / "run", tmp_path / "output")]) == 0
    runs.assert_same_run(tmp_path / "run", whole["0.002"])


def test_a_deleted_record_does_not_hide_another_run(whole: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "run"
    longer = {"step_scheduler__max_steps": "3", "lr_scheduler": "{}"}
    assert sft.main(tiny(target, **longer)) == 0
    (target / "run.json").unlink()
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    longer["step_scheduler__max_steps"] = "4"
    with pytest.raises(ValueError, match=r"belongs to another run: config.optimizer: .*\"lr\": 0.002.*\"lr\": 0.5"):
        sft.main(tiny(target, optimizer__lr="0.5", **longer))
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert sft.main(tiny(target, **longer)) == 0
    assert runs.metrics(target)[-1]["step"] == 4


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(ValueError, match=r"holds config.yaml, train.py and no run \(no run.json\).*new or empty"):
        sft.main(tiny(tmp_path))
    assert files(tmp_path) == {"train.py", "config.yaml"}


def test_an_attempt_that_was_killed_while_loading_binds_nobody(tmp_path: Path) -> None:
    process = automodel(tmp_path / "run", tmp_path / "output", OTHER)
    while not (tmp_path / "run" / lock.NAME).exists():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert files(tmp_path / "run") == {lock.NAME}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with run_dir.claim(tiny(tmp_path / "run")) as finished:
            assert not finished
            assert str(os.getpid()) in (tmp_path / "run" / lock.NAME).read_text()
    finally:
        dist.destroy_process_group()
    assert files(tmp_path / "run") == set()
