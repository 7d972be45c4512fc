"""Scaled dot product attention with one masking contract: causal, mask, documents, window, sink, soft-cap.

Documents are attended one by one: no work is spent on padding or on pairs of different documents, and no `[S, S]` mask
exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from am_kernels._bucketed import MAX_LENGTH, Buckets, bucketed_attention
from am_kernels._documents import Documents, document_segments
from am_kernels._varlen import varlen_attention, why_not
from am_kernels.reference import allowed_pairs, attend

BACKENDS = ("sdpa", "bucketed", "varlen", "reference")


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
    """Attention of `q [B, H, S, P]` over `k, v [B, K, S', P]` (H a multiple of K), result `[B, S, H, P]`, dtype of q.

    What a query sees is the intersection of everything given; a query that sees nothing gives zeros.

    - `causal`: keys up to its own position; with S < S' the last query sits at the last key, as with a key-value cache.
    - `mask`: `[B or 1, H or 1, S, S']`, boolean (True = visible) or additive in the dtype of q.
    - `document_ids`: `[B, S]` integer (0 = padding, other values one contiguous document each), or the `Documents`
      that `document_segments` made of it: build that once per batch and every layer reuses it. Queries see their own
      document only; padding is neither read nor written other than with zeros. Needs S = S'.
    - `window`: this many most recent keys, the query's own position included (transformers' `sliding_window`).
    - `sink`: `[H]` logits of one extra key per head whose value is zero (GPT-OSS).
    - `softcap`: scores become `softcap * tanh(scores / softcap)` (Gemma 2). `scale`: default P ** -0.5.
    - `backend`: None chooses; `"sdpa"` is torch's scaled_dot_product_attention (per document if there are documents),
      `"bucketed"` batches documents of similar length (CPU, causal, with document_ids; documents of more than 1,024
      tokens go through sdpa), `"varlen"` is torch's varlen_attn over all documents at once (CUDA, float16 or bfloat16,
      with document_ids; by name only), `"reference"` is plain PyTorch. A named one is used or ValueError says why
      it cannot.

    Raises ValueError for shapes that do not fit and for combinations that no backend, or the named one, supports.
    """
    documents = None
    if document_ids is not None:
        documents = document_ids if isinstance(document_ids, Documents) else document_segments(document_ids)
    _check_shapes(q, k, v, mask, documents)
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window={window} with causal={causal}; a window is at least 1 and needs causal=True")
    backend = _choose(q, causal, mask, documents, window, sink, softcap, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if backend == "reference":
            return attend(q, k, v, causal=causal, mask=mask, window=window, sink=sink, softcap=softcap, scale=scale)
        return _sdpa(q, k, v, causal=causal, mask=mask, window=window, scale=scale)

    if documents is None:
        return one(q, k, v, mask).transpose(1, 2).contiguous()
    if not documents.lengths:
        return _no_document(q, k, v)
    if backend == "varlen":
        return varlen_attention(q, k, v, documents, causal=causal, scale=scale)
    if backend == "bucketed":
        return _bucketed(one, q, k, v, documents, window, scale)
    return _per_document(one, q, k, v, mask, documents)


def _choose(
    q: Tensor,
    causal: bool,
    mask: Tensor | None,
    documents: Documents | None,
    window: int | None,
    sink: Tensor | None,
    softcap: float | None,
    backend: str | None,
) -> str:
    """The name of the backend to use; ValueError when the named one cannot do what is asked."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}, or None to let it choose")
    not_sdpa = _given({"sink": sink is not None, "softcap": softcap is not None})
    for_documents = not_sdpa + _given({"mask": mask is not None, "no document_ids": documents is None})
    not_bucketed = for_documents + _given(
        {"causal=False": not causal, f"device {q.device.type}": q.device.type != "cpu"}
    )
    if backend is None:
        if not not_bucketed:
            return "bucketed"
        return "reference" if not_sdpa else "sdpa"
    not_varlen = for_documents + _given({"window": window is not None}) + why_not(q.device.type, q.dtype)
    refused = {"sdpa": not_sdpa, "bucketed": not_bucketed, "varlen": not_varlen, "reference": []}[backend]
    if refused:
        raise ValueError(
            f"backend={backend!r} does not support {', '.join(refused)}; use backend=None to let it choose"
        )
    return backend


