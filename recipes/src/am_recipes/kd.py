"""Distillation of a causal language model from a larger one, from config to exported folder. Read it top to bottom.

    automodel CONFIG             python -m am_recipes.kd -c CONFIG             torchrun ... -m am_recipes.kd -c CONFIG

The student learns from the rows and from the teacher's distribution over the next token (Hinton et al. 2015,
arXiv:1503.02531): `(1 - kd_ratio) * cross-entropy + kd_ratio * temperature^2 * divergence`, both as sums over target
tokens divided once by the targets of the whole optimizer step. The teacher is frozen and never trained; neither model's
logits are ever held for more than a chunk of tokens.
"""

from __future__ import annotations

# As a script this file ends here: once the command line has checked the config, it imports this very file, and torch.
if __name__ == "__main__":
    from am_recipes import cli

    raise SystemExit(cli.run_recipe("kd", __file__))

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import am_data
import am_loss
import am_mesh
import am_models
import am_peft
from am_recipes import build, checks, data, ending, evaluate, optim, run, run_dir, sources
from am_recipes.configs import KdConfig
from am_recipes.progress import Progress
from am_recipes.stop_signal import StopSignal
from am_recipes.tokenizer import load_tokenizer, tokenizer_of


def main(config: KdConfig) -> int:
    """Train as `config` says; return the exit status: 0 when finished, 75 when told to stop and committed."""
    with run.started(config) as (device, stop, finished):
        return 0 if finished else train(config, device, stop)


