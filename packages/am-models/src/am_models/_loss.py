"""One forward pass that ends in a loss: the loss function sees hidden states and the output head, not logits."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from am_models._attention import plan_documents, uses_documents
from am_models._families import FAMILIES, Family


def forward_with_loss(model: nn.Module, loss_fn: Callable[..., torch.Tensor], **batch: torch.Tensor) -> torch.Tensor:
    """Run `model` on a batch and return the summed loss: the float32 scalar that `loss_fn` returns.

    batch: `input_ids [B, S]`, `shift_labels [B, S]` (already shifted, -100 = no loss) and, optionally, `position_ids
    [B, S]` and `document_ids [B, S]` (1.. per document, 0 = padding). Any other key is a TypeError.

    `loss_fn(hidden [B, S, D], weight [V, D], shift_labels, *, bias, softcap, scale)` is called once; bias is the head's
    [V] or None; the logits that it must stand for are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`,
    where None means that the step is left out.

    A family whose arithmetic after the head is not declared, and a head that is more than a linear layer (an adapter on
    it), has its logits materialised by its own forward instead: the result is then their float32 cross-entropy, summed
    over the targets, and `loss_fn` is not called. The report of :func:`optimize` says which.

    Same as `model.forward_with_loss(loss_fn, **batch)`, which :func:`optimize` and the Auto classes install; FSDP2 must
    know that method as a forward method. Every rank that holds a shard calls it. Raises ValueError where the family's
    router loss is switched on (`output_router_logits`), since it would be missing from the result.
    """
    return model.forward_with_loss(loss_fn, **batch)


def install_forward_with_loss(model: nn.Module, family: Family | None) -> str:
    """Install the method and the per-batch document plan on this instance; return the report's line on the loss."""
    if "forward_with_loss" not in vars(model):
        model.forward_with_loss = MethodType(_forward_with_loss, model)
        model.base_model.register_forward_pre_hook(plan_documents, with_kwargs=True)
    if family is None:
        return f"logits: what {model.config.model_type} does after its head is not declared"
    if not _is_linear(model.get_output_embeddings()):
        return "logits: the output head is more than a linear layer"
    return "hidden states"


def _forward_with_loss(
    self: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    *,
    input_ids: torch.Tensor,
    shift_labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`forward_with_loss`."""
    config = self.config
    family = FAMILIES.get(config.model_type)
    head = self.get_output_embeddings()
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    # Stock attention finds packed documents in position_ids and needs no padding mask: padding comes last in a row.
    if document_ids is not None and uses_documents(self):
        inputs["document_ids"] = document_ids
    if family is None or not _is_linear(head):
        # Not `self(...)`: where this is a forward method of FSDP2, its hooks already ran.
        logits = self.forward(**inputs).logits
        return F.cross_entropy(
            logits.flatten(0, -2).float(), shift_labels.flatten(), ignore_index=-100, reduction="sum"
        )
    if family.router_loss and config.output_router_logits:
        raise ValueError(
            f"{config.model_type}: output_router_logits=True adds a router loss that forward_with_loss does not "
            "compute; set model.config.output_router_logits = False"
        )
    hidden = self.base_model(**inputs).last_hidden_state
    return loss_fn(
        hidden,
        head.weight,
        shift_labels,
        bias=head.bias,
        softcap=getattr(config, family.softcap) if family.softcap else None,
        scale=_scale(config, family),
    )


def _scale(config: Any, family: Family) -> float | None:
    if family.scale:
        return getattr(config, family.scale)
    return 1.0 / getattr(config, family.inverse_scale) if family.inverse_scale else None


def _is_linear(head: nn.Module) -> bool:
    """Whether `head(hidden)` is `hidden @ weight.T + bias` and no more: adapters bring a forward of their own."""
    return type(head).forward is nn.Linear.forward and "forward" not in vars(head)
