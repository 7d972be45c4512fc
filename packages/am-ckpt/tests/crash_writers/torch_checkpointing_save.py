"""torch_checkpointing's manager into a new folder each, the newest that is there counts: for crash_matrix.py.

Needs `pip install torch_checkpointing`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch_checkpointing import CheckpointManager, ItemSpec
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig


def state(value):
    return {"model": {f"weight{i}": torch.full((64, 64), float(value)) for i in range(4)}}


def manager():
    config = CheckpointManager.Config.with_sync_save()
    config.items = {"model": ItemSpec(resharder=DefaultResharder())}
    # Its default, O_DIRECT, fails where a file is no multiple of a block.
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config.build()


def save(folder, value):
    manager().save(f"{folder}/step_{value}", state(value))


def load(folder):
    newest = max(int(path.name.removeprefix("step_")) for path in Path(folder).glob("step_*"))
    loaded = state(9)
    manager().load(f"{folder}/step_{newest}", into=loaded)
    values = {float(x) for tensor in loaded["model"].values() for x in tensor.unique()}
    assert values == {float(newest)}, (newest, values)
    return newest
