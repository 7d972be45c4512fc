"""Reads a tree of YAML nodes into typed, frozen dataclasses, and turns those back into plain values.

The annotations of a dataclass are its schema: `int`, `float`, `bool`, `str`, `Path`, `Literal`, `X | None`,
`tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, Any]` (free-form), `Target` and nested dataclasses. `Annotated` adds a
constraint (`Check`) or says how keys map to the field (`Inline`, `Prefixed`, `DefaultTarget`). What a
dataclass refuses itself stands at its section; where it raises `ArgumentError`, at the key that this names.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from am_recipes.settings.references import variable
from am_recipes.settings.secrets import is_secret
from am_recipes.settings.target import ArgumentError, DefaultTarget, Target
from am_recipes.settings.yaml import ConfigError, Node, did_you_mean, inline, nearest, walk


@dataclass(frozen=True)
class Check:
    """A constraint on a value that already has the right type."""

    test: Callable[[Any], bool]
    rule: str


@dataclass(frozen=True)
class NumberAsText:
    """A text that may look like a whole number, and is then the text that was typed: `max_time: 90`."""


@dataclass(frozen=True)
class AsWritten:
    """A text that keeps its references to the environment, for another process to resolve; whole numbers are text.

    What its key names a secret is such a reference and nothing else, so no secret ever stands in the field.
    """


@dataclass(frozen=True)
class Inline:
    """The field takes every key of its section that no other field claims."""


@dataclass(frozen=True)
class Prefixed:
    """The field collects the keys `key` and `key_<name>` of its section, as `stored`, `stored_<name>`."""

    key: str
    stored: str


def read_section(node: Node, kind: type[Any], **given: Any) -> Any:
    """Build dataclass `kind` from a mapping node; `given` are the fields that do not come from YAML."""
    if not isinstance(node.value, dict):
        raise node.error(f"expected a mapping with {', '.join(_keys(kind))}, got {node.shown()}")
    hints = typing.get_type_hints(kind, include_extras=True)
    values = dict(given)
    remaining = dict(node.value)
    inline = [name for name, hint in hints.items() if metadata(hint, Inline)]
    # Unknown keys come first: a misspelt required key is better called misspelt than missing.
    _refuse_unknown(node, kind, [metadata(hints[name], DefaultTarget) for name in inline])
    for item in dataclasses.fields(kind):
        prefixed = metadata(hints[item.name], Prefixed)
        if item.name in given or item.name in inline:
            continue
        if prefixed:
            keys = [key for key in remaining if key == prefixed.key or key.startswith(prefixed.key + "_")]
            (annotation,) = typing.get_args(typing.get_args(hints[item.name])[0])[1:]
            nodes = {prefixed.stored + key.removeprefix(prefixed.key): remaining.pop(key) for key in keys}
            # Null is none of them.
            values[item.name] = {
                name: read(child, annotation) for name, child in nodes.items() if child.value is not None
            }
        elif item.name in remaining:
            values[item.name] = _read_field(remaining.pop(item.name), hints[item.name], item)
        elif not has_default(item):
            raise node.error(f"the key {item.name!r} is required")
    for name in inline:
        values[name] = read(dataclasses.replace(node, value=remaining), hints[name])
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ArgumentError as error:
        raise _below(node, error.path).error(str(error)) from error
    except ValueError as error:
        raise node.error(str(error)) from error


def _below(node: Node, path: str) -> Node:
    """The node at the dotted `path` below this one, or the last on the way there; keys may have dots themselves."""
    children = dict(enumerate(node.value)) if isinstance(node.value, list) else node.value
    for key, child in children.items() if isinstance(children, dict) else ():
        if path == str(key):
            return child
        if path.startswith(f"{key}."):
            return _below(child, path.removeprefix(f"{key}."))
    return node


def _read_field(node: Node, annotation: Any, item: dataclasses.Field[Any]) -> Any:
    """`read`, which where null is no value of the field says its default: null would be taken for off, or for that."""
    try:
        return read(node, annotation)
    except ConfigError as error:
        if node.value is not None or not has_default(item):
            raise
        raise ConfigError(f"{error}; its default is {inline(plain(default_of(item)))}") from None


def has_default(item: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass makes the field itself where it is not given."""
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def default_of(item: dataclasses.Field[Any]) -> Any:
    """What the dataclass makes the field."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _refuse_unknown(section: Node, kind: type[Any], inline: list[DefaultTarget]) -> None:
    """Refuse keys that are no field; those of an inline target count as fields where its arguments are known."""
    if any(not target.arguments or "_target_" in section.value for target in inline):
        return
    known = [*_keys(kind), *(name for target in inline for name in target.arguments)]
    hints = typing.get_type_hints(kind, include_extras=True).values()
    prefixes = tuple(f"{prefixed.key}_" for hint in hints if (prefixed := metadata(hint, Prefixed)))
    for key, child in section.value.items():
        if key not in known and not key.startswith(prefixes):
            raise child.error(f"unknown key{nearest(key, known)}")


def read(node: Node, annotation: Any) -> Any:
    """The value of `node` as `annotation` demands; raises `ConfigError` with the place and the constraint."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        if arguments[0] is Target:
            return read_target(node, metadata(annotation, DefaultTarget))
        if metadata(annotation, NumberAsText) and type(node.value) is int:
            node = dataclasses.replace(node, value=str(node.value))
        if metadata(annotation, AsWritten):
            node = _as_written(node)
        value = read(node, arguments[0])
        for check in annotation.__metadata__:
            if isinstance(check, Check) and not check.test(value):
                raise node.error(f"{check.rule}, got {node.shown()}")
        return value
    if origin in (Union, types.UnionType):
        return _read_union(node, arguments)
    if origin is Literal:
        typed = node.value if node.text is None else node.text
        if typed not in arguments or isinstance(typed, bool):
            choices = ", ".join(map(repr, arguments))
            raise node.error(f"must be one of {choices}, got {node.shown()}{did_you_mean(str(typed), arguments)}")
        return typed
    if origin is tuple:
        return _read_list(node, arguments)
    if origin in (Mapping, dict):
        if not isinstance(node.value, dict):
            raise node.error(f"expected a mapping, got {node.shown()}")
        # Whoever takes this mapping checks its own keys; what is nested deeper, nobody does.
        free = arguments[1] is Any
        return {key: read_free(child) if free else read(child, arguments[1]) for key, child in node.value.items()}
    if annotation is Target:
        return read_target(node, None)
    if dataclasses.is_dataclass(annotation):
        return read_section(node, typing.cast(type, annotation))
    return _read_scalar(node, annotation)


