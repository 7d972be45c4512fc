"""Saving, loading and saving in the background, 1 GB on the CPU: am-ckpt against stock torch and safetensors.

A part of ckpt.py. One process, but for the direct layout; methods are interleaved, ratios are
paired by round, the page cache is warm, torch has one thread. The model is three layers of a 7B model in bfloat16.

save: durable as each does it by default: am-ckpt fsyncs and digests, `FileSystemWriter` fsyncs files, the Hugging
Face writer and safetensors do neither; `raw` is fallocate, pwrite and fsync of the same bytes.
load: into existing parameters, with no look at digests, as the others; am-ckpt reads with as many threads as there are
cores, up to four; `raw` is as many threads that do nothing but pread into the same memory, which is as fast as reads
without mmap can be: what counts is 0.9 of their speed or more.
verified: a load that holds all bytes against their digests first, as it does by default, against one that does not;
warm, and after the page cache was told to forget the files.
async: how long a save blocks its caller, after the one before has ended; torch as it is by default, and with a stager
that is kept, to use its memory again; `copy` is a copy into warm memory.
direct: four processes save their FSDP shards into the final files, against saving shards and merging them afterwards.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, FFN = 3, 4096, 11008
SAVES = ["am-ckpt", "dcp", "dcp-hf", "safetensors", "raw"]
LOADS = ["am-ckpt", "dcp", "dcp-hf", "raw"]
ASYNCS = ["am-ckpt", "dcp", "dcp-kept", "copy"]


def build(fill: bool):
    import torch
    from torch import nn

    model = nn.Module()
    # Random bits, so that no block is a hole; another part of them for every parameter.
    bits = torch.randint(-(2**15), 2**15, (2**22,), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    for layer in range(LAYERS):
        shapes = {f"{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN), "norm": (HIDDEN,)}
        for name, shape in shapes.items():
            values = torch.zeros(math.prod(shape), dtype=torch.int16)
            if fill:
                bits = bits.roll(12345)
                for start in range(0, len(values), len(bits)):
                    part = values[start : start + len(bits)]
                    part.copy_(bits[: len(part)])
            parameter = nn.Parameter(values.view(torch.bfloat16).view(shape))
            model.register_parameter(f"layer{layer}_{name}", parameter)
    return model


def saver(method: str, model) -> Callable[[Path], None]:
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    import am_ckpt

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if method == "am-ckpt":
        return lambda path: am_ckpt.Checkpointer(path).save(1, {"model": model})
    if method == "dcp":
        return lambda path: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    if method == "dcp-hf":
        return lambda path: dcp.save(
            tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True), no_dist=True
        )
    if method == "safetensors":

        def save(path: Path) -> None:
            path.mkdir(parents=True)
            save_file(tensors, path / "model.safetensors")

        return save

    def raw(path: Path) -> None:
        path.mkdir(parents=True)
        descriptor = os.open(path / "raw", os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(descriptor, 0, sum(tensor.nbytes for tensor in tensors.values()))
        position = 0
        for tensor in tensors.values():
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            while data:
                count = os.pwrite(descriptor, data[: 2**26], position)
                position, data = position + count, data[count:]
        os.fsync(descriptor)
        os.close(descriptor)

    return raw


def loader(method: str, model, path: Path) -> Callable[[], None]:
    import torch
    import torch.distributed.checkpoint as dcp

    import am_ckpt

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if method == "am-ckpt":
        return lambda: am_ckpt.Checkpointer(path).load({"model": model}, verify=False) and None
    if method == "dcp":
        return lambda: dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    if method == "dcp-hf":
        return lambda: dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    memory = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in tensors.values()]
    starts = itertools.accumulate(map(len, memory), initial=0)
    pieces = [
        (view[offset : offset + 2**24], start + offset)
        for view, start in zip(memory, starts, strict=False)
        for offset in range(0, len(view), 2**24)
    ]

    def read_all() -> None:
        descriptor = os.open(path / "raw", os.O_RDONLY)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            done = sum(pool.map(lambda piece: os.preadv(descriptor, [piece[0]], piece[1]), pieces))
        os.close(descriptor)
        assert done == sum(map(len, memory))

    return read_all


def blocker(method: str, model, folder: Path) -> Callable[[], float]:
    """A function that saves in the background, waits until that has ended, and returns the seconds it was blocked."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    import am_ckpt

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    checkpoints = am_ckpt.Checkpointer(folder / "ours", asynchronous=True, keep_last=1)
    # No pinned memory, no CUDA stream: as async_save itself does on the CPU.
    options = (
        {"async_stager": DefaultStager(StagingOptions(False, False, False, False))} if method == "dcp-kept" else {}
    )
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} if method == "copy" else {}
    steps = itertools.count(1)

    def save() -> float:
        step = next(steps)
        begin = time.perf_counter()
        if method == "am-ckpt":
            checkpoints.save(step, {"model": model})
        elif method == "copy":
            for name, tensor in tensors.items():
                copies[name].copy_(tensor)
        else:
            future = dcp.async_save(tensors, storage_writer=dcp.FileSystemWriter(folder / "dcp"), **options)
        seconds = time.perf_counter() - begin
        if method == "am-ckpt":
            checkpoints.wait()
        elif method != "copy":
            future.result()
            shutil.rmtree(folder / "dcp")
        return seconds

    return save


