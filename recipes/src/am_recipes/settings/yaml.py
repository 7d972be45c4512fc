"""YAML values that know where they come from, so that every complaint about one can name file, line and dotted path.

A config file becomes a tree of `Node`; command-line overrides are put into the tree before anything reads it, and
references to environment variables are resolved last (`references`), keeping their source text for what is saved.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from am_recipes.settings.secrets import HIDDEN, is_secret

_HERE = re.compile(r"(?<!\$)\$\{here\}")
# A plain or quoted scalar that begins with it.
_PATH_FROM_HERE = re.compile(r"""(?<=[\s"'\[,])\$\{here\}[^\s"',\]}]*""")
_NULLS = ("none", "None")
# YAML 1.2's scalars: `off` and `no` are text, `1e-4` is a number, dates and 12:30 are text; PyYAML implements YAML 1.1.
_SCALARS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
]


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by `_SCALARS` alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would not read back as text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


class ConfigError(ValueError):
    """A config that is wrong by itself; the message starts with file, line and dotted path."""


class UnusableError(ValueError):
    """A value that a run found to be of no use, once it used it; the message starts as that of a `ConfigError`."""


@dataclass(frozen=True)
class Place:
    """Where a value stands: `where` is `file:line` (with the flag of an override), `path` its dotted path."""

    where: str
    path: str

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {self.path}: {message}" if self.path else f"{self.where}: {message}")

    def child(self, key: str | int) -> Place:
        return replace(self, path=f"{self.path}.{key}" if self.path else str(key))


@dataclass(frozen=True)
class Node:
    """A YAML value and its place. `value` is a dict or list of nodes, or a scalar.

    `text` is what was typed, for values whose type only the schema can decide (overrides, environment variables);
    `reference` the unresolved source of a value that refers to the environment; `created` marks a key that an
    override added.
    """

    place: Place
    value: Any
    text: str | None = None
    reference: str | None = None
    created: bool = False

    def error(self, message: str) -> ConfigError:
        return self.place.error(message)

    def shown(self) -> str:
        """The value for an error message: secrets and the environment stay out of it."""
        if is_secret(self.place.path):
            return HIDDEN
        if self.reference is not None:
            return self.reference
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}"
        return "null" if self.value is None else repr(self.value)


