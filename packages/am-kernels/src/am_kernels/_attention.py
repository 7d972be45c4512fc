"""Scaled dot product attention with one masking contract: causal, mask, documents, window, sink, soft-cap.

Documents are attended one by one: no work is spent on padding or on pairs of different documents, and no `[S, S]` mask
exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ._documents import Documents, document_segments
from .reference import allowed_pairs, attend

BACKENDS = ("sdpa", "reference")


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
    backend: str | None = None,
) -> Tensor:
    documents = None
    if document_ids is not None:
        documents = document_ids if isinstance(document_ids, Documents) else document_segments(document_ids)
    _check(q, k, v, causal, mask, documents, window, sink, softcap, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    eager = backend == "reference" or sink is not None or softcap is not None

    def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if eager:
            return attend(q, k, v, causal=causal, mask=mask, window=window, sink=sink, softcap=softcap, scale=scale)
        return _sdpa(q, k, v, causal=causal, mask=mask, window=window, scale=scale)

    if documents is None:
        return one(q, k, v, mask).transpose(1, 2).contiguous()
    return _per_document(one, q, k, v, mask, documents)


def _per_document(
    one: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Documents,
) -> Tensor:
    B, H, S, P = q.shape
    # Split and cat: the backward of split is one cat, that of slicing a full-size gradient per document.
    split_q, split_k, split_v = (x.transpose(1, 2).reshape(B * S, -1, P).split(documents.runs) for x in (q, k, v))
    pieces = []
    position = 0
    for index, (length, real) in enumerate(zip(documents.runs, documents.is_document, strict=True)):
        if real:
            row, first = divmod(position, S)
            here = slice(first, first + length)
            mask_here = None if mask is None else mask.expand(B, -1, S, S)[row : row + 1, :, here, here]
            heads_first = [split[index].transpose(0, 1)[None] for split in (split_q, split_k, split_v)]
            pieces.append(one(heads_first[0], heads_first[1], heads_first[2], mask_here)[0].transpose(0, 1))
        else:
            pieces.append(q.new_zeros(length, H, P))
        position += length
    return torch.cat(pieces).view(B, S, H, P) if pieces else q.transpose(1, 2).contiguous()


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, window: int | None, scale: float
) -> Tensor:
    H, S, K, num_keys = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    plain_causal = causal and window is None and mask is None and S == num_keys
    one_token = S == 1 and mask is None and (window is None or num_keys <= window)
    if not plain_causal and not one_token:
        allowed = allowed_pairs(S, num_keys, causal=causal, window=window, device=q.device)
        if mask is None:
            mask = allowed
        elif allowed is not None:
            mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=H != K
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None,
    documents: Documents | None,
    window: int | None,
    sink: Tensor | None,
    softcap: float | None,
    backend: str | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; they must be [B, heads, S, P]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "q is [B, H, S, P], k and v are [B, K, S', P]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key-value heads")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}, or None to let it choose")
    if backend == "sdpa" and (sink is not None or softcap is not None):
        named = "sink" if sink is not None else "softcap"
        raise ValueError(f"backend='sdpa' does not support {named}; use backend='reference' or None")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window={window} with causal={causal}; a window is at least 1 and needs causal=True")
    if documents is None:
        return
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"document_ids with {q.shape[2]} queries and {k.shape[2]} keys; documents need equal lengths: "
            "decode with a key-value cache through mask= instead"
        )
    if (documents.batch_size, documents.sequence_length) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"document_ids describe [{documents.batch_size}, {documents.sequence_length}] tokens, "
            f"q has [{q.shape[0]}, {q.shape[2]}]"
        )
