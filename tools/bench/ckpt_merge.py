"""Merging 4 ranks' shards of a 1 GB checkpoint: am-ckpt against `cp -r` of the same bytes and others' consolidation.

A part of ckpt.py. Shards are files as torch's `HuggingFaceStorageWriter` lays them out: FSDP (dim 0) and tensor
parallel (dim 1 of every matrix). Every measurement is a fresh process that imports first; methods are interleaved,
ratios are paired by round, the page cache is warm. `cp` does not wait for the disk, so it is compared with
`fsync=False`, and `cp` and `sync` with the default. Free memory is used once before each measurement: on a virtual
machine the first use of a page costs several times a later one, and would be paid by whoever comes first. Results are
compared bit for bit once. Then: the peak of resident memory, above that before the merge and in all, for sparse files
of 1 and 20 GB; and the time to plan 10,000 to 1,000,000 chunks. NeMo AutoModel's consolidation runs where the Python of
an environment that has it is given.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANKS, LAYERS, HIDDEN, FFN = 4, 10, 2048, 5632
METHODS = ["cp", "am-ckpt-1", "am-ckpt-2", "am-ckpt-1-digest", "cp-sync", "am-ckpt-2-fsync"]
# The dim that is cut.
LAYOUTS = {"fsdp": 0, "tp_dim_1": 1}
PAIRS = [
    ("am-ckpt-1", "cp"),
    ("am-ckpt-2", "cp"),
    ("am-ckpt-1-digest", "cp"),
    ("am-ckpt-2-fsync", "cp-sync"),
]


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
    """`chunks` parts of tensors of 4 x 4, in files of 1,000."""
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


def many_ranks(folder: Path, ranks: int, dim: int) -> int:
    """Shards of the 980 matrices of a model of 140 layers; the number of chunks. `ranks` is a power of two."""
    folder.mkdir()
    hidden, ffn = 4096, 14336
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    for rank in range(ranks):
        header: dict[str, Any] = {}
        offsets: dict[str, Any] = {}
        position = 0
        for layer in range(140):
            for name, shape in shapes.items():
                size, offset = list(shape), [0, 0]
                size[dim] //= ranks
                offset[dim] = rank * size[dim]
                end = position + size[0] * size[1] * 2
                tensor = f"model.layers.{layer}.{name}.weight"
                header[tensor] = {"dtype": "BF16", "shape": size, "data_offsets": [position, end]}
                offsets[tensor] = {"saved_offsets": offset}
                position = end
        write_header(folder, rank, header, offsets, position)
    return ranks * 140 * len(shapes)


def write_header(folder: Path, number: int, header: dict[str, Any], offsets: dict[str, Any], data_bytes: int) -> None:
    """A shard file whose data is a hole."""
    # As safetensors writes it.
    header = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
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
    """Print wall seconds, CPU seconds of this process and its children, and the peak memory: its growth, and all."""
    kind, *arguments = method.replace("am-ckpt", "am_ckpt").split("-")
    if kind == "am_ckpt":
        from am_ckpt import merge

        def action() -> None:
            options = {name: name in arguments for name in ("fsync", "digest")}
            merge(source, target, threads=int(arguments[0]), assume_complete=True, **options)

    elif kind == "plan":
        from am_ckpt._copy.plan import plan_jobs
        from am_ckpt._sources import paused_collector
        from am_ckpt._tools.inspect import inspect
        from am_ckpt._tools.merge import _Plan

        def action() -> None:
            inventory = inspect(source)
            with paused_collector():
                plan_jobs(_Plan(inventory, None, 5 * 10**9, None, False, True).outputs)

    elif kind in ("torch", "nemo"):
        if kind == "torch":
            from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
        else:
            from nemo_automodel.components.checkpoint._backports.consolidate_hf_safetensors import (
                consolidate_safetensors_files,
            )

        names = json.loads(os.environ["NAMES"])
        threads = int(arguments[0])

        def action() -> None:
            os.mkdir(target)
            # As many output files as threads: their threads share work by file.
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
    print(json.dumps([wall, used, peak_bytes() - peak, peak_bytes()]))


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


def measure(method: str, source: Path, target: Path, names: list[str], python: str = sys.executable) -> list[float]:
    """What `child` prints, of a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "NAMES": json.dumps(names)}
    command = [python, __file__, method, str(source), str(target)]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    row: list[float] = json.loads(output.splitlines()[-1])
    return row