def train(config: KdConfig, device: torch.device, stop: StopSignal) -> int:
    dims = build.dims(config, device)

    # Data: every rank reads the same index and takes its share of each global batch.
    folder = sources.model_folder(config)
    teacher_folder = sources.model_folder(config, "teacher_model")
    tokenizer = tokenizer_of(config, folder)
    dataset = config.dataset.build(tokenizer=tokenizer)
    held_out = {name: target.build(tokenizer=tokenizer) for name, target in config.validation_datasets.items()}
    loader = make_loader(config, dataset, dims, training=True)
    validation = {name: make_loader(config, rows, dims, training=False) for name, rows in held_out.items()}
    total_steps = data.total_steps(config, loader)

    with config.at("model"), torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(
            config.model.hf_config(folder), kernels="off", **config.model.families()
        )
    checks.require_embeddings(model, tokenizer, (dataset, *held_out.values()))
    checks.require_positions(model, (dataset, *held_out.values()))
    facts = [*data.facts(config, dataset, held_out, loader), ending.follow(model, tokenizer, folder, dataset)]
    loss_fn = config.loss_fn.callable()
    built = build.build(
        config,
        model,
        dims,
        device,
        folder=folder,
        tokenizer=tokenizer,
        losses={"loss_fn": config.loss_fn} | ({"kd_loss_fn": config.kd_loss_fn} if config.kd_ratio > 0 else {}),
        freeze=config.freeze_rules() or (),
        separate_documents=config.packed_sequence.packed_sequence_size > 0 or data.shares_rows(config, dataset),
    )

    # At kd_ratio 0 this is supervised fine-tuning, and nothing asks the teacher.
    teacher = load_teacher(config, teacher_folder, tokenizer, dataset, device) if config.kd_ratio > 0 else None
    kd_loss_fn = distillation_loss(config, tokenizer, (model,) if teacher is None else (model, teacher), device)

    # Optimizer, schedule, and all that a checkpoint holds: this dict and nothing else.
    optimizer, schedule = build.optimizer(config, model, total_steps)
    progress = Progress()
    state = {"model": built.state, "optimizer": optimizer, "schedule": schedule, "data": loader, "progress": progress}
    weights = built.weights({"teacher": teacher_folder})
    with run.Run(config, dims, stop, state, total_steps=total_steps, weights=weights) as this:
        this.begin(dataset, *facts, *built.facts(), am_peft.trainable_report(model), optim.describe(optimizer))
        if this.resumed is None and this.validation_is_due:
            this.validated(evaluate.evaluate(config, model, validation, dims, device))
        asked = (config.generate.prompts, config.generate.max_new_tokens, data.template_variables(dataset))
        if this.resumed is None:
            this.log.answers("before", evaluate.generate_answers(model, tokenizer, *asked))

        def forward(number: int, batch: am_data.Batch) -> dict[str, torch.Tensor]:
            this.seed(number)
            inputs, targets = data.share(config, model, batch, dims, device)
            if teacher is None:
                loss = am_models.forward_with_loss(model, loss_fn, inputs, targets, router_loss=built.router.loss)
                return {"loss": loss, "ce_loss": loss, "kd_loss": torch.zeros_like(loss)}
            return distil(model, teacher, kd_loss_fn, inputs, targets, built.router.loss)

        for micro_batches in this.steps(loader):
            # The divisor is known before any backward, so that every token of the step weighs the same.
            targets = this.count(micro_batches)
            model.train()
            sums = am_mesh.forward_backward(model, micro_batches, forward, targets)
            grad_norm = am_mesh.clip_grad_norm_(model, config.clip_grad_norm.max_norm)
            this.measure(sums, grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            this.done(built.router.metrics(dims))
            if this.validation_is_due:
                this.validated(evaluate.evaluate(config, model, validation, dims, device))
            this.save()
        if this.stopped():
            return this.preempted()

        this.choose_weights()
        build.export(config, built, tokenizer)
        this.log.answers("after", evaluate.generate_answers(model, tokenizer, *asked))
        return this.finish(run_dir.CHAT)


def load_teacher(
    config: KdConfig,
    folder: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: am_data.Dataset | am_data.Stream,
    device: torch.device,
) -> PreTrainedModel:
    """The frozen teacher in its own dtype and layout; it must read the student's tokens and embed those of the data."""
    if folder is not None:
        checks.require_same_tokens(tokenizer, load_tokenizer(folder, None), "teacher_model")
    with config.at("teacher_model"), torch.device("meta"):
        teacher = am_models.AutoModelForCausalLM.from_config(
            config.teacher_model.hf_config(folder), kernels="off", **config.teacher_model.families()
        )
    checks.require_embeddings(teacher, tokenizer, (dataset,), "teacher_model")
    checks.require_positions(teacher, (dataset,))
    build.build_teacher(
        config,
        teacher,
        config.teacher_distributed or config.distributed,
        device,
        folder=folder,
        losses={"kd_loss_fn": config.kd_loss_fn},
        separate_documents=config.packed_sequence.packed_sequence_size > 0 or data.shares_rows(config, dataset),
    )
    return teacher


def distillation_loss(
    config: KdConfig, tokenizer: PreTrainedTokenizerBase, models: tuple[PreTrainedModel, ...], device: torch.device
) -> Callable[..., am_loss.DistillationLoss]:
    """`kd_loss_fn` with the options of the run; what it refuses, or is no sum, is found before anything is written."""
    # Vocabularies are padded to different sizes, but the tokens are the same.
    num_tokens = min(1 + max(tokenizer.get_vocab().values()), *map(checks.num_embeddings, models))
    kd_loss_fn = functools.partial(
        config.kd_loss_fn.callable(), kd_ratio=config.kd_ratio, temperature=config.temperature, num_tokens=num_tokens
    )
    checks.require_distillation_loss(kd_loss_fn, num_tokens, device)
    return kd_loss_fn


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kd_loss_fn: Callable[..., am_loss.DistillationLoss],
    inputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    router_loss: am_models.RouterLoss | None,
) -> dict[str, torch.Tensor]:
    """The losses of one micro-batch as sums. The student runs inside the teacher's forward, where both models' heads
    are gathered at once.
    """
    sums: dict[str, torch.Tensor] = {}

    def run_student(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **head: Any) -> torch.Tensor:
        teacher_head = {f"teacher_{name}": value for name, value in head.items()}
        asked = functools.partial(kd_loss_fn, teacher_hidden=hidden, teacher_weight=weight, **teacher_head)

        # What `asked` takes is what it takes: targets that a loss does not know are refused by its signature.
        @functools.wraps(asked)
        def loss_fn(*student_head: torch.Tensor, **options: Any) -> torch.Tensor:
            losses = asked(*student_head, **options)
            sums.update(ce_loss=losses.cross_entropy, kd_loss=losses.divergence)
            return losses.loss

        with torch.enable_grad():
            return am_models.forward_with_loss(student, loss_fn, inputs, targets, router_loss=router_loss)

    with torch.no_grad():
        labels = {"shift_labels": targets["shift_labels"]}
        loss = am_models.forward_with_loss(teacher, run_student, inputs, labels)
    return {"loss": loss, **sums}


def make_loader(
    config: KdConfig, dataset: am_data.Dataset | am_data.Stream, dims: am_mesh.ParallelDims, *, training: bool
) -> am_data.DataLoader:
    """Steps over `dataset` packed or padded as the config says."""
    pack_size = config.packed_sequence.packed_sequence_size
    with config.at("packed_sequence"):
        rows = am_data.PackedDataset(dataset, pack_size) if pack_size else dataset
    collate = functools.partial(am_data.collate, layout="packed" if pack_size else "padded")
    return data.loader(config, rows, dims, collate, training=training)
