"""Mixture-of-experts routing, permutation and grouped GEMM for PyTorch."""

from __future__ import annotations

from am_moe import reference
from am_moe._balance import balance_loss, expert_counts, load_metrics
from am_moe._experts import GroupedExperts, experts_forward
from am_moe._grouped_mm import grouped_mm
from am_moe._moe import LocalDispatch, MoE
from am_moe._permute import Permutation, permute, unpermute
from am_moe._router import Router, route

__version__ = "0.1.0"

__all__ = [
    "GroupedExperts",
    "LocalDispatch",
    "MoE",
    "Permutation",
    "Router",
    "balance_loss",
    "expert_counts",
    "experts_forward",
    "grouped_mm",
    "load_metrics",
    "permute",
    "reference",
    "route",
    "unpermute",
]
