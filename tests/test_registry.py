from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from apt.errors import ConfigError, InputError
from apt.registry import Registry, replace_typed


def shapes() -> Registry[object]:
    registry: Registry[object] = Registry("shape")

    @registry.register("square")
    def square(side: float = 1.0, *, colour: Literal["red", "blue"] = "red") -> object:
        """Four equal sides.

        And more that a summary leaves out.
        """
        return ("square", side, colour)

    @registry.register("circle")
    @dataclass(frozen=True)
    class Circle:
        radius: int = 1
        name: str | None = None
        size: tuple[int, int] = (1, 1)
        tags: tuple[str, ...] = ()

    return registry


def test_names_and_patterns() -> None:
    registry = shapes()
    assert registry.names() == ["circle", "square"]
    assert registry.names("s*") == ["square"]
    assert registry.names("x*") == []


def test_create_passes_options_on() -> None:
    assert shapes().create("square", side=2, colour="blue") == ("square", 2, "blue")
    circle: Any = shapes().create("circle", radius=3, name=None)
    assert circle.radius == 3


def test_summary_is_the_first_line() -> None:
    assert shapes().summary("square") == "Four equal sides."
    registry: Registry[int] = Registry("number")
    registry.register("one")(lambda: 1)
    assert registry.summary("one") == ""


def test_registering_returns_the_builder() -> None:
    registry: Registry[int] = Registry("number")

    def one() -> int:
        return 1

    assert registry.register("one")(one) is one


def test_a_name_is_taken_once() -> None:
    registry = shapes()
    twice = r"shape 'square' is registered twice, as test\S+square and as test\S+other"

    def other() -> object:
        return "other"

    with pytest.raises(ConfigError, match=twice.replace("test", r"tests\.test")):
        registry.register("square")(other)
    assert registry.create("square") == ("square", 1.0, "red")


def test_a_definition_that_is_run_again_replaces_itself() -> None:
    registry: Registry[int] = Registry("number")
    for value in (1, 2):

        @registry.register("one")
        def one(value: int = value) -> int:
            return value

    assert registry.create("one") == 2


@pytest.mark.parametrize("call", ["get", "create", "summary"])
def test_unknown_names_list_close_ones(call: str) -> None:
    with pytest.raises(InputError, match="unknown shape 'sqare'; did you mean 'square'"):
        getattr(shapes(), call)("sqare")
    with pytest.raises(InputError, match="choose from: circle, square"):
        getattr(shapes(), call)("zzz")
    with pytest.raises(InputError, match="none is registered"):
        getattr(Registry("shape"), call)("zzz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("square", {"sid": 1.0}, "takes no option 'sid'; did you mean 'side'"),
        ("square", {"side": "1"}, "option 'side' must be float, got '1'"),
        ("square", {"side": True}, "must be float"),
        ("square", {"colour": "green"}, "must be .*red.*, got 'green'"),
        ("circle", {"radius": 1.5}, "must be int"),
        ("circle", {"radius": None}, "must be int"),
        ("circle", {"name": 3}, "must be str | None"),
        ("circle", {"size": (1, 2, 3)}, "must be tuple"),
        ("circle", {"size": (1, "2")}, "must be tuple"),
        ("circle", {"tags": "ab"}, "must be tuple"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    registry = shapes()
    with pytest.raises(ConfigError, match=message):
        registry.create(name, **options)
    circle: Any = registry.create("circle")
    if name == "circle":
        with pytest.raises(ConfigError, match=message):
            replace_typed(circle, options)


def test_replace_typed_takes_lists_for_tuples() -> None:
    circle: Any = shapes().create("circle")
    changed = replace_typed(circle, {"size": [2, 3], "tags": ["a", "b", "c"], "radius": 5})
    assert (changed.size, changed.tags, changed.radius) == ((2, 3), ("a", "b", "c"), 5)
    assert circle.radius == 1
    assert replace_typed(circle, {}) == circle