def cpu() -> float:
    return sum(os.times()[:4])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(action: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    begin, used = time.perf_counter(), cpu()
    action()
    return time.perf_counter() - begin, cpu() - used


def run(folder: Path, rounds: int) -> dict[str, Any]:
    """Everything, in `folder`."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = build(fill=True)
    rows: dict[str, dict[str, list[tuple[float, ...]]]] = {
        kind: {method: [] for method in methods}
        for kind, methods in (("save", SAVES), ("load", LOADS), ("async", ASYNCS))
    }
    try:
        # Round 0 warms up: imports, page cache, memory.
        for _ in range(rounds + 1):
            for method in SAVES:
                save = saver(method, model)
                rows["save"][method].append(measure(functools.partial(save, folder / "out")))
                shutil.rmtree(folder / "out")
        other = build(fill=False)
        for method in LOADS:
            saver(method, model)(folder / method)
        for _ in range(rounds + 1):
            for method in LOADS:
                for parameter in other.parameters():
                    parameter.detach().zero_()
                rows["load"][method].append(measure(loader(method, other, folder / method)))
                pairs = zip(model.parameters(), other.parameters(), strict=True)
                assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs), method
        for method in LOADS:
            shutil.rmtree(folder / method)
        del other
        blockers = {method: blocker(method, model, folder) for method in ASYNCS}
        for _ in range(rounds + 1):
            for method in ASYNCS:
                rows["async"][method].append((blockers[method](), float(resident_bytes())))
        shutil.rmtree(folder / "ours")
    finally:
        dist.destroy_process_group()
    names = dict.fromkeys(rows, ("wall_seconds", "cpu_seconds"))
    names["async"] = ("blocked_seconds", "resident_bytes")
    result: dict[str, Any] = {"bytes": sum(p.nbytes for p in model.parameters())}
    for kind, methods in rows.items():
        result[kind] = {
            method: dict(zip(names[kind], map(statistics.median, zip(*values[1:], strict=True)), strict=True))
            for method, values in methods.items()
        }

    def ratio(kind: str, one: str, two: str, index: int) -> float:
        pairs = zip(rows[kind][one][1:], rows[kind][two][1:], strict=True)
        return round(statistics.median(a[index] / b[index] for a, b in pairs), 3)

    result["hundred_saves"] = hundred_saves(folder)
    result["ratios"] = {
        **{f"save cpu: am-ckpt / {two}": ratio("save", "am-ckpt", two, 1) for two in SAVES[1:]},
        **{f"save wall: am-ckpt / {two}": ratio("save", "am-ckpt", two, 0) for two in SAVES[1:]},
        **{f"load wall: {one} / am-ckpt": ratio("load", one, "am-ckpt", 0) for one in LOADS[1:]},
        **{f"blocked: am-ckpt / {two}": ratio("async", "am-ckpt", two, 0) for two in ASYNCS[1:]},
    }
    return result


def hundred_saves(folder: Path) -> dict[str, int]:
    """Resident memory after the fifth and after the hundredth save in the background of a model of 64 MB."""
    import torch

    import am_ckpt

    model = torch.nn.Linear(4096, 4096, bias=False)
    checkpoints = am_ckpt.Checkpointer(folder / "hundred", asynchronous=True, keep_last=1)
    resident = {}
    for step in range(1, 101):
        checkpoints.save(step, {"model": model})
        checkpoints.wait()
        resident[f"bytes after {step}"] = resident_bytes()
    shutil.rmtree(folder / "hundred")
    return {key: resident[key] for key in ("bytes after 5", "bytes after 100")}


def verified(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a load with and without verification, in turn."""
    import am_ckpt

    am_ckpt.Checkpointer(folder / "verified").save(1, {"model": build(fill=True)})
    model = build(fill=False)
    files = [path for path in (folder / "verified").rglob("*") if path.is_file()]
    rows: dict[str, dict[bool, list[tuple[float, float]]]] = {}
    for cache in ("warm", "cold"):
        rows[cache] = {True: [], False: []}
        for _ in range(rounds + 1):
            for verify, measured in rows[cache].items():
                for path in files if cache == "cold" else ():
                    descriptor = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(descriptor)
                checkpoints = am_ckpt.Checkpointer(folder / "verified")
                measured.append(measure(functools.partial(checkpoints.load, {"model": model}, verify=verify)))
    shutil.rmtree(folder / "verified")
    result: dict[str, Any] = {"bytes": sum(p.nbytes for p in model.parameters())}
    for cache, both in rows.items():
        # The first round warms up.
        pairs = [*zip(both[True][1:], both[False][1:], strict=True)]
        for index, unit in enumerate(("wall", "cpu")):
            result[f"{cache} {unit}: verified / not"] = round(
                statistics.median(a[index] / b[index] for a, b in pairs), 3
            )
        result[f"{cache} seconds"] = {
            "verified": statistics.median(a[0] for a, _ in pairs),
            "not": statistics.median(b[0] for _, b in pairs),
        }
    return result


RANKS = 4


def direct(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a save by four processes that is a Hugging Face folder at once, and of one that is merged after."""
    import torch.multiprocessing

    context = torch.multiprocessing.get_context("spawn")
    rows: Any = context.SimpleQueue()
    torch.multiprocessing.spawn(_direct_rank, (folder, rounds, rows), RANKS)
    seconds = rows.get()
    return {
        "seconds": {method: statistics.median(values) for method, values in seconds.items()},
        "direct / sharded and merged": round(
            statistics.median(a / b for a, b in zip(seconds["direct"], seconds["sharded and merged"], strict=True)), 3
        ),
    }


def _direct_rank(rank: int, folder: Path, rounds: int, rows: Any) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    import am_ckpt

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = build(fill=False)
    for name, parameter in list(model.named_parameters()):
        shape = (parameter.shape[0] // RANKS, *parameter.shape[1:])
        local = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)
        setattr(model, name, torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)])))
    seconds: dict[str, list[float]] = {"direct": [], "sharded and merged": []}
    for number in range(rounds + 1):
        for method, values in seconds.items():
            layout = "direct" if method == "direct" else "sharded"
            dist.barrier()
            begin = time.perf_counter()
            am_ckpt.Checkpointer(folder / "run", layout=layout).save(1, {"model": model})
            if rank == 0 and layout == "sharded":
                am_ckpt.merge(folder / "run" / "step_000001", folder / "merged")
            dist.barrier()
            # The first round warms up.
            if number:
                values.append(time.perf_counter() - begin)
            if rank == 0:
                shutil.rmtree(folder / "run")
                shutil.rmtree(folder / "merged", ignore_errors=True)
    if rank == 0:
        rows.put(seconds)
    dist.destroy_process_group()
