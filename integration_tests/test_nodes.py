"""Two machines, both here: the commands typed on each, stopped and continued; a run directory that is two."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from am_recipes import run_dir
from am_testing import free_port, run_distributed
from integration_tests import runs
from integration_tests.test_resume import CONFIG, ROOT, SHORT, tiny

RECIPES = ROOT / "recipes/src/am_recipes"


def start(target: Path, outputs: list[Path]) -> list[Any]:
    """`automodel CONFIG ...` on the first machine and `python sft.py -c CONFIG ...` on the second.

    The commands are forked, as what they import costs seconds; the ranks are processes that torchrun starts.
    """
    port, processes = free_port(), []
    options = [str(CONFIG), "--run_dir", str(target), *(f"--{key}={value}" for key, value in SHORT.items())]
    for number, (file, output) in enumerate(zip(("cli.py", "sft.py"), outputs, strict=True)):
        place = ["--nnodes=2", "--node-rank", str(number), "--rdzv-endpoint", f"127.0.0.1:{port}"]
        arguments = ["-c", *options, *place, "--nproc-per-node", "1"]
        processes += runs.start_file(RECIPES / file, arguments[file == "cli.py" :], ROOT, output)
    return processes


def test_a_signal_to_one_machine_stops_both_and_the_run_continues(tmp_path: Path) -> None:
    """It continues as two ranks of one machine: the ranks are the same, wherever they are."""
    whole = runs.train(tmp_path, "whole", CONFIG, SHORT, world_size=2)
    target, outputs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    processes = start(target, outputs)

    def told() -> list[str]:
        return [(output / "0.txt").read_text() for output in outputs]

    while not (target / "checkpoints/latest").is_symlink():
        assert all(process.is_alive() for process in processes), told()
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGUSR1)
    for process in processes:
        process.join(120)
    first, second = told()
    assert [process.exitcode for process in processes] == [75, 75], told()
    step = runs.metrics(target)[-1]["step"]
    assert step < 10
    assert (target / "checkpoints/latest").resolve().name == f"step_{step:06d}"
    # What the run has to say, it says on the first machine.
    assert "another rank was told to stop: the current step is finished and committed" in first
    assert f"stopped after step {step} of 10, which is committed" in first.replace("\n", " ")
    assert second.strip().startswith("SIGUSR1 received: the current step is finished and committed")
    assert second.count("\n") == 2
    assert "error" not in first
    assert "failed" not in first

    assert runs.finish(runs.start(CONFIG, target, SHORT, world_size=2)) == 0
    runs.assert_same_run(target, whole)


def claimed(folder: Path, target: str, overrides: list[dict[str, str]]) -> tuple[str, list[str]]:
    """What a rank is told that starts in a folder of its own, and what lies there then."""
    mine = folder / str(dist.get_rank())
    mine.mkdir()
    os.chdir(mine)
    told = "mine"
    try:
        with run_dir.claim(tiny(Path(target), **overrides[dist.get_rank()])):
            pass
    except ValueError as error:
        told = str(error)
    finally:
        os.chdir(ROOT)
    return told, [path.name for path in mine.iterdir()]


def test_a_run_directory_that_is_not_the_same_on_every_rank_is_refused_on_all(tmp_path: Path) -> None:
    answers = run_distributed(claimed, 2, tmp_path, "run", [{}, {}])
    assert answers[0] == answers[1]
    told, left = answers[0]
    assert "run_dir=run is not one directory: rank 1 on " in told
    assert f"does not see in {tmp_path}/1/run what rank 0 on " in told
    assert f"has made in {tmp_path}/0/run; it must be on storage that every machine has" in told
    assert left == []


@pytest.mark.parametrize("key", ["optimizer.lr", "distributed.reduce_dtype"])
def test_ranks_that_were_given_different_configs_are_refused(tmp_path: Path, key: str) -> None:
    other = {key.replace(".", "__"): {"optimizer.lr": "0.1"}.get(key, "bfloat16")}
    answers = run_distributed(claimed, 2, tmp_path, str(tmp_path / "run"), [{}, other])
    assert answers[0] == answers[1]
    assert "rank 1 on " in answers[0][0]
    assert "was given another config than rank 0 on " in answers[0][0]
    assert f": {key}; every machine needs the same file and the same command" in answers[0][0]
    assert not (tmp_path / "run").exists()


def claimed_with_other_packages(folder: Path) -> tuple[str, list[str]]:
    """The same of ranks that are alike but for a package of rank 1, which another one of that name hides."""
    if dist.get_rank():
        place = folder / "site" / "transformers-1.2.3.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 1.2.3\n")
        sys.path.insert(0, str(place.parent))
    try:
        return claimed(folder, str(folder / "run"), [{}, {}])
    finally:
        if dist.get_rank():
            sys.path.remove(str(folder / "site"))


def test_ranks_with_different_packages_are_refused(tmp_path: Path) -> None:
    answers = run_distributed(claimed_with_other_packages, 2, tmp_path)
    assert answers[0] == answers[1]
    assert "has other packages than rank 0 on " in answers[0][0]
    assert f": transformers 1.2.3, not {version('transformers')}; every machine needs the same" in answers[0][0]
    assert not (tmp_path / "run").exists()