def _as_written(node: Node) -> Node:
    written = node.value if node.reference is None else node.reference
    if is_secret(node.place.path) and (node.reference is None or variable(node.reference) is None):
        raise node.error("a secret in clear; name an environment variable that holds it instead: ${NAME}")
    text = str(written) if type(written) is int else written
    return dataclasses.replace(node, value=text, text=text if isinstance(text, str) else None)


def _read_scalar(node: Node, kind: type[Any]) -> Any:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    value = node.value
    if kind in (str, Path) and node.text is not None:
        value = node.text
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not (str if kind is Path else kind):
        raise node.error(f"expected {names[kind]}, got {node.shown()}")
    return Path(value) if kind is Path else value


def _read_union(node: Node, alternatives: tuple[Any, ...]) -> Any:
    if type(None) in alternatives and (node.value is None or node.value in ("none", "None")):
        return None
    rest = [item for item in alternatives if item is not type(None)]
    mapping = [item for item in rest if typing.get_origin(item) is Mapping or dataclasses.is_dataclass(item)]
    if isinstance(node.value, dict) and mapping:
        return read(node, mapping[0])
    # Of several scalars the one that is typed so: true is no number.
    typed = [item for item in rest if item in (bool, int) and type(node.value) is item]
    return read(node, next((item for item in (*typed, *rest) if item not in mapping), rest[0]))


