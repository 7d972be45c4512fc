"""Mixture-of-experts routing, permutation and grouped GEMM for PyTorch."""

from . import reference
from ._balance import balance_loss, expert_counts, load_metrics
from ._experts import GroupedExperts, experts_forward
from ._grouped_mm import grouped_mm
from ._moe import LocalDispatch, MoE
from ._permute import Permutation, permute, unpermute
from ._router import Router, route

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
