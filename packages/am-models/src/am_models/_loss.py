"""One forward pass that ends in a loss: the loss function sees hidden states and the output head, not logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from am_models._attention import plan_documents, uses_documents
from am_models._families import VISION_FAMILIES, Family, family_class, family_of, modules_of
from am_models._images import check_image_keys, image_inputs, image_keys, install_blank_image

RouterLoss = Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], torch.Tensor]
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)

_TEXT_KEYS = ("input_ids", "position_ids", "document_ids")
_HEAD = ("bias", "softcap", "scale")


class Loss(Protocol[ResultT_co]):
    """What `forward_with_loss` calls: `loss_fn(hidden, weight, shift_labels, *, bias, softcap, scale, **further)`.

    hidden `[B, S, D]` and weight `[V, D]` are in the dtype of the computation, shift_labels `[B, S]` int64 with -100 =
    no loss; bias is the head's `[V]` or None. The logits that it must stand for are
    `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, where None means that the step is left out. Further
    targets come by the names that they have in the batch (`shift_weights [B, S]`); a loss takes them by name, or all
    with `**further`.

    The result is a float32 scalar, the SUM over the targets, with a graph (0 with a graph where there is no target). A
    NamedTuple of such tensors is handed on as it is.

    `*args` and `**kwargs` below are how typing spells "and keyword arguments of its own".
    """

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, shift_labels: torch.Tensor, /, *args: Any, **kwargs: Any
    ) -> ResultT_co: ...


def split_batch(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs and the targets of a batch for `forward_with_loss`: what the family declares as input, and all else.

    Inputs are `input_ids`, `position_ids`, `document_ids` and the image tensors of the family.
    """
    declared = (*_TEXT_KEYS, *image_keys(model))
    inputs = {name: tensor for name, tensor in batch.items() if name in declared}
    return inputs, {name: tensor for name, tensor in batch.items() if name not in declared}


def forward_with_loss(
    model: nn.Module,
    loss_fn: Loss[ResultT],
    inputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    *,
    router_loss: RouterLoss | None = None,
) -> ResultT:
    """Run `model` on a batch and return the summed loss: the float32 scalar that `loss_fn` returns.

    Without image tensors the vision tower and the projector of a model of images and text still run, on a blank image
    of which no feature enters the text: every rank runs the same modules, and their gradients are zeros that are there.

    A family whose arithmetic after the head is not declared, and a head that is more than a linear layer (an adapter on
    it), has its logits materialised by its own forward instead: the result is then their float32 cross-entropy, summed
    over the targets, and `loss_fn` is not called. The report of `optimize` says which.

    Same as `model.forward_with_loss(loss_fn, inputs, targets)`, which `optimize` and the Auto classes install; FSDP2
    must know that method as a forward method. Every rank that holds a shard calls it. Prefer this function there: with
    `param_dtype` FSDP2 rounds every float tensor that it finds in the arguments, and it does not find the targets here.

    Args:
        loss_fn: called once, see `Loss`; what it returns is returned where there is no `router_loss`.
        inputs: what the model takes: `input_ids [B, S]` and, optionally, `position_ids [B, S]` and
            `document_ids [B, S]` (1.. per document, 0 = padding). A model of images and text also takes the image
            tensors of its processor, as declared: `pixel_values` and `pixel_attention_mask` (idefics3, smolvlm),
            `pixel_values` (llava), `pixel_values` and `image_grid_thw` (qwen2_5_vl, qwen3_vl; with `position_ids
            [3, B, S]` from `multi_axis_positions`).
        targets: what the loss takes: `shift_labels [B, S]` (already shifted, -100 = no loss) and further tensors,
            which reach it as keyword arguments. `split_batch` tells them from the inputs.
        router_loss: `router_loss(router_logits, document_ids)`, for a family with routers (qwen2_moe, qwen3_moe,
            mixtral), is added: a scalar sum from one `[T, E]` per layer, T = B * S, and the document ids or None.

    Raises:
        ValueError: before anything runs: a key that the family does not declare or that the loss does not take, a
            missing target that the loss needs, further targets where logits are materialised, images without the
            position ids that they need, the family's own router loss switched on (`output_router_logits`) without
            `router_loss`, since it would be missing from the result; after the forward: router logits that were not
            recorded.
    """
    return model.forward_with_loss(loss_fn, dict(inputs), MappingProxyType(dict(targets)), router_loss=router_loss)


def install_forward_with_loss(model: nn.Module, family: Family | None) -> str:
    """Install the method and the per-batch document plan on this instance; return the report's line on the loss."""
    if "forward_with_loss" not in vars(model):
        model.forward_with_loss = MethodType(_forward_with_loss, model)
        model.base_model.register_forward_pre_hook(plan_documents, with_kwargs=True)
        if model.config.model_type in VISION_FAMILIES:
            install_blank_image(model.base_model)
    if family is None:
        return f"logits: what {model.config.model_type} does after its head is not declared"
    if not _is_linear(model.get_output_embeddings()):
        return "logits: the output head is more than a linear layer"
    return "hidden states"


def _forward_with_loss(
    self: nn.Module,
    loss_fn: Loss[ResultT],
    inputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    router_loss: RouterLoss | None = None,
) -> ResultT:
    """See `forward_with_loss`."""
    config = self.config.get_text_config()
    family = family_of(self.config)
    head = self.get_output_embeddings()
    linear_head = family is not None and _is_linear(head)
    _check_inputs(self, inputs)
    shift_labels, further = _checked_targets(self, targets, loss_fn if linear_head else None)
    _check_router_loss(self, family, router_loss)
    document_ids = inputs.get("document_ids")
    arguments: dict[str, Any] = {**image_inputs(self, inputs), "use_cache": False}
    # Stock attention finds packed documents in position_ids and needs no padding mask: padding comes last in a row.
    if document_ids is not None and uses_documents(self):
        arguments["document_ids"] = document_ids
    if router_loss is not None:
        arguments["output_router_logits"] = True
    if family is None or not linear_head:
        # Not `self(...)`: where this is a forward method of FSDP2, its hooks already ran.
        outputs = self.forward(**arguments)
        # What a loss of this name promises; one with another result cannot be honoured here, see `optimize`'s report.
        loss: Any = F.cross_entropy(
            outputs.logits.flatten(0, -2).float(), shift_labels.flatten(), ignore_index=-100, reduction="sum"
        )
    else:
        outputs = self.base_model(**arguments)
        loss = loss_fn(
            outputs.last_hidden_state,
            head.weight,
            shift_labels,
            bias=head.bias,
            softcap=getattr(config, family.softcap) if family.softcap else None,
            scale=_scale(config, family),
            **further,
        )
    if router_loss is None or family is None:
        return loss
    _check_recorded(self, family, outputs.router_logits)
    return loss + router_loss(outputs.router_logits, document_ids)


def _check_inputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Keys that the family declares, and all that it needs."""
    allowed = (*_TEXT_KEYS, *image_keys(model))
    unknown = sorted(set(inputs) - set(allowed))
    if unknown:
        raise ValueError(
            f"{model.config.model_type} does not take the inputs {unknown}; its declared inputs are {list(allowed)}, "
            "and what the loss takes belongs to the targets (split_batch tells them apart)"
        )
    if "input_ids" not in inputs:
        raise ValueError(f"inputs have no input_ids, only {sorted(inputs)}; give the token ids [B, S]")
    check_image_keys(model, inputs)


def _checked_targets(
    model: nn.Module, targets: Mapping[str, torch.Tensor], loss_fn: Loss[object] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`shift_labels` and the further targets, which `loss_fn` takes; None where the loss is made of logits."""
    declared = f"the declared inputs of {model.config.model_type} are {[*_TEXT_KEYS, *image_keys(model)]}"
    if "shift_labels" not in targets:
        raise ValueError(f"targets have no shift_labels, only {sorted(targets)}; give the shifted labels [B, S]")
    further = {name: tensor for name, tensor in targets.items() if name != "shift_labels"}
    if loss_fn is None:
        if further:
            raise ValueError(
                f"further targets {sorted(further)} reach no loss function: that of {model.config.model_type} is the "
                f"cross-entropy of materialised logits (see optimize's report); leave them out. If one is meant for "
                f"the model: {declared}"
            )
        return targets["shift_labels"], further
    parameters = inspect.signature(loss_fn).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][3:]
    named += [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    taken = {p.name: p for p in named if p.name not in _HEAD}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = sorted(name for name in further if name in _HEAD or (name not in taken and not takes_all))
    if unknown:
        raise ValueError(
            f"the loss {_name_of(loss_fn)} does not take the targets {unknown}; beside shift_labels it takes "
            f"{list(taken)}, and {declared}"
        )
    missing = [name for name, p in taken.items() if p.default is p.empty and name not in further]
    if missing:
        raise ValueError(
            f"the loss {_name_of(loss_fn)} needs the targets {missing}, and the batch has only {sorted(targets)}"
        )
    return targets["shift_labels"], further


def _name_of(loss_fn: Loss[object]) -> str:
    function = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    return function.__qualname__ if inspect.isroutine(function) else type(function).__qualname__


def _check_router_loss(model: nn.Module, family: Family | None, router_loss: RouterLoss | None) -> None:
    config = model.config.get_text_config()
    has_router = family is not None and family.router is not None
    if router_loss is not None and not has_router:
        raise ValueError(f"router_loss given, but no router of {config.model_type} is declared; leave it out")
    if router_loss is None and has_router and config.output_router_logits:
        raise ValueError(
            f"{config.model_type}: output_router_logits=True adds a router loss that forward_with_loss does not "
            "compute; set model.config.output_router_logits = False and give router_loss"
        )


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
