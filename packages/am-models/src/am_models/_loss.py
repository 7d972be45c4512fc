"""One forward pass that ends in a loss: the loss function sees hidden states and the output head, not logits."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from am_models._attention import plan_documents, uses_documents
from am_models._families import VISION_FAMILIES, Family, family_class, family_of, modules_of
from am_models._pictures import install_blank_picture, picture_inputs

RouterLoss = Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], torch.Tensor]


def forward_with_loss(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    *,
    router_loss: RouterLoss | None = None,
    **batch: torch.Tensor,
) -> torch.Tensor:
    """Run `model` on a batch and return the summed loss: the float32 scalar that `loss_fn` returns.

    batch: `input_ids [B, S]`, `shift_labels [B, S]` (already shifted, -100 = no loss) and, optionally, `position_ids
    [B, S]` and `document_ids [B, S]` (1.. per document, 0 = padding). A model of pictures and text also takes the
    picture tensors of its processor, as declared: `pixel_values` and `pixel_attention_mask` (idefics3, smolvlm),
    `pixel_values` (llava), `pixel_values` and `image_grid_thw` (qwen2_5_vl, qwen3_vl; with `position_ids [3, B, S]`
    from :func:`multi_axis_positions`). Any other key is a TypeError.

    `loss_fn(hidden [B, S, D], weight [V, D], shift_labels, *, bias, softcap, scale)` is called once; bias is the head's
    [V] or None; the logits that it must stand for are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`,
    where None means that the step is left out.

    `router_loss(router_logits, document_ids)`, for a family with routers (qwen2_moe, qwen3_moe, mixtral), is added to
    that: a scalar sum from one [T, E] per layer, T = B * S, and the batch's document ids or None.

    Without picture tensors the vision tower and the projector still run, on a blank picture of which no feature enters
    the text: every rank runs the same modules, and their gradients are zeros that are there.

    A family whose arithmetic after the head is not declared, and a head that is more than a linear layer (an adapter on
    it), has its logits materialised by its own forward instead: the result is then their float32 cross-entropy, summed
    over the targets, and `loss_fn` is not called. The report of :func:`optimize` says which.

    Same as `model.forward_with_loss(loss_fn, **batch)`, which :func:`optimize` and the Auto classes install; FSDP2 must
    know that method as a forward method. Every rank that holds a shard calls it. Raises ValueError where the family's
    router loss is switched on (`output_router_logits`) without `router_loss`, since it would be missing from the
    result, where router logits were not recorded, and for pictures without the position ids that they need.
    """
    return model.forward_with_loss(loss_fn, router_loss=router_loss, **batch)


def install_forward_with_loss(model: nn.Module, family: Family | None) -> str:
    """Install the method and the per-batch document plan on this instance; return the report's line on the loss."""
    if "forward_with_loss" not in vars(model):
        model.forward_with_loss = MethodType(_forward_with_loss, model)
        model.base_model.register_forward_pre_hook(plan_documents, with_kwargs=True)
        if model.config.model_type in VISION_FAMILIES:
            install_blank_picture(model.base_model)
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
    router_loss: RouterLoss | None = None,
    **pictures: torch.Tensor,
) -> torch.Tensor:
    """See :func:`forward_with_loss`."""
    config = self.config.get_text_config()
    family = family_of(self.config)
    head = self.get_output_embeddings()
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    inputs |= picture_inputs(self, input_ids, position_ids, document_ids, pictures)
    # Stock attention finds packed documents in position_ids and needs no padding mask: padding comes last in a row.
    if document_ids is not None and uses_documents(self):
        inputs["document_ids"] = document_ids
    has_router = family is not None and family.router is not None
    if router_loss is not None:
        if not has_router:
            raise ValueError(f"router_loss given, but no router of {config.model_type} is declared; leave it out")
        inputs["output_router_logits"] = True
    elif has_router and config.output_router_logits:
        raise ValueError(
            f"{config.model_type}: output_router_logits=True adds a router loss that forward_with_loss does not "
            "compute; set model.config.output_router_logits = False and give router_loss"
        )
    if family is None or not _is_linear(head):
        # Not `self(...)`: where this is a forward method of FSDP2, its hooks already ran.
        outputs = self.forward(**inputs)
        loss = F.cross_entropy(
            outputs.logits.flatten(0, -2).float(), shift_labels.flatten(), ignore_index=-100, reduction="sum"
        )
    else:
        outputs = self.base_model(**inputs)
        loss = loss_fn(
            outputs.last_hidden_state,
            head.weight,
            shift_labels,
            bias=head.bias,
            softcap=getattr(config, family.softcap) if family.softcap else None,
            scale=_scale(config, family),
        )
    if router_loss is None or family is None:
        return loss
    _check_recorded(self, family, outputs.router_logits)
    return loss + router_loss(outputs.router_logits, document_ids)


def _check_recorded(model: nn.Module, family: Family, router_logits: tuple[torch.Tensor, ...] | None) -> None:
    """Every router's logits are there, with the graph of the forward."""
    routers = modules_of(model, family_class(family, str(family.router)))
    if not router_logits or len(router_logits) != len(routers):
        raise ValueError(
            f"{len(router_logits or ())} of {len(routers)} routers of {type(model.base_model).__name__} were recorded; "
            "transformers records by the class of the base model: shard its layers and the whole model, not the base "
            "model by itself"
        )
    for router, logits in zip(routers, router_logits, strict=True):
        if torch.is_grad_enabled() and router.weight.requires_grad and not logits.requires_grad:
            raise ValueError(
                f"the logits of {type(router).__name__} have no graph, so router_loss would train nothing; reentrant "
                "activation checkpointing drops it: use the non-reentrant one"
            )


def _scale(config: Any, family: Family) -> float | None:
    if family.scale:
        return getattr(config, family.scale)
    return 1.0 / getattr(config, family.inverse_scale) if family.inverse_scale else None


def _is_linear(head: nn.Module) -> bool:
    """Whether `head(hidden)` is `hidden @ weight.T + bias` and no more: adapters bring a forward of their own."""
    return type(head).forward is nn.Linear.forward and "forward" not in vars(head)
