"""Which experts each token goes to, and with which weights.

Scores are softmax or sigmoid of the logits. Selection may be limited to the best groups of experts and shifted by a
correction bias (aux-loss-free balancing, DeepSeek-V3); the weights always come from the unshifted scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORE_FUNCTIONS = ("softmax", "sigmoid")


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
    """Choose experts from `logits [T, E]`: `(weights [T, A], index [T, A] int64)`, weights in the dtype of logits.

    Scores are computed in float32 (float64 for float64 logits). With `num_groups` > 1, experts form that many equal
    consecutive groups; only the `topk_groups` best groups of a token take part, the others are masked with -inf, so
    negative biased scores cannot let them win. A group's score is the sum of its two best biased scores with a
    `correction_bias [E]` (DeepSeek-V3), else its best score (DeepSeek-V2). `norm_topk_prob` makes the weights of a
    token sum to 1 before `route_scale`. Raises ValueError for impossible sizes.
    """
    E = logits.shape[-1]
    _check(E, top_k, score_function, num_groups, topk_groups)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.softmax(dim=-1) if score_function == "softmax" else wide.sigmoid()
    choice = scores.detach() if correction_bias is None else scores.detach() + correction_bias
    if num_groups > 1:
        by_group = choice.view(-1, num_groups, E // num_groups)
        best = min(1 if correction_bias is None else 2, E // num_groups)
        group_scores = by_group.topk(best, dim=-1).values.sum(dim=-1)
        kept = group_scores.topk(topk_groups, dim=-1).indices
        lost = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        choice = by_group.masked_fill(lost[..., None], float("-inf")).view(-1, E)
    index = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, index)
    if norm_topk_prob:
        # 1e-20 as transformers adds it: sigmoid scores may all underflow to zero.
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    if route_scale != 1.0:
        weights = weights * route_scale
    return weights.to(logits.dtype), index


class Router(nn.Module):
    """A linear gate and `route`.

    Parameter `weight [E, D]` and, if asked for, buffer `e_score_correction_bias [E]`: the names and shapes of
    transformers' Qwen3-MoE and DeepSeek-V3 gates.

    `dtype_of_logits` is what the gate computes in: None = that of hidden (Qwen3-MoE), torch.float32 (DeepSeek-V3).
    The other arguments are those of `route`.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        norm_topk_prob: bool = True,
        num_groups: int = 1,
        topk_groups: int = 1,
        correction_bias: bool = False,
        route_scale: float = 1.0,
        dtype_of_logits: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(num_experts, top_k, score_function, num_groups, topk_groups)
        self.top_k = top_k
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.route_scale = route_scale
        self.dtype_of_logits = dtype_of_logits
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts) if correction_bias else None)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`hidden [T, D]` to `(logits [T, E], weights [T, A], index [T, A])`, in the order of transformers' gates."""
        dtype = hidden.dtype if self.dtype_of_logits is None else self.dtype_of_logits
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype))
        weights, index = route(
            logits,
            self.top_k,
            score_function=self.score_function,
            norm_topk_prob=self.norm_topk_prob,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            correction_bias=self.e_score_correction_bias,
            route_scale=self.route_scale,
        )
        return logits, weights, index


def _check(num_experts: int, top_k: int, score_function: str, num_groups: int, topk_groups: int) -> None:
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function={score_function!r} is not one of {', '.join(SCORE_FUNCTIONS)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide num_experts={num_experts}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups={topk_groups} must be between 1 and num_groups={num_groups}")
    available = num_experts if num_groups == 1 else topk_groups * (num_experts // num_groups)
    if not 1 <= top_k <= available:
        raise ValueError(f"top_k={top_k} must be between 1 and the {available} experts that a token may choose from")
