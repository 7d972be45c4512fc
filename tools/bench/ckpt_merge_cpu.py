"""Merging 4 ranks' shards of a 1 GB checkpoint: am-ckpt against ``cp -r`` of the same bytes and torch's consolidation.

Run from the repository root: ``python tools/bench/ckpt_merge_cpu.py``. Shards are files as torch's
``HuggingFaceStorageWriter`` lays them out: FSDP (dim 0) and tensor parallel (dim 1 of every matrix). Every measurement
is a fresh process that imports first; methods are interleaved, ratios are paired by round, the page cache is warm.
``cp`` does not wait for the disk, so it is compared with ``fsync=False``, and ``cp`` and ``sync`` with the default.
Results are compared bit for bit once. Then: the peak of resident memory, above that before the merge, for the same
shards and for sparse files of 20 times their size; and the time to plan 10,000 to 1,000,000 chunks. Writes
``tools/bench/results/ckpt_merge_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import am_ckpt

ROOT = Path(__file__).resolve().parents[2]
RANKS, LAYERS, HIDDEN, FFN = 4, 10, 2048, 5632
METHODS = ["cp", "am-ckpt-1", "am-ckpt-2", "torch-2", "cp-sync", "am-ckpt-2-fsync"]
PAIRS = [("am-ckpt-1", "cp"), ("am-ckpt-2", "cp"), ("am-ckpt-2-fsync", "cp-sync"), ("torch-2", "am-ckpt-2")]


def write_shards(folder: Path, dim: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for name in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (FFN, HIDDEN)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes[f"model.layers.{layer}.norm.weight"] = (HIDDEN,)
    generator = torch.Generator().manual_seed(0)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(RANKS)]
    offsets: list[dict[str, dict[str, list[int]]]] = [{} for _ in range(RANKS)]
    for name, shape in shapes.items():
        # Random bits: nothing compresses, no block is a hole.
        tensor = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
        cut = min(dim, len(shape) - 1)
        for rank, piece in enumerate(tensor.chunk(RANKS, cut)):
            parts[rank][name] = piece.contiguous()
            begin = [0] * len(shape)
            begin[cut] = rank * piece.shape[cut]
            offsets[rank][name] = {"saved_offsets": begin}
    for rank in range(RANKS):
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets[rank])}
        save_file(parts[rank], folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=metadata)


def sparse_shards(folder: Path, layers: int) -> None:
    """FSDP shards of matrices of 64 MB, all of them holes."""
    folder.mkdir()
    rows, columns = 4096, 8192
    for rank in range(RANKS):
        names = [f"model.layers.{layer}.weight" for layer in range(layers)]
        size = rows // RANKS * columns * 2
        header: dict[str, Any] = {
            name: {"dtype": "BF16", "shape": [rows // RANKS, columns], "data_offsets": [i * size, (i + 1) * size]}
            for i, name in enumerate(names)
        }
        offsets = {name: {"saved_offsets": [rank * rows // RANKS, 0]} for name in names}
        write_header(folder, rank, header, offsets, layers * size)


def tiny_shards(folder: Path, chunks: int) -> None:
    """``chunks`` parts of tensors of 4 x 4, in files of 1,000."""
    folder.mkdir()
    for first in range(0, chunks // RANKS, 1000):
        names = [f"model.layers.{index}.weight" for index in range(first, min(first + 1000, chunks // RANKS))]
        for rank in range(RANKS):
            header: dict[str, Any] = {
                name: {"dtype": "U8", "shape": [1, 4], "data_offsets": [4 * i, 4 * i + 4]}
                for i, name in enumerate(names)
            }
            offsets = {name: {"saved_offsets": [rank, 0]} for name in names}
            write_header(folder, first // 1000 * RANKS + rank, header, offsets, 4 * len(names))


def write_header(folder: Path, number: int, header: dict[str, Any], offsets: dict[str, Any], data_bytes: int) -> None:
    """A shard file whose data is a hole."""
    header["__metadata__"] = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps(header).encode()
    with open(folder / f"shard-{number + 1:05d}-model-00001-of-00001.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data_bytes)


def reset_peak() -> int:
    """Start measuring the peak of resident memory anew; the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process has had since, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(method: str, source: str, target: str) -> None:
    """Print wall seconds, CPU seconds of this process and its children, and growth of the peak memory in bytes."""
    if method.startswith("am-ckpt"):
        threads, fsync = int(method.split("-")[2]), method.endswith("fsync")
        merge = am_ckpt.merge

        def action() -> None:
            merge(source, target, threads=threads, fsync=fsync)

    elif method == "plan":
        from am_ckpt._inventory import inspect, paused_collector
        from am_ckpt._merge import _Plan

        def action() -> None:
            inventory = inspect(source)
            with paused_collector():
                _Plan(inventory, None, 5 * 10**9, None)

    elif method.startswith("torch"):
        from torch.distributed.checkpoint._consolidate_hf_safetensors import (
            consolidate_safetensors_files,
        )

        names = json.loads(os.environ["NAMES"])

        def action() -> None:
            os.mkdir(target)
            threads = int(method.split("-")[1])
            # As many output files as threads: torch's threads share work by file.
            files = {name: 1 + index * threads // len(names) for index, name in enumerate(names)}
            consolidate_safetensors_files(source, target, files, num_threads=threads)
    else:

        def action() -> None:
            subprocess.run(["cp", "-r", source, target], check=True)
            if method == "cp-sync":
                subprocess.run(["sync", *map(str, Path(target).iterdir())], check=True)

    def cpu() -> float:
        return sum(os.times()[:4])

    peak = reset_peak()
    wall, used = time.perf_counter(), cpu()
    action()
    wall, used = time.perf_counter() - wall, cpu() - used
    print(json.dumps([wall, used, peak_bytes() - peak]))


def same(folder: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    one, two = (
        {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (folder, other)
    )
    return one.keys() == two.keys() and all(
        torch.equal(one[name].view(torch.int16), two[name].view(torch.int16)) for name in one
    )


def measure(method: str, source: Path, target: Path, names: list[str]) -> list[float]:
    """What :func:`child` prints, of a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "NAMES": json.dumps(names)}
    command = [sys.executable, __file__, "--child", method, str(source), str(target)]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    row: list[float] = json.loads(output.splitlines()[-1])
    return row


def compare(folder: Path, layout: str, dim: int, rounds: int) -> dict[str, Any]:
    """All methods on the shards of one layout."""
    source, target = folder / layout, folder / "out"
    write_shards(source, dim)
    inventory = am_ckpt.inspect(source)
    names = list(inventory.tensors)
    rows: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for round_number in range(rounds + 1):
        for method in METHODS:
            row = measure(method, source, target, names)
            # The first round warms the page cache.
            if round_number:
                rows[method].append(row)
            elif method == "am-ckpt-2":
                target.rename(folder / "ours")
            elif method == "torch-2":
                assert same(folder / "ours", target), "am-ckpt and torch disagree"
                shutil.rmtree(folder / "ours")
            shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(source)
    summary: dict[str, Any] = {"bytes": inventory.num_bytes}
    for method in METHODS:
        wall, cpu, peak = (statistics.median(row[index] for row in rows[method]) for index in range(3))
        summary[method] = {"wall_seconds": wall, "cpu_seconds": cpu, "peak_growth_bytes": peak}
    for one, two in PAIRS:
        for index, what in enumerate(("wall", "cpu")):
            ratios = [a[index] / b[index] for a, b in zip(rows[one], rows[two], strict=True)]
            summary[f"{what}: {one} / {two}"] = round(statistics.median(ratios), 3)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckpt_merge_cpu"))
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result: dict[str, Any] = {}
    try:
        for layout, dim in (("fsdp", 0), ("tp_dim_1", 1)):
            result[layout] = compare(folder, layout, dim, options.rounds)
            print(layout, json.dumps(result[layout], indent=1), flush=True)
        result["planning"] = {}
        for chunks in (10_000, 100_000, 1_000_000):
            tiny_shards(folder / "tiny", chunks)
            rows = [measure("plan", folder / "tiny", folder / "out", []) for _ in range(3)]
            seconds = statistics.median(row[1] for row in rows)
            result["planning"][chunks] = {
                "cpu_microseconds_per_chunk": seconds / chunks * 1e6,
                "peak_growth_bytes_per_chunk": statistics.median(row[2] for row in rows) / chunks,
            }
            shutil.rmtree(folder / "tiny")
        result["memory"] = {}
        for gigabytes in (1, 20):
            sparse_shards(folder / "sparse", gigabytes * 16)
            row = measure("am-ckpt-2", folder / "sparse", folder / "out", [])
            result["memory"][f"{gigabytes} GB, 2 threads, peak_growth_bytes"] = row[2]
            shutil.rmtree(folder / "sparse")
            shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result["rounds"] = options.rounds
    result["load_average"] = os.getloadavg()
    result["versions"] = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "am-ckpt": version("am-ckpt"),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
    }
    print(json.dumps({key: result[key] for key in ("planning", "memory", "versions")}, indent=1))
    (ROOT / "tools/bench/results/ckpt_merge_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
