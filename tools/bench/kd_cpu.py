"""Distillation of a small Llama from a larger one on a CPU: our recipe against a plain loop and TRL's GKD trainer.

    python tools/bench/kd_cpu.py [--rounds 5] [--dtype float32 bfloat16] [--trl-python ENV/bin/python]

Every variant trains the same student (hidden 256, 4 layers, vocabulary 8,192) on the shipped rows with AdamW, by the
forward KL from the same frozen teacher (hidden 384, 6 layers) at temperature 1, without cross-entropy:

- `recipe`: `am_recipes.kd` as a user runs it, packed, with its data pipeline, metrics file and report;
- `padded`: a plain loop, rows padded to the longest of the batch, both models' logits held, `F.kl_div`;
- `trl`: TRL's GKDTrainer off-policy (`lmbda=0`: nothing is generated; `beta=0`: forward KL), in its own
  environment, where `--trl-python` names one.

A variant runs in a process of its own; rounds interleave them. Measured: non-padding tokens per CPU-second (user and
system time of all threads) between the first step after the warm-up and the last, and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sft_cpu import MODEL, ROOT, ROWS, TOKENIZER, cpu_name, tokenised_rows, versions, versions_elsewhere

WARMUP, STEPS, SEED, LEARNING_RATE = 1, 4, 7, 1e-3
# A padded batch of so many rows has about as many tokens as a pack.
PACK_TOKENS, BATCH_ROWS = 2048, 12
TEACHER = MODEL | {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6}
TEACHER["num_key_value_heads"] = 6
REQUIRED = 1.3


def make_models(folder: Path) -> None:
    """Seeded student and teacher as Hugging Face folders, which every variant loads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for seed, (name, config) in enumerate({"student": MODEL, "teacher": TEACHER}.items()):
        torch.manual_seed(SEED + seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)


def run_recipe(dtype: str, inputs: Path, folder: Path) -> dict[str, float]:
    """The recipe itself; the loss function it is given notes the CPU time at every optimizer step."""
    import yaml

    from am_recipes import configs, kd

    path = folder / "bench.yaml"
    document = {
        "recipe": "kd",
        "seed": SEED,
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(inputs / "student"), "dtype": dtype},
        "teacher_model": {"name_or_path": str(inputs / "teacher"), "dtype": dtype},
        "kd_ratio": 1.0,
        "kd_loss_fn": {"_target_": "__main__.timed_loss"},
        "dataset": {"path": str(ROWS)},
        "packed_sequence": {"packed_sequence_size": PACK_TOKENS},
        "step_scheduler": {"global_batch_size": 1, "local_batch_size": 1, "max_steps": WARMUP + STEPS + 1},
        "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.01},
        "checkpoint": {"enabled": False},
        "export": {"enabled": False},
    }
    path.write_text(yaml.safe_dump(document))
    kd.main(configs.parse(path, []))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(CALLS) == len(rows) == WARMUP + STEPS + 1
    tokens = sum(row["tokens"] for row in rows if WARMUP < row["step"] <= WARMUP + STEPS)
    return {"tokens": tokens, "cpu_seconds": CALLS[WARMUP + STEPS] - CALLS[WARMUP], "loss": rows[-1]["loss"]}


CALLS: list[float] = []


def timed_loss(hidden, *arguments, **options):
    """am-loss's function; one call with a graph is one optimizer step, since the run has one micro-batch a step."""
    import am_loss

    if hidden.requires_grad:
        CALLS.append(time.process_time())
    return am_loss.linear_distillation(hidden, *arguments, **options)


