"""torch.distributed.checkpoint into a new folder each, the newest with .metadata counts: for crash_matrix.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def state(value):
    return {f"weight{i}": torch.full((64, 64), float(value)) for i in range(4)}


def save(folder, value):
    writer = dcp.FileSystemWriter(f"{folder}/step_{value}", thread_count=2)
    dcp.save(state(value), storage_writer=writer, no_dist=True)


def load(folder):
    newest = max(int(path.parent.name.removeprefix("step_")) for path in Path(folder).glob("step_*/.metadata"))
    loaded = state(9)
    dcp.load(loaded, checkpoint_id=f"{folder}/step_{newest}", no_dist=True)
    values = {float(x) for tensor in loaded.values() for x in tensor.unique()}
    assert values == {float(newest)}, (newest, values)
    return newest
