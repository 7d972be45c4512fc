"""Runs of a recipe in processes that can be killed, and what is compared of two runs.

The processes are forked from a server that has imported everything, so that a start costs no seconds. A session has one
such server: the workers of `am_testing.run_distributed` come from it as well, so it starts first (`start_server`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from am_recipes import cli, configs
from am_testing import free_port

ROOT = Path(__file__).resolve().parents[1]
# The config of each recipe that runs in seconds, in `recipes/configs`.
TINY = {"sft": "tiny.yaml", "pretrain": "pretrain/tiny.yaml", "kd": "kd/tiny.yaml", "vlm": "vlm/tiny.yaml"}
# What two equal runs differ in.
TIMINGS = ("time", "tokens_per_second", "peak_memory_bytes")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "am_recipes.kd",
        "am_recipes.pretrain",
        "am_recipes.sft",
        "am_recipes.vlm",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "transformers.models.llama.modeling_llama",
        "transformers.models.idefics3.modeling_idefics3",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "datasets",
        "mlflow",
        "peft",
        "am_ckpt._train.checkpointer",
    ]
)


def start_server() -> None:
    """Start the server with what it imports, before anyone else starts one with less."""
    # The import of mlflow would report itself.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    process = SERVER.Process()
    process.start()
    process.join()


# Progress bars of other libraries, which a message may follow.
_PROGRESS = r"(Generating|Loading weights|Writing model|Saving)[^\n]*?(?=error: |\n|$)"


def shipped(name: str) -> dict[str, Any]:
    """A config of `recipes/configs`, for a copy of it anywhere: `${here}` is spelt out."""
    file = ROOT / "recipes" / "configs" / name
    config: dict[str, Any] = yaml.safe_load(file.read_text().replace("${here}", str(file.parent)))
    return config


def merge(config: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Merge `change` into a config in place; None takes a key out, a section with a target is replaced."""
    for key, value in change.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, Mapping) and "_target_" not in value:
            merge(config.setdefault(key, {}), value)
        else:
            config[key] = value


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config with values at dotted paths; None takes a key out."""
    config: dict[str, Any] = json.loads(json.dumps(base))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        # A copy: a later change must not reach the values of this one.
        place[key] = copy.deepcopy(value)
        if value is None:
            del place[key]
    return config


def command(*arguments: str) -> tuple[int, str]:
    """The exit status of `automodel ARGUMENTS` in this process, and its messages on stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli.main(arguments)
    return status, re.sub(_PROGRESS, "", errors.getvalue()).strip()


def require_refusal(outcome: tuple[int, str], status: int, *patterns: str) -> None:
    """Raise AssertionError unless `outcome` of `command` is `status` and one message with all `patterns`."""
    found, text = outcome
    assert found == status, text
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"
    assert "Traceback" not in text


def start(config: Path, run_dir: Path, overrides: Mapping[str, str], world_size: int = 1) -> list[Any]:
    """The processes of `automodel CONFIG --run_dir RUN_DIR ...`, one a rank, running."""
    port = free_port()
    arguments = (config, [("run_dir", str(run_dir)), *overrides.items()])
    processes = [SERVER.Process(target=_run, args=(*arguments, rank, world_size, port)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def start_file(file: Path, arguments: Sequence[str], folder: Path, output: Path, world_size: int = 1) -> list[Any]:
    """The processes of `python FILE ARGUMENTS` in `folder`, one a rank, running; rank N prints to `output`/N.txt."""
    port = free_port()
    processes = [
        SERVER.Process(target=_run_file, args=(file, arguments, folder, output, rank, world_size, port))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _run_file(
    file: Path, arguments: Sequence[str], folder: Path, output: Path, rank: int, world_size: int, port: int
) -> None:
    _be_rank(rank, world_size, port)
    os.chdir(folder)
    output.mkdir(exist_ok=True)
    with (output / f"{rank}.txt").open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="__main__")


def _be_rank(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _run(config: Path, overrides: list[tuple[str, str]], rank: int, world_size: int, port: int) -> None:
    os.chdir(ROOT)
    _be_rank(rank, world_size, port)
    parsed = configs.parse(config, overrides)
    raise SystemExit(importlib.import_module(f"am_recipes.{parsed.recipe}").main(parsed))


def train(
    folder: Path, name: str, config: Path, overrides: Mapping[str, str] | None = None, world_size: int = 1
) -> Path:
    """Run to the end in forked processes; the run directory."""
    assert finish(start(config, folder / name, overrides or {}, world_size)) == 0
    return folder / name


def finish(processes: list[Any]) -> int:
    """Wait for all ranks; the largest of their exit statuses."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
    return max(process.exitcode for process in processes)


def kill_when(processes: list[Any], path: Path) -> None:
    """SIGKILL for every rank as soon as `path` exists."""
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
