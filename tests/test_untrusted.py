from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.untrusted import MAX_JSON_DEPTH, check_name, is_inside, parse_json, read_json_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_sound_json_is_read_as_the_standard_library_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode(), unique_keys=True) == value


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_depth_has_a_limit(opening: str, closing: str) -> None:
    def nested(levels: int) -> str:
        return opening * levels + "1" + closing * levels

    parse_json(nested(MAX_JSON_DEPTH))
    for levels in (MAX_JSON_DEPTH + 1, 900, 200_000):
        with pytest.raises(ValueError, match="nested deeper than 64"):
            parse_json(nested(levels))


def test_size_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1, 2]")
    assert read_json_file(path, limit=6) == [1, 2]
    with pytest.raises(ValueError, match="larger than"):
        read_json_file(path, limit=5)


@pytest.mark.parametrize("text", ["", "{", "nul", b"\xff\xfe\xfd", '{"a": 1}{', "9" * 5000])
def test_damaged_json(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_key_that_is_there_twice() -> None:
    text = '{"b": {"a": 1, "a": 2}}'
    assert parse_json(text) == {"b": {"a": 2}}
    with pytest.raises(ValueError, match="'a' occurs twice"):
        parse_json(text, unique_keys=True)


@pytest.mark.parametrize("name", ["a", "a.safetensors", "sub/a-00001-of-00002.json", "ä b/..c"])
def test_names_that_stay(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../a",
        "a/../../b",
        "a/..",
        "./a",
        "/etc/passwd",
        "//host/share",
        "a//b",
        "C:/a",
        "c:a",
        "sub/D:a",
        "a\\b",
        "..\\a",
        "a\0b",
        "a\nb",
        "",
        " ",
        " a",
        "a/",
        None,
        7,
        ["a"],
    ],
)
def test_names_that_leave(name: object) -> None:
    with pytest.raises(ValueError):
        check_name(name)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "/", "\\", "C:", "b c"]), max_size=6))
def test_an_accepted_name_is_inside_its_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        check_name(name)
    except ValueError:
        return
    folder = Path("/some/folder")
    assert (folder / name).resolve().is_relative_to(folder) and (folder / name).resolve() != folder


def test_links_are_followed(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    (inner / "link").symlink_to(outer)
    assert is_inside(inner / "a", inner)
    assert not is_inside(inner / "link" / "a", inner)
    assert is_inside(inner / "link" / "a", inner, outer)
    assert not is_inside(tmp_path / "inner2", inner)
