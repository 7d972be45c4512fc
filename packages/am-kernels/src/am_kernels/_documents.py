"""Which tokens of a batch belong to one document: computed once per batch, used by every layer.

Packed batches carry `document_ids [B, S]`: 0 is padding, each other value one document whose tokens are contiguous.
Attention never crosses documents, so the positions of the documents are all that a layer needs; a block mask is not.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class Documents:
    """Positions of the documents of one batch, in the flattened token axis `[B * S]`.

    Build it with `document_segments` once per batch and give it to `attention` in place of the tensor. It also keeps
    the index tensors that the CPU path derives from the positions, which is why reusing it across layers saves time.

    Attributes: `batch_size`, `sequence_length` (tokens per row), `starts` and `lengths` (tokens; one entry per document
    in order), `runs` (lengths of all runs in order, padding included; they sum to B * S), `is_document` (per run),
    `num_padding` (tokens), `derived` (what a backend computed from the positions, under a key of its own).
    """

    def __init__(self, batch_size: int, sequence_length: int, runs: list[int], is_document: list[bool]) -> None:
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.runs = runs
        self.is_document = is_document
        self.starts: list[int] = []
        self.lengths: list[int] = []
        position = 0
        for length, real in zip(runs, is_document, strict=True):
            if real:
                self.starts.append(position)
                self.lengths.append(length)
            position += length
        self.num_padding = position - sum(self.lengths)
        self.derived: dict[Hashable, object] = {}

    def __repr__(self) -> str:
        return (
            f"Documents(batch_size={self.batch_size}, sequence_length={self.sequence_length}, "
            f"documents={len(self.lengths)}, padding={self.num_padding})"
        )


def document_segments(document_ids: Tensor) -> Documents:
    """Find the documents of `document_ids [B, S]` (integer; 0 = padding, any other value one contiguous document).

    Reads the values on the host: one synchronisation when the tensor is on an accelerator.
    Raises ValueError when an id appears in two places of one row, TypeError when the dtype is not an integer type.
    """
    if document_ids.dtype not in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"document_ids has dtype {document_ids.dtype}; it must be an integer tensor, such as int32")
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}; it must be [B, S]")
    batch_size, sequence_length = document_ids.shape
    if document_ids.numel() == 0:
        return Documents(batch_size, sequence_length, [], [])
    runs: list[int] = []
    is_document: list[bool] = []
    for row, ids_of_row in enumerate(document_ids.cpu()):
        values, counts = torch.unique_consecutive(ids_of_row, return_counts=True)
        ids = values.tolist()
        seen = [value for value in ids if value != 0]
        if len(set(seen)) != len(seen):
            twice = next(value for value in seen if seen.count(value) > 1)
            raise ValueError(
                f"document_ids row {row}: document {twice} is not contiguous; "
                "give each run of tokens an id of its own, or 0 for padding"
            )
        runs += counts.tolist()
        is_document += [value != 0 for value in ids]
    return Documents(batch_size, sequence_length, runs, is_document)
