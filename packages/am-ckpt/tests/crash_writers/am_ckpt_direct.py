"""The Checkpointer on four ranks that write into the same Hugging Face files: for crash_matrix.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import am_ckpt

_ranks = runpy.run_path(str(Path(__file__).with_name("am_ckpt_ranks.py")))
RANKS, load, setup = _ranks["RANKS"], _ranks["load"], _ranks["setup"]


def save(folder, value):
    model = _ranks["setup_state"](value)["model"]
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)))
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=float(value))}
    am_ckpt.Checkpointer(folder, layout="direct", keep_last=1, timeout=1.0).save(value, state)
