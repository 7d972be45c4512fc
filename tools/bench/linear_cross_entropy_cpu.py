"""Time am_loss.linear_cross_entropy against the plain loss on a CPU, forward and backward.

The peer is what one writes by hand: `F.cross_entropy(F.linear(hidden[mask], weight), labels[mask], reduction="sum")`.
The two run in turn in one process; figures are medians of the process's CPU time. Run it on idle cores: threads
that wait for a preempted one spin, and that counts.

    python tools/bench/linear_cross_entropy_cpu.py [--rounds 15] [--threads 2] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import am_loss

RESULT = Path(__file__).parent / "results" / "linear_cross_entropy_cpu.json"


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    return F.cross_entropy(F.linear(hidden[mask], weight), labels[mask], reduction="sum")


def step(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    hidden.grad = weight.grad = None
    loss = loss_fn(hidden, weight, labels)
    (loss / labels.numel()).backward()
    return loss.detach()


def compare(
    dtype: torch.dtype, tokens: int, targets: int, width: int, vocabulary: int, frozen: bool, rounds: int
) -> dict:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.05).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[: tokens - targets]] = -100
    losses = {"plain": plain, "am_loss": am_loss.linear_cross_entropy}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    values = {}
    for turn in range(rounds + 2):
        for name, loss_fn in losses.items():
            begin = time.process_time()
            values[name] = step(loss_fn, hidden, weight, labels)
            # The first two rounds warm the allocator and the matrix library's packing up.
            if turn >= 2:
                seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "targets": targets,
        "hidden": width,
        "vocabulary": vocabulary,
        "frozen_weight": frozen,
        "rounds": rounds,
        "target_tokens_per_cpu_second": {name: targets / value for name, value in medians.items()},
        "ratio": medians["plain"] / medians["am_loss"],
        "relative_loss_difference": abs(1 - float(values["am_loss"]) / float(values["plain"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        compare(dtype, 2048, targets, 256, 8192, frozen, arguments.rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for targets, frozen in ((1024, False), (1536, False), (2048, False), (1536, True))
    ]
    for row in rows:
        print(
            f"{row['dtype']:>8}  targets {row['targets']}/{row['tokens']}  "
            f"{'frozen' if row['frozen_weight'] else 'trained'} head  {row['ratio']:.2f}x the plain loss"
        )
    report = {
        "benchmark": "linear_cross_entropy_cpu",
        "peer": 'F.cross_entropy(F.linear(hidden[mask], weight), labels[mask], reduction="sum"), forward and backward',
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "architecture": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": arguments.threads,
        },
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
