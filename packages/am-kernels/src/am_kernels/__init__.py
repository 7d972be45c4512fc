"""Attention, norms, rotary embedding and gated activations: faster, same meaning."""

from __future__ import annotations

from am_kernels import reference
from am_kernels._attention import attention
from am_kernels._backends import Backend, BackendReport, backends
from am_kernels._documents import Documents, document_segments
from am_kernels._gated import swiglu
from am_kernels._norm import add_rms_norm, rms_norm
from am_kernels._rope import rope

__version__ = "0.1.0"

__all__ = [
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
