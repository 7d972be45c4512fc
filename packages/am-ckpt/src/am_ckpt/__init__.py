"""Training checkpoints that commit atomically, resume exactly and load anywhere.

Names are imported when first used, so that ``import am_ckpt`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from am_ckpt._checkpointer import Checkpointer
    from am_ckpt._hf import hf_files, load_hf, save_hf

__all__ = ["Checkpointer", "hf_files", "load_hf", "save_hf"]

_MODULES = {
    "Checkpointer": "am_ckpt._checkpointer",
    "hf_files": "am_ckpt._hf",
    "load_hf": "am_ckpt._hf",
    "save_hf": "am_ckpt._hf",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'am_ckpt' has no attribute {name!r}; public are {', '.join(__all__)}")
    return importlib.import_module(_MODULES[name]).__dict__[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
