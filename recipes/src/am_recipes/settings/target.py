"""A callable in a config: its dotted path and arguments, held against its signature before anything is built."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, ParamSpec, TypeVar

from am_recipes.settings.yaml import Place, first_name, nearest, unusable

_DEFAULT_PLACE = Place("default", "")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class DefaultTarget:
    """The callable that a target node means when it has no `_target_`.

    `arguments`, where they are known without importing it, let a misspelt one be found at once.
    """

    path: str
    arguments: tuple[str, ...] = ()


class ArgumentError(ValueError):
    """A value that the schema or a signature allows and its use does not.

    `path` is where it is: the name of the argument, and with dots what is wrong within it; of a check of a recipe, the
    whole dotted path in the config.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


class Checked(Generic[P, R]):
    """A callable that can say before it is called whether it could be: what `checked` makes of a function."""

    def __init__(self, function: Callable[P, R], check: Callable[[Mapping[str, Any]], None]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.check = check

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        return self._function(*arguments, **options)


def checked(check: Callable[[Mapping[str, Any]], None]) -> Callable[[Callable[P, R]], Checked[P, R]]:
    """Let `check` see the arguments that a config gives to the function, by name, before anything is built.

    It raises `ArgumentError`. Nested targets among the arguments are still `Target` objects.
    """
    return lambda function: Checked(function, check)


@dataclass(frozen=True, repr=False)
class Target:
    """A callable by its dotted path, with arguments that may be targets themselves.

    Nothing is imported until `callable`, `bind` or `build` is called. `partial` is for a target among the arguments of
    another, which is then given the callable with these arguments applied.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
    place: Place = field(default=_DEFAULT_PLACE, compare=False)
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"Target({self.path!r}, arguments={sorted(self.arguments)})"

    def bind(self, provided: Iterable[str] = (), *, partial: bool = False) -> None:
        """Import the callable and hold the arguments, here and in nested targets, against its signature.

        Args:
            provided: the arguments that the recipe passes itself.
            partial: the rest comes when it is called, so a missing argument is no error.

        Nothing is built. Raises `ConfigError`.
        """
        for value in _targets_in(self.arguments):
            value.bind(partial=value.partial)
        function = self._import()
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            return  # some C functions have no signature: they complain when they are called
        named = {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        provided = tuple(provided)
        for name in self.arguments:
            if name in provided:
                raise self._place(name).error("the recipe passes this argument itself; remove it")
            if name not in named and not takes_any:
                raise self._place(name).error(f"{self.path} takes no such argument{nearest(name, named)}")
        for name in provided:
            if name not in named and not takes_any:
                raise self.place.child(name).error(f"{self.path} takes no {name!r}, which the recipe passes to it")
        missing = [
            name
            for name, parameter in named.items()
            if parameter.default is parameter.empty and name not in self.arguments and name not in provided
        ]
        if missing and not partial:
            raise self.place.error(f"{self.path} needs {', '.join(map(repr, missing))}")
        if isinstance(function, Checked):
            try:
                function.check(self.arguments)
            except ArgumentError as error:
                raise self._place(error.path).error(str(error)) from error

    def spelt_out(self, provided: Iterable[str] = ()) -> Target:
        """The same with the defaults of the callable written out, those that a config could hold."""
        try:
            parameters = inspect.signature(self._import()).parameters
        except ValueError:
            return self
        plain = (type(None), bool, int, float, str)
        defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if name not in provided and type(parameter.default) in plain
        }
        return replace(
            self, arguments=dict(self.arguments) | {k: v for k, v in defaults.items() if k not in self.arguments}
        )

    def build(self, **runtime: Any) -> Any:
        """Call it with its arguments, nested targets built first; `runtime` arguments win.

        A ValueError or OSError from it becomes an `UnusableError` of the argument that it begins with, or of all.
        """
        function, arguments = self._import(), self.built_arguments() | runtime
        with unusable(lambda error: self._blamed(function, first_name(error))):
            return function(**arguments)

    def built_arguments(self) -> dict[str, Any]:
        """The arguments, with nested targets built."""
        return {name: _built(value) for name, value in self.arguments.items()}

    def callable(self) -> Callable[..., Any]:
        """The callable with the configured arguments applied, for whoever passes the rest."""
        function = self._import()
        return functools.partial(function, **self.built_arguments()) if self.arguments else function

    def _blamed(self, function: Callable[..., Any], name: str) -> Place:
        """The place of the argument `name`, given or left out, if `function` has one; else that of the target."""
        try:
            return self._place(name) if name in inspect.signature(function).parameters else self.place
        except ValueError:
            return self.places.get(name, self.place) if name else self.place

    def _place(self, path: str) -> Place:
        """Where the argument at the dotted `path` was given, by the nearest line that is known."""
        known = path
        while known not in self.places and known:
            known = known.rpartition(".")[0]
        nearest_place = self.places[known] if known else self.place
        return replace(nearest_place, path=self.place.child(path).path)

    def _import(self) -> Callable[..., Any]:
        place = self._place("_target_")
        names = self.path.split(".")
        module, depth = None, 0
        for depth, name in enumerate(names):
            path = ".".join(names[: depth + 1])
            if module is not None and name in vars(module):
                break
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise place.error(f"importing {path} failed: {error}") from error
                break
            except ImportError as error:
                raise place.error(f"importing {path} failed: {error}") from error
        else:
            depth = len(names)
        if module is None:
            installed = [entry.name for entry in pkgutil.iter_modules()]
            raise place.error(f"{self.path!r}: no module named {names[0]!r}{nearest(names[0], installed)}")
        found: Any = module
        for position in range(depth, len(names)):
            owner = ".".join(names[:position])
            try:
                found = getattr(found, names[position])
            except AttributeError:
                choices = [name for name in dir(found) if not name.startswith("_")]
                hint = nearest(names[position], choices)
                raise place.error(f"{self.path!r}: {owner} has no {names[position]!r}{hint}") from None
        if not callable(found):
            raise place.error(f"{self.path!r} is a {type(found).__name__}, not a callable")
        return typing.cast(Callable[..., Any], found)


@dataclass(frozen=True)
class Call:
    """A target of a config and how it is called: what `Target.bind` is told. `key` is its dotted path."""

    key: str
    target: Target
    provided: tuple[str, ...] = ()
    partial: bool = False

    def bind(self) -> None:
        """`Target.bind`. Raises `ConfigError`."""
        self.target.bind(self.provided, partial=self.partial)


def _targets_in(value: Any) -> Iterable[Target]:
    if isinstance(value, Target):
        yield value
    elif isinstance(value, (Mapping, list)):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _targets_in(child)


def _built(value: Any) -> Any:
    if isinstance(value, Target):
        return value.callable() if value.partial else value.build()
    if isinstance(value, Mapping):
        return {key: _built(child) for key, child in value.items()}
    return [_built(child) for child in value] if isinstance(value, list) else value
