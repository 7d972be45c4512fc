"""What trackers cost a step: the tiny config with MLflow, W&B, TensorBoard and trackio on, against none.

    python tools/bench/trackers_cpu.py [--rounds 7] [--steps 400] [--variants none all mlflow wandb tensorboard trackio]

Every variant trains `recipes/configs/tiny.yaml` without validations and checkpoints, so that there are steps alone, and
is a process of its own; rounds interleave them, each in another order. The trackers need no server: MLflow writes to an
SQLite database, W&B is offline. Measured: the time between the first step after the warm-up and the last, by the clock
and per step, the median step, and the CPU time of the process and its children. A run counts only if its losses are
those of the others to the bit, and its trackers had every row. The exit status is 1 where a step with all takes more
than 1.02 of one with none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sft_cpu import ROOT, cpu_name, versions

WARMUP, REQUIRED = 20, 1.02
CONFIG = ROOT / "recipes" / "configs" / "tiny.yaml"
TRACKERS = ("mlflow", "wandb", "tensorboard", "trackio")
VARIANTS = {"none": (), "all": TRACKERS} | {name: (name,) for name in TRACKERS}


def run(variant: str, steps: int, folder: Path) -> dict[str, object]:
    """Train in this process; seconds per step by the clock, and the losses."""
    import torch

    from am_recipes import configs, sft

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sections = {
        "mlflow": f"{{tracking_uri: 'sqlite:///{folder}/mlflow.db', artifact_location: '{folder}/mlflow'}}",
        "wandb": "{mode: offline}",
        "tensorboard": "{}",
        "trackio": f"{{dir: '{folder}/trackio'}}",
    }
    overrides = {
        "run_dir": str(folder / "run"),
        "step_scheduler": f"{{global_batch_size: 4, local_batch_size: 1, max_steps: {steps}}}",
        "lr_scheduler": "{style: constant, warmup_steps: 2}",
        "validation_dataset": "null",
        "checkpoint.enabled": "false",
        "export.enabled": "false",
    } | {name: sections[name] for name in VARIANTS[variant]}
    assert sft.main(configs.parse(CONFIG, list(overrides.items()))) == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    if VARIANTS[variant]:
        state = json.loads((folder / "run" / "trackers.json").read_text())
        assert {name: state[name]["step"] for name in VARIANTS[variant]} == dict.fromkeys(VARIANTS[variant], steps)
    times = [row["time"] for row in rows[WARMUP - 1 :]]
    every = [after - before for before, after in itertools.pairwise(times)]
    return {
        "seconds_per_step": statistics.mean(every),
        "median_seconds_per_step": statistics.median(every),
        "losses": [row["loss"] for row in rows],
    }


def measure(variant: str, steps: int, threads: int) -> dict[str, object]:
    """Run one variant in its own process and return what it printed last, with its CPU time."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--variant", variant, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"cpu_seconds": cpu_seconds}


def rounds(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, object]]]:
    losses = None
    for number in range(arguments.rounds):
        for variant in random.Random(number).sample(arguments.variants, len(arguments.variants)):
            result = measure(variant, arguments.steps, arguments.threads)
            losses = losses or result["losses"]
            if result.pop("losses") != losses:
                raise RuntimeError(f"{variant} has other losses")
            seconds, median = result["seconds_per_step"], result["median_seconds_per_step"]
            print(f"round {number + 1} {variant}: {1e3 * seconds:.2f} ms a step, median {1e3 * median:.2f}", flush=True)
            yield variant, result


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians over rounds, and the ratios to none paired by round: the machine's load changes between rounds."""
    summary: dict[str, object] = {}
    for name in ("seconds_per_step", "median_seconds_per_step", "cpu_seconds"):
        values = {variant: [result[name] for result in results] for variant, results in runs.items()}
        summary[name] = {variant: statistics.median(results) for variant, results in values.items()}
        if "none" in values:
            summary[f"ratios of {name}"] = {
                f"{variant} / none": statistics.median(on / off for on, off in zip(results, values["none"]))
                for variant, results in values.items()
                if variant != "none"
            }
    return summary


def within(summary: dict[str, object]) -> bool | None:
    """Whether a step with all four takes at most `REQUIRED` of one with none; None where one was not measured."""
    ratios = summary.get("ratios of seconds_per_step", {})
    return ratios["all / none"] <= REQUIRED if "all / none" in ratios else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--variants", nargs="+", default=["none", "all"], choices=VARIANTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "bench" / "results" / "trackers_cpu.json")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(arguments.variant, arguments.steps, Path(folder))))
        return
    runs: dict[str, list[dict[str, float]]] = {}
    for variant, result in rounds(arguments):
        runs.setdefault(variant, []).append(result)
    summary = summarise(runs)
    document = {
        "benchmark": "trackers_cpu",
        "versions": versions(["torch", "am-recipes", *TRACKERS]),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": arguments.threads,
        "steps": arguments.steps,
        "required all / none": REQUIRED,
        "is within": within(summary),
        "summary": summary,
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    if within(summary) is False:
        raise SystemExit(f"a step with all trackers takes more than {REQUIRED} of one without")


if __name__ == "__main__":
    main()
