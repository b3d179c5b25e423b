"""The registry for everything that is chosen by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from apt.errors import ConfigError, InputError

T = TypeVar("T")
B = TypeVar("B", bound=Callable[..., Any])


class Buildable(Protocol):
    """A frozen config dataclass."""

    def build(self) -> Any: ...


class Registry(Generic[T]):
    """A mapping from names to builder functions.

    Args:
        kind: what the entries are, for messages ("model", "loss").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[B], B]:
        """Return a decorator that registers a builder under `name`.

        Running the same definition again, as in a notebook cell, replaces the earlier builder.
        Raises ConfigError if another builder has the name.
        """

        def add(builder: B) -> B:
            there = self._builders.get(name)
            if there is not None and _place(there) != _place(builder):
                raise ConfigError(
                    f"{self.kind} {name!r} is registered twice, as {_place(there)} and as "
                    f"{_place(builder)}; choose another name"
                )
            self._builders[name] = builder
            return builder

        return add

    def names(self, pattern: str = "*") -> list[str]:
        """Return the registered names that match a shell-style pattern, sorted."""
        return sorted(fnmatch.filter(self._builders, pattern))

    def get(self, name: str) -> Callable[..., T]:
        """Return the builder of that name. Raises InputError with close matches if unknown."""
        if name not in self._builders:
            raise InputError(f"unknown {self.kind} {name!r}; {suggest(name, self._builders)}")
        return self._builders[name]

    def configured(self, name: str, options: Mapping[str, Any]) -> T:
        """Call the builder without arguments, and replace fields of the dataclass it returns.

        Raises InputError as `get` and `replace_typed` do.
        """
        return replace_typed(self.get(name)(), options)

    def summary(self, name: str) -> str:
        """Return the first line of the builder's docstring."""
        return (inspect.getdoc(self.get(name)) or "").partition("\n")[0]

    def create(self, name: str, /, **options: Any) -> T:
        """Call the builder.

        Raises InputError for an unknown option, a value of the wrong type, or a missing option.
        """
        builder = self.get(name)
        check_options(f"{self.kind} {name!r}", _parameter_types(builder), options)
        missing = [
            parameter.name
            for parameter in inspect.signature(builder).parameters.values()
            if parameter.default is parameter.empty and parameter.name not in options
        ]
        if missing:
            raise ConfigError(f"{self.kind} {name!r} needs the option {missing[0]!r}")
        return builder(**options)


def replace_typed(config: T, overrides: Mapping[str, Any]) -> T:
    """`dataclasses.replace` for user input.

    Raises ConfigError for an unknown field (with close matches) or a value of the wrong type.
    """
    kind = type(config)
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    check_options(kind.__name__, fields, overrides)
    # JSON has no tuples, so a list is accepted for a tuple field.
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in overrides.items()
    }
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def check_options(owner: str, accepted: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option with an unknown name or a value of the wrong type."""
    for name, value in options.items():
        if name not in accepted:
            raise ConfigError(f"{owner} takes no option {name!r}; {suggest(name, accepted)}")
        if not _fits(value, accepted[name]):
            expected = accepted[name]
            label = expected.__name__ if isinstance(expected, type) else expected
            raise ConfigError(f"{owner}: option {name!r} must be {label}, got {value!r}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return advice for an unknown name: close matches, or all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    return f"choose from: {', '.join(names) or '(none is registered)'}"


def _place(builder: Callable[..., Any]) -> str:
    return f"{builder.__module__}.{builder.__qualname__}"


def _parameter_types(builder: Callable[..., Any]) -> dict[str, Any]:
    function = builder.__init__ if inspect.isclass(builder) else builder
    hints = typing.get_type_hints(function)
    return {name: hints.get(name, Any) for name in inspect.signature(builder).parameters}


def _fits(value: Any, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if expected is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(expected))
    if origin is typing.Literal:
        return value in typing.get_args(expected)
    if origin is tuple and isinstance(value, (tuple, list)):
        kinds = typing.get_args(expected)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(_fits(item, kinds[0]) for item in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if expected is None or expected is type(None):
        return value is None
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or expected)
