"""Attention, norms, rotary embedding and gated activations: faster, same meaning."""

from . import reference
from ._attention import attention
from ._documents import Documents, document_segments
from .reference import add_rms_norm, rms_norm, rope, swiglu

__all__ = [
    "Documents",
    "add_rms_norm",
    "attention",
    "document_segments",
    "reference",
    "rms_norm",
    "rope",
    "swiglu",
]
