"""Supervised fine-tuning of one small Llama on a CPU: our recipe against hand-written loops and TRL.

    python tools/bench/sft_cpu.py [--rounds 5] [--dtype float32 bfloat16] [--trl-python ENV/bin/python]

Every variant trains the same seeded Llama (hidden 256, 4 layers, vocabulary 8,192) on the same shipped rows with AdamW:

- `recipe`: `am_recipes.sft` as a user runs it, packed, with its data pipeline, metrics file and report;
- `padded`: a plain loop, rows padded to the longest of the batch, logits at every position;
- `packed`: the best loop we could write by hand, attention per document, head at target positions only;
- `trl`: TRL's SFTTrainer in its own environment, where `--trl-python` names one.

A variant runs in a process of its own; rounds interleave them. Measured: non-padding tokens per CPU-second (user and
system time of all threads) between the first step after the warm-up and the last, and the peak resident memory.
A row counts only if `packed` shows itself a strong opponent: at least 2.0x `padded` in fp32, 1.45x in bf16.
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
ROWS = ROOT / "recipes" / "data" / "chat" / "train.jsonl"
TOKENIZER = ROOT / "recipes" / "data" / "bench" / "tokenizer"
WARMUP, STEPS, SEED, LEARNING_RATE = 3, 10, 7, 1e-3
PACK_TOKENS, BATCH_ROWS = 2048, 16
REQUIRED = {"float32": 2.0, "bfloat16": 1.45}
MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def run_recipe(dtype: str, folder: Path) -> dict[str, float]:
    """The recipe itself; the loss function it is given notes the CPU time at the start of every optimizer step."""
    import yaml

    from am_recipes import configs, sft

    path = folder / "bench.yaml"
    document = {
        "recipe": "sft",
        "seed": SEED,
        "run_dir": str(folder / "run"),
        "model": {"config": MODEL, "dtype": dtype},
        "tokenizer": {"name_or_path": str(TOKENIZER)},
        "dataset": {"path": str(ROWS)},
        "packed_sequence": {"packed_sequence_size": PACK_TOKENS},
        "step_scheduler": {"global_batch_size": 1, "local_batch_size": 1, "max_steps": WARMUP + STEPS + 1},
        "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.01},
        "loss_fn": {"_target_": "__main__.timed_loss"},
        "checkpoint": {"enabled": False},
        "export": {"enabled": False},
    }
    path.write_text(yaml.safe_dump(document))
    sft.main(configs.parse(path, []))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(row["tokens"] for row in rows if "loss" in row and WARMUP < row["step"] <= WARMUP + STEPS)
    return {"tokens": tokens, "cpu_seconds": CALLS[WARMUP + STEPS] - CALLS[WARMUP], "loss": rows[-1]["loss"]}


CALLS: list[float] = []


def timed_loss(hidden, *arguments, **options):
    """am-loss's function; one call with the model's hidden states is one optimizer step of one micro-batch."""
    import am_loss

    # Before the first step the recipe asks a loss about rows that it made up, of another width.
    if hidden.shape[-1] == MODEL["hidden_size"]:
        CALLS.append(time.process_time())
    return am_loss.linear_cross_entropy(hidden, *arguments, **options)


def tokenised_rows() -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of every row, as the recipe sees them."""
    from transformers import AutoTokenizer

    import am_data

    dataset = am_data.ChatDataset(str(ROWS), AutoTokenizer.from_pretrained(TOKENIZER))
    return [(dataset[i]["input_ids"].tolist(), dataset[i]["labels"].tolist()) for i in range(len(dataset))]