@contextlib.contextmanager
def unusable(
    place: Callable[[Exception], Place], kinds: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Turn an exception of `kinds` from within into an `UnusableError` of the place that `place` knows for it."""
    try:
        yield
    except (ConfigError, UnusableError):
        raise
    except kinds as error:
        raise UnusableError(str(place(error).error(str(error)))) from error


def first_name(error: Exception) -> str:
    """The name of the value that a message is about where it begins `name=`, as ours do; empty for another message."""
    begin = re.match(r"([A-Za-z_]\w*)=", str(error))
    return begin[1] if begin else ""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest name, nothing when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, names: Iterable[str]) -> str:
    """`did_you_mean`, or the list of what there is when nothing is close."""
    choices = sorted(set(names))
    return did_you_mean(name, choices) or (f"; choose from {', '.join(choices)}" if 0 < len(choices) <= 30 else "")


def load(path: Path) -> Node:
    """Read one YAML file; duplicate keys, unknown tags and anything but a mapping at the top are refused.

    `${here}` in it is the folder of the file, so that what lies beside it is found from anywhere.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    root = _parse(text, Place(str(path), ""))
    if not isinstance(root.value, dict):
        raise ConfigError(f"{path}:1: expected a mapping of sections, got {root.shown()}")
    return _with_folder(root, str(path.absolute().parent))


def _with_folder(node: Node, folder: str) -> Node:
    if isinstance(node.value, dict):
        return replace(node, value={key: _with_folder(child, folder) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[_with_folder(child, folder) for child in node.value])
    if not isinstance(node.value, str) or not _HERE.search(node.value):
        return node
    path = _HERE.sub(lambda _: folder.replace("${", "$${"), node.value)
    # One spelling, whatever the way to it: it tells whether two runs are the same.
    return replace(node, value=os.path.normpath(path) if _HERE.match(node.value) else path)


def with_folder(text: str, folder: str) -> str:
    """The text of a config file with `${here}` written out as `folder`, the same lines: for a copy elsewhere."""

    def path(match: re.Match[str]) -> str:
        return os.path.normpath(match[0].replace("${here}", folder.replace("${", "$${"), 1))

    return _HERE.sub(lambda _: folder.replace("${", "$${"), _PATH_FROM_HERE.sub(path, text))


def dump(values: Mapping[str, Any]) -> str:
    """Plain values as YAML text that `load` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def inline(value: Any) -> str:
    """A plain value as YAML on one line, for messages."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def override(root: Node, flag: str, text: str) -> None:
    """Set the value at `flag` (`optimizer.lr`, `prompts.0`) in the tree; the schema judges the names later.

    A number one past the end of a list adds to it, and 0 below what is not there begins a list.
    """
    keys = flag.split(".")
    if not all(keys):
        raise root.error(f"--{flag}: not a dotted path; write --section.key value")
    node = root
    for depth, key in enumerate(keys):
        parent = node.place
        place = replace(parent.child(key), where=f"{parent.where.split(' (--')[0]} (--{flag})")
        last = depth == len(keys) - 1
        if isinstance(node.value, list):
            length = len(node.value)
            if not key.isdecimal() or int(key) > length:
                raise place.error(
                    f"no such item; {parent.path} has {length}, numbered from 0; --{parent.path}.{length} adds one"
                )
            index: Any = int(key)
            if index == length:
                node.value.append(Node(place, None, created=True))
            found = node.value[index]
        elif isinstance(node.value, dict):
            index = key
            found = node.value.get(key)
        else:
            raise place.error(f"{parent.path} is {node.shown()}, which has no {key!r}")
        if last:
            node.value[index] = _typed(text, place, created=found is None)
        elif found is None or found.value is None:
            below: Any = [] if keys[depth + 1].isdecimal() else {}
            node.value[index] = node = Node(place, below, created=found is None)
        else:
            node = found


def _typed(text: str, place: Place, created: bool) -> Node:
    if text in _NULLS:
        # As "null" and "~" are; the schema still sees the text, for a key that has it among its choices.
        return Node(place, None, text=text, created=created)
    if text[:1] in ("[", "{", '"', "'"):
        try:
            parsed = _parse(text, place)
        except ConfigError:
            return Node(place, text, text=text, created=created)
        return replace(parsed, created=created)
    return Node(place, scalar(text), text=text, created=created)


def scalar(text: str) -> Any:
    """The value that a plain scalar stands for."""
    loader = _Loader("")
    return _construct(loader.resolve(yaml.ScalarNode, text, (True, False)), text)


def _construct(tag: str, text: str) -> Any:
    match tag.removeprefix("tag:yaml.org,2002:"):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 16) if text.startswith("0x") else int(text)
        case "float":
            return float(
                text.replace(".inf", "inf").replace(".nan", "nan") if text.lower()[-3:] in ("inf", "nan") else text
            )
        case _:
            return text


def _parse(text: str, place: Place) -> Node:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Node(place, None)
        return _node(root, place, of_file=not place.path, ancestors=())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not place.path else ""
        raise ConfigError(f"{place.where}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{place.where}: not YAML: {error}") from error
    finally:
        loader.dispose()


def _node(source: yaml.Node, place: Place, of_file: bool, ancestors: tuple[int, ...]) -> Node:
    """Convert a composed YAML node; inside an override's value all places are the override's."""
    file = re.sub(r":\d+$", "", place.where) if ancestors else place.where
    here = replace(place, where=f"{file}:{source.start_mark.line + 1}") if of_file else place
    if id(source) in ancestors:
        raise here.error("an alias that contains itself")
    ancestors = (*ancestors, id(source))
    if isinstance(source, yaml.SequenceNode):
        items = [_node(item, here.child(i), of_file, ancestors) for i, item in enumerate(source.value)]
        return Node(here, items)
    if isinstance(source, yaml.MappingNode):
        values: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, value in source.value:
            at = here.child(key.value if isinstance(key, yaml.ScalarNode) else "?")
            at = replace(at, where=f"{file}:{key.start_mark.line + 1}") if of_file else at
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise at.error("keys must be plain text; write merged keys out")
            if key.value in values:
                raise at.error(f"duplicate key; it is already set on line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
            values[key.value] = replace(_node(value, at, of_file, ancestors), place=at)
        return Node(here, values)
    if source.tag.removeprefix("tag:yaml.org,2002:") not in ("null", "bool", "int", "float", "str"):
        raise here.error(f"the tag {source.tag} is not supported; plain YAML values only")
    try:
        return Node(here, _construct(source.tag, source.value))
    except ValueError as error:
        raise here.error(f"{source.value!r} does not fit its tag {source.tag}") from error


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """The node and all below it, with their dotted paths."""
    yield path, node
    children = node.value if isinstance(node.value, dict) else {}
    if isinstance(node.value, list):
        children = dict(enumerate(node.value))
    for key, child in children.items():
        yield from walk(child, f"{path}.{key}" if path else str(key))
