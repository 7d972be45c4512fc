"""The pretrain recipe against a plain PyTorch loop, compiled and not: same weights, windows, schedule and optimizer.

    uv run python tools/bench/pretrain_cpu.py --threads 1 --output tools/bench/results/pretrain_cpu.json

A Llama of four layers and hidden size 256 over the shipped tokens in windows of 256, 8 a step, AdamW, wsd. Variants:
`recipe`: `am_recipes.pretrain` as a user runs it, logging included;
`plain`: what one writes by hand: stock transformers, sdpa, F.cross_entropy over the logits, fused AdamW, clipping;
`compiled`: the same loop with `torch.compile(model, dynamic=False)`.
In bfloat16 weights and optimizer stay float32: the recipe's `param_dtype`, autocast in the loop.

A variant runs in a process of its own; rounds interleave them. Measured: tokens per CPU-second (user and system time of
all threads) between the step after the warm-up, in which torch.compile has compiled, and the last; peak resident
memory. Every variant starts from the weights that the recipe starts from; all must end at the same loss.

Then the validation curve of both over 60 steps in fp32, which must be equal to 1e-3 at every evaluation, at a rate
where that can be asked: the `control` is the plain loop from weights that were rounded once more. (With the rate and
the warm-up of the speed runs the plain loop is 0.05 apart from itself after 60 steps, by rounding alone.)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "recipes" / "data" / "pretrain"
WINDOW, BATCH, SEED, LEARNING_RATE, LAST_RATE, BETAS, DECAY = 256, 8, 7, 3e-3, 1e-4, (0.9, 0.95), 0.1
WARMUP, STEPS = 3, 10
CURVE_STEPS, CURVE_EVERY, CURVE_TOLERANCE = 60, 10, 1e-3
CURVE_RATE, CURVE_RISE = 1e-3, 20
# Steps of the schedule that rise and that fall.
RISE, FALL = 4, 5
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SCHEDULE = {"style": "wsd", "warmup_steps": RISE, "decay_steps": FALL, "min_lr": LAST_RATE}
CALLS: list[float] = []


def timed_loss(hidden, *arguments, **options):
    """am-loss's function; one call with the model's hidden states is one optimizer step of one micro-batch."""
    import am_loss

    # Before the first step the recipe asks a loss about rows that it made up, of another width.
    if hidden.shape[-1] == MODEL["hidden_size"]:
        CALLS.append(time.process_time())
    return am_loss.linear_cross_entropy(hidden, *arguments, **options)


def recipe(dtype: str, run_dir: Path, steps: int, **changes) -> list[dict]:
    """The recipe itself; its metrics."""
    import yaml

    from am_recipes import configs, pretrain

    document = {
        "recipe": "pretrain",
        "seed": SEED,
        "run_dir": str(run_dir),
        "model": {"config": MODEL, "dtype": "float32"},
        "tokenizer": {"name_or_path": str(DATA / "tokenizer")},
        "dataset": {"path": str(DATA / "train_*.bin"), "sequence_length": WINDOW},
        "dataloader": {"shuffle": False},
        "distributed": {"param_dtype": None if dtype == "float32" else dtype},
        "step_scheduler": {"global_batch_size": BATCH, "local_batch_size": BATCH, "max_steps": steps},
        "optimizer": {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": DECAY},
        "lr_scheduler": SCHEDULE,
        "loss_fn": {"_target_": "__main__.timed_loss"},
        "checkpoint": {"enabled": False},
        "export": {"enabled": False},
    }
    for section, values in changes.items():
        document[section] = document.get(section, {}) | values
    CALLS.clear()
    run_dir.mkdir(parents=True)
    path = run_dir / "bench.yaml"
    path.write_text(yaml.safe_dump(document))
    pretrain.main(configs.parse(path, []))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def starting_weights(folder: Path) -> Path:
    """The weights that the recipe starts from, as it exports them after a step at rate 0."""
    schedule = {"style": "constant", "decay_steps": None, "warmup_steps": 0, "min_lr": 0.0}
    recipe("float32", folder / "start", 1, optimizer={"lr": 0.0}, lr_scheduler=schedule, export={"enabled": True})
    return folder / "start" / "export"


def windows(prefix: str):
    """Every window and its last target, int64 [N, 257]: the shards of nanoGPT read by hand, as one stream."""
    import numpy as np
    import torch

    files = sorted(DATA.glob(f"{prefix}_*.bin"))
    stream = np.concatenate([np.fromfile(file, dtype="<u2", offset=1024) for file in files]).astype(np.int64)
    number = (len(stream) - 1) // WINDOW
    return torch.from_numpy(np.stack([stream[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(number)]))


def rate(step: int, steps: int, peak: float, rise: int) -> float:
    """The wsd schedule at a step, counted from 1."""
    if step <= rise:
        return peak * step / rise
    return LAST_RATE + (peak - LAST_RATE) * min(1.0, (steps - step) / FALL)


def plain(
    dtype: str,
    weights: Path,
    steps: int,
    *,
    compiled: bool = False,
    evaluate_every: int | None = None,
    peak: float = LEARNING_RATE,
    rise: int = RISE,
    nudged: bool = False,
) -> dict:
    """The loop one writes by hand: the losses, the CPU time at the start of each step, the validation losses."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="sdpa")
    stock.config.use_cache = False
    if nudged:
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.mul_(1 + 2**-23)
    decaying = [parameter for parameter in stock.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in stock.parameters() if parameter.ndim < 2]
    groups = [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    model = torch.compile(stock, dynamic=False) if compiled else stock
    train, validation = windows("train"), windows("validation")

    def mean_loss(block, reduction: str = "mean"):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=block[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten(), reduction=reduction)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        total = sum(mean_loss(block, "sum").item() for block in validation.split(BATCH))
        model.train()
        return total / validation[:, 1:].numel()

    model.train()
    losses, marks, curve = [], [], {0: evaluate()} if evaluate_every else {}
    for step in range(1, steps + 1):
        marks.append(time.process_time())
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak, rise)
        loss = mean_loss(train[(step - 1) * BATCH : step * BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if evaluate_every and step % evaluate_every == 0:
            curve[step] = evaluate()
    return {"losses": losses, "marks": marks, "curve": curve}


def run_recipe(dtype: str, weights: Path, folder: Path) -> dict[str, float]:
    rows = [row for row in recipe(dtype, folder / "run", WARMUP + STEPS + 1) if "loss" in row]
    return {"cpu_seconds": CALLS[WARMUP + STEPS] - CALLS[WARMUP], "loss": rows[-1]["loss"]}


def run_plain(dtype: str, weights: Path, folder: Path) -> dict[str, float]:
    return timed(plain(dtype, weights, WARMUP + STEPS + 1))


def run_compiled(dtype: str, weights: Path, folder: Path) -> dict[str, float]:
    return timed(plain(dtype, weights, WARMUP + STEPS + 1, compiled=True))


def timed(result: dict) -> dict[str, float]:
    return {"cpu_seconds": result["marks"][-1] - result["marks"][WARMUP], "loss": result["losses"][-1]}


def run_curves(dtype: str, weights: Path, folder: Path) -> dict[str, object]:
    """The validation losses of the recipe and of the plain loop by step, and how far they are apart."""
    validation = {"path": str(DATA / "validation_*.bin"), "sequence_length": WINDOW}
    rows = recipe(
        dtype,
        folder / "curve",
        CURVE_STEPS,
        validation_dataset=validation,
        step_scheduler={"val_every_steps": CURVE_EVERY},
        optimizer={"lr": CURVE_RATE},
        lr_scheduler={"warmup_steps": CURVE_RISE},
    )
    ours = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    pace = {"evaluate_every": CURVE_EVERY, "peak": CURVE_RATE, "rise": CURVE_RISE}
    theirs = plain(dtype, weights, CURVE_STEPS, **pace)["curve"]
    control = plain(dtype, weights, CURVE_STEPS, nudged=True, **pace)["curve"]
    largest = max(abs(ours[step] - loss) for step, loss in theirs.items())
    equal = ours.keys() == theirs.keys() and largest <= CURVE_TOLERANCE
    apart = max(abs(control[step] - loss) for step, loss in theirs.items())
    curves = {"recipe": ours, "plain": theirs, "control": control}
    return curves | {"largest_difference": largest, "control_difference": apart, "equal": equal}


VARIANTS = {"recipe": run_recipe, "plain": run_plain, "compiled": run_compiled, "curves": run_curves}


def measure(variant: str, dtype: str, weights: Path, threads: int) -> dict:
    """Run one variant in its own process and return what it printed last."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--variant", variant, "--dtype", dtype, "--weights", str(weights)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{variant} {dtype} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rounds(arguments: argparse.Namespace, weights: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    for round_number in range(arguments.rounds):
        for dtype in arguments.dtype:
            for variant in ("recipe", "plain", "compiled"):
                result = measure(variant, dtype, weights, arguments.threads)
                speed = STEPS * BATCH * WINDOW / result["cpu_seconds"]
                print(
                    f"round {round_number + 1} {dtype} {variant}: {speed:.0f} tokens/CPU-s, {result['rss_mb']:.0f} MB, "
                    f"loss {result['loss']:.5f}",
                    flush=True,
                )
                yield dtype, variant, result | {"tokens_per_cpu_second": speed}


def summarise(by_variant: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians, and the ratios paired by round: the machine's load changes between rounds, not within one."""
    speeds = {name: [run["tokens_per_cpu_second"] for run in results] for name, results in by_variant.items()}
    faster = [max(pair) for pair in zip(speeds["plain"], speeds["compiled"], strict=True)]
    opponents = {"plain": speeds["plain"], "compiled": speeds["compiled"], "the faster": faster}
    return {
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in speeds.items()},
        "peak_rss_mb": {
            name: statistics.median(run["rss_mb"] for run in results) for name, results in by_variant.items()
        },
        "ratios": {
            f"recipe / {name}": statistics.median(
                ours / theirs for ours, theirs in zip(speeds["recipe"], values, strict=True)
            )
            for name, values in opponents.items()
        },
        "last_loss": {name: results[-1]["loss"] for name, results in by_variant.items()},
    }


def versions(names: list[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "bench" / "results" / "pretrain_cpu.json")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.variant:
            result = VARIANTS[arguments.variant](arguments.dtype[0], arguments.weights, Path(folder))
            print(json.dumps(result | {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
            return
        weights = starting_weights(Path(folder))
        runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        for dtype, variant, result in rounds(arguments, weights):
            runs.setdefault(dtype, {}).setdefault(variant, []).append(result)
        curves = measure("curves", "float32", weights, arguments.threads)
    summary = {dtype: summarise(by_variant) for dtype, by_variant in runs.items()}
    document = {
        "benchmark": "pretrain_cpu",
        "versions": versions(["torch", "transformers", "am-recipes", "am-models", "am-kernels", "am-loss", "am-data"]),
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "summary": summary,
        "validation_curves": curves,
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary | {"validation_curves": curves}, indent=1))


if __name__ == "__main__":
    main()
