"""The data of a run as optimizer steps, and how many of them the run has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import am_data
import am_mesh
import am_models
from am_recipes.configs import RunConfig
from am_recipes.settings import ArgumentError, Target

IGNORED = -100


def loader(
    config: RunConfig,
    dataset: am_data.Dataset | am_data.Stream,
    dims: am_mesh.ParallelDims,
    collate: Callable[..., am_data.Batch],
    *,
    training: bool,
) -> am_data.DataLoader:
    """Steps over `dataset`; for validation one epoch, in order. `dataloader.collate` replaces `collate`.

    `collate` is `am_data.collate` with a layout; it pads rows so that ranks that share them get equal parts. Every rank
    calls it, and gets its share of each global batch. Raises what `am_data.DataLoader` does, and ArgumentError for a
    collate of the config that does not pad.
    """
    chosen, zigzag = config.dataloader, config.distributed.cp_layout == "zigzag"
    sequence_parallel = config.distributed.sequence_parallel
    multiple = dims.row_multiple(sequence_parallel=sequence_parallel, zigzag=zigzag)
    padded = functools.partial(collate, pad_to_multiple_of=multiple)
    if chosen.collate is not None:
        _require_padding(chosen.collate, dims.row_multiple(zigzag=zigzag))
    with config.at("step_scheduler"):
        return am_data.DataLoader(
            dataset,
            collate=padded if chosen.collate is None else chosen.collate.callable(),
            global_batch_size=config.step_scheduler.global_batch_size,
            local_batch_size=config.step_scheduler.local_batch_size,
            mesh=dims.row_ranks,
            seed=config.seed,
            shuffle=training and chosen.shuffle,
            num_epochs=config.step_scheduler.num_epochs if training else 1,
            drop_last=training and chosen.drop_last,
            prefetch=chosen.prefetch,
        )


def _require_padding(collate: Target, multiple: int) -> None:
    """Refuse a `collate` whose rows ranks could not share: ArgumentError. No samples at all are a row, too."""
    width = collate.callable()([])["input_ids"].shape[-1] if multiple > 1 else 0
    if width % multiple:
        raise ArgumentError(
            "dataloader.collate",
            f"{collate.path} gave a row of {width} tokens, and rows are cut over ranks: a length must be a multiple "
            f"of {multiple}; pad them (am_data.collate: pad_to_multiple_of={multiple}), or choose cp_size=1",
        )


def total_steps(config: RunConfig, loader: am_data.DataLoader) -> int:
    """Optimizer steps of the run: whichever of `step_scheduler`'s limits comes first.

    Raises ConfigError where a stream, whose length nobody knows, is to be read by another limit than `max_steps`, or
    saved at the ends of its epochs.
    """
    scheduler = config.step_scheduler
    if loader.is_stream and scheduler.ckpt_every_epoch:
        raise config.error(
            "step_scheduler.ckpt_every_epoch",
            "true: the dataset is a stream, and nobody knows where it ends; leave it out",
        )
    if loader.is_stream and (scheduler.max_steps is None or scheduler.max_tokens is not None):
        raise config.error(
            "step_scheduler",
            f"max_steps={scheduler.max_steps}, max_tokens={scheduler.max_tokens}: the dataset is a stream, whose "
            "length and order nobody knows before it is read; give max_steps, and it alone",
        )
    epochs = None if scheduler.num_epochs is None or loader.is_stream else scheduler.num_epochs * len(loader)
    return min(limit for limit in (*asked_steps(config, loader), epochs) if limit is not None)


def asked_steps(config: RunConfig, loader: am_data.DataLoader) -> list[int]:
    """The limits in steps and in tokens, where there are, as optimizer steps."""
    scheduler = config.step_scheduler
    steps = [] if scheduler.max_steps is None else [scheduler.max_steps]
    return steps if scheduler.max_tokens is None else [*steps, loader.steps_for_tokens(scheduler.max_tokens)]


def shares_rows(config: RunConfig, dataset: am_data.Dataset | am_data.Stream) -> bool:
    """Whether documents may lie in one row, so that a model must not mix them.

    Known of a dataset, by sixteen samples from all over it; may be so in a stream, whose samples nobody has seen.
    """
    if not isinstance(dataset, am_data.Dataset):
        return True
    samples = _spread_samples(dataset)
    if not all(isinstance(sample, Mapping) for sample in samples):
        return True
    collate = config.dataloader.collate
    if collate is None:
        return False
    batch = collate.callable()(samples)
    return "document_ids" in batch and int(batch["document_ids"].max()) > 1


def spread(dataset: am_data.Dataset) -> list[am_data.Example]:
    """The examples of sixteen samples from all over `dataset`."""
    samples = _spread_samples(dataset)
    return [each for sample in samples for each in ([sample] if isinstance(sample, Mapping) else sample)]


def _spread_samples(dataset: am_data.Dataset) -> list[am_data.Sample]:
    return [dataset[index] for index in sorted({len(dataset) * part // 16 for part in range(16)})]


def facts(
    config: RunConfig,
    dataset: am_data.Dataset | am_data.Stream,
    held_out: Mapping[str, am_data.Dataset | am_data.Stream],
    loader: am_data.DataLoader,
) -> list[str]:
    """What is to be said of the data beside the report of `dataset`: the held-out rows, and what a step holds."""
    lines = []
    for name, rows in held_out.items():
        if isinstance(rows, am_data.Reported):
            lines.append(f"{name}: {rows.report}")
        theirs, ours = _rendering(rows), _rendering(dataset)
        if None not in (theirs, ours) and theirs != ours:
            lines.append(f"WARNING {name} is rendered with another chat template than the rows that train")
    return [*lines, step_size(config.step_scheduler.global_batch_size, dataset, loader, config.dataloader.drop_last)]


def template_variables(dataset: am_data.Dataset | am_data.Stream) -> Mapping[str, Any]:
    """What the template of `dataset` was given, which a prompt is rendered with too."""
    return dataset.chat_template_kwargs if isinstance(dataset, am_data.Rendered) else {}


def _rendering(rows: object) -> tuple[str | None, dict[str, Any]] | None:
    return (rows.chat_template, dict(rows.chat_template_kwargs)) if isinstance(rows, am_data.Rendered) else None


def step_size(
    global_batch_size: int, dataset: am_data.Dataset | am_data.Stream, loader: am_data.DataLoader, drop_last: bool
) -> str:
    """What an optimizer step holds on average, and where the last one of an epoch is another."""
    if not isinstance(dataset, am_data.Dataset):
        return f"a step is {global_batch_size} samples of a stream"
    samples, examples, tokens = loader.num_samples, len(dataset), int(dataset.lengths.sum())
    name = "rows" if samples == examples else "packs"
    each = "" if samples == examples else f"{examples / samples * global_batch_size:,.1f} rows, "
    lines = [
        f"a step is {global_batch_size} {name}: on average {each}{tokens / samples * global_batch_size:,.0f} tokens"
    ]
    steps, rest = divmod(samples, global_batch_size)
    if rest and drop_last:
        lines.append(f"an epoch is {_steps(steps)}; dataloader.drop_last leaves {rest} of {samples} {name} out of each")
    elif rest:
        lines.append(f"an epoch is {_steps(steps + 1)}, the last of {rest} instead of {global_batch_size}")
        if 2 * rest < global_batch_size and steps:
            lines.append("at the same learning rate, so each of them moves the model more than others do;")
            lines.append("dataloader.drop_last leaves such a step out")
    else:
        lines.append(f"an epoch is {_steps(steps)}")
    return "\n".join(lines)


def _steps(number: int) -> str:
    return f"{number:,} step{'' if number == 1 else 's'}"


def share(
    config: RunConfig,
    model: PreTrainedModel,
    batch: am_data.Batch,
    dims: am_mesh.ParallelDims,
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """This rank's part of the sequences of `batch`, as the inputs and the targets of `am_models.forward_with_loss`."""
    part = am_mesh.shard_sequence(batch, dims.sequence_ranks, zigzag=config.distributed.cp_layout == "zigzag")
    return am_models.split_batch(model, part, device=device)


def count_targets(micro_batches: Sequence[am_data.Batch]) -> int:
    """Targets in the micro-batches of this rank."""
    return sum(int((batch["shift_labels"] != IGNORED).sum()) for batch in micro_batches)


def count_tokens(micro_batches: Sequence[am_data.Batch]) -> int:
    """Tokens in the micro-batches of this rank, without padding where `document_ids` tell it."""
    return sum(
        int((batch["document_ids"] != 0).sum()) if "document_ids" in batch else batch["input_ids"].numel()
        for batch in micro_batches
    )
