"""Fine-tuning of a vision-language model, from config to exported folder. Read it top to bottom.

    automodel CONFIG            python -m am_recipes.vlm -c CONFIG            torchrun ... -m am_recipes.vlm -c CONFIG

Rows may have pictures or none: a micro-batch without any still runs the vision tower, on a blank picture that nothing
uses, so that all ranks run the same modules. The vision tower is frozen and the projector trained, unless ``freeze``
says otherwise. Losses are sums over target tokens, divided once by the number of targets of the whole optimizer step.
"""

from __future__ import annotations

# As a script this file ends here: the command line checks the config before it imports this module, and with it torch.
if __name__ == "__main__":
    from am_recipes import cli

    raise SystemExit(cli.main_recipe("vlm"))

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import am_ckpt
import am_data
import am_mesh
import am_models
import am_peft
from am_recipes import checks, optim, runtime, sources, vision
from am_recipes.configs import VlmConfig
from am_recipes.launch import PREEMPTED
from am_recipes.report import Report

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def main(config: VlmConfig) -> int:
    """Train as ``config`` says; return the exit status: 0 when finished, 75 when stopped by SIGTERM after a commit."""
    checks.require_run_dir(config.run_dir)
    if runtime.already_finished(config.run_dir, config.identity(), config.goal()):
        print(f"{config.run_dir} holds this run, finished. Remove it or choose another run_dir to train again.")
        return 0
    with am_mesh.process_group(config.distributed.timeout_minutes) as device, runtime.StopSignal() as stop:
        return train(config, device, stop)


