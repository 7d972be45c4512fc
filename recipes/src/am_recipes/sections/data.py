"""Sections about data: how rows become batches, and what is asked at the end."""

from __future__ import annotations

from dataclasses import dataclass

from am_recipes.sections.kinds import NonNegativeInt, PositiveInt, Text
from am_recipes.settings import Target


@dataclass(frozen=True)
class PackedSequence:
    """Several examples in one row, without padding between them."""

    packed_sequence_size: NonNegativeInt = 0
    """Tokens of one pack; 0 gives each example a padded row instead."""


@dataclass(frozen=True)
class DataLoader:
    """How rows become batches."""

    shuffle: bool = True
    """Another order of the rows in each epoch, from the seed."""
    prefetch: NonNegativeInt = 1
    """Steps that are read ahead, in a thread; 0: none."""
    drop_last: bool = False
    """Leave out the rows or packs at the end of an epoch that fill no global batch: a short step at the full rate."""
    collate: Target | None = None
    """Makes a batch of a list of samples (am_data.Collate), in place of the recipe's own."""


@dataclass(frozen=True)
class Generate:
    """Answers before the first step and at the end of the run."""

    prompts: tuple[Text, ...] = ()
    """What is asked; recipe pretrain samples a continuation, the others decode greedily after a chat prompt."""
    max_new_tokens: PositiveInt = 64
    """Tokens of an answer at most."""


@dataclass(frozen=True)
class GenerateFromRows:
    """Answers to held-out rows before the first step and at the end of the run, decoded greedily."""

    num_rows: NonNegativeInt = 0
    """How many of the first rows of the validation dataset."""
    max_new_tokens: PositiveInt = 16
    """Tokens of an answer at most."""
