"""`docs/paper.md` names every equation, section and appendix, and only what is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from apt.models import MODELS
from apt.train.recipes import RECIPES

PAGE = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(apt\.[\w.]+)`", PAGE)))


def resolve(name: str) -> object:
    """Return the module, or the attribute of a module, that a name refers to."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[split:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there(name: str) -> None:
    assert resolve(name) is not None


def test_a_wrong_name_does_not_resolve() -> None:
    with pytest.raises(AttributeError):
        resolve("apt.methods.apt.discriminator_los")


def rows(title: str) -> list[list[str]]:
    """First cell and last cell of each row of a section's table."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[row[0].strip(), row[-1].strip()] for row in cells[2:]]


def test_nothing_is_left_out() -> None:
    assert [row[0] for row in rows("Equations")] == [str(n) for n in range(1, 11)]
    sections = {"3.1", "3.2", "3.3", "3.4", "3.5", "4.1", "4.2"} | {f"5.{n}" for n in range(1, 6)}
    assert {row[0] for row in rows("Sections")} == sections
    assert [row[0] for row in rows("Appendices")] == list("ABCDEFGHIJ")
    for table in ("Equations", "Sections", "Appendices"):
        for what, where in rows(table):
            assert "`" in where or "not here" in where or "](" in where, what


def test_recipes_and_models_are_registered() -> None:
    for name in re.findall(r"`(digits_\w+)`", PAGE):
        assert name in RECIPES.names()
    assert "apt_8b" in MODELS.names() and MODELS.names("mmdit_*")
