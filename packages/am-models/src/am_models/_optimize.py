"""Swap the slow parts of one model instance for the kernels of am_kernels and am_moe."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from am_models import _attention, _forwards
from am_models._attention import AttentionFunction
from am_models._families import Family, VisionFamily
from am_models._loss import install_forward_with_loss
from am_models._rows import choose_rows, family_class, keep_rows, language_model_of, modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("attention", "norm", "rope", "activation", "experts")


@dataclass(frozen=True)
class OptimizeReport:
    """What `optimize` did to one model: `str(report)` says in lines of at most 80 columns what runs on our
    kernels, and why the rest does not.

    family: `config.model_type`. parts: part name to what runs now, "stock: <why>" where nothing was changed.
    loss: what `forward_with_loss` gives the loss function, "logits: <why>" where it cannot give hidden states.
    router: whether `forward_with_loss` takes a `router_loss`; never for a model of images and text.
    num_experts_per_token: how many experts that router gives a token to; None without one.
    """

    family: str
    parts: Mapping[str, str]
    loss: str
    router: bool
    num_experts_per_token: int | None

    def __str__(self) -> str:
        stock = {name: text.removeprefix("stock: ") for name, text in self.parts.items() if text.startswith("stock: ")}
        swapped = [name for name in self.parts if name not in stock]
        lines = [f"model family: {self.family}; its loss is computed from {self.loss}"]
        if swapped:
            lines.append(f"  on our kernels: {', '.join(swapped)}")
        if stock:
            lines.append("  stock: " + "; ".join(f"{name} ({why})" for name, why in stock.items()))
        return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)


def optimize(
    model: PreTrainedModel,
    *,
    kernels: str | Mapping[str, str | bool | AttentionFunction] = "auto",
    family: Family | None = None,
    vision_family: VisionFamily | None = None,
) -> OptimizeReport:
    """Run attention, norms, rotary embedding, gated MLPs and experts of `model` on our kernels, in place.

    Of a model of images and text the language model is swapped; the vision tower stays stock, its attention included.
    Works on the instance: module classes, parameter objects, names and state dict stay, `save_pretrained` writes what
    stock would, other models of the process are untouched. On the meta device or with weights, before or after
    adapters are added and before or after sharding; every rank calls it. Also installs `forward_with_loss`.

    Args:
        kernels: "auto" swaps what the family declares and reports the rest; "off" swaps nothing; a mapping from a part
            ("attention", "norm", "rope", "activation", "experts") to True (must be swapped), False (stays stock),
            "auto" (as for parts not named), or for attention the name of an am_kernels backend or a function with the
            signature of `am_kernels.attention` (it must be used), such as `am_mesh.context_attention(...)`.
        family: what the language model is made of, in place of its row in `FAMILIES`; for a model that is not there
            too. The instance keeps it, so that it holds for later calls and for `forward_with_loss`.
        vision_family: how images enter, in place of the row in `VISION_FAMILIES`; kept likewise.

    Raises:
        ValueError: an unknown part or value; a part asked for by name cannot be swapped; a row names a class, a
            configuration key or a part of the model that is not there. The model is as it was.
    """
    rows = choose_rows(model, family, vision_family)
    language_model = language_model_of(model, rows)
    # Every part is decided before the first is changed: a refused request leaves the model as it was.
    swaps = {}
    for part, request in _requests(kernels).items():
        if request is False:
            swaps[part] = _stock("switched off")
        elif rows.language is None:
            swaps[part] = _stock(f"{model.config.model_type} is not a declared family")
        else:
            swaps[part] = _PLANS[part](language_model, rows.language, request)
        if swaps[part].apply is None and request not in ("auto", False):
            reason = swaps[part].text.removeprefix("stock: ")
            asked, fix = repr(request), 'use "auto" or False'
            if callable(request):
                asked, fix = type(request).__name__, "no attention can be given to this model"
            raise ValueError(f'kernels={{"{part}": {asked}}} cannot be honoured: {reason}; {fix}')
    keep_rows(model, rows)
    _own_config(model)
    for swap in swaps.values():
        if swap.apply is not None:
            swap.apply()
    routed = rows.with_router
    return OptimizeReport(
        family=model.config.model_type,
        parts={part: swap.text for part, swap in swaps.items()},
        loss=install_forward_with_loss(model, rows),
        router=routed is not None,
        num_experts_per_token=None if routed is None else getattr(model.config, routed.experts_per_token),
    )


class _Swap(NamedTuple):
    """What the report says about a part, and what changes the model; None leaves it stock."""

    text: str
    apply: Callable[[], None] | None


def _stock(reason: str) -> _Swap:
    return _Swap(f"stock: {reason}", None)


_Request = str | bool | AttentionFunction


def _requests(kernels: str | Mapping[str, _Request]) -> dict[str, _Request]:
    if isinstance(kernels, str):
        if kernels not in ("auto", "off"):
            raise ValueError(f'kernels={kernels!r}: use "auto", "off" or a mapping with keys among {PARTS}')
        return dict.fromkeys(PARTS, "auto" if kernels == "auto" else False)
    unknown = sorted(set(kernels) - set(PARTS))
    if unknown:
        raise ValueError(f"kernels has unknown parts {unknown}; choose among {PARTS}")
    for part, request in kernels.items():
        if part != "attention" and request != "auto" and not isinstance(request, bool):
            raise ValueError(f'kernels[{part!r}]={request!r}: use True, False or "auto"; attention alone has backends')
    return {part: kernels.get(part, "auto") for part in PARTS}


def _own_config(model: PreTrainedModel) -> None:
    """Give the instance its own configuration: the one it was built from may be shared with other models."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def _attention_plan(model: PreTrainedModel, family: Family, request: _Request) -> _Swap:
    current = model.config._attn_implementation
    usual = current in ("sdpa", family.default_attention) or _attention.uses_documents(model)
    if request == "auto" and not usual:
        return _stock(f"attn_implementation={current!r} was chosen")
    dropout = model.config.to_dict().get("attention_dropout")
    if dropout:
        return _stock(f"attention_dropout={dropout} needs transformers' own attention")
    backend = None if isinstance(request, bool) or request == "auto" else request
    name = _attention.register(backend)
    if callable(backend):
        return _Swap("a function that was given", lambda: model.set_attn_implementation(name))
    text = f"am_kernels, backend {backend or 'chosen by device, dtype and shape'}"
    return _Swap(text, lambda: model.set_attn_implementation(name))


