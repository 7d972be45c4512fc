"""Pre-training of a causal language model on token shards, from config to exported folder. Read it top to bottom.

    automodel CONFIG        python -m am_recipes.pretrain -c CONFIG        torchrun ... -m am_recipes.pretrain -c CONFIG

The model starts from random weights, which depend on their names and the seed alone and so are the same for any layout,
or goes on from a folder. Every token of the shards is a target once an epoch. Losses are sums over target tokens,
divided once by the number of targets of the whole optimizer step.
"""

from __future__ import annotations

# As a script this file ends here: the command line checks the config before it imports this module, and with it torch.
if __name__ == "__main__":
    from am_recipes import cli

    raise SystemExit(cli.main_recipe("pretrain"))

import itertools
import time
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import am_ckpt
import am_data
import am_mesh
import am_models
import am_peft
from am_recipes import checks, optim, routing, runtime, sources
from am_recipes.configs import PretrainConfig
from am_recipes.launch import PREEMPTED
from am_recipes.report import Report


def main(config: PretrainConfig) -> int:
    """Train as ``config`` says; return the exit status: 0 when finished, 75 when stopped by SIGTERM after a commit."""
    checks.require_run_dir(config.run_dir)
    if runtime.already_finished(config.run_dir, config.identity(), config.goal()):
        print(f"{config.run_dir} holds this run, finished. Remove it or choose another run_dir to train again.")
        return 0
    with am_mesh.process_group(config.distributed.timeout_minutes) as device, runtime.StopSignal() as stop:
        return train(config, device, stop)


def train(config: PretrainConfig, device: torch.device, stop: runtime.StopSignal) -> int:
    dims = am_mesh.ParallelDims(**config.distributed.sizes()).build(device.type)
    data_ranks = dims.mesh("dp")

    # Data: windows of the token stream; every rank takes its share of each global batch.
    folder = sources.resolve(config.model.name_or_path) if config.model.name_or_path else None
    tokenizer = runtime.load_tokenizer(config.tokenizer.name_or_path or folder, config.tokenizer.chat_template)
    hf_config = config.model.hf_config(folder)
    given = {"tokenizer": tokenizer, "vocab_size": hf_config.vocab_size}
    dataset = config.dataset.build(**given)
    held_out = {name: target.build(**given) for name, target in config.validation_datasets.items()}
    loader = make_loader(config, dataset, data_ranks, training=True)
    validation = {name: make_loader(config, rows, data_ranks, training=False) for name, rows in held_out.items()}
    total_steps = count_steps(config, loader, dataset)

    # Model: meta device -> faster parts -> parallel layout -> weights.
    with torch.device("meta"):
        model: Any = am_models.AutoModelForCausalLM.from_config(hf_config, kernels="off")
    checks.require_positions(model, (dataset, *held_out.values()))
    kernels = am_models.optimize(model, kernels=config.kernels)
    checks.require_loss_function(kernels, config.loss_fn)
    mapping = am_models.weight_map(model)
    model_files = runtime.model_files(model, tokenizer, folder)
    router = routing.routing(model, kernels, config.moe.balance_loss, config.moe.z_loss)
    model = am_mesh.parallelize(model, dims, forward_methods=("forward_with_loss",), **config.distributed.options())
    fresh = () if folder else ("*",)
    am_ckpt.load_hf(model, folder, mapping=mapping, initialise=fresh, seed=config.seed, device=device)

    # Optimizer, schedule, and all that a checkpoint holds: this dict and nothing else.
    optimizer = optim.build_optimizer(model, **config.optimizer.options())
    schedule = optim.schedule(optimizer, total_steps=total_steps, **config.lr_scheduler.options())
    progress = runtime.Progress()
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": loader, "progress": progress}
    keep_best = config.checkpoint.keep_best
    checkpoints = am_ckpt.Checkpointer(
        config.run_dir / "checkpoints",
        asynchronous=config.checkpoint.asynchronous,
        layout=config.checkpoint.layout,
        keep_last=config.checkpoint.keep_last,
        keep_best=(next(iter(validation)), "min", keep_best) if keep_best is not None else None,
        files=model_files,
        mapping=mapping,
    )
    resumed = runtime.resume(checkpoints, state, config.checkpoint.resume, total_steps)

    loss_fn = config.loss_fn.callable()
    router_loss = router.loss if router is not None else None
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
                    batch = runtime.to_device(batch, device)
                    total = am_models.forward_with_loss(model, loss_fn, router_loss=router_loss, **batch)
                    part = total / targets
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
                others=router.metrics(data_ranks) if router is not None else None,
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

        # Out: a plain Hugging Face folder, and how the model goes on from the prompts.
        if config.export.enabled:
            am_ckpt.save_hf(model, config.run_dir / "export", mapping=mapping, files=model_files)
        if config.generate.prompts:
            options = (config.generate.max_new_tokens, config.seed)
            log.answers("after", runtime.generate_text(model, tokenizer, config.generate.prompts, *options))
        log.finish(
            goal=config.goal(),
            next_steps=runtime.next_steps(config.run_dir, runtime.TEXT if config.export.enabled else None),
        )
    return 0


def make_loader(config: PretrainConfig, dataset: Any, data_ranks: DeviceMesh, *, training: bool) -> am_data.DataLoader:
    """Steps over windows of equal length, so nothing is padded; for validation one epoch, in order."""
    return am_data.DataLoader(
        dataset,
        layout="padded",
        global_batch_size=config.step_scheduler.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        mesh=data_ranks,
        seed=config.seed,
        shuffle=training and config.dataloader.shuffle,
        num_epochs=config.step_scheduler.num_epochs if training else 1,
    )


def count_steps(config: PretrainConfig, loader: am_data.DataLoader, dataset: Any) -> int:
    """Optimizer steps of the run. Raises ValueError where that is longer than the data, read ``num_epochs`` times."""
    scheduler = config.step_scheduler
    available = len(loader) * scheduler.num_epochs
    asked = [] if scheduler.max_steps is None else [scheduler.max_steps]
    if scheduler.max_tokens is not None:
        # The last step of an epoch is a short one where the windows do not divide.
        epochs, rest = divmod(scheduler.max_tokens, int(dataset.lengths.sum()))
        tokens_per_step = scheduler.global_batch_size * int(dataset.lengths.max())
        asked.append(epochs * len(loader) + -(-rest // tokens_per_step))
    steps = min(asked, default=available)
    if steps > available:
        raise ValueError(
            f"the run is to have {steps} steps, but num_epochs={scheduler.num_epochs} over {len(dataset)} windows has "
            f"{available}; lower max_steps or max_tokens, or repeat the data with num_epochs={-(-steps // len(loader))}"
        )
    return steps
