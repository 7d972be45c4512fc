"""Supervised fine-tuning of a causal language model, from config to exported folder. Read it top to bottom.

    automodel CONFIG            python -m am_recipes.sft -c CONFIG            torchrun ... -m am_recipes.sft -c CONFIG

The model is built on the meta device, gets its adapters, its faster parts and its parallel layout, and only then its
weights, so that no rank ever holds more than its shard. Losses are sums over target tokens, divided once by the number
of targets of the whole optimizer step, so the result does not depend on how a batch was split.
"""

from __future__ import annotations

# As a script this file ends here: once the command line has checked the config, it imports this very file, and torch.
if __name__ == "__main__":
    from am_recipes import cli

    raise SystemExit(cli.run_recipe("sft", __file__))

import functools

import torch

import am_data
import am_mesh
import am_models
import am_peft
from am_recipes import build, checks, data, ending, evaluate, optim, run, run_dir, sources
from am_recipes.configs import SftConfig
from am_recipes.progress import Progress
from am_recipes.stop_signal import StopSignal
from am_recipes.tokenizer import tokenizer_of


def main(config: SftConfig) -> int:
    """Train as `config` says; return the exit status: 0 when finished, 75 when told to stop and committed."""
    with run.started(config) as (device, stop, finished):
        return 0 if finished else train(config, device, stop)


def train(config: SftConfig, device: torch.device, stop: StopSignal) -> int:
    dims = build.dims(config, device)

    # Data: every rank reads the same index and takes its share of each global batch.
    folder = sources.model_folder(config)
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
        losses={"loss_fn": config.loss_fn},
        freeze=config.freeze_rules() or (),
        separate_documents=config.packed_sequence.packed_sequence_size > 0 or data.shares_rows(config, dataset),
    )

    # Optimizer, schedule, and all that a checkpoint holds: this dict and nothing else.
    optimizer, schedule = build.optimizer(config, model, total_steps)
    progress = Progress()
    state = {"model": built.state, "optimizer": optimizer, "schedule": schedule, "data": loader, "progress": progress}
    with run.Run(config, dims, stop, state, total_steps=total_steps, weights=built.weights()) as this:
        this.begin(dataset, *facts, *built.facts(), am_peft.trainable_report(model), optim.describe(optimizer))
        if this.resumed is None and this.validation_is_due:
            this.validated(evaluate.evaluate(config, model, validation, dims, device))
        asked = (config.generate.prompts, config.generate.max_new_tokens, data.template_variables(dataset))
        if this.resumed is None:
            this.log.answers("before", evaluate.generate_answers(model, tokenizer, *asked))

        def forward(number: int, batch: am_data.Batch) -> dict[str, torch.Tensor]:
            this.seed(number)
            inputs, targets = data.share(config, model, batch, dims, device)
            return {"loss": am_models.forward_with_loss(model, loss_fn, inputs, targets, router_loss=built.router.loss)}

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


def make_loader(
    config: SftConfig, dataset: am_data.Dataset | am_data.Stream, dims: am_mesh.ParallelDims, *, training: bool
) -> am_data.DataLoader:
    """Steps over `dataset` packed or padded as the config says."""
    pack_size = config.packed_sequence.packed_sequence_size
    with config.at("packed_sequence"):
        rows = am_data.PackedDataset(dataset, pack_size) if pack_size else dataset
    collate = functools.partial(am_data.collate, layout="packed" if pack_size else "padded")
    return data.loader(config, rows, dims, collate, training=training)
