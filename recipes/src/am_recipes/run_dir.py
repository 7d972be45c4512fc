"""The directory of a run: whether it can be written, what it already holds, where a run goes on, what to do next."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import am_ckpt
from am_recipes.run_config import RunConfig, identity_difference
from am_recipes.sinks import record

# How transformers.pipeline asks an exported model.
CHAT = (
    """("text-generation", "{export}")([{{"role": "user", "content": "Hello!"}}])[0]["generated_text"][-1]["content"]"""
)
TEXT = '("text-generation", "{export}")("The", do_sample=True, max_new_tokens=60)[0]["generated_text"]'


def is_finished(config: RunConfig) -> bool:
    """Whether the very run that `config` describes has finished in its directory; says so where it has.

    Every rank calls this before anything is loaded or written. Raises NotADirectoryError or PermissionError where the
    run could not write, ValueError where the directory holds another run (with the keys that differ) or a record that
    is broken.
    """
    run_dir = config.run_dir
    require_usable(config)
    finished = already_finished(run_dir, config.identity(), config.goal())
    if finished:
        print(f"{run_dir} holds this run, finished. Remove it or choose another run_dir to train again.")
    return finished


def require_usable(config: RunConfig) -> None:
    """Refuse a directory that the run cannot write, or that holds another run; reads only."""
    with config.at("run_dir"):
        _require_writable(config.run_dir)
        already_finished(config.run_dir, config.identity(), config.goal())


def _require_writable(run_dir: Path) -> None:
    """Find out before anything is loaded, not at the first save, that a run cannot write; creates nothing."""
    for folder in (run_dir / "checkpoints", run_dir / "export"):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(
                f"run_dir={run_dir} needs the folder {folder}, but {existing} is a file; remove it or choose another "
                "run_dir"
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(
                f"run_dir={run_dir} needs the folder {folder}, and {existing} cannot be written by this user or is "
                "read-only; choose another run_dir"
            )


def already_finished(run_dir: Path, identity: Mapping[str, Any], goal: Mapping[str, Any]) -> bool:
    """Refuse a directory that holds another run; say whether this very run has already finished there.

    `identity`: what makes two runs the same run, as nested JSON values. `goal`: how long it was asked to train.
    Both are compared with `run.json`. Every rank calls this, before anything is written.

    Raises ValueError with the keys that differ and their old and new values, or where run.json is damaged.
    """
    if not (run_dir / record.NAME).exists():
        return False
    recorded = record.load(run_dir)
    old, new = recorded.identity, json.loads(json.dumps(identity))
    different = identity_difference(old, new)
    if different:
        lines = [f"  {key}: {_lookup(old, key)!r} there, {_lookup(new, key)!r} now" for key in different]
        raise ValueError(
            f"{run_dir} holds a different run:\n" + "\n".join(lines) + "\n"
            "Give this one its own run_dir, remove that directory, or restore these values to continue it."
            + _on_lengthening(different, new)
        )
    return recorded.finished == dict(goal)


def _on_lengthening(different: Sequence[str], identity: Mapping[str, Any]) -> str:
    """How to train on where another length alone, of a schedule that follows from it, makes the run another one."""
    lengths = {f"step_scheduler.{name}" for name in ("max_steps", "num_epochs", "max_tokens")}
    if not lengths.issuperset(different):
        return ""
    style = identity["lr_scheduler"]["style"]
    return (
        f" With lr_scheduler.style={style} the length decides the rate of every step, also of those that are done. To "
        "train on from the result of a finished run, start a new one in its own run_dir from its export "
        "(model.name_or_path), with lr_scheduler.warmup_steps and a lower optimizer.lr. Of a run with style constant "
        "or inverse_sqrt the length may grow: the same command continues it."
    )


def _lookup(values: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None  # type: ignore[assignment]
    return values


def resume(checkpoints: am_ckpt.Checkpointer, state: Mapping[str, Any], mode: str, total_steps: int) -> int | None:
    """Restore `state` from the newest checkpoint as `checkpoint.resume` says; the step, or None for a fresh start.

    `auto`: where there is one; `must`: or raise FileNotFoundError; `never`: raise FileExistsError if there is
    one, since training on would mix two runs in one directory. ValueError where the checkpoint is of a later step than
    the run's last. Rank 0 prints what it restored, with a digest of it. Every rank calls it.
    """
    if mode == "never":
        existing = sorted(path.name for path in checkpoints.directory.glob("step_*"))
        if existing:
            raise FileExistsError(
                f"checkpoint.resume is never, but {checkpoints.directory} holds {', '.join(existing)}; "
                "remove them, choose another run_dir, or set checkpoint.resume to auto"
            )
        return None
    step = checkpoints.load(state)
    if step is None and mode == "must":
        raise FileNotFoundError(
            f"checkpoint.resume is must, but {checkpoints.directory} holds no checkpoint; "
            "check run_dir, or set checkpoint.resume to auto"
        )
    if step is not None and step > total_steps:
        raise ValueError(
            f"{checkpoints.directory} is at step {step}, and the run would end at step {total_steps}; "
            "lengthen the run in step_scheduler, or choose another run_dir"
        )
    if step is not None:
        restored = checkpoints.digest(state)
        if torch.distributed.get_rank() == 0:
            print(
                f"resumed from step {step} in {checkpoints.directory}: rank 0 restored {restored['tensors']} tensors, "
                f"{restored['bytes'] / 1e6:.1f} MB, xxh3-128 {restored['xxh3_128']}",
                flush=True,
            )
    return step


def next_steps(run_dir: Path, ask: str | None) -> list[str]:
    """What to type after the run, as shell lines; `ask` is how to ask its export, None where it has none."""
    lines = ["# Loss curves, what was under loss, samples:", f"open {run_dir / 'report.html'}"]
    if ask is not None:
        question = ask.format(export=run_dir / "export")
        lines += ["# The exported model in stock transformers:"]
        lines += [f"python -c 'from transformers import pipeline; print(pipeline{question})'"]
    return lines
