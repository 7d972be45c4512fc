"""How the values of a config leave the process: never with a secret, never with what the environment held."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from am_recipes.settings.yaml import escaped, is_secret


def written(values: Any, environment: Mapping[str, str]) -> Any:
    """`values` for a config file; `environment` maps dotted paths to the reference their value came from.

    A secret is written as a reference named after its key, or as the one it came from without a default, for the rerun
    to fill in.
    """

    def write(path: str, value: Any) -> Any:
        if is_secret(path) and value is not None:
            source = environment.get(path, f"${{{path.rsplit('.', 1)[-1].upper()}}}")
            return re.sub(r"(\$\{[\w.:]+),[^}]*\}", r"\1}", source)
        if path in environment:
            return environment[path]
        return escaped(value) if isinstance(value, str) else value

    return _replace_leaves(values, "", write)


def fingerprints(values: Any, environment: Mapping[str, str]) -> Any:
    """`values` for comparing runs: secrets left out, and of what came from the environment only a digest."""

    def fingerprint(path: str, value: Any) -> Any:
        if is_secret(path):
            return None
        if path in environment:
            return f"{environment[path]} blake2b:{hashlib.blake2b(str(value).encode(), digest_size=8).hexdigest()}"
        return value

    return _replace_leaves(values, "", fingerprint)


def _replace_leaves(value: Any, path: str, new: Callable[[str, Any], Any]) -> Any:
    """The same nesting with every scalar replaced by `new(dotted path, scalar)`."""
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key: _replace_leaves(child, prefix + key, new) for key, child in value.items()}
    if isinstance(value, list):
        return [_replace_leaves(child, f"{prefix}{index}", new) for index, child in enumerate(value)]
    return new(path, value)
