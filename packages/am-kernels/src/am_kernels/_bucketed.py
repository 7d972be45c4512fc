"""Causal attention over many short documents as a few batched matrix products (CPU).

A call per document spends most of its time on overhead when documents are short, and the CPU flash kernel runs at a
fraction of the speed of a plain matrix product. Here documents of similar length form a group: their rows are gathered
into `[n * K, G * length, P]` (n documents, K kv heads, G query heads per kv head), and each block of query rows is one
batched product with the keys up to its last row, so half of the square is never computed. Forward keeps the softmax
weights of these blocks, at most H * S * MAX_LENGTH elements per layer (half of it for documents at the limit).

Measured on two cores against a call of torch's SDPA per document: see tools/bench/attention_cpu.py.

Padding tokens are never gathered. A document shorter than its group repeats its last token: as a key no real query sees
it (causal), as a query its result is dropped and its gradient is set to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from am_kernels._documents import Documents

# Tokens. Longer documents would keep too many softmax weights; the flash kernel recomputes them.
MAX_LENGTH = 1024
# Rows of one query block: below, overhead dominates; above, work on masked pairs does.
BLOCK = 128
# A group may pad its documents by this fraction of its longest one, or by MIN_SPREAD tokens.
SPREAD = 0.12
MIN_SPREAD = 8


@dataclass(frozen=True)
class _Block:
    """Query rows `[begin, end)` of every document of a group; they see keys `[first_key, end)`."""

    begin: int
    end: int
    first_key: int


@dataclass(frozen=True)
class _Group:
    tokens: Tensor  # [n, length] int64, positions in the flattened [B * S]
    valid: Tensor  # [n, length] bool, False where a shorter document repeats its last token
    blocks: list[_Block]


@dataclass(frozen=True)
class _Rows:
    """Where the rows of one tensor, seen as `[B * S * heads, P]`, go in its gathered buffer, and back."""

    gather: Tensor  # [R] int64
    inverse: Tensor  # [B * S * heads] int64, R where the token is in no group: a row of zeros
    filler: Tensor  # int64, the rows of the buffer that repeat a token


class Buckets:
    """The groups of one batch for one window, with the index tensors of each head count and memory layout."""

    def __init__(self, documents: Documents, window: int | None) -> None:
        self.batch_size = documents.batch_size
        self.sequence_length = documents.sequence_length
        self.window = window
        self.groups = _groups(documents, window)
        self._rows: dict[tuple[int, int, bool, bool], _Rows] = {}
        self._masks: dict[tuple[int, int, int, int, torch.dtype], Tensor] = {}

    def query_rows(self, num_heads: int, num_kv_heads: int, heads_first: bool) -> _Rows:
        """Rows of q, ordered group, block, document, kv head, query head of it, position."""
        key = (num_heads, num_kv_heads, heads_first, True)
        if key not in self._rows:
            heads = torch.arange(num_heads).view(1, num_kv_heads, num_heads // num_kv_heads, 1)
            parts = []
            for group in self.groups:
                for block in group.blocks:
                    here = slice(block.begin, block.end)
                    parts.append((group.tokens[:, None, None, here], group.valid[:, None, None, here]))
            self._rows[key] = self._build(parts, heads, num_heads, heads_first)
        return self._rows[key]

    def key_rows(self, num_kv_heads: int, heads_first: bool) -> _Rows:
        """Rows of k or v, ordered group, document, kv head, position."""
        key = (num_kv_heads, num_kv_heads, heads_first, False)
        if key not in self._rows:
            heads = torch.arange(num_kv_heads).view(1, num_kv_heads, 1)
            parts = [(group.tokens[:, None], group.valid[:, None]) for group in self.groups]
            self._rows[key] = self._build(parts, heads, num_kv_heads, heads_first)
        return self._rows[key]

    def mask(self, block: _Block, num_heads_per_kv: int, dtype: torch.dtype) -> Tensor:
        """Additive mask of one block, `[G * rows, keys]`."""
        key = (block.begin, block.end, block.first_key, num_heads_per_kv, dtype)
        if key not in self._masks:
            query = torch.arange(block.begin, block.end)[:, None]
            position = torch.arange(block.first_key, block.end)[None]
            hidden = position > query
            if self.window is not None:
                hidden |= query - position >= self.window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask.repeat(num_heads_per_kv, 1)
        return self._masks[key]

    def _build(self, parts: list[tuple[Tensor, Tensor]], heads: Tensor, num_heads: int, heads_first: bool) -> _Rows:
        B, S = self.batch_size, self.sequence_length
        rows, real = [], []
        for tokens, valid in parts:
            if heads_first:
                index = (tokens // S * num_heads + heads) * S + tokens % S
            else:
                index = tokens * num_heads + heads
            rows.append(index.reshape(-1))
            real.append(valid.expand(index.shape).reshape(-1))
        gather, is_real = torch.cat(rows), torch.cat(real)
        inverse = torch.full((B * S * num_heads,), len(gather))
        inverse[gather[is_real]] = torch.arange(len(gather))[is_real]
        return _Rows(gather, inverse, (~is_real).nonzero().view(-1))


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, scale: float) -> Tensor:
    """Causal attention within each document of `buckets`; `q [B, H, S, P]`, `k, v [B, K, S, P]`, result `[B, S, H, P]`.

    Tokens of no group (padding, documents longer than MAX_LENGTH) give zeros and get zero gradients.
    """
    return _BucketedAttention.apply(q, k, v, buckets, scale)


def _groups(documents: Documents, window: int | None) -> list[_Group]:
    short = [i for i, length in enumerate(documents.lengths) if length <= MAX_LENGTH]
    short.sort(key=lambda i: -documents.lengths[i])
    members: list[list[int]] = []
    for i in short:
        longest = documents.lengths[members[-1][0]] if members else 0
        if members and longest - documents.lengths[i] <= max(MIN_SPREAD, SPREAD * longest):
            members[-1].append(i)
        else:
            members.append([i])
    groups = []
    for group in members:
        length = documents.lengths[group[0]]
        starts = torch.tensor([documents.starts[i] for i in group])[:, None]
        lengths = torch.tensor([documents.lengths[i] for i in group])[:, None]
        positions = torch.arange(length)[None]
        num_blocks = max(1, round(length / BLOCK))
        size = -(-length // num_blocks)
        blocks = []
        for begin in range(0, length, size):
            first_key = 0 if window is None else max(0, begin - window + 1)
            blocks.append(_Block(begin, min(begin + size, length), first_key))
        groups.append(_Group(starts + torch.minimum(positions, lengths - 1), positions < lengths, blocks))
    return groups


def _as_rows(x: Tensor) -> tuple[Tensor, bool]:
    """`[B, heads, S, P]` as `[B * S * heads, P]` rows without a copy where its memory allows, and its layout."""
    heads_first = x.is_contiguous() and not x.transpose(1, 2).is_contiguous()
    rows = x if heads_first else x.transpose(1, 2).contiguous()
    return rows.view(-1, x.shape[-1]), heads_first


def _like_rows(rows: Tensor, shape: tuple[int, int, int, int], heads_first: bool) -> Tensor:
    """Inverse of `_as_rows`: rows back to `[B, heads, S, P]`."""
    B, heads, S, _ = shape
    if heads_first:
        return rows.view(B, heads, S, -1)
    return rows.view(B, S, heads, -1).transpose(1, 2)


def _gathered(num_rows: int, width: int, like: Tensor) -> Tensor:
    """A buffer for `num_rows` results, and one row of zeros after them for tokens that are in no group."""
    buffer = like.new_empty(num_rows + 1, width)
    buffer[-1].zero_()
    return buffer


def _plan(
    buckets: Buckets, num_kv_heads: int, num_heads_per_kv: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[int]]:
    """Of every block its mask and six numbers: batch, rows, first row of keys, their length, first and last key."""
    masks, blocks = [], []
    key_row = 0
    for group in buckets.groups:
        n, length = group.tokens.shape
        batch = n * num_kv_heads
        for block in group.blocks:
            masks.append(buckets.mask(block, num_heads_per_kv, dtype))
            rows = num_heads_per_kv * (block.end - block.begin)
            blocks += [batch, rows, key_row, length, block.first_key, block.end]
        key_row += batch * length
    return masks, blocks


def _blocks(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], blocks: list[int], scale: float) -> list[Tensor]:
    """Attention of gathered rows by block: the rows of the result, a row of zeros after them, and the weights."""
    P, width = q.shape[1], v.shape[1]
    # A bfloat16 product would round the scores themselves, several times the error of the flash kernel.
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide = q.to(wide), k.to(wide)
    out = _gathered(len(q), width, v)
    weights = []
    row = 0
    for index, mask in enumerate(masks):
        batch, rows, key_row, length, first_key, last_key = blocks[6 * index : 6 * index + 6]
        keys = slice(first_key, last_key)
        k_group = k_wide[key_row : key_row + batch * length].view(batch, length, P)
        v_group = v[key_row : key_row + batch * length].view(batch, length, width)
        q_block = q_wide[row : row + batch * rows].view(batch, rows, P)
        scores = torch.baddbmm(mask, q_block, k_group[:, keys].transpose(1, 2), alpha=scale)
        softmax = torch.softmax(scores, dim=-1).to(v.dtype)
        torch.bmm(softmax, v_group[:, keys], out=out[row : row + batch * rows].view(batch, rows, width))
        weights.append(softmax)
        row += batch * rows
    return [out, *weights]


# One operator, by a name that says what it is, so that selective recomputation can keep its results: the products that
# write into slices of a buffer cannot be kept one by one.
_LIBRARY = torch.library.Library("am_kernels", "DEF")
_LIBRARY.define(
    "bucketed_attention(Tensor q, Tensor k, Tensor v, Tensor[] masks, int[] blocks, float scale) -> Tensor[]"
)
_LIBRARY.impl("bucketed_attention", _blocks, "CompositeExplicitAutograd")


class _BucketedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: Buckets, scale: float) -> Tensor:
        B, H, S, P = q.shape
        K, width = k.shape[1], v.shape[3]
        G = H // K
        (q_flat, q_first), (k_flat, k_first), (v_flat, v_first) = _as_rows(q), _as_rows(k), _as_rows(v)
        q_rows = buckets.query_rows(H, K, q_first)
        out_rows = buckets.query_rows(H, K, False)
        k_rows, v_rows = buckets.key_rows(K, k_first), buckets.key_rows(K, v_first)
        q_all = q_flat.index_select(0, q_rows.gather)
        k_all = k_flat.index_select(0, k_rows.gather)
        v_all = v_flat.index_select(0, v_rows.gather)
        masks, blocks = _plan(buckets, K, G, torch.promote_types(q.dtype, torch.float32))
        out_all, *weights = torch.ops.am_kernels.bucketed_attention(q_all, k_all, v_all, masks, blocks, scale)
        ctx.save_for_backward(q_all, k_all, v_all, *weights)
        ctx.buckets, ctx.scale, ctx.dims = buckets, scale, (B, H, K, S, P, width)
        ctx.layouts = (q_first, k_first, v_first)
        return out_all.index_select(0, out_rows.inverse).view(B, S, H, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_all, k_all, v_all, *weights = ctx.saved_tensors
        buckets, scale = ctx.buckets, ctx.scale
        B, H, K, S, P, width = ctx.dims
        q_first, k_first, v_first = ctx.layouts
        G = H // K
        out_rows = buckets.query_rows(H, K, False)
        grad_all = grad.reshape(-1, width).index_select(0, out_rows.gather)
        if len(out_rows.filler):
            grad_all.index_fill_(0, out_rows.filler, 0.0)
        dq_all = _gathered(len(q_all), P, q_all)
        dk_all, dv_all = _gathered(len(k_all), P, k_all), _gathered(len(v_all), width, v_all)
        row = key_row = index = 0
        for group in buckets.groups:
            n, length = group.tokens.shape
            here = slice(key_row, key_row + n * K * length)
            k_group, v_group = k_all[here].view(n * K, length, P), v_all[here].view(n * K, length, width)
            dk_group, dv_group = dk_all[here].view(n * K, length, P), dv_all[here].view(n * K, length, width)
            key_row += n * K * length
            one_block = len(group.blocks) == 1
            if not one_block:
                dk_group.zero_()
                dv_group.zero_()
            for block in group.blocks:
                rows = G * (block.end - block.begin)
                keys = slice(block.first_key, block.end)
                span = slice(row, row + n * K * rows)
                row += n * K * rows
                softmax = weights[index]
                index += 1
                q_block, grad_block = q_all[span].view(n * K, rows, P), grad_all[span].view(n * K, rows, width)
                d_softmax = torch.bmm(grad_block, v_group[:, keys].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_softmax, softmax, -1, softmax.dtype)
                torch.bmm(d_scores, k_group[:, keys], out=dq_all[span].view(n * K, rows, P))
                if one_block:
                    torch.bmm(d_scores.transpose(1, 2), q_block, out=dk_group)
                    torch.bmm(softmax.transpose(1, 2), grad_block, out=dv_group)
                else:
                    dk_group[:, keys].add_(torch.bmm(d_scores.transpose(1, 2), q_block))
                    dv_group[:, keys].add_(torch.bmm(softmax.transpose(1, 2), grad_block))
        dq_all.mul_(scale)
        dk_all.mul_(scale)
        dq = _like_rows(dq_all.index_select(0, buckets.query_rows(H, K, q_first).inverse), (B, H, S, P), q_first)
        dk = _like_rows(dk_all.index_select(0, buckets.key_rows(K, k_first).inverse), (B, K, S, P), k_first)
        dv = _like_rows(dv_all.index_select(0, buckets.key_rows(K, v_first).inverse), (B, K, S, width), v_first)
        return dq, dk, dv, None, None
