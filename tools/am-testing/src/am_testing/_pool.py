"""One pool of gloo worker processes for a whole test session.

Starting a process costs seconds (importing torch, FSDP, DTensor), a job on a running one costs milliseconds. So the
workers come from a `forkserver` that has imported everything once, stay alive, and make a fresh process group over a
fresh `FileStore` for every job. There are as many as the largest job so far had ranks. A rank that fails or hangs takes
the pool down; the next job builds a new one.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo"]
# Preloaded as well where the tests have imported them by the time the pool starts.
PRELOAD_IF_USED = [
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.modeling_utils",
    "peft",
    "datasets",
]


def _load_module(name: str, path: str) -> None:
    """Make the module that defines a job importable: pytest's importlib mode leaves test files off `sys.path`."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Unpickling imports the parents too, which pytest named after the folders that the file is in.
    names = name.split(".")
    for depth, folder in zip(range(len(names) - 1, 0, -1), Path(path).parents, strict=False):
        package = types.ModuleType(".".join(names[:depth]))
        package.__path__ = [str(folder)]
        sys.modules.setdefault(package.__name__, package)
    spec.loader.exec_module(module)


def _worker(connection: multiprocessing.connection.Connection) -> None:
    import torch
    import torch.distributed as dist

    # Where an abort or a segmentation fault ends a worker, its stacks are in what pytest captured.
    faulthandler.enable()
    torch.set_num_threads(1)
    while True:
        try:
            module_name, module_path = connection.recv()
        except EOFError:
            return
        payload = connection.recv_bytes()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            _load_module(module_name, module_path)
            function, rank, world_size, store_path, args, timeout = pickle.loads(payload)
        except BaseException as error:  # noqa: BLE001 - an import error in the test file must reach the test
            connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
            continue
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
        )
        try:
            # torch.distributed has it by a star import, which type checkers do not count as public.
            store = dist.FileStore(store_path, world_size)  # type: ignore[attr-defined]
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout),
            )
            try:
                # A rank with nothing to exchange would leave while another still connects to it.
                dist.barrier()
                result = function(*args)
            finally:
                dist.destroy_process_group()
            connection.send((True, result))
        except BaseException as error:  # noqa: BLE001 - every failure must reach the test, exits included
            connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Pool:
    """Up to `size` worker processes that run functions of importable modules, one gloo rank each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Run `function(*args)` on `world_size` ranks and return their results in rank order.

        `function`, `args` and the results are pickled, so `function` is a module-level function. Inside it the default
        process group is initialised. Raises `RuntimeError` with the tracebacks of the ranks that failed, or
        `TimeoutError` after `timeout` seconds.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size={world_size} must be between 1 and the pool's size {self.size}")
        self._start(world_size)
        with tempfile.TemporaryDirectory(prefix="am-testing-") as folder:
            store = os.path.join(folder, "store")
            for rank in range(world_size):
                connection = self._workers[rank][1]
                connection.send((function.__module__, inspect.getfile(function)))
                connection.send_bytes(ForkingPickler.dumps((function, rank, world_size, store, args, timeout)))
            waiting: dict[Any, int] = {self._workers[rank][1]: rank for rank in range(world_size)}
            results: list[Any] = [None] * world_size
            failures: dict[int, str] = {}
            deadline = time.monotonic() + timeout
            while waiting:
                # Once one rank has failed the others usually hang in a collective: give them a moment, then stop.
                patience = 2.0 if failures else deadline - time.monotonic()
                ready = multiprocessing.connection.wait(list(waiting), max(patience, 0.0))
                if not ready:
                    break
                for readable in ready:
                    rank = waiting.pop(readable)
                    try:
                        succeeded, value = self._workers[rank][1].recv()
                    except (EOFError, ConnectionResetError):
                        succeeded, value = False, "the worker process died"
                    if succeeded:
                        results[rank] = value
                    else:
                        failures[rank] = value
            if failures or waiting:
                self.close()
        if failures:
            raise RuntimeError(
                "\n".join(f"rank {rank} of {world_size}: {text}" for rank, text in sorted(failures.items()))
            )
        if waiting:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {world_size} did not finish within {timeout} s")
        return results

    def _start(self, number: int) -> None:
        """Start what is missing to so many workers."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD + [name for name in PRELOAD_IF_USED if name in sys.modules])
        for _ in range(len(self._workers), number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End the workers. A later `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()
