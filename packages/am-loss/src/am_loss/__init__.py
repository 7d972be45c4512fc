"""Training losses that return sums and never hold the logits."""

from __future__ import annotations

from am_loss._chunked import ChunkLoss, chunked
from am_loss._cross_entropy import cross_entropy
from am_loss._distillation import DistillationLoss, distillation, linear_distillation
from am_loss._head import Head
from am_loss._linear_cross_entropy import linear_cross_entropy

__version__ = "0.1.0"

__all__ = [
    "ChunkLoss",
    "DistillationLoss",
    "Head",
    "chunked",
    "cross_entropy",
    "distillation",
    "linear_cross_entropy",
    "linear_distillation",
]
