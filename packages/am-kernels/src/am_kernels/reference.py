"""Every operation of this package in plain PyTorch: the specification that the faster versions are tested against.

Readable first: quadratic masks, one document at a time, autograd for every gradient. Arithmetic that transformers does
in float32 is done in `promote_types(dtype, float32)` here, so float64 inputs give a float64 oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_kernels._documents import Documents, document_segments


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def allowed_pairs(
    num_queries: int, num_keys: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Boolean `[S, S']`, True where a query may see a key; None when it may see all.

    Aligned bottom-right: the last query sits at the last key, as with a key-value cache.
    """
    if not causal:
        return None
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    allowed = key <= query
    return allowed if window is None else allowed & (query - key < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    window: int | None,
    sink: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Attention of `q [B, H, S, P]` over `k, v [B, K, S', P]`, result `[B, H, S, P]`; blind rows give zeros."""
    B, H, S, P = q.shape
    K, num_keys = k.shape[1], k.shape[2]
    grouped_q = q.reshape(B, K, H // K, S, P)
    scores = torch.matmul(grouped_q, k[:, :, None].transpose(-1, -2)).reshape(B, H, S, num_keys) * scale
    scores = scores.to(_wide(q.dtype))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = allowed_pairs(S, num_keys, causal=causal, window=window, device=q.device)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
        mask = None
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype)[None, :, None, None].expand(B, H, S, 1)], dim=-1)
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    weights = weights[..., :num_keys].to(q.dtype).reshape(B, K, H // K, S, num_keys)
    return torch.matmul(weights, v[:, :, None]).reshape(B, H, S, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    document_ids: Tensor | Documents | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `am_kernels.attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if document_ids is None:
        out = attend(q, k, v, causal=causal, mask=mask, window=window, sink=sink, softcap=softcap, scale=scale)
        return out.transpose(1, 2).contiguous()
    documents = document_ids if isinstance(document_ids, Documents) else document_segments(document_ids)
    B, H, S, _ = q.shape
    width = v.shape[-1]
    rows = []
    for row in range(B):
        pieces = [q.new_zeros(H, 0, width)]
        position = 0
        for start, length in zip(documents.starts, documents.lengths, strict=True):
            if start // S != row:
                continue
            first = start - row * S
            here, one = slice(first, first + length), slice(row, row + 1)
            piece = attend(
                q[one, :, here],
                k[one, :, here],
                v[one, :, here],
                causal=causal,
                mask=None if mask is None else mask.expand(B, -1, S, S)[one, :, here, here],
                window=window,
                sink=sink,
                softcap=softcap,
                scale=scale,
            )
            pieces += [q.new_zeros(H, first - position, width), piece[0]]
            position = first + length
        rows.append(torch.cat([*pieces, q.new_zeros(H, S - position, width)], dim=1))
    return torch.stack(rows).transpose(1, 2).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """See `am_kernels.rms_norm`."""
    wide = x.to(_wide(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """See `am_kernels.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `am_kernels.rope`."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `am_kernels.swiglu`."""
    return torch.nn.functional.silu(gate) * up
