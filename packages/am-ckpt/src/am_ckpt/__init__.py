"""Training checkpoints that commit atomically, resume exactly and load anywhere.

Names are imported when first used, so that `import am_ckpt` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from am_ckpt._checkpointer import Checkpointer
    from am_ckpt._convert import convert
    from am_ckpt._diff import Difference, DiffReport, diff
    from am_ckpt._hf import load_hf, save_hf
    from am_ckpt._inventory import Inventory, inspect
    from am_ckpt._merge import MergeReport, merge
    from am_ckpt._names import hf_files
    from am_ckpt._reshard import reshard
    from am_ckpt._storage import StorageReader, StorageWriter
    from am_ckpt._verify import VerifyReport, verify

__all__ = [
    "Checkpointer",
    "DiffReport",
    "Difference",
    "Inventory",
    "MergeReport",
    "StorageReader",
    "StorageWriter",
    "VerifyReport",
    "convert",
    "diff",
    "hf_files",
    "inspect",
    "load_hf",
    "merge",
    "reshard",
    "save_hf",
    "verify",
]

_MODULES = {
    "Checkpointer": "am_ckpt._checkpointer",
    "DiffReport": "am_ckpt._diff",
    "Difference": "am_ckpt._diff",
    "Inventory": "am_ckpt._inventory",
    "MergeReport": "am_ckpt._merge",
    "StorageReader": "am_ckpt._storage",
    "StorageWriter": "am_ckpt._storage",
    "VerifyReport": "am_ckpt._verify",
    "convert": "am_ckpt._convert",
    "diff": "am_ckpt._diff",
    "hf_files": "am_ckpt._names",
    "inspect": "am_ckpt._inventory",
    "load_hf": "am_ckpt._hf",
    "merge": "am_ckpt._merge",
    "reshard": "am_ckpt._reshard",
    "save_hf": "am_ckpt._hf",
    "verify": "am_ckpt._verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'am_ckpt' has no attribute {name!r}; public are {', '.join(__all__)}")
    return importlib.import_module(_MODULES[name]).__dict__[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
