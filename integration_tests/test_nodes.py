"""Two machines, both here: the commands typed on each, stopped and continued; a run directory that is two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from am_recipes import run_dir
from am_testing import free_port, run_distributed
from integration_tests import runs
from integration_tests.test_resume import CONFIG, ROOT, SHORT, tiny

COMMANDS = (["-m", "am_recipes.cli"], [str(ROOT / "recipes/src/am_recipes/sft.py"), "-c"])


def start(target: Path, outputs: list[Path]) -> list[subprocess.Popen[bytes]]:
    """`automodel CONFIG ...` on the first machine and `python sft.py -c CONFIG ...` on the second."""
    port = free_port()
    processes = []
    for number, (command, output) in enumerate(zip(COMMANDS, outputs, strict=True)):
        place = ["--nnodes=2", "--node-rank", str(number), "--rdzv-endpoint", f"127.0.0.1:{port}"]
        options = [f"--{key}={value}" for key, value in SHORT.items()]
        arguments = [*command, str(CONFIG), "--run_dir", str(target), *options, *place, "--nproc-per-node", "1"]
        with output.open("w") as stream:
            processes.append(subprocess.Popen([sys.executable, *arguments], stdout=stream, stderr=stream))
    return processes


def test_a_signal_to_one_machine_stops_both_and_the_same_commands_continue(tmp_path: Path) -> None:
    whole = runs.train(tmp_path, "whole", CONFIG, SHORT, world_size=2)
    target, outputs = tmp_path / "run", [tmp_path / "0.txt", tmp_path / "1.txt"]
    processes = start(target, outputs)
    while not (target / "checkpoints/latest").is_symlink():
        assert all(process.poll() is None for process in processes), [output.read_text() for output in outputs]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGUSR1)
    assert [process.wait(60) for process in processes] == [75, 75], [output.read_text() for output in outputs]
    told = [output.read_text() for output in outputs]
    step = runs.metrics(target)[-1]["step"]
    assert step < 10
    assert (target / "checkpoints/latest").resolve().name == f"step_{step:06d}"
    assert "another rank was told to stop: the current step is finished and committed" in told[0]
    assert f"stopped after step {step} of 10, which is committed" in told[0].replace("\n", " ")
    assert "SIGUSR1 received: the current step is finished and committed" in told[1]
    assert not any("error" in text or "failed" in text for text in told), told

    assert [process.wait(120) for process in start(target, outputs)] == [0, 0], [path.read_text() for path in outputs]
    runs.assert_same_run(target, whole)
    # What the run has to say, it says on the first machine.
    assert "finished: " in outputs[0].read_text()
    assert outputs[1].read_text() == ""


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


def test_ranks_that_were_given_different_configs_are_refused(tmp_path: Path) -> None:
    answers = run_distributed(claimed, 2, tmp_path, str(tmp_path / "run"), [{}, {"optimizer__lr": "0.1"}])
    assert answers[0] == answers[1]
    assert "rank 1 on " in answers[0][0]
    assert "was given another config than rank 0 on " in answers[0][0]
    assert ": optimizer.lr; every machine needs the same file and the same command" in answers[0][0]
    assert not (tmp_path / "run").exists()
