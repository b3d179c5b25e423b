"""What `--help` prints."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

pytest.importorskip("tyro")

from apt.cli.app import COMMANDS
from apt.cli.help import explanations, wrapped
from tests.cli.shell import invoke

COMMANDS_AND_RECIPES = [*COMMANDS, "train own", "train own_apt", "plan digits"]


@pytest.mark.parametrize("name", COMMANDS_AND_RECIPES)
def test_it_fits_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke(*name.split(), "--help")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert text.startswith(f"usage: diffusion-apt {name} ")
    assert max(map(len, text.splitlines())) <= 80
    assert "\n\n\n" not in text
    assert "(default: )" not in text


def test_every_field_of_a_run_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = invoke("train", "own_apt", "--help").stdout
    lines = [line.strip("│╭╰─ ") for line in text.splitlines()]
    bare = [
        line
        for line, after in pairwise(lines)
        if line.startswith("--") and after.startswith("(default")
    ]
    # Options of a text encoder or of weighted terms, whose names say what they are.
    assert not [name for name in bare if not name.startswith(("--model.", "--stage.terms."))]


@dataclass
class Options:
    """Something.

    Attributes:
        height, width: of a clip, in
            pixels.
    """

    height: int = 1
    width: int = 1
    name: str = ""
    """Of what
    there is."""


def test_an_explanation_is_one_paragraph() -> None:
    assert explanations(Options) == {
        "height": "of a clip, in pixels.",
        "width": "see height.",
        "name": "Of what there is.",
    }


def test_paragraphs_are_filled_and_boxes_stay() -> None:
    box = "╭─ box ──────────╮\n│ a     and    b │\n╰────────────────╯\n"
    text = f"one\ntwo three\n\n\n  --name: of what\n  --size: of it\n{box}"
    assert wrapped(text, 12) == (
        f"one two\nthree\n\n  --name: of\n      what\n  --size: of\n      it\n{box}"
    )
