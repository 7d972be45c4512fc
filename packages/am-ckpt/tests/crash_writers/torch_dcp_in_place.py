"""torch.distributed.checkpoint into one folder, as its tutorial does: for crash_matrix.py."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch.distributed.checkpoint as dcp

_state = runpy.run_path(str(Path(__file__).with_name("torch_dcp.py")))["state"]


def save(folder, value):
    dcp.save(_state(value), checkpoint_id=f"{folder}/checkpoint", no_dist=True)


def load(folder):
    loaded = _state(9)
    dcp.load(loaded, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    (value,) = {float(x) for tensor in loaded.values() for x in tensor.unique()}
    return int(value)
