"""Holds a transformers config that stands in a YAML file against its class.

Transformers keeps unknown keywords as attributes: a misspelt size would go unnoticed. A key is known where the class
declares it, where the class makes something else of it (`rope_theta` becomes part of `rope_parameters`), and where the
family's modelling code asks for it although the class does not declare it (`head_dim` of qwen3_moe).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path
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
        if key not in known and key not in _asked_for(kind) and not _consumed(path, kind, given, key):
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


def _asked_for(kind: type[PretrainedConfig]) -> set[str]:
    """Keys that the modelling file beside the class reads with `getattr(config, key, ...)`: what it does without.

    Those of rotary embeddings alone do not count: they share one code, whatever the attention makes of the key. Nor
    does a class that is made of others: the keys are those of its parts.
    """
    file = Path(inspect.getfile(kind))
    file = file.with_name(file.name.replace("configuration_", "modeling_"))
    if kind.sub_configs or not file.is_file():
        return set()
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {
        str(node.args[1].value)
        for outer in classes
        if "Rotary" not in outer.name
        for node in ast.walk(outer)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and ast.unparse(node.args[0]) in ("config", "self.config")
        and isinstance(node.args[1], ast.Constant)
    }


def _consumed(path: str, kind: type[PretrainedConfig], given: Mapping[str, Any], key: str) -> bool:
    """Whether the class makes something of a key beyond an attribute of that name."""
    fields = {name: value for name, value in given.items() if name != "model_type"}
    kept = vars(_build(path, kind, fields))
    others = vars(_build(path, kind, {name: value for name, value in fields.items() if name != key}))
    return key not in kept or {name: value for name, value in kept.items() if name != key} != others


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
