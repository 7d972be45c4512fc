"""References to environment variables in the texts of a config: `${NAME}`, `${NAME,default}`, `$NAME/folder`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from am_recipes.settings.secrets import is_secret
from am_recipes.settings.yaml import Node, did_you_mean, scalar

_REFERENCE = re.compile(
    r"\$\$\{"
    r"|\$\{(?:oc\.env:)?(?P<name>[A-Za-z_]\w*)(?:,(?P<default>[^}]*))?\}"
    # Without braces at the beginning alone, as of a path: text such as "$x^2$" has dollars of its own.
    r"|^\$(?P<bare>[A-Za-z_]\w*)(?=/|\Z)|^(?P<plain>\$+)(?=\$[A-Za-z_]\w*(?:/|\Z))"
    r"|(?P<malformed>\$\{[^}]*\}?)"
)
# What `_REFERENCE` takes for one without braces, or for an escaped one.
_BARE = re.compile(r"\$+[A-Za-z_]\w*(?:/|\Z)")


def resolve(node: Node, environment: Mapping[str, str] | None = None) -> Node:
    """Replace `${VAR}` and `${VAR,default}` in every text of the tree (`$${` stands for `${`).

    `${oc.env:VAR,default}` is the same, and so is `$VAR` at the beginning of a text, alone or before a slash (`$$VAR`
    stands for `$VAR`). A value that is one reference and nothing else takes the type its text has in YAML. Raises
    `ConfigError` for a variable that is neither set nor given a default.
    """
    variables = os.environ if environment is None else environment
    if isinstance(node.value, dict):
        return replace(node, value={key: resolve(child, variables) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[resolve(child, variables) for child in node.value])
    if not isinstance(node.value, str) or not ("${" in node.value or _BARE.match(node.value)):
        return node

    def substitute(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        if match["plain"]:
            return match["plain"][1:]
        if match["malformed"]:
            raise node.error(
                f"{match[0]} is not a reference; write ${{NAME}} or ${{NAME,default}}, and $${{ for a plain ${{"
            )
        name, default = match["name"] or match["bare"], match["default"]
        if name not in variables and default is None:
            hint = did_you_mean(name, variables) or f"; set it, or write ${{{name},default}}"
            raise node.error(f"the environment variable {name} is not set{hint}")
        return variables[name] if name in variables else (default or "").strip()

    text = _REFERENCE.sub(substitute, node.value)
    only = _REFERENCE.fullmatch(node.value)
    whole = only is not None and bool(only["name"] or only["bare"]) and not is_secret(node.place.path)
    return replace(node, value=scalar(text) if whole else text, text=text, reference=node.value)


def variable(text: str) -> str | None:
    """The environment variable that a text as it was written stands for; None of any other text, or with a default."""
    only = _REFERENCE.fullmatch(text)
    return None if only is None or only["default"] is not None else only["name"] or only["bare"]


def rewritten(text: str, literal: Callable[[str], str], variable: Callable[[str, str | None], str]) -> str:
    """A text as it was written in another notation.

    `literal` writes what stands for itself, `variable` a reference by its name and its default, if it has one.
    """
    result, end = "", 0
    for match in _REFERENCE.finditer(text):
        result += literal(text[end : match.start()])
        if match["name"] or match["bare"]:
            result += variable(match["name"] or match["bare"], match["default"])
        else:
            result += literal(match["plain"][1:] if match["plain"] else "${")
        end = match.end()
    return result + literal(text[end:])


def references(text: str) -> list[tuple[str, str | None]]:
    """The references in a text as it was written: the name and the default, if it has one, of each."""
    found = ((match["name"] or match["bare"], match["default"]) for match in _REFERENCE.finditer(text))
    return [(name, default) for name, default in found if name]


def escaped(text: str) -> str:
    """A text that `resolve` turns back into `text`."""
    return ("$" if _BARE.match(text) else "") + text.replace("${", "$${")
