"""What a config may hold, for people: every key with its type, default and meaning, from the classes themselves.

The meaning of a key is the string below its field, that of a section the first paragraph of its class.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union

from am_recipes.settings.schema import Check, Inline, Prefixed, default_of, has_default, metadata, plain
from am_recipes.settings.target import DefaultTarget, Target

_NAMES = {int: "integer", float: "number", bool: "true | false", str: "text", Path: "path"}
_WIDEST = {"name": 26, "type": 18, "default": 17}


@dataclass(frozen=True)
class Key:
    """A key of a section; `default` None: it is required."""

    name: str
    type: str
    default: str | None
    meaning: str


def sections(kind: type[Any], path: str = "", meaning: str | None = None) -> Iterator[tuple[str, str, list[Key]]]:
    """The sections of dataclass `kind`, itself first: dotted path, meaning, keys."""
    hints = typing.get_type_hints(kind, include_extras=True)
    meanings = field_docstrings(kind)
    below: list[tuple[type[Any], str, str]] = []
    keys = []
    for item in dataclasses.fields(kind):
        if not item.compare:
            continue
        hint = hints[item.name]
        section = _section_in(hint)
        if section is None:
            keys.append(_key(item, hint, meanings[item.name]))
            continue
        inner, suffix = section
        said = meanings[item.name] or _first_paragraph(inner)
        below.append((inner, f"{path}.{item.name}{suffix}".lstrip("."), said + _presence(item)))
    yield path, _first_paragraph(kind) if meaning is None else meaning, keys
    for inner, inner_path, inner_meaning in below:
        yield from sections(inner, inner_path, inner_meaning)


def table(kind: type[Any], heading: str, *, defaults: Mapping[str, str], width: int = 100) -> str:
    """`sections` as text of at most `width` columns; `defaults` are of top-level keys that the class leaves open."""
    blocks = []
    for path, meaning, keys in sections(kind, meaning=heading):
        lines = _wrapped(f"{path}: {meaning}" if path else meaning, width)
        if not path:
            keys = [replace(key, default=defaults.get(key.name, key.default)) for key in keys]
        columns = {
            "name": [key.name for key in keys],
            "type": [key.type for key in keys],
            "default": ["required" if key.default is None else key.default for key in keys],
        }
        widths = {name: min(max(map(len, cells), default=0), _WIDEST[name]) for name, cells in columns.items()}
        for index, key in enumerate(keys):
            cells = [_wrapped(columns[name][index], widths[name]) for name in columns]
            left = 4 + sum(widths.values()) + 2 * len(widths)
            rows = [*cells, _wrapped(key.meaning, width - left)]
            for line in range(max(map(len, rows))):
                padded = [
                    (row[line] if line < len(row) else "").ljust(size)
                    for row, size in zip(rows, (*widths.values(), 0), strict=True)
                ]
                lines.append(("    " + "  ".join(padded)).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """The string below each field of a dataclass, on one line; empty where there is none."""
    found = {item.name: "" for item in dataclasses.fields(kind)}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = typing.cast(ast.ClassDef, definition).body
        for statement, following in itertools.pairwise(body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text).replace("\n", " ")
    return found


def _key(item: dataclasses.Field[Any], hint: Any, meaning: str) -> Key:
    name = item.name
    if metadata(hint, Inline):
        default_target = metadata(hint, DefaultTarget)
        return Key("_target_, its arguments", "target", default_target.path, meaning)
    prefixed = metadata(hint, Prefixed)
    if prefixed:
        (hint,) = typing.get_args(typing.get_args(hint)[0])[1:]
        return Key(f"{prefixed.key}(_NAME)", _type_name(hint), "none", meaning)
    rules = {check.rule.removeprefix("must be ").partition(":")[0]: None for check in _checks(hint)}
    rules.pop("must not be empty", None)
    default, default_target = _default(item), metadata(hint, DefaultTarget)
    if default_target is not None:
        default = "required" if default is None else "{}"
        meaning = f"{meaning} Default _target_: {default_target.path}."
    meaning = f"{meaning} ({'; '.join(rules)})" if rules else meaning
    return Key(name, _type_name(hint), default, meaning)


def _default(item: dataclasses.Field[Any]) -> str | None:
    if not has_default(item):
        return None
    value = plain(default_of(item))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _presence(item: dataclasses.Field[Any]) -> str:
    """What is said of a section as a whole: whether it has to be there."""
    if item.default is None:
        return " By default null: none."
    return "" if has_default(item) else " Required."


def _section_in(hint: Any) -> tuple[type[Any], str] | None:
    """The dataclass that a field holds, once or, with the suffix `.N`, in a list."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        found = [section for item in arguments if (section := _section_in(item))]
        return found[0] if found else None
    if origin is tuple:
        section = _section_in(arguments[0])
        return None if section is None else (section[0], ".N")
    is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Target
    return (hint, "") if is_section else None


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(item) for item in arguments if item is not type(None))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        length = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {length}{_type_name(arguments[0])}"
    if origin in (Mapping, dict):
        return "mapping"
    return "target" if hint is Target else _NAMES[hint]


def _checks(hint: Any) -> Iterator[Check]:
    if typing.get_origin(hint) is typing.Annotated:
        yield from (item for item in hint.__metadata__ if isinstance(item, Check))
    for inner in typing.get_args(hint):
        if typing.get_origin(inner) is not None:
            yield from _checks(inner)


def _first_paragraph(kind: type[Any]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
