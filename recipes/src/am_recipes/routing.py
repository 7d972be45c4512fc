"""The losses of a mixture's router, and how evenly it uses its experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

import am_mesh
import am_models
import am_moe
from am_recipes.configs import RunConfig


class Routing:
    """The losses of a mixture's router, and how evenly its experts were used since the last `metrics`.

    num_experts_per_token: None for a model without a declared router, which has neither. dims: whose ranks may hold
    parts of one document, over which it is balanced as a whole.
    """

    def __init__(
        self, num_experts_per_token: int | None, balance_loss: float, z_loss: float, dims: am_mesh.ParallelDims
    ) -> None:
        self._num_experts_per_token = num_experts_per_token
        self._balance_loss = balance_loss
        self._z_loss = z_loss
        self._ranks = dims.sequence_ranks
        self._counts = torch.zeros((), dtype=torch.int64)

    @property
    def loss(self) -> am_models.RouterLoss | None:
        """The `router_loss` of `am_models.forward_with_loss`."""
        return None if self._num_experts_per_token is None else self._count_and_balance

    def _count_and_balance(
        self, router_logits: Sequence[torch.Tensor], document_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Count the tokens of each expert; the losses as a sum."""
        assert self._num_experts_per_token is not None
        counts = am_moe.expert_counts(router_logits, document_ids, self._num_experts_per_token)
        self._counts = self._counts.to(counts.device) + counts
        return am_moe.balance_loss(
            router_logits,
            document_ids,
            num_experts_per_token=self._num_experts_per_token,
            coefficient=self._balance_loss,
            z_loss=self._z_loss,
            sum_counts=self._sum_counts if self._ranks.size() > 1 else None,
        )

    def _sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Of the ranks that hold parts of the same documents."""
        return am_mesh.sum_over(self._ranks, counts)

    def metrics(self, dims: am_mesh.ParallelDims) -> dict[str, float]:
        """`am_moe.load_metrics` of the counts over all ranks, which start anew; nothing without a router.

        Every rank calls it.
        """
        if self._num_experts_per_token is None:
            return {}
        counts, self._counts = am_mesh.sum_over(dims.loss_ranks, self._counts), torch.zeros((), dtype=torch.int64)
        return am_moe.load_metrics(counts)


def routing(
    config: RunConfig, model: PreTrainedModel, report: am_models.OptimizeReport, dims: am_mesh.ParallelDims
) -> Routing:
    """The routing of `model` as the section `moe` asks.

    Raises ConfigError where losses are asked of a model without a declared router, and where the model's own config
    asks for transformers' auxiliary loss, which is another formula, without a word from `moe.balance_loss`.
    """
    asked, text = config.moe, model.config.get_text_config()
    settings = text.to_dict()
    # Around a language model, transformers adds none.
    if text is model.config and settings.get("output_router_logits") and asked.balance_loss is None:
        raise config.error(
            "moe.balance_loss",
            "is required: the model's config has output_router_logits=true, so transformers would add its own "
            f"auxiliary loss (router_aux_loss_coef={settings.get('router_aux_loss_coef')}), of another formula; say "
            "how much of the balance loss of DeepSeek-V3 is added per token, 0 for none",
        )
    balance_loss = asked.balance_loss or 0.0
    if report.num_experts_per_token is not None:
        text.output_router_logits = False
        return Routing(report.num_experts_per_token, balance_loss, asked.z_loss, dims)
    if balance_loss or asked.z_loss:
        raise config.error(
            "moe",
            f"balance_loss={balance_loss} and z_loss={asked.z_loss} are for models with experts, and am-models "
            f"declares no router of {report.family}; leave the section out, or set both to 0",
        )
    return Routing(None, 0.0, 0.0, dims)
