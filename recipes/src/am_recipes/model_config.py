"""Holds a transformers config that stands in a YAML file against its class.

Transformers keeps unknown keywords as attributes that nothing reads; a misspelt size would go unnoticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from am_recipes.settings import ArgumentError, nearest


def check(given: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` where `given`, or a part that it is made of, does not fit the class of its model_type."""
    _check_fields("", given, _config_class("", given["model_type"]))


def _check_fields(path: str, given: Mapping[str, Any], kind: type[PretrainedConfig]) -> None:
    default = _build(path, kind, {})
    known = {*inspect.signature(kind).parameters, *default.to_dict(), *kind.attribute_map, "model_type"}
    for key, value in given.items():
        inner = _join(path, key)
        if key not in known:
            raise ArgumentError(inner, f"{kind.__name__} has no such field{nearest(key, known)}")
        # What is neither a mapping nor null, the class refuses below.
        if key in kind.sub_configs and isinstance(value, Mapping):
            part = kind.sub_configs[key]
            if part is AutoConfig and "model_type" in value:
                part = _config_class(inner, value["model_type"])
            elif part is AutoConfig and vars(default)[key] is None:
                raise ArgumentError(inner, f"needs a model_type: {kind.__name__} has no default for it")
            elif part is AutoConfig:
                part = type(vars(default)[key])
            _check_fields(inner, value, part)
    _build(path, kind, {key: value for key, value in given.items() if key != "model_type"})


def _config_class(path: str, model_type: Any) -> type[PretrainedConfig]:
    if model_type not in list(CONFIG_MAPPING):
        hint = nearest(str(model_type), CONFIG_MAPPING)
        raise ArgumentError(_join(path, "model_type"), f"unknown {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]


def _build(path: str, kind: type[PretrainedConfig], fields: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ArgumentError(path, f"{kind.__name__}: {error.__cause__ or error}") from error


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
