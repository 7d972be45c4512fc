"""Packed attention on the CPU, forward and backward: am_kernels against what people write without it.

Peers, in one process on the same tensors: torch's SDPA with a block-diagonal mask, a loop over documents by slicing,
and one by split and cat. Rounds are interleaved and medians compared, so that a busy machine hurts all
alike; CPU seconds (user + system, all threads) are the figure, wall seconds are beside it.

    python tools/bench/attention_cpu.py [--rounds 7] [--threads 1] [--output FILE]

From a bare checkout: PYTHONPATH=packages/am-kernels/src.
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
from torch import Tensor
from torch.nn import functional as F

import am_kernels

RESULT = Path(__file__).parent / "results" / "attention_cpu.json"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
TOTAL = 2048
HEAD_DIM = 64
HEADS = ((4, 4), (9, 3))
LENGTHS = ((20, 60), (20, 300), (300, 300), (1024, 1024))
OURS = "am_kernels"


def lengths_of_documents(low: int, high: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < TOTAL:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        lengths.append(min(length, TOTAL - sum(lengths)))
    return lengths


def candidates(lengths: list[int]) -> dict[str, Attention]:
    document = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
    documents = am_kernels.document_segments(document[None].int())

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return am_kernels.attention(q, k, v, document_ids=documents)

    def ours_without_plan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return am_kernels.attention(q, k, v, document_ids=document[None])

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    def block_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (document[:, None] == document[None]).tril()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).contiguous()

    def loop_of_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            parts.append(sdpa(q[:, :, here], k[:, :, here], v[:, :, here]))
            start += length
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    def loop_of_splits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [sdpa(*part) for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    return {
        OURS: ours,
        "am_kernels, plan built per call": ours_without_plan,
        "sdpa with block mask": block_mask,
        "sdpa per document, slices": loop_of_slices,
        "sdpa per document, split and cat": loop_of_splits,
    }


def measure(dtype: torch.dtype, heads: tuple[int, int], low: int, high: int, rounds: int) -> dict[str, object]:
    lengths = lengths_of_documents(low, high, seed=0)
    H, K = heads
    generator = torch.Generator().manual_seed(1)
    # As a model makes them: tokens first in memory.
    q, k, v = (
        torch.randn(1, TOTAL, n, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in (H, K, K)
    )
    grad = torch.randn(1, TOTAL, H, HEAD_DIM, generator=generator).to(dtype)
    functions = candidates(lengths)
    expected = functions["sdpa with block mask"](q, k, v).detach()
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            q.grad = k.grad = v.grad = None
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            out = function(q, k, v)
            out.backward(grad)
            if turn:
                cpu[name].append(time.process_time() - cpu_start)
                wall[name].append(time.perf_counter() - wall_start)
            else:
                # The first turn warms up and checks that all compute the same thing.
                tolerance = 1e-5 if dtype == torch.float32 else 4e-2
                torch.testing.assert_close(out.detach(), expected, atol=tolerance, rtol=tolerance)
    seconds = {name: statistics.median(times) for name, times in cpu.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": H,
        "kv_heads": K,
        "head_dim": HEAD_DIM,
        "tokens": TOTAL,
        "document_lengths": [low, high],
        "documents": len(lengths),
        "cpu_seconds": seconds,
        "wall_seconds": {name: statistics.median(times) for name, times in wall.items()},
        "tokens_per_cpu_second": {name: TOTAL / value for name, value in seconds.items()},
        "times_as_fast_as": {name: value / seconds[OURS] for name, value in seconds.items() if name != OURS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="more threads add spinning to the CPU seconds")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for heads in HEADS:
            for low, high in LENGTHS:
                result = measure(dtype, heads, low, high, arguments.rounds)
                results.append(result)
                ratios = result["times_as_fast_as"]
                assert isinstance(ratios, dict)
                print(f"{result['dtype']:<9} H={heads[0]} K={heads[1]} documents of {low}-{high}:", flush=True)
                for name, ratio in ratios.items():
                    print(f"    {ratio:5.2f} x {name}", flush=True)
    report = {
        "what": "attention over packed documents, forward + backward, CPU",
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
