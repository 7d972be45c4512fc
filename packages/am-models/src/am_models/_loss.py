"""One forward pass that ends in a loss: the loss function sees hidden states and the output head, not logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F

import am_kernels
from am_models._attention import CutDocuments, plan_documents, uses_documents
from am_models._families import Family
from am_models._images import check_image_keys, image_inputs, image_keys, install_blank_image
from am_models._rope import depends_on_length, install_document_lengths, without_padding
from am_models._rows import Rows, family_class, modules_of, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RouterLoss = Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], torch.Tensor]
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)

_TEXT_KEYS = ("input_ids", "position_ids", "document_ids")
_HEAD = ("bias", "softcap", "scale")


class Loss(Protocol[ResultT_co]):
    """What `forward_with_loss` calls: `loss_fn(hidden, weight, shift_labels, *, bias, softcap, scale, **further)`.

    hidden `[B, S, D]` and weight `[V, D]` are in the dtype of the computation, shift_labels `[B, S]` int64 with -100 =
    no loss; bias is the head's `[V]` or None. Under tensor parallelism weight and bias are DTensors, `Shard(0)` over
    the tensor-parallel mesh, all else the same on each of its ranks. The logits that it must stand for are
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


def further_targets(loss_fn: Loss[object]) -> tuple[str, ...]:
    """The names of the targets beside `shift_labels` that `loss_fn` needs, by the rule of `forward_with_loss`.

    They are its arguments without a default, after the first three and beside bias, softcap and scale.
    """
    own, _ = _own_arguments(loss_fn)
    return tuple(name for name, parameter in own.items() if parameter.default is parameter.empty)


def split_batch(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], *, device: torch.device | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs and the targets of a batch for `forward_with_loss`: what the family declares as input, and all else.

    Inputs are `input_ids`, `position_ids`, `document_ids` and the image tensors of the family. device: where all but
    `document_ids` go, which are read on the host; None leaves every tensor where it is.
    """
    declared = _declared_inputs(rows_of(model))
    inputs = {name: tensor for name, tensor in batch.items() if name in declared}
    targets = {name: tensor for name, tensor in batch.items() if name not in declared}
    if device is not None:
        inputs = {name: tensor if name == "document_ids" else tensor.to(device) for name, tensor in inputs.items()}
        targets = {name: tensor.to(device) for name, tensor in targets.items()}
    return inputs, targets


def forward_with_loss(
    model: PreTrainedModel,
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
            `document_ids [B, S]` (1.. per document, 0 = padding; best left on the host, where they are read once
            before the forward: from an accelerator that is a copy back and a wait). A model of images and text also
            takes the image tensors of its processor, as declared: `pixel_values` and `pixel_attention_mask` (idefics3,
            smolvlm), `pixel_values` (llava), `pixel_values` and `image_grid_thw` (qwen2_5_vl, qwen3_vl; with
            `position_ids [3, B, S]` from `multi_axis_positions`). Of sequences that are cut over ranks `document_ids`
            is a `CutDocuments`, such as what `am_mesh.shard_sequence` makes; `router_loss` gets its `local_ids`.
        targets: what the loss takes: `shift_labels [B, S]` (already shifted, -100 = no loss) and further tensors,
            which reach it as keyword arguments. `split_batch` tells them from the inputs.
        router_loss: `router_loss(router_logits, document_ids)`, for a family with routers (qwen2_moe, qwen3_moe,
            mixtral), is added: a scalar sum from one `[T, E]` per layer, T = B * S, and the document ids or None.
            Not for models of images and text.

    Raises:
        ValueError: before anything runs: a key that the family does not declare or that the loss does not take, a
            missing target that the loss needs, further targets where logits are materialised, images without the
            position ids that they need, the family's own router loss switched on (`output_router_logits`) without
            `router_loss`, since it would be missing from the result, a `router_loss` for a model without a declared
            router or of images and text; after the forward: router logits that were not recorded.
    """
    method = vars(model).get("forward_with_loss")
    if method is None:
        raise ValueError(f"{type(model).__name__} has no method forward_with_loss yet; call am_models.optimize(model)")
    document_ids = inputs.get("document_ids")
    documents = None
    if isinstance(document_ids, torch.Tensor) and uses_documents(model):
        # Here, before FSDP2 moves the ids to its device.
        documents = am_kernels.document_segments(document_ids)
    targets = MappingProxyType(dict(targets))
    return method(loss_fn, dict(inputs), targets, router_loss=router_loss, documents=documents)


