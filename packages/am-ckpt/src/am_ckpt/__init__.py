"""Training checkpoints that commit atomically, resume exactly and load anywhere.

Names are imported when first used, so that `import am_ckpt` does not import torch, which only
`am-ckpt[torch]` installs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from am_ckpt._torch import require_torch

if TYPE_CHECKING:
    from am_ckpt._files.hf_folder import hf_files, require_replaceable
    from am_ckpt._tools.convert import convert
    from am_ckpt._tools.diff import Difference, DiffReport, diff
    from am_ckpt._tools.inspect import inspect
    from am_ckpt._tools.inventory import Inventory
    from am_ckpt._tools.merge import MergeReport, merge
    from am_ckpt._tools.reshard import reshard
    from am_ckpt._tools.verify import VerifyReport, verify
    from am_ckpt._train.checkpointer import Checkpointer
    from am_ckpt._train.entries import PerRank
    from am_ckpt._train.hf import load_hf, save_hf
    from am_ckpt._train.torch_storage import StorageReader, StorageWriter
    from am_ckpt.errors import ArgumentError, IncompleteError, MissingTorchError, NewerError, UnsafeError

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Checkpointer",
    "DiffReport",
    "Difference",
    "IncompleteError",
    "Inventory",
    "MergeReport",
    "MissingTorchError",
    "NewerError",
    "PerRank",
    "StorageReader",
    "StorageWriter",
    "UnsafeError",
    "VerifyReport",
    "convert",
    "diff",
    "hf_files",
    "inspect",
    "load_hf",
    "merge",
    "require_replaceable",
    "reshard",
    "save_hf",
    "verify",
]

_MODULES = {
    "ArgumentError": "am_ckpt.errors",
    "Checkpointer": "am_ckpt._train.checkpointer",
    "DiffReport": "am_ckpt._tools.diff",
    "Difference": "am_ckpt._tools.diff",
    "IncompleteError": "am_ckpt.errors",
    "Inventory": "am_ckpt._tools.inventory",
    "MergeReport": "am_ckpt._tools.merge",
    "MissingTorchError": "am_ckpt.errors",
    "NewerError": "am_ckpt.errors",
    "PerRank": "am_ckpt._train.entries",
    "StorageReader": "am_ckpt._train.torch_storage",
    "StorageWriter": "am_ckpt._train.torch_storage",
    "UnsafeError": "am_ckpt.errors",
    "VerifyReport": "am_ckpt._tools.verify",
    "convert": "am_ckpt._tools.convert",
    "diff": "am_ckpt._tools.diff",
    "hf_files": "am_ckpt._files.hf_folder",
    "inspect": "am_ckpt._tools.inspect",
    "load_hf": "am_ckpt._train.hf",
    "merge": "am_ckpt._tools.merge",
    "require_replaceable": "am_ckpt._files.hf_folder",
    "reshard": "am_ckpt._tools.reshard",
    "save_hf": "am_ckpt._train.hf",
    "verify": "am_ckpt._tools.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'am_ckpt' has no attribute {name!r}; public are {', '.join(__all__)}")
    if _MODULES[name].startswith("am_ckpt._train."):
        require_torch(f"am_ckpt.{name}")
    return importlib.import_module(_MODULES[name]).__dict__[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