def touch_free_memory() -> None:
    """Use several times the memory that a measurement needs, and give it back: what was freed last is taken first."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree"))
    with mmap.mmap(-1, max(min(4 * 2**30, free - 2**30), mmap.PAGESIZE)) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


def compare(
    folder: Path, layout: str, dim: int, rounds: int, pythons: dict[str, str], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    """The methods that are keys of `pythons` on the shards of one layout."""
    import am_ckpt

    source, target = folder / layout, folder / "out"
    write_shards(source, dim)
    inventory = am_ckpt.inspect(source)
    names = list(inventory.tensors)
    rows: dict[str, list[list[float]]] = {method: [] for method in pythons}
    for round_number in range(rounds + 1):
        for method, python in pythons.items():
            touch_free_memory()
            row = measure(method, source, target, names, python)
            # The first round warms the page cache.
            if round_number:
                rows[method].append(row)
            elif method == "am-ckpt-2" and "torch-2" in pythons:
                target.rename(folder / "ours")
            elif method == "torch-2":
                assert same(folder / "ours", target), "am-ckpt and torch disagree"
                shutil.rmtree(folder / "ours")
            shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(source)
    summary: dict[str, Any] = {"bytes": inventory.num_bytes}
    for method in pythons:
        wall, cpu, peak = (statistics.median(row[index] for row in rows[method]) for index in range(3))
        summary[method] = {"wall_seconds": wall, "cpu_seconds": cpu, "peak_growth_bytes": peak}
    for one, two in pairs:
        for index, what in enumerate(("wall", "cpu")):
            ratios = [a[index] / b[index] for a, b in zip(rows[one], rows[two], strict=True)]
            summary[f"{what}: {one} / {two}"] = round(statistics.median(ratios), 3)
    return summary


def plans(folder: Path) -> dict[str, Any]:
    """CPU time and memory of planning, per chunk."""
    result = {}
    for chunks in (10_000, 100_000, 1_000_000):
        tiny_shards(folder / "tiny", chunks)
        result[f"4 ranks, {chunks} chunks"] = planning(folder / "tiny", chunks)
    for ranks, dim in ((16, 0), (128, 0), (1024, 0), (1024, 1)):
        chunks = many_ranks(folder / "many", ranks, dim)
        result[f"{ranks} ranks, dim {dim}, {chunks} chunks"] = planning(folder / "many", chunks)
    return result


def planning(shards: Path, chunks: int) -> dict[str, float]:
    """Of one folder of shards, which is then removed."""
    rows = [measure("plan", shards, shards.with_name("out"), []) for _ in range(5)]
    shutil.rmtree(shards)
    return {
        "cpu_microseconds_per_chunk": round(statistics.median(row[1] for row in rows) / chunks * 1e6, 2),
        "peak_growth_bytes_per_chunk": round(statistics.median(row[2] for row in rows) / chunks),
    }


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of a merge with 2 threads, of files of holes."""
    result = {}
    for gigabytes in (1, 20):
        sparse_shards(folder / "sparse", gigabytes * 16)
        row = measure("am-ckpt-2", folder / "sparse", folder / "out", [])
        result[f"{gigabytes} GB"] = {"peak_growth_bytes": row[2], "peak_bytes": row[3]}
        shutil.rmtree(folder / "sparse")
        shutil.rmtree(folder / "out")
    return result


def merges(folder: Path, rounds: int) -> dict[str, Any]:
    """Against copies of the same bytes, on all layouts, in `folder`."""
    pythons = dict.fromkeys(METHODS, sys.executable)
    return {layout: compare(folder, layout, dim, rounds, pythons, PAIRS) for layout, dim in LAYOUTS.items()}


def consolidations(folder: Path, rounds: int, nemo_python: str | None) -> dict[str, Any]:
    """Against others' consolidation, on all layouts, in `folder`."""
    pythons = dict.fromkeys(["am-ckpt-2", "torch-2"], sys.executable)
    pythons |= {"nemo-2": nemo_python} if nemo_python is not None else {}
    pairs = [(other, "am-ckpt-2") for other in pythons if other != "am-ckpt-2"]
    return {layout: compare(folder, layout, dim, rounds, pythons, pairs) for layout, dim in LAYOUTS.items()}


if __name__ == "__main__":
    child(*sys.argv[1:])
