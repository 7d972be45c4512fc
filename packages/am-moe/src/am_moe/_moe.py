"""The mixture-of-experts block: router, dispatch, experts, combine."""

from __future__ import annotations

from torch import Tensor, nn

from am_moe._experts import GroupedExperts
from am_moe._permute import Permutation, permute, unpermute
from am_moe._router import Router


class LocalDispatch:
    """Tokens to experts that all live in this process."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, hidden: Tensor, top_k_index: Tensor) -> tuple[Tensor, Tensor, Permutation]:
        """`hidden [T, D], top_k_index [T, A]` to `(rows [R, D] sorted by expert, offsets [E] int32, permutation)`."""
        rows, permutation = permute(hidden, top_k_index, self.num_experts)
        return rows, permutation.offsets, permutation

    def combine(self, rows: Tensor, top_k_weights: Tensor, permutation: Permutation) -> Tensor:
        """`rows [R, D], top_k_weights [T, A]` to `[T, D]`, summed in float32."""
        return unpermute(rows, top_k_weights, permutation)


class MoE(nn.Module):
    """`router` as `gate`, `experts`, and optionally `shared_experts` that see every token: the sub-module names, and so
    the parameter names, of transformers' Qwen3-MoE and DeepSeek-V3 blocks.
    """

    def __init__(self, router: Router, experts: GroupedExperts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        if router.weight.shape[0] != experts.num_experts:
            raise ValueError(f"the router has {router.weight.shape[0]} experts, the experts are {experts.num_experts}")
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.dispatch = LocalDispatch(experts.num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden [..., D]` to `[..., D]`."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = self.gate(tokens)
        rows, offsets, permutation = self.dispatch.dispatch(tokens, index)
        out = self.dispatch.combine(self.experts(rows, offsets), weights, permutation).view(hidden.shape)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)