def seeded_model(dtype: str, attention: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    configuration = AutoConfig.for_model(**MODEL)
    return AutoModelForCausalLM.from_config(configuration, dtype=getattr(torch, dtype), attn_implementation=attention)


def run_padded(dtype: str, folder: Path) -> dict[str, float]:
    import random

    import torch
    import torch.nn.functional as F

    rows = tokenised_rows()
    random.Random(SEED).shuffle(rows)
    model = seeded_model(dtype, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    tokens, marks, loss = [], [], torch.zeros(())
    for step in range(WARMUP + STEPS + 1):
        marks.append(time.process_time())
        batch = [rows[(step * BATCH_ROWS + i) % len(rows)] for i in range(BATCH_ROWS)]
        longest = max(len(ids) for ids, _ in batch)
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        tokens.append(int(mask.sum()))
    return {"tokens": sum(tokens[WARMUP:-1]), "cpu_seconds": marks[-1] - marks[WARMUP], "loss": loss.item()}


def run_packed(dtype: str, folder: Path) -> dict[str, float]:
    import random

    import torch
    import torch.nn.functional as F
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def per_document(module, query, key, value, attention_mask, document_lengths, **options):
        pieces = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            for q, k, v in zip(*(tensor.split(document_lengths, dim=2) for tensor in (query, key, value)))
        ]
        return torch.cat(pieces, dim=2).transpose(1, 2), None

    AttentionInterface.register("per_document", per_document)
    AttentionMaskInterface.register("per_document", lambda *arguments, **options: None)

    rows = tokenised_rows()
    random.Random(SEED).shuffle(rows)
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):
        length = len(rows[index][0])
        for pack, left in enumerate(room):
            if left >= length:
                packs[pack].append(index)
                room[pack] -= length
                break
        else:
            packs.append([index])
            room.append(PACK_TOKENS - length)
    random.Random(SEED).shuffle(packs)

    model = seeded_model(dtype, "per_document")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    tokens, marks, loss = [], [], torch.zeros(())
    for step in range(WARMUP + STEPS + 1):
        marks.append(time.process_time())
        documents = [rows[i] for i in packs[step % len(packs)]]
        lengths = [len(ids) for ids, _ in documents]
        input_ids = torch.tensor([[token for ids, _ in documents for token in ids]])
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        targets = torch.tensor([label for _, row in documents for label in [*row[1:], -100]])
        hidden = model.model(
            input_ids=input_ids, position_ids=position_ids, document_lengths=lengths, use_cache=False
        ).last_hidden_state[0]
        chosen = targets != -100
        loss = F.cross_entropy(model.lm_head(hidden[chosen]).float(), targets[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        tokens.append(sum(lengths))
    return {"tokens": sum(tokens[WARMUP:-1]), "cpu_seconds": marks[-1] - marks[WARMUP], "loss": loss.item()}


def run_trl(dtype: str, folder: Path) -> dict[str, float]:
    """TRL as its documentation shows it: padded batches of conversational rows, loss on the assistant's tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            marks.append(time.process_time())

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    prepared = json.loads(Path(os.environ["BENCH_ROWS"]).read_text())
    examples = [{"input_ids": ids, "labels": row} for ids, row in prepared]
    lengths: list[int] = []
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH_ROWS,
        max_steps=WARMUP + STEPS + 1,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False,
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        seed=SEED,
    )
    trainer = SFTTrainer(
        model=seeded_model(dtype, "sdpa"),
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[Marks()],
    )
    collate = trainer.data_collator

    def counted(batch):
        lengths.append(sum(len(example["input_ids"]) for example in batch))
        return collate(batch)

    trainer.data_collator = counted
    result = trainer.train()
    tokens = sum(lengths[WARMUP : WARMUP + STEPS])
    return {"tokens": tokens, "cpu_seconds": marks[WARMUP + STEPS] - marks[WARMUP], "loss": result.training_loss}


VARIANTS = {"recipe": run_recipe, "padded": run_padded, "packed": run_packed, "trl": run_trl}


def measure(variant: str, dtype: str, python: str, rows: Path, threads: int) -> dict[str, float]:
    """Run one variant in its own process and return what it printed last."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "BENCH_ROWS": str(rows),
    }
    command = [python, __file__, "--variant", variant, "--dtype", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{variant} {dtype} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def versions(names: list[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()}


def versions_elsewhere(python: str, names: list[str]) -> dict[str, str]:
    """The versions in another environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(subprocess.check_output([python, "-c", code], text=True))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def rounds(arguments: argparse.Namespace, rows: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    for round_number in range(arguments.rounds):
        for dtype in arguments.dtype:
            for variant in ["recipe", "padded", "packed", *(["trl"] if arguments.trl_python else [])]:
                python = arguments.trl_python if variant == "trl" else sys.executable
                result = measure(variant, dtype, python, rows, arguments.threads)
                speed = result["tokens"] / result["cpu_seconds"]
                print(
                    f"round {round_number + 1} {dtype} {variant}: {speed:.0f} tokens/CPU-s, {result['rss_mb']:.0f} MB"
                )
                yield dtype, variant, result | {"tokens_per_cpu_second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl-python", help="python of an environment with trl, for the optional fourth variant")
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "bench" / "results" / "sft_cpu.json")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.variant:
            result = VARIANTS[arguments.variant](arguments.dtype[0], Path(folder))
            print(json.dumps(result | {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
            return
        prepared = Path(folder, "rows.json")
        prepared.write_text(json.dumps(tokenised_rows()))
        runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        for dtype, variant, result in rounds(arguments, prepared):
            runs.setdefault(dtype, {}).setdefault(variant, []).append(result)
    summary = {dtype: summarise(dtype, by_variant) for dtype, by_variant in runs.items()}
    trl = arguments.trl_python
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": "sft_cpu",
        "versions": versions(["torch", "transformers", "am-recipes", "am-models", "am-kernels", "am-loss", "am-data"]),
        "trl versions": versions_elsewhere(trl, ["trl", "torch", "transformers", "accelerate"]) if trl else None,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "summary": summary,
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def summarise(dtype: str, by_variant: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians, and the ratios paired by round: the machine's load changes between rounds, not within one."""
    speeds = {name: [run["tokens_per_cpu_second"] for run in results] for name, results in by_variant.items()}
    ratios = {
        f"recipe / {name}": statistics.median(ours / theirs for ours, theirs in zip(speeds["recipe"], speeds[name]))
        for name in speeds
        if name != "recipe"
    }
    opponent = statistics.median(packed / padded for packed, padded in zip(speeds["packed"], speeds["padded"]))
    return {
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in speeds.items()},
        "peak_rss_mb": {
            name: statistics.median(run["rss_mb"] for run in results) for name, results in by_variant.items()
        },
        "ratios": ratios,
        "packed / padded": opponent,
        "opponent_is_strong": opponent >= REQUIRED[dtype],
    }


if __name__ == "__main__":
    main()
