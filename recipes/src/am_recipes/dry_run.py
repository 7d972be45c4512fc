"""A dry run is the recipe itself up to its first step, without the weights: so it refuses what the run would refuse.

Everything is made as for training: model folder and tokenizer are found (on the Hub without the weights), every row is
read, the model is built on the meta device with adapters, faster parts and layout. What needs weights, or is a fact of
the machine that trains, is left to the run: memory, documents that leak, image features. Nothing is written to the run
directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

import am_mesh
from am_recipes import reproducible, run_dir
from am_recipes.run import BeginsHere
from am_recipes.run_config import RunConfig
from am_recipes.stop_signal import StopSignal

Config = TypeVar("Config", bound=RunConfig)


def dry_run(config: Config, train: Callable[[Config, torch.device, StopSignal], Any]) -> None:
    """Do what `train` of a recipe does with `config` until it would begin. Raises what it does.

    One process alone stands for the first rank of the smallest world that the layouts of the config are for, so that a
    layout of many GPUs is checked on a laptop.
    """
    run_dir.require_usable(config)
    ranks = max(layout.fewest_ranks() for layout in config.layouts().values())
    minutes = config.distributed.timeout_minutes
    with (
        reproducible.as_asked(config),
        contextlib.nullcontext() if "RANK" in os.environ else _first_of(ranks),
        am_mesh.process_group(minutes) as device,
        StopSignal() as stop,
    ):
        try:
            train(replace(config, dry_run=True), device, stop)
        except BeginsHere:
            return


@contextlib.contextmanager
def _first_of(ranks: int) -> Iterator[None]:
    """Be the first of so many ranks, none of which is there: what it tells them is lost, and nothing waits."""
    if ranks == 1:
        yield
        return
    # torch's own group for dry runs; importing it registers its backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
