"""Rows to batches: chat rendering, loss masks, packing and a resumable loader."""

from am_data._batch import Batch, collate
from am_data._chat import ChatDataset
from am_data._loader import DataLoader
from am_data._pack import PackedDataset, pack
from am_data._render import render_and_mask
from am_data._report import DatasetReport
from am_data._tokens import TokenDataset

__all__ = [
    "Batch",
    "ChatDataset",
    "DataLoader",
    "DatasetReport",
    "PackedDataset",
    "TokenDataset",
    "collate",
    "pack",
    "render_and_mask",
]
