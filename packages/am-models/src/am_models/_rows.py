"""The declared facts that hold for one model: the caller's rows, kept on the instance, before those of the tables."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from am_models._families import FAMILIES, VISION_FAMILIES, Family, VisionFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ATTRIBUTE = "am_models_rows"
_CLASSES = ("attention", "norm", "gated_mlp", "experts", "router")
_CONFIG_KEYS = ("softcap", "scale", "inverse_scale")


class Rows(NamedTuple):
    """What is declared about a model; None where nothing is, or where it has no vision tower."""

    language: Family | None
    vision: VisionFamily | None

    @property
    def with_router(self) -> Family | None:
        """The family, where transformers records its router logits: not below a model of images and text."""
        return self.language if self.vision is None and self.language and self.language.router else None


def rows_of(model: PreTrainedModel) -> Rows:
    """The rows that `keep_rows` left on this instance, else those of its configuration in the tables."""
    own = vars(model).get(_ATTRIBUTE)
    return own if isinstance(own, Rows) else table_rows(model.config)


def keep_rows(model: PreTrainedModel, rows: Rows) -> None:
    """Let `rows_of` give these rows for this instance, its copies included."""
    vars(model)[_ATTRIBUTE] = rows


def choose_rows(model: PreTrainedModel, family: Family | None, vision_family: VisionFamily | None) -> Rows:
    """The caller's rows before those that hold already; ValueError, before any change, for rows that do not fit."""
    held = rows_of(model)
    config = model.config
    text = config.get_text_config()
    if text is config and vision_family is not None:
        raise ValueError(f"vision_family given, but {config.model_type} has no vision tower; leave it out")
    vision = vision_family or held.vision
    if text is not config and vision is None:
        if family is not None:
            raise ValueError(
                f"family given, but what surrounds the language model of {config.model_type} is not declared; give "
                "vision_family= too"
            )
        return held
    if family is not None:
        _check_family(family, text)
    if vision_family is not None:
        _check_vision_family(vision_family, model)
    return Rows(family or held.language or FAMILIES.get(text.model_type), vision)


def language_model_of(model: PreTrainedModel, rows: Rows) -> PreTrainedModel:
    """The part that the kernels are for: `model` itself where it is text only."""
    from transformers import PreTrainedModel

    if rows.vision is None:
        return model
    part = model.base_model.get_submodule(rows.vision.language_model)
    assert isinstance(part, PreTrainedModel)
    return part


def family_class(family: Family, name: str) -> type[nn.Module]:
    """The class `name` of the family's modelling file; ValueError where it has no such module class."""
    path = _modelling_file(family.module)
    try:
        file = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"Family(module={family.module!r}): no module {path!r} can be imported; give a family of transformers or "
            "the import path of your modelling file"
        ) from error
    classes = {key: cls for key, cls in vars(file).items() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    if name not in classes:
        raise ValueError(f"{path} has no module class {name!r}{_nearest(name, classes)}")
    return classes[name]


def modules_of(model: nn.Module, cls: type[nn.Module]) -> list[nn.Module]:
    """The submodules that run `cls.forward`: `cls` itself and wrappers such as FSDP2's that inherit its forward."""
    return [module for module in model.modules() if isinstance(module, cls) and type(module).forward is cls.forward]


def table_rows(config: PreTrainedConfig) -> Rows:
    """The rows of a configuration in the tables."""
    text = config.get_text_config()
    if text is config:
        return Rows(FAMILIES.get(config.model_type), None)
    vision = VISION_FAMILIES.get(config.model_type)
    return Rows(None if vision is None else FAMILIES.get(text.model_type), vision)


def _modelling_file(module: str) -> str:
    path = f"transformers.models.{module}"
    # A name without a dot may also be a module of the caller's, such as a script.
    return module if "." in module or importlib.util.find_spec(path) is None else f"{path}.modeling_{module}"


def _check_family(family: Family, config: PreTrainedConfig) -> None:
    facts = vars(family)
    for fact in _CLASSES:
        if facts[fact] is not None:
            family_class(family, facts[fact])
    keys = {fact: facts[fact] for fact in _CONFIG_KEYS if facts[fact] is not None}
    if family.activation is not None and (family.gated_mlp or family.experts):
        keys["activation"] = family.activation
    if family.router is not None:
        keys |= {"experts_per_token": family.experts_per_token, "router": "output_router_logits"}
    known = config.to_dict()
    for fact, key in keys.items():
        if key not in known:
            raise ValueError(
                f"Family({fact}={facts[fact]!r}): the configuration of {config.model_type} has no key {key!r}"
                f"{_nearest(key, known)}"
            )
    if family.router is not None and not isinstance(known[family.experts_per_token], int):
        raise ValueError(
            f"Family(experts_per_token={family.experts_per_token!r}): {known[family.experts_per_token]!r} in the "
            f"configuration of {config.model_type} is no number of experts; give the key of an int"
        )


def _check_vision_family(vision: VisionFamily, model: PreTrainedModel) -> None:
    base = model.base_model
    names = [name for name, _ in base.named_modules() if name]
    for fact, path in (
        ("language_model", vision.language_model),
        ("tower", vision.tower),
        *(("projector", path) for path in vision.projector),
    ):
        if path not in names:
            raise ValueError(
                f"VisionFamily({fact}={path!r}): {type(base).__name__} has no such part{_nearest(path, names)}"
            )
    if "get_image_features" not in dir(type(base)):
        raise ValueError(
            f"{type(base).__name__} has no method get_image_features, through which images enter the models of "
            "VisionFamily; write one with transformers' signature"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; the nearest names there are {', '.join(nearest)}" if nearest else ""
