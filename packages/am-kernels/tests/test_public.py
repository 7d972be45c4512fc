"""The public names, what importing costs, and the backend report."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import am_kernels


def test_public_names() -> None:
    assert sorted(am_kernels.__all__) == [
        "Backend",
        "BackendReport",
        "Documents",
        "add_rms_norm",
        "attention",
        "backends",
        "document_segments",
        "reference",
        "rms_norm",
        "rope",
        "swiglu",
    ]
    for name in am_kernels.__all__:
        assert name in vars(am_kernels)


def test_importing_pulls_in_no_extra() -> None:
    extras = ("transformers", "torchao", "transformer_engine")
    code = f"import sys, am_kernels; print([m for m in {extras!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_backends_agrees_with_what_attention_accepts() -> None:
    report = am_kernels.backends("cpu")
    ids = torch.tensor([[1, 1, 2, 0]])
    q = torch.randn(1, 2, 4, 8)
    for backend in report:
        if backend.operation == "attention" and backend.usable:
            am_kernels.attention(q, q, q, document_ids=ids, backend=backend.name)
        elif backend.operation == "attention":
            with pytest.raises(ValueError, match="device cpu"):
                am_kernels.attention(q, q, q, document_ids=ids, backend=backend.name)
    assert [backend.name for backend in report if not backend.usable] == ["varlen"]
    assert str(report).splitlines()[0].startswith("attention     bucketed   usable")
    assert {backend.operation for backend in report} == {"attention", "rms_norm", "add_rms_norm", "rope", "swiglu"}


def test_backends_refuses_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="finds no such device"):
        am_kernels.backends("nonsense")
