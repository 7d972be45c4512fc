"""What every recipe needs around its loop: seeding, progress, stop signals, the run directory.

Nothing here calls back into a loop, and nothing here knows what is trained.
"""

from __future__ import annotations

import hashlib
import json
import signal
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoTokenizer

import am_ckpt
import am_loss
import am_mesh
import am_models
from am_recipes import sources
from am_recipes.configs import identity_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# How transformers.pipeline asks an exported model.
CHAT = (
    """("text-generation", "{export}")([{{"role": "user", "content": "Hello!"}}])[0]["generated_text"][-1]["content"]"""
)
TEXT = '("text-generation", "{export}")("The", do_sample=True, max_new_tokens=60)[0]["generated_text"]'


def seed_everything(seed: int, *coordinates: int) -> None:
    """Seed torch on every device from ``seed`` and where in the run we are: (step, micro-batch, data rank).

    Deriving instead of carrying the generator state makes dropout a function of the position alone, so a resumed run
    draws what the uninterrupted one would have drawn.
    """
    digest = hashlib.blake2b(repr((seed, *coordinates)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class Progress:
    """How far the run is: optimizer steps done. Checkpointed beside the model."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


def total_steps(
    steps_per_epoch: int, max_steps: int | None, num_epochs: int | None, max_tokens: int | None = None
) -> int:
    """Optimizer steps of the whole run: whichever of the two limits comes first; at least one is set."""
    limits = [max_steps, None if num_epochs is None else num_epochs * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something done every so many steps (None: only at the end) is due after ``step``."""
    return step == last or (every is not None and step % every == 0)


class StopSignal:
    """While entered, SIGTERM asks for an orderly stop instead of killing the process."""

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def requested(self, mesh: DeviceMesh) -> bool:
        """Whether any rank of ``mesh`` got the signal; every rank calls it, so that all stop after the same step."""
        return am_mesh.sum_over(mesh, int(self._received)) > 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def already_finished(run_dir: Path, identity: Mapping[str, Any], goal: Mapping[str, Any]) -> bool:
    """Refuse a directory that holds another run; say whether this very run has already finished there.

    ``identity``: what makes two runs the same run, as nested JSON values. ``goal``: how long it was asked to train.
    Both are compared with ``run.json``. Every rank calls this, before anything is written.

    Raises ValueError with the keys that differ and their old and new values, or where run.json is damaged.
    """
    file = run_dir / "run.json"
    if not file.exists():
        return False
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        old, finished = recorded["identity"], recorded["finished"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is not the record of a run ({error}), so nothing tells which run {run_dir} holds; restore the "
            "file, or give this run its own run_dir"
        ) from error
    new = json.loads(json.dumps(identity))
    different = identity_difference(old, new)
    if different:
        lines = [f"  {key}: {_lookup(old, key)!r} there, {_lookup(new, key)!r} now" for key in different]
        raise ValueError(
            f"{run_dir} holds a different run:\n" + "\n".join(lines) + "\n"
            "Give this one its own run_dir, remove that directory, or restore these values to continue it."
        )
    return bool(finished == dict(goal))


def _lookup(values: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None  # type: ignore[assignment]
    return values


def resume(checkpoints: am_ckpt.Checkpointer, state: Mapping[str, Any], mode: str, total_steps: int) -> int | None:
    """Restore ``state`` from the newest checkpoint as ``checkpoint.resume`` says; the step, or None for a fresh start.

    ``auto``: where there is one; ``must``: or raise FileNotFoundError; ``never``: raise FileExistsError if there is
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


def load_tokenizer(name_or_path: str | Path | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, Hub id or ``package:`` asset; ``chat_template`` (Jinja) replaces its own.

    Raises ValueError where there is none.
    """
    name_or_path = None if name_or_path is None else sources.locate(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); set "
            "tokenizer.name_or_path to a folder with tokenizer.json and tokenizer_config.json, or to a Hub id"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def model_files(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> dict[str, bytes]:
    """What stands beside the weights of an export, by file name: config, generation config and tokenizer as this run
    uses them, and what else ``folder`` (the model's own) has: code, licence, SentencePiece model.

    Call it before the layout: FSDP2 renames the class.
    """
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as temporary:
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(temporary)
        written = {path.name: path.read_bytes() for path in Path(temporary).iterdir() if path.is_file()}
    original = am_ckpt.hf_files(folder) if folder is not None else {}
    return {name: path.read_bytes() for name, path in original.items()} | written


def next_steps(run_dir: Path, ask: str | None) -> list[str]:
    """What to type after the run, as shell lines; ``ask`` is how to ask its export, None where it has none."""
    lines = ["# Loss curves, what was under loss, samples:", f"open {run_dir / 'report.html'}"]
    if ask is not None:
        question = ask.format(export=run_dir / "export")
        lines += ["# The exported model in stock transformers:"]
        lines += [f"python -c 'from transformers import pipeline; print(pipeline{question})'"]
    return lines


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def count(micro_batches: Iterable[Mapping[str, torch.Tensor]], key: str, *, but: int) -> int:
    """How many values of ``key`` in the micro-batches of this rank are not ``but``."""
    return sum(int((batch[key] != but).sum()) for batch in micro_batches)


@torch.no_grad()
def evaluate(
    model: Any,
    loaders: Mapping[str, Iterable[Sequence[Mapping[str, torch.Tensor]]]],
    data_ranks: DeviceMesh,
    device: torch.device,
) -> dict[str, float]:
    """Mean cross-entropy per target token of each validation set, whatever the loss that trains: it compares runs.

    Every rank calls it; all get the same numbers.
    """
    model.eval()
    losses = {}
    for name, loader in loaders.items():
        total, targets = torch.zeros((), device=device), 0
        for micro_batches in loader:
            for batch in micro_batches:
                total += am_models.forward_with_loss(model, am_loss.linear_cross_entropy, **to_device(batch, device))
            targets += count(micro_batches, "shift_labels", but=-100)
        losses[name] = am_mesh.sum_over(data_ranks, total).item() / am_mesh.sum_over(data_ranks, targets)
    return losses


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs, decoded greedily with the tokenizer's chat template. Every rank calls it."""
    model.eval()
    answers = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append((prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


@torch.no_grad()
def generate_text(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[tuple[str, str]]:
    """(prompt, continuation) pairs, each sampled from the 20 likeliest tokens with ``seed``. Every rank calls it."""
    model.eval()
    answers: list[tuple[str, str]] = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        seed_everything(seed, len(answers))
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=20, temperature=0.8)
        answers.append((prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers
