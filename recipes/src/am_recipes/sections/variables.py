"""What sections that hand a run to other machines take for variables and labels there: text, and never a secret."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from am_recipes.settings import ArgumentError, is_secret

VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def require_names(key: str, variables: Iterable[str]) -> None:
    """Refuse names that no environment variable can have."""
    for name in variables:
        if VARIABLE.fullmatch(name) is None:
            raise ArgumentError(
                f"{key}.{name}", f"{name!r} cannot be the name of an environment variable: A to Z, a to z, digits and _"
            )


def require_distinct(given: Iterable[tuple[str, str]]) -> None:
    """Refuse a variable that two keys give; `given` are the keys and the variable of each."""
    names: set[str] = set()
    for path, name in given:
        if name in names:
            raise ArgumentError(path, f"the variable {name} is given twice; remove one")
        names.add(name)


def require_variables(key: str, variables: Mapping[str, Any], fix: str) -> None:
    """Refuse what cannot be an environment variable, and a secret in clear; `fix` says how to give `{name}` instead."""
    require_names(key, variables)
    for name, value in variables.items():
        path = f"{key}.{name}"
        if is_secret(name):
            raise ArgumentError(
                path, f"{name} is a secret by its name, and would be written in clear; {fix}".format(name=name)
            )
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ArgumentError(path, f'must be text or a number; put it in quotes, as in {name}: "true"')


def require_texts(key: str, values: Mapping[str, Any]) -> None:
    """Refuse values that are not text, which Kubernetes would not take for a label."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise ArgumentError(f"{key}.{name}", f"must be text, got {value!r}; put it in quotes")


def require_there(needed: Mapping[str, str], there: Iterable[str], fix: str) -> None:
    """Refuse variables that the config needs (with the key that does) and that the other machines do not have."""
    for name, path in needed.items():
        if name not in there and name not in ("HOME", "HOSTNAME", "PATH"):
            raise ArgumentError(path, f"the environment variable {name} is not set where the run is; {fix}")


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as they are written in an environment."""
    return {name: str(value) for name, value in values.items()}
