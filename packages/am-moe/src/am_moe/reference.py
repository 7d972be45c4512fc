"""The operations of this package in plain PyTorch, one expert at a time: the specification of the faster ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def route(
    logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    norm_topk_prob: bool = True,
    num_groups: int = 1,
    topk_groups: int = 1,
    correction_bias: Tensor | None = None,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `am_moe.route`; one token at a time."""
    all_weights, all_index = [], []
    for token in logits.to(torch.promote_types(logits.dtype, torch.float32)):
        scores = torch.softmax(token, 0) if score_function == "softmax" else torch.sigmoid(token)
        choice = scores.detach() if correction_bias is None else scores.detach() + correction_bias
        groups = choice.chunk(num_groups)
        best = 1 if correction_bias is None else min(2, len(groups[0]))
        ranked = sorted(range(num_groups), key=lambda g: -float(groups[g].sort(descending=True).values[:best].sum()))
        size = len(groups[0])
        candidates = [e for g in ranked[:topk_groups] for e in range(g * size, (g + 1) * size)]
        chosen = sorted(candidates, key=lambda e: -float(choice[e]))[:top_k]
        weights = scores[chosen]
        if norm_topk_prob:
            weights = weights / weights.sum()
        all_weights.append(weights * route_scale)
        all_index.append(torch.tensor(chosen))
    return torch.stack(all_weights).to(logits.dtype), torch.stack(all_index)


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """See `am_moe.grouped_mm`."""
    ends = offsets.tolist()
    parts = [rows[start:end] @ w.T for start, end, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weight.shape[1])])


def experts_forward(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """See `am_moe.experts_forward`; the loop of transformers' eager experts (Qwen3-MoE, DeepSeek-V3)."""
    out = torch.zeros_like(hidden)
    for expert, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, choice = torch.where(top_k_index == expert)
        gate, up = F.linear(hidden[token], gate_up).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, down) * top_k_weights[token, choice, None]
        out = out.index_add(0, token, result.to(out.dtype))
    return out


def moe(hidden: Tensor, router_weight: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k: int) -> Tensor:
    """transformers' Qwen3-MoE block with norm_topk_prob: `hidden [T, D]`, `router_weight [E, D]` to `[T, D]`."""
    logits = F.linear(hidden, router_weight)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    weights, index = torch.topk(probabilities, top_k, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype)
    return experts_forward(hidden, index, weights, gate_up_proj, down_proj)
