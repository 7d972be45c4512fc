"""A dry run is the recipe itself up to its first step, without the weights: so it refuses what the run would refuse.

Everything is made as for training: model folder and tokenizer are found (on the Hub without the weights), every row is
read, the model is built on the meta device with adapters, faster parts and layout. What needs weights, or is a fact of
the machine that trains, is left to the run: memory, documents that leak, image features. Nothing is written to the run
directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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

    Where one process stands for the ranks of the run, sizes of its layouts that need more are left out.
    """
    run_dir.require_usable(config)
    if "RANK" not in os.environ:
        config = config.on_one_process()
    minutes = config.distributed.timeout_minutes
    with reproducible.as_asked(config), am_mesh.process_group(minutes) as device, StopSignal() as stop:
        try:
            train(replace(config, dry_run=True), device, stop)
        except BeginsHere:
            return
