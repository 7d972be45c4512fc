"""Rows to batches: chat rendering, loss masks, packing and a resumable loader.

Names are imported when first used, so that the command `am-data` answers `--help` without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from am_data._batch import collate
    from am_data._chat import ChatDataset
    from am_data._contracts import Batch, Collate, Dataset, Example, Rendered, Report, Reported, Sample, Stream
    from am_data._loader import DataLoader
    from am_data._pack import PackedDataset, pack
    from am_data._render import render_and_mask
    from am_data._report import DatasetReport
    from am_data._shard_files import write_token_shards
    from am_data._templates import chat_template
    from am_data._token_shards import TokenShards, TokenShardsReport
    from am_data._tokens import TokenDataset
    from am_data._vision import VisionChatDataset
    from am_data._vision_processor import VisionProcessor, vision_processor

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ChatDataset",
    "Collate",
    "DataLoader",
    "Dataset",
    "DatasetReport",
    "Example",
    "PackedDataset",
    "Rendered",
    "Report",
    "Reported",
    "Sample",
    "Stream",
    "TokenDataset",
    "TokenShards",
    "TokenShardsReport",
    "VisionChatDataset",
    "VisionProcessor",
    "chat_template",
    "collate",
    "pack",
    "render_and_mask",
    "vision_processor",
    "write_token_shards",
]

_MODULES = {
    "Batch": "am_data._contracts",
    "ChatDataset": "am_data._chat",
    "Collate": "am_data._contracts",
    "DataLoader": "am_data._loader",
    "Dataset": "am_data._contracts",
    "DatasetReport": "am_data._report",
    "Example": "am_data._contracts",
    "PackedDataset": "am_data._pack",
    "Rendered": "am_data._contracts",
    "Report": "am_data._contracts",
    "Reported": "am_data._contracts",
    "Sample": "am_data._contracts",
    "Stream": "am_data._contracts",
    "TokenDataset": "am_data._tokens",
    "TokenShards": "am_data._token_shards",
    "TokenShardsReport": "am_data._token_shards",
    "VisionChatDataset": "am_data._vision",
    "VisionProcessor": "am_data._vision_processor",
    "chat_template": "am_data._templates",
    "collate": "am_data._batch",
    "pack": "am_data._pack",
    "render_and_mask": "am_data._render",
    "vision_processor": "am_data._vision_processor",
    "write_token_shards": "am_data._shard_files",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'am_data' has no attribute {name!r}; public are {', '.join(__all__)}")
    return importlib.import_module(_MODULES[name]).__dict__[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