def train(config: VlmConfig, device: torch.device, stop: runtime.StopSignal) -> int:
    dims = am_mesh.ParallelDims(**config.distributed.sizes()).build(device.type)
    data_ranks = dims.mesh("dp")

    # On the meta device it costs nothing: a model without a vision tower is refused before any data is read.
    folder = find_model(config)
    hf_config = config.model.hf_config(folder)
    with torch.device("meta"):
        model: Any = am_models.AutoModelForImageTextToText.from_config(hf_config, kernels="off")

    # Data: every rank reads the same index and takes its share of each global batch.
    processor = vision.load_processor(config.processor.name_or_path or folder, config.processor.chat_template)
    dataset = config.dataset.build(processor=processor)
    held_out = {name: target.build(processor=processor) for name, target in config.validation_datasets.items()}
    vision.require_processor(hf_config, dataset.processor_adapter)
    loader = make_loader(config, hf_config, dataset, data_ranks, training=True)
    validation = {
        name: make_loader(config, hf_config, rows, data_ranks, training=False) for name, rows in held_out.items()
    }
    total_steps = runtime.total_steps(len(loader), **config.goal())

    # Model: meta device -> adapters -> faster parts -> parallel layout -> weights.
    checks.require_embeddings(model, processor.tokenizer, (dataset, *held_out.values()))
    checks.require_positions(model, (dataset, *held_out.values()))
    if config.peft is not None:
        am_peft.apply_lora(model, config.peft.lora_config(), adapter_dtype=config.peft.dtype())
    vision.freeze(model, config.freeze_rules(), has_adapter=config.peft is not None)
    if folder is not None and sources.random_parts(folder):
        vision.require_trained_tower(model)
    kernels = am_models.optimize(model, kernels=config.kernels)
    checks.require_loss_function(kernels, config.loss_fn)
    mapping = am_models.weight_map(model, folder)
    model_files = runtime.model_files(model, processor, folder)
    model = am_mesh.parallelize(model, dims, forward_methods=("forward_with_loss",), **config.distributed.options())
    fresh = ("*lora_*",) if folder else ("*",)
    am_ckpt.load_hf(model, folder, mapping=mapping, initialise=fresh, seed=config.seed, device=device)

    # Optimizer, schedule, and all that a checkpoint holds: this dict and nothing else.
    optimizer = optim.build_optimizer(model, **config.optimizer.options())
    schedule = optim.schedule(optimizer, total_steps=total_steps, **config.lr_scheduler.options())
    progress = runtime.Progress()
    state = {
        "model": am_peft.Adapter(model) if config.peft is not None else model,
        "optimizer": optimizer,
        "schedule": schedule,
        "data": loader,
        "progress": progress,
    }
    base = sources.base_name(config.model.name_or_path or str(folder), folder) if folder else None
    keep_best = config.checkpoint.keep_best
    checkpoints = am_ckpt.Checkpointer(
        config.run_dir / "checkpoints",
        asynchronous=config.checkpoint.asynchronous,
        layout=config.checkpoint.layout,
        keep_last=config.checkpoint.keep_last,
        keep_best=(next(iter(validation)), "min", keep_best) if keep_best is not None else None,
        files=am_peft.adapter_files(model, base_model_name_or_path=base) if config.peft is not None else model_files,
        mapping=mapping,
        # An adapter means nothing on other weights than those it was trained on.
        fingerprints={"base": sources.fingerprint(folder)} if config.peft is not None and folder else None,
    )
    resumed = runtime.resume(checkpoints, state, config.checkpoint.resume, total_steps)

    loss_fn = config.loss_fn.callable()
    vision.require_features(model, loss_fn, dataset, device)
    with Report(
        config.run_dir,
        config.to_yaml(),
        total_steps=total_steps,
        rank=torch.distributed.get_rank(),
        world_size=dims.world_size,
        resume_step=resumed,
        identity=config.identity(),
    ) as log:
        for fact in (dataset.report, kernels, am_peft.trainable_report(model), optim.describe(optimizer)):
            log.note(fact)
        log.samples(dataset.report.samples)
        if resumed is None and validation:
            log.validation(0, runtime.evaluate(model, validation, data_ranks, device))

        for micro_batches in itertools.islice(loader, total_steps - progress.step):
            began = time.monotonic()
            # The divisor is known before any backward, so that every token of the step weighs the same.
            targets = am_mesh.sum_over(data_ranks, runtime.count(micro_batches, "shift_labels", but=-100))
            tokens = am_mesh.sum_over(data_ranks, runtime.count(micro_batches, "document_ids", but=0))

            model.train()
            loss = torch.zeros((), device=device)
            for number, batch in enumerate(micro_batches):
                runtime.seed_everything(config.seed, progress.step, number, data_ranks.get_local_rank())
                with am_mesh.gradient_sync(model, number == len(micro_batches) - 1):
                    part = am_models.forward_with_loss(model, loss_fn, **runtime.to_device(batch, device)) / targets
                    part.backward()
                loss += part.detach()
            mean_loss = am_mesh.sum_over(data_ranks, loss).item()
            grad_norm = am_mesh.clip_grad_norm_(model, config.clip_grad_norm.max_norm).item()
            checks.require_finite(progress.step + 1, loss=mean_loss, grad_norm=grad_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.step += 1

            log.step(
                progress.step,
                epoch=loader.epoch,
                loss=mean_loss,
                grad_norm=grad_norm,
                lr=rate,
                tokens=tokens,
                target_tokens=targets,
                seconds=time.monotonic() - began,
            )
            stopping = stop.requested(data_ranks)
            losses: dict[str, float] | None = None
            if validation and runtime.is_due(progress.step, config.step_scheduler.val_every_steps, total_steps):
                losses = runtime.evaluate(model, validation, data_ranks, device)
                log.validation(progress.step, losses)
                checks.require_finite(progress.step, **losses)
            due = runtime.is_due(progress.step, config.step_scheduler.ckpt_every_steps, total_steps)
            if stopping or (due and config.checkpoint.enabled):
                checkpoints.save(progress.step, state, metrics=losses)
                log.write_page()
            if stopping and progress.step < total_steps:
                checkpoints.wait()
                log.finish(status=f"stopped after step {progress.step}; the same command continues")
                return PREEMPTED
        checkpoints.wait()

        # Out: a plain Hugging Face folder, or the adapter alone.
        export = config.run_dir / "export"
        if config.export.enabled:
            if config.peft is not None and not config.export.merge_adapter:
                am_peft.save_adapter(model, export, base_model_name_or_path=base)
                if torch.distributed.get_rank() == 0:
                    processor.save_pretrained(export)
            else:
                if config.peft is not None:
                    am_peft.merge_lora(model)
                am_ckpt.save_hf(model, export, mapping=mapping, files=model_files)
        if config.generate.num_rows:
            rows = next(iter(held_out.values()))
            answers = vision.answer_rows(
                model, processor, rows, config.generate.num_rows, config.generate.max_new_tokens
            )
            log.pictures(answers.rows, f"{answers}")
        log.finish(goal=config.goal(), next_steps=runtime.next_steps(config.run_dir, None))
    return 0


def find_model(config: VlmConfig) -> Path | None:
    """The folder of the weights, composed where the config says so; None for a random model."""
    return sources.resolve(config.model.name_or_path) if config.model.name_or_path else None


def make_loader(
    config: VlmConfig, hf_config: PretrainedConfig, dataset: Any, data_ranks: DeviceMesh, *, training: bool
) -> am_data.DataLoader:
    """Steps over padded rows and their pictures; for validation one epoch, in order."""
    return am_data.DataLoader(
        dataset,
        layout="padded",
        join=dataset.processor_adapter.join,
        position_ids=vision.position_ids(hf_config),
        global_batch_size=config.step_scheduler.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        mesh=data_ranks,
        seed=config.seed,
        shuffle=training and config.dataloader.shuffle,
        num_epochs=config.step_scheduler.num_epochs if training else 1,
    )