def _given(asked: dict[str, bool]) -> list[str]:
    return [name for name, given in asked.items() if given]


def _no_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros that still have a gradient, so that a rank without documents computes one for all of its weights."""
    connected = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]) + connected


def _bucketed(
    one: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    window: int | None,
    scale: float,
) -> Tensor:
    """Short documents in buckets, long ones by `one`."""
    if max(documents.lengths) <= MAX_LENGTH:
        return bucketed_attention(q, k, v, _buckets(documents, window), scale)
    long = _per_document(one, q, k, v, None, documents, longer_than=MAX_LENGTH)
    if min(documents.lengths) > MAX_LENGTH:
        return long
    return long + bucketed_attention(q, k, v, _buckets(documents, window), scale)


def _buckets(documents: Documents, window: int | None) -> Buckets:
    key = ("bucketed", window)
    found = documents.derived.get(key)
    if not isinstance(found, Buckets):
        found = Buckets(documents, window)
        documents.derived[key] = found
    return found


def _per_document(
    one: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Documents,
    longer_than: int = 0,
) -> Tensor:
    """Apply `one` to each document of more than `longer_than` tokens; zeros elsewhere."""
    B, H, S, _ = q.shape
    width = v.shape[-1]
    # Split and cat: the backward of split is one cat, that of slicing a full-size gradient per document.
    split_q, split_k, split_v = (x.transpose(1, 2).flatten(0, 1).split(documents.runs) for x in (q, k, v))
    pieces = []
    position = 0
    for index, (length, real) in enumerate(zip(documents.runs, documents.is_document, strict=True)):
        if real and length > longer_than:
            row, first = divmod(position, S)
            here = slice(first, first + length)
            mask_here = None if mask is None else mask.expand(B, -1, S, S)[row : row + 1, :, here, here]
            heads_first = [split[index].transpose(0, 1)[None] for split in (split_q, split_k, split_v)]
            pieces.append(one(heads_first[0], heads_first[1], heads_first[2], mask_here)[0].transpose(0, 1))
        else:
            pieces.append(q.new_zeros(length, H, width))
        position += length
    return torch.cat(pieces).view(B, S, H, width)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, window: int | None, scale: float
) -> Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    plain_causal = causal and window is None and mask is None and num_queries == num_keys
    one_token = num_queries == 1 and mask is None and (window is None or num_keys <= window)
    if not plain_causal and not one_token:
        allowed = allowed_pairs(num_queries, num_keys, causal=causal, window=window, device=q.device)
        if mask is None:
            mask = allowed
        elif allowed is not None:
            mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; they must be [B, heads, S, P]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "q is [B, H, S, P], k and v are [B, K, S', P]"
        )
    B, H, num_queries, _ = q.shape
    K, num_keys = k.shape[1], k.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key-value heads")
    fits = mask is None or (
        mask.dim() == 4
        and mask.shape[0] in (1, B)
        and mask.shape[1] in (1, H)
        and mask.shape[2:] == (num_queries, num_keys)
    )
    if mask is not None and not fits:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must be [{B} or 1, {H} or 1, {num_queries}, {num_keys}]"
        )
    if documents is None:
        return
    if num_queries != num_keys:
        raise ValueError(
            f"document_ids with {num_queries} queries and {num_keys} keys; documents need equal lengths: "
            "decode with a key-value cache through mask= instead"
        )
    if (documents.batch_size, documents.sequence_length) != (B, num_queries):
        raise ValueError(
            f"document_ids describe [{documents.batch_size}, {documents.sequence_length}] tokens, "
            f"q has [{B}, {num_queries}]"
        )