def _read_list(node: Node, items: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(node.value, list):
        raise node.error(f"expected a list, got {node.shown()}")
    if items[-1] is Ellipsis:
        items = (items[0],) * len(node.value)
    if len(items) != len(node.value):
        raise node.error(f"expected a list of {len(items)}, got {node.shown()}")
    return tuple(read(child, item) for child, item in zip(node.value, items, strict=True))


def read_free(node: Node, *, targets: bool = False) -> Any:
    """Plain values, and with `targets` also `Target` objects for mappings that have a `_target_`."""
    if isinstance(node.value, list):
        return [read_free(child, targets=targets) for child in node.value]
    if not isinstance(node.value, dict):
        return node.text if node.text is not None and is_secret(node.place.path) else node.value
    if targets and "_target_" in node.value:
        return read_target(node, None, nested=True)
    _refuse_created(node)
    return {key: read_free(child, targets=targets) for key, child in node.value.items()}


def _refuse_created(node: Node) -> None:
    """Nothing knows the keys of a free-form mapping, so an override of one that is not there may be a misspelling."""
    existing = [key for key, child in node.value.items() if not child.created]
    for key, child in node.value.items():
        if child.created:
            hint = did_you_mean(key, existing) or f"; to add it, give {node.place.path} as a whole"
            raise child.error(f"unknown key: an override cannot add it{hint}")


def read_target(node: Node, default: DefaultTarget | None, *, nested: bool = False) -> Target:
    """A `_target_` node, or with `default` a mapping that may leave the `_target_` out.

    One that is `nested` in the arguments of another may be `_partial_: true`: what it stands for is then the callable
    with these arguments, for the other to call.
    """
    if not isinstance(node.value, dict):
        raise node.error(f"expected a mapping with _target_ and its arguments, got {node.shown()}")
    children = dict(node.value)
    named = children.pop("_target_", None)
    partial = children.pop("_partial_", None)
    if partial is not None and not nested:
        raise partial.error("is for a target in the arguments of another; how this one is called is not its choice")
    if named is None and default is None:
        raise node.error("the key '_target_' is required: the dotted path of a callable")
    path = default.path if named is None and default else _read_scalar(typing.cast(Node, named), str)
    if not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        place = named.place if named else node.place
        raise place.error(f"{path!r} is not the dotted path of a callable, such as torch.optim.AdamW")
    arguments = {key: read_free(child, targets=True) for key, child in children.items()}
    places = {key: child.place for key, child in walk(node)}
    return Target(path, arguments, partial is not None and _read_scalar(partial, bool), node.place, places)


def plain(value: Any) -> Any:
    """What `read` would read back as `value`: dicts, lists and scalars."""
    if isinstance(value, Target):
        partial = {"_partial_": True} if value.partial else {}
        return {"_target_": value.path} | partial | {key: plain(child) for key, child in value.arguments.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result: dict[str, Any] = {}
        hints = typing.get_type_hints(type(value), include_extras=True)
        for item in dataclasses.fields(value):
            if not item.compare:
                continue
            content = plain(value.__dict__[item.name])
            prefixed = metadata(hints[item.name], Prefixed)
            if metadata(hints[item.name], Inline):
                result = content | result
            elif prefixed:
                result |= {prefixed.key + key.removeprefix(prefixed.stored): child for key, child in content.items()}
            else:
                result[item.name] = content
        return result
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def metadata(annotation: Any, kind: type[Any]) -> Any:
    if typing.get_origin(annotation) is not typing.Annotated:
        return None
    return next((item for item in annotation.__metadata__ if isinstance(item, kind)), None)


def _keys(kind: type[Any]) -> list[str]:
    hints = typing.get_type_hints(kind, include_extras=True)
    keys = []
    for item in dataclasses.fields(kind):
        prefixed = metadata(hints[item.name], Prefixed)
        if prefixed:
            keys.append(prefixed.key)
        elif item.compare and not metadata(hints[item.name], Inline):
            keys.append(item.name)
    return keys
