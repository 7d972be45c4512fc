"""Runs of a recipe in processes that can be killed, and what is compared of two runs.

The processes are forked from a server that has imported everything, so that a start costs no seconds.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from am_recipes import config as configs

ROOT = Path(__file__).resolve().parents[1]
# What two equal runs differ in.
TIMINGS = ("time", "tokens_per_second", "peak_memory_bytes")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "am_recipes.sft",
        "am_recipes.pretrain",
        "am_recipes.vlm",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
        "transformers.models.idefics3.modeling_idefics3",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "datasets",
        "am_ckpt._checkpointer",
    ]
)


def start(config: Path, run_dir: Path, overrides: Mapping[str, str], world_size: int = 1) -> list[Any]:
    """The processes of `automodel CONFIG --run_dir RUN_DIR ...`, one a rank, running."""
    port = random.randint(20000, 50000)
    arguments = (config, [("run_dir", str(run_dir)), *overrides.items()])
    processes = [SERVER.Process(target=_run, args=(*arguments, rank, world_size, port)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def _run(config: Path, overrides: list[tuple[str, str]], rank: int, world_size: int, port: int) -> None:
    os.chdir(ROOT)
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parsed = configs.parse(config, overrides)
    raise SystemExit(importlib.import_module(f"am_recipes.{parsed.recipe}").main(parsed))


def finish(processes: list[Any]) -> int:
    """Wait for all ranks; the largest of their exit statuses."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
    return max(process.exitcode for process in processes)


def kill_when(processes: list[Any], path: Path) -> None:
    """SIGKILL for every rank as soon as ``path`` exists."""
    while not path.exists():
        assert all(process.is_alive() for process in processes), f"the run ended without {path}"
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without `TIMINGS`."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files under a folder, by the folder of its file and its name."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Equal metrics, and weights, optimizer and state of the last checkpoint equal bit for bit."""
    assert metrics(run_dir) == metrics(reference)
    mine, theirs = tensors(run_dir / "checkpoints" / "latest"), tensors(reference / "checkpoints" / "latest")
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