def install_forward_with_loss(model: PreTrainedModel, rows: Rows) -> str:
    """Install the method and the per-batch document plan on this instance; return the report's line on the loss."""
    if "forward_with_loss" not in vars(model):
        vars(model)["forward_with_loss"] = MethodType(_forward_with_loss, model)
        model.base_model.register_forward_pre_hook(plan_documents, with_kwargs=True)
        install_document_lengths(model)
    if rows.vision is not None:
        install_blank_image(model.base_model, rows.vision)
    if rows.language is None:
        return f"logits: what {model.config.model_type} does after its head is not declared"
    return "hidden states" if _linear_head(model) else "logits: the output head is more than a linear layer"


def _forward_with_loss(
    self: PreTrainedModel,
    loss_fn: Loss[ResultT],
    inputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    router_loss: RouterLoss | None = None,
    documents: am_kernels.Documents | None = None,
) -> ResultT:
    """See `forward_with_loss`; documents: what `am_kernels.document_segments` makes of the document ids."""
    config = self.config.get_text_config()
    rows = rows_of(self)
    family = rows.language
    head = _linear_head(self)
    _check_inputs(self.config.model_type, rows, inputs)
    asked = None if family is None or head is None else loss_fn
    further = _checked_targets(self.config.model_type, rows, targets, asked)
    _check_router_loss(self, rows, router_loss)
    document_ids = inputs.get("document_ids")
    arguments: dict[str, Any] = {**image_inputs(self, inputs), "use_cache": False}
    if document_ids is not None and "position_ids" in inputs and any(map(depends_on_length, self.modules())):
        _refuse_pieces(self.config.model_type, document_ids)
        arguments["position_ids"] = without_padding(inputs["position_ids"], document_ids)
    # Stock attention finds packed documents in position_ids and needs no padding mask: padding comes last in a row.
    if document_ids is not None and uses_documents(self):
        arguments["document_ids"] = document_ids if documents is None else documents
    if router_loss is not None:
        arguments["output_router_logits"] = True
    if family is None or head is None:
        # Not `self(...)`: where this is a forward method of FSDP2, its hooks already ran.
        outputs = self.forward(**arguments)
        loss = F.cross_entropy(
            outputs.logits.flatten(0, -2).float(),
            targets["shift_labels"].flatten(),
            ignore_index=-100,
            reduction="sum",
        )
    else:
        outputs = self.base_model(**arguments)
        result = loss_fn(
            outputs.last_hidden_state,
            head.weight,
            targets["shift_labels"],
            bias=head.bias,
            softcap=getattr(config, family.softcap) if family.softcap else None,
            scale=_scale(config, family),
            **further,
        )
        if router_loss is None:
            return result
        loss = cast(torch.Tensor, result)  # A router loss is added to a tensor; a NamedTuple has no such sum.
    if router_loss is not None and rows.with_router is not None:
        _check_recorded(self, rows.with_router, outputs.router_logits)
        ids = document_ids.local_ids if isinstance(document_ids, CutDocuments) else document_ids
        ids = None if ids is None else ids.to(inputs["input_ids"].device)
        loss = loss + router_loss(outputs.router_logits, ids)
    # The loss function was not asked, or what it gave is a tensor: of ResultT only a tensor can come here.
    return cast(ResultT, loss)


def _refuse_pieces(family: str, document_ids: object) -> None:
    if isinstance(document_ids, CutDocuments):
        raise ValueError(
            f"{family}: its rotary frequencies depend on the length of a document, of which a rank has a piece; train "
            "it without context parallelism (cp=1), or with another rope_type"
        )