def models(dtype: str, inputs: Path):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    return (
        AutoModelForCausalLM.from_pretrained(inputs / name, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        for name in ("student", "teacher")
    )


def padded_batch(rows: list[tuple[list[int], list[int]]]):
    """(input ids, labels not yet shifted, mask), padded to the longest row."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
    )


def prepared_rows(inputs: Path) -> list[tuple[list[int], list[int]]]:
    return json.loads((inputs / "rows.json").read_text())


def run_padded(dtype: str, inputs: Path, folder: Path) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    rows = prepared_rows(inputs)
    random.Random(SEED).shuffle(rows)
    student, teacher = models(dtype, inputs)
    student.train()
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    tokens, marks, loss = [], [], torch.zeros(())
    for step in range(WARMUP + STEPS + 1):
        marks.append(time.process_time())
        batch = [rows[(step * BATCH_ROWS + i) % len(rows)] for i in range(BATCH_ROWS)]
        input_ids, labels, mask = padded_batch(batch)
        chosen = labels[:, 1:] != -100
        logits = student(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        log_q, log_p = (F.log_softmax(z[chosen].float(), -1) for z in (logits, teacher_logits))
        loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        tokens.append(int(mask.sum()))
    return {"tokens": sum(tokens[WARMUP:-1]), "cpu_seconds": marks[-1] - marks[WARMUP], "loss": loss.item()}


def run_trl(dtype: str, inputs: Path, folder: Path) -> dict[str, float]:
    """TRL's trainer, given rows that are tokenised already, in padded batches."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    marks: list[float] = []
    lengths: list[int] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            marks.append(time.process_time())

    def collate(examples):
        input_ids, labels, mask = padded_batch([(row["input_ids"], row["labels"]) for row in examples])
        lengths.append(int(mask.sum()))
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}

    student, teacher = models(dtype, inputs)
    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=BATCH_ROWS,
        max_steps=WARMUP + STEPS + 1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        max_length=None,
        bf16=False,
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        seed=SEED,
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": row} for ids, row in prepared_rows(inputs)]),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        callbacks=[Marks()],
    )
    result = trainer.train()
    tokens = sum(lengths[WARMUP : WARMUP + STEPS])
    return {"tokens": tokens, "cpu_seconds": marks[WARMUP + STEPS] - marks[WARMUP], "loss": result.training_loss}


VARIANTS = {"recipe": run_recipe, "padded": run_padded, "trl": run_trl}


def measure(variant: str, dtype: str, python: str, inputs: Path, threads: int) -> dict[str, float]:
    """Run one variant in its own process and return what it printed last."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [python, __file__, "--variant", variant, "--dtype", dtype, "--inputs", str(inputs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{variant} {dtype} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rounds(arguments: argparse.Namespace, inputs: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    for round_number in range(arguments.rounds):
        for dtype in arguments.dtype:
            for variant in ["recipe", "padded", *(["trl"] if arguments.trl_python else [])]:
                python = arguments.trl_python if variant == "trl" else sys.executable
                result = measure(variant, dtype, python, inputs, arguments.threads)
                speed = result["tokens"] / result["cpu_seconds"]
                line = (
                    f"round {round_number + 1} {dtype} {variant}: {speed:.0f} tokens/CPU-s, {result['rss_mb']:.0f} MB"
                )
                print(line, flush=True)
                yield dtype, variant, result | {"tokens_per_cpu_second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl-python", help="python of an environment with trl, for the optional third variant")
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "bench" / "results" / "kd_cpu.json")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.variant:
            result = VARIANTS[arguments.variant](arguments.dtype[0], arguments.inputs, Path(folder))
            print(json.dumps(result | {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
            return
        make_models(Path(folder))
        Path(folder, "rows.json").write_text(json.dumps(tokenised_rows()))
        runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        for dtype, variant, result in rounds(arguments, Path(folder)):
            runs.setdefault(dtype, {}).setdefault(variant, []).append(result)
    summary = {dtype: summarise(by_variant) for dtype, by_variant in runs.items()}
    trl = arguments.trl_python
    document = {
        "benchmark": "kd_cpu",
        "versions": versions(["torch", "transformers", "am-recipes", "am-models", "am-kernels", "am-loss", "am-data"]),
        "trl versions": versions_elsewhere(trl, ["trl", "torch", "transformers", "accelerate"]) if trl else None,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "required recipe / trl": REQUIRED,
        "summary": summary,
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def summarise(by_variant: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians, and the ratios paired by round: the machine's load changes between rounds, not within one."""
    speeds = {name: [run["tokens_per_cpu_second"] for run in results] for name, results in by_variant.items()}
    memory = {name: statistics.median(run["rss_mb"] for run in results) for name, results in by_variant.items()}
    return {
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in speeds.items()},
        "peak_rss_mb": memory,
        "ratios": {
            f"recipe / {name}": statistics.median(ours / theirs for ours, theirs in zip(speeds["recipe"], speeds[name]))
            for name in speeds
            if name != "recipe"
        },
    }


if __name__ == "__main__":
    main()
