"""The Checkpointer on four ranks, each with its shards: for crash_matrix.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import am_ckpt

RANKS = 4
_sync = runpy.run_path(str(Path(__file__).with_name("am_ckpt_save.py")))
load = _sync["load"]
setup_state = _sync["state"]


def setup(folder):
    am_ckpt.Checkpointer(folder).save(1, setup_state(1))


def save(folder, value):
    model = setup_state(value)["model"]
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=float(value))}
    am_ckpt.Checkpointer(folder, keep_last=1, timeout=1.0).save(value, state)