def _declared_inputs(rows: Rows) -> list[str]:
    return [*_TEXT_KEYS, *image_keys(rows.vision)]


def _check_inputs(family: str, rows: Rows, inputs: Mapping[str, torch.Tensor]) -> None:
    """Keys that the family declares, and all that it needs."""
    unknown = sorted(set(inputs) - set(_declared_inputs(rows)))
    if unknown:
        raise ValueError(
            f"{family} does not take the inputs {unknown}; its declared inputs are {_declared_inputs(rows)}, and what "
            "the loss takes belongs to the targets (split_batch tells them apart)"
        )
    if "input_ids" not in inputs:
        raise ValueError(f"inputs have no input_ids, only {sorted(inputs)}; give the token ids [B, S]")
    if rows.vision is not None:
        check_image_keys(family, rows.vision, inputs)


def _checked_targets(
    family: str, rows: Rows, targets: Mapping[str, torch.Tensor], loss_fn: Loss[object] | None
) -> dict[str, torch.Tensor]:
    """The targets beside `shift_labels`, all of which `loss_fn` takes; None where the loss is made of logits."""
    declared = f"the declared inputs of {family} are {_declared_inputs(rows)}"
    if "shift_labels" not in targets:
        raise ValueError(f"targets have no shift_labels, only {sorted(targets)}; give the shifted labels [B, S]")
    further = {name: tensor for name, tensor in targets.items() if name != "shift_labels"}
    if loss_fn is None:
        if further:
            raise ValueError(
                f"further targets {sorted(further)} reach no loss function: that of {family} is the cross-entropy of "
                f"materialised logits (see optimize's report); leave them out. If one is for the model: {declared}"
            )
        return further
    own, takes_all = _own_arguments(loss_fn)
    unknown = sorted(name for name in further if name in _HEAD or (name not in own and not takes_all))
    if unknown:
        raise ValueError(
            f"the loss {_name_of(loss_fn)} does not take the targets {unknown}; its own keyword arguments are "
            f"{list(own)}, and {declared}"
        )
    missing = [name for name in further_targets(loss_fn) if name not in further]
    if missing:
        raise ValueError(
            f"the loss {_name_of(loss_fn)} needs the targets {missing}, and the batch has only {sorted(targets)}"
        )
    return further


def _own_arguments(loss_fn: Loss[object]) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a loss takes by name beside what the head gives it, and whether it takes every other name too."""
    parameters = inspect.signature(loss_fn).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][3:]
    named += [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    own = {p.name: p for p in named if p.name not in _HEAD}
    return own, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _name_of(loss_fn: Loss[object]) -> str:
    function = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    return function.__qualname__ if inspect.isroutine(function) else type(function).__qualname__


def _check_router_loss(model: PreTrainedModel, rows: Rows, router_loss: RouterLoss | None) -> None:
    name = model.config.model_type
    if router_loss is not None and rows.with_router is None:
        reason = f"no router of {name} is declared"
        if rows.vision is not None:
            reason = f"{name} is a model of images and text, which hands out no router logits of its language model"
        raise ValueError(f"router_loss given, but {reason}; leave it out")
    if router_loss is None and rows.with_router is not None and model.config.output_router_logits:
        raise ValueError(
            f"{name}: output_router_logits=True adds a router loss that forward_with_loss does not "
            "compute; set model.config.output_router_logits = False and give router_loss"
        )


def _check_recorded(model: PreTrainedModel, family: Family, router_logits: tuple[torch.Tensor, ...] | None) -> None:
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


def _scale(config: PreTrainedConfig, family: Family) -> float | None:
    if family.scale:
        return getattr(config, family.scale)
    return 1.0 / getattr(config, family.inverse_scale) if family.inverse_scale else None


def _linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output head where it is `hidden @ weight.T + bias` and no more: adapters bring a forward of their own."""
    head = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    return head if plain else None
