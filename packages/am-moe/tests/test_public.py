"""The public names, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import am_moe


def test_public_names() -> None:
    assert sorted(am_moe.__all__) == [
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
    for name in am_moe.__all__:
        assert name in vars(am_moe)


def test_importing_pulls_in_no_extra() -> None:
    code = "import sys, am_moe; print([m for m in ('transformers', 'deep_ep') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
