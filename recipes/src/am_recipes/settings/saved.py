"""How the values of a config leave the process: never with a secret, never with what the environment held."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from am_recipes.settings.references import escaped
from am_recipes.settings.secrets import HIDDEN, is_secret, without_secrets
from am_recipes.settings.yaml import Node, Place, inline, override, walk


def written(values: Any, environment: Mapping[str, str]) -> Any:
    """`values` for a config file; `environment` maps dotted paths to the reference their value came from.

    A secret is written as a reference named after its key, or as the one it came from without a default, for the rerun
    to fill in.
    """

    def write(path: str, value: Any) -> Any:
        if is_secret(path) and value is not None:
            source = environment.get(path, f"${{{_variable(path)}}}")
            return re.sub(r"(\$\{[\w.:]+),[^}]*\}", r"\1}", source)
        if path in environment:
            return environment[path]
        return escaped(value) if isinstance(value, str) else value

    return _replace_leaves(values, "", write)


def replaced(values: Any, environment: Mapping[str, str]) -> Iterator[str]:
    """What `written` does to secrets that stand in `values` as they are, a sentence each, for who runs it again."""
    for path, value in leaves(values):
        if is_secret(path) and value is not None and path not in environment:
            name = _variable(path)
            yield f"{path} is a secret, and config.yaml has ${{{name}}} in its place: to use that file, set {name}"


def _variable(path: str) -> str:
    """The name of a variable for a secret: that of the key that makes it one, and of those below it."""
    keys = path.split(".")
    first = next(number for number, key in enumerate(keys) if is_secret(key))
    return re.sub(r"\W", "_", "_".join(keys[first:])).upper()


def command_line(arguments: Sequence[str]) -> str:
    """The command as a shell takes it, without the secrets in addresses and among its overrides:
    `--wandb.api_key=value`, `--wandb.api_key value`, and what is one within a mapping or list that is given whole.
    """
    shown = list(arguments)
    for index, argument in enumerate(arguments):
        flag, equals, text = argument.partition("=")
        if not flag.startswith("--") or (not equals and index + 1 == len(arguments)):
            continue
        key = flag.removeprefix("--")
        if equals:
            shown[index] = f"{flag}={_redacted(key, text)}"
        elif not arguments[index + 1].startswith("--"):
            shown[index + 1] = _redacted(key, arguments[index + 1])
    return shlex.join(map(without_secrets, shown))


def _redacted(key: str, text: str) -> str:
    """The text of an override of `key` for people to see."""
    if is_secret(key):
        return HIDDEN
    if text[:1] not in ("{", "["):
        return text
    root = Node(Place("", ""), {})
    override(root, "given", text)
    if not isinstance(root.value["given"].value, dict | list):
        # What was to be a mapping or a list and is none: nobody knows what is a secret in it.
        return HIDDEN
    if not any(is_secret(path) and node.value is not None for path, node in walk(root)):
        return text
    return inline(_replace_leaves(_plain(root.value["given"]), "", _shown))


def _shown(path: str, value: Any) -> Any:
    return HIDDEN if value is not None and is_secret(path) else value


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return [_plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def fingerprints(values: Any, environment: Mapping[str, str]) -> Any:
    """`values` for comparing runs: secrets left out, and of what came from the environment only a digest."""

    def fingerprint(path: str, value: Any) -> Any:
        if is_secret(path):
            return None
        if path in environment:
            return f"{environment[path]} blake2b:{hashlib.blake2b(str(value).encode(), digest_size=8).hexdigest()}"
        return value

    return _replace_leaves(values, "", fingerprint)


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar below `values`, and every empty mapping or list, with its dotted path."""
    children = list(enumerate(values)) if isinstance(values, list) else []
    if isinstance(values, Mapping):
        children = list(values.items())
    if not children:
        yield path, values
    for key, child in children:
        yield from leaves(child, f"{path}.{key}" if path else str(key))


def _replace_leaves(value: Any, path: str, new: Callable[[str, Any], Any]) -> Any:
    """The same nesting with every scalar replaced by `new(dotted path, scalar)`."""
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key: _replace_leaves(child, prefix + key, new) for key, child in value.items()}
    if isinstance(value, list):
        return [_replace_leaves(child, f"{prefix}{index}", new) for index, child in enumerate(value)]
    return new(path, value)
