"""Attention, norms, rotary embedding and gated activations: faster, same meaning."""

from . import reference
from ._attention import attention
from ._backends import Backend, BackendReport, backends
from ._documents import Documents, document_segments
from ._gated import swiglu
from ._norm import add_rms_norm, rms_norm
from ._rope import rope

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