def _norm_plan(model: PreTrainedModel, family: Family, request: _Request) -> _Swap:
    if family.norm is None:
        return _stock(f"no norm of {family.module} has the formula of am_kernels.rms_norm")
    return _forward_plan(modules_of(model, family_class(family, family.norm)), _forwards.rms_norm_forward)


def _rope_plan(model: PreTrainedModel, family: Family, request: _Request) -> _Swap:
    if not family.rotary:
        return _stock(f"the rotary embedding of {family.module} does not rotate halves")
    attention = family_class(family, family.attention)
    if "apply_rotary_pos_emb" not in attention.forward.__code__.co_names:
        return _stock(f"{family.attention}.forward of this transformers does not call apply_rotary_pos_emb")
    return _forward_plan(modules_of(model, attention), _forwards.with_rotation(attention.forward))


def _activation_plan(model: PreTrainedModel, family: Family, request: _Request) -> _Swap:
    if family.gated_mlp is None:
        return _stock(f"{family.module} has no MLP with a SiLU gate")
    if not _is_silu(model, family):
        return _stock(f"{family.activation}={getattr(model.config, str(family.activation))!r} is not silu")
    return _forward_plan(modules_of(model, family_class(family, family.gated_mlp)), _forwards.swiglu_mlp_forward)


def _experts_plan(model: PreTrainedModel, family: Family, request: _Request) -> _Swap:
    if family.experts is None:
        return _stock(f"{family.module} has no experts")
    if not _is_silu(model, family):
        return _stock(f"{family.activation}={getattr(model.config, str(family.activation))!r} is not silu")
    current = model.config._experts_implementation
    if request == "auto" and current not in ("grouped_mm", _forwards.EXPERTS_NAME):
        return _stock(f"experts_implementation={current!r} was chosen")
    _forwards.register_experts()
    num_layers = len(modules_of(model, family_class(family, family.experts)))
    return _Swap(f"am_moe ({num_layers} layers)", lambda: model.set_experts_implementation(_forwards.EXPERTS_NAME))


def _is_silu(model: PreTrainedModel, family: Family) -> bool:
    return family.activation is None or getattr(model.config, family.activation) in ("silu", "swish")


_PLANS: dict[str, Callable[[PreTrainedModel, Family, _Request], _Swap]] = {
    "attention": _attention_plan,
    "norm": _norm_plan,
    "rope": _rope_plan,
    "activation": _activation_plan,
    "experts": _experts_plan,
}


def _forward_plan(modules: list[nn.Module], function: Callable[..., Any]) -> _Swap:
    """Put `function` on every module, or on none where another library already replaced a forward."""
    if not modules:
        return _stock("this model has no such module")
    foreign = [module for module in modules if "forward" in vars(module) and not _forwards.is_ours(module)]
    if foreign:
        name = type(foreign[0]).__name__
        return _stock(f"the forward of {name} was already replaced, by device_map or another library")

    def apply() -> None:
        for module in modules:
            _forwards.install(module, function)

    return _Swap(f"am_kernels ({len(modules)} modules)", apply)
