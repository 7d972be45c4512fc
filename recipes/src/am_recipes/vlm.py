"""Fine-tuning of a vision-language model, from config to exported folder. Read it top to bottom.

    automodel CONFIG            python -m am_recipes.vlm -c CONFIG            torchrun ... -m am_recipes.vlm -c CONFIG

Rows may have images or none: a micro-batch without any still runs the vision tower, on a blank image that nothing
uses, so that all ranks run the same modules. The vision tower is frozen and the projector trained, unless `freeze`
says otherwise. Losses are sums over target tokens, divided once by the number of targets of the whole optimizer step.
"""

from __future__ import annotations

# As a script this file ends here: once the command line has checked the config, it imports this very file, and torch.
if __name__ == "__main__":
    from am_recipes import cli

    raise SystemExit(cli.run_recipe("vlm", __file__))

import functools

import torch
from transformers import PretrainedConfig

import am_data
import am_mesh
import am_models
import am_peft
from am_recipes import build, checks, data, ending, evaluate, optim, run, sources, vision
from am_recipes.configs import VlmConfig
from am_recipes.progress import Progress
from am_recipes.stop_signal import StopSignal
from am_recipes.tokenizer import processor_of


def main(config: VlmConfig) -> int:
    """Train as `config` says; return the exit status: 0 when finished, 75 when told to stop and committed."""
    with run.started(config) as (device, stop, finished):
        return 0 if finished else train(config, device, stop)


def train(config: VlmConfig, device: torch.device, stop: StopSignal) -> int:
    dims = build.dims(config, device)

    # On the meta device it costs nothing: a model without a vision tower is refused before any data is read.
    folder = sources.model_folder(config)
    with config.at("model"):
        hf_config = config.model.hf_config(folder)
    with config.at("model"), torch.device("meta"):
        model = am_models.AutoModelForImageTextToText.from_config(hf_config, kernels="off", **config.model.families())

    # Data: every rank reads the same index and takes its share of each global batch.
    processor = processor_of(config, folder)
    dataset = vision.require_images(hf_config, config.dataset.build(processor=processor))
    held_out = {
        name: vision.require_images(hf_config, target.build(processor=processor))
        for name, target in config.validation_datasets.items()
    }
    loader = make_loader(config, hf_config, dataset, dims, training=True)
    validation = {name: make_loader(config, hf_config, rows, dims, training=False) for name, rows in held_out.items()}
    total_steps = data.total_steps(config, loader)

    checks.require_embeddings(model, processor.tokenizer, (dataset, *held_out.values()))
    checks.require_positions(model, (dataset, *held_out.values()))
    facts = [*data.facts(config, dataset, held_out, loader), ending.follow(model, processor, folder, dataset)]
    loss_fn = config.loss_fn.callable()
    built = build.build(
        config,
        model,
        dims,
        device,
        folder=folder,
        tokenizer=processor,
        losses={"loss_fn": config.loss_fn},
        freeze=vision.freeze_rules(config, model),
        separate_documents=data.shares_rows(config, dataset),
    )
    vision.require_features(config, model, dataset, device)

    # Optimizer, schedule, and all that a checkpoint holds: this dict and nothing else.
    optimizer, schedule = build.optimizer(config, model, total_steps)
    progress = Progress()
    state = {"model": built.state, "optimizer": optimizer, "schedule": schedule, "data": loader, "progress": progress}
    with run.Run(config, dims, stop, state, total_steps=total_steps, weights=built.weights()) as this:
        this.begin(dataset, *facts, *built.facts(), am_peft.trainable_report(model), optim.describe(optimizer))
        if this.resumed is None and this.validation_is_due:
            this.validated(evaluate.evaluate(config, model, validation, dims, device))

        def ask(moment: str) -> None:
            if config.generate.num_rows:
                asked = (config.generate.num_rows, config.generate.max_new_tokens)
                answers = vision.answer_rows(model, processor, next(iter(held_out.values())), *asked)
                this.log.images(moment, answers.rows, f"{answers}")

        if this.resumed is None:
            ask("before")

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
        build.export(config, built, processor)
        ask("after")
        return this.finish()


def make_loader(
    config: VlmConfig,
    hf_config: PretrainedConfig,
    dataset: vision.VisionRows,
    dims: am_mesh.ParallelDims,
    *,
    training: bool,
) -> am_data.DataLoader:
    """Steps over padded rows and their images."""
    collate = functools.partial(
        am_data.collate,
        layout="padded",
        join=dataset.processor_adapter.join,
        position_ids=vision.position_ids(config, hf_config),
    )
    return data.loader(config, dataset, dims, collate, training=training)
