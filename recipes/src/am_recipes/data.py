"""The data of a run as optimizer steps, and how many of them the run has."""

from __future__ import annotations

from collections.abc import Sequence

import am_data
import am_mesh
from am_recipes.configs import RunConfig


def loader(
    config: RunConfig,
    dataset: am_data.Dataset | am_data.Stream,
    dims: am_mesh.ParallelDims,
    collate: am_data.Collate,
    *,
    training: bool,
) -> am_data.DataLoader:
    """Steps over `dataset`; for validation one epoch, in order. `dataloader.collate` replaces `collate`.

    Every rank calls it, and gets its share of each global batch. Raises what `am_data.DataLoader` does.
    """
    chosen = config.dataloader
    return am_data.DataLoader(
        dataset,
        collate=collate if chosen.collate is None else chosen.collate.callable(),
        global_batch_size=config.step_scheduler.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        mesh=dims.row_ranks,
        seed=config.seed,
        shuffle=training and chosen.shuffle,
        num_epochs=config.step_scheduler.num_epochs if training else 1,
        drop_last=training and chosen.drop_last,
        prefetch=chosen.prefetch,
    )


def total_steps(config: RunConfig, loader: am_data.DataLoader) -> int:
    """Optimizer steps of the run: whichever of `step_scheduler`'s limits comes first.

    Raises ConfigError where a stream, whose length nobody knows, is to be read without `max_steps`.
    """
    scheduler = config.step_scheduler
    if loader.is_stream:
        if scheduler.max_steps is None:
            raise config.error(
                "step_scheduler.max_steps", "is required: the dataset is a stream, whose length is not known; set it"
            )
        return scheduler.max_steps
    limits = [
        scheduler.max_steps,
        None if scheduler.num_epochs is None else scheduler.num_epochs * len(loader),
        None if scheduler.max_tokens is None else loader.steps_for_tokens(scheduler.max_tokens),
    ]
    return min(limit for limit in limits if limit is not None)


def shares_rows(dataset: am_data.Dataset | am_data.Stream) -> bool:
    """Whether a sample of `dataset` is several documents, which lie in one row."""
    return isinstance(dataset, am_data.Dataset) and isinstance(dataset[0], list)


def count_targets(micro_batches: Sequence[am_data.Batch]) -> int:
    """Targets in the micro-batches of this rank."""
    return sum(int((batch["shift_labels"] != -100).sum()) for batch in micro_batches)


def count_tokens(micro_batches: Sequence[am_data.Batch]) -> int:
    """Tokens in the micro-batches of this rank, without padding."""
    return sum(int((batch["document_ids"] != 0).sum()) for batch in micro_batches)
