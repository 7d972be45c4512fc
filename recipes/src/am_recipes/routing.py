"""The losses of a mixture's router, and how evenly it uses its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import am_mesh
import am_models
import am_moe


class Routing:
    """The losses of a mixture's router, and how evenly its experts were used since the last `metrics`."""

    def __init__(self, num_experts_per_token: int, balance_loss: float, z_loss: float) -> None:
        self._num_experts_per_token = num_experts_per_token
        self._balance_loss = balance_loss
        self._z_loss = z_loss
        self._counts = torch.zeros((), dtype=torch.int64)

    def loss(self, router_logits: Sequence[torch.Tensor], document_ids: torch.Tensor | None) -> torch.Tensor:
        """The ``router_loss`` of `am_models.forward_with_loss`; counts the tokens of each expert."""
        counts = am_moe.expert_counts(router_logits, document_ids, self._num_experts_per_token)
        self._counts = self._counts.to(counts.device) + counts
        return am_moe.balance_loss(
            router_logits,
            document_ids,
            num_experts_per_token=self._num_experts_per_token,
            coefficient=self._balance_loss,
            z_loss=self._z_loss,
        )

    def metrics(self, data_ranks: DeviceMesh) -> dict[str, float]:
        """`am_moe.load_metrics` of the counts over all ranks, which start anew. Every rank calls it."""
        counts, self._counts = am_mesh.sum_over(data_ranks, self._counts), torch.zeros((), dtype=torch.int64)
        return am_moe.load_metrics(counts)


def routing(model: Any, kernels: am_models.OptimizeReport, balance_loss: float, z_loss: float) -> Routing | None:
    """The routing of ``model``, None where no router is declared; ValueError where losses are asked of such a one."""
    if kernels.router:
        return Routing(model.config.num_experts_per_tok, balance_loss, z_loss)
    if balance_loss or z_loss:
        raise ValueError(
            f"moe.balance_loss={balance_loss} and moe.z_loss={z_loss} are for models with experts, and am-models "
            f"declares no router of {kernels.family}; leave the section out"
        )
    return None
