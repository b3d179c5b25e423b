"""`diffusion-apt list`."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("tyro")


from apt.cli.list import SECTIONS, Row, format_section
from apt.losses import list_losses
from apt.models import list_models
from apt.train.recipes import list_recipes
from tests.cli.shell import invoke


def names(output: str) -> list[str]:
    """First words of the indented lines."""
    return [line.split()[0] for line in output.splitlines() if line.startswith("  ")]


def test_everything() -> None:
    result = invoke("list")
    assert result.returncode == 0, result.stderr
    titles = [line for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles == [f"{title}:" for title in SECTIONS]
    assert {*list_models(), *list_losses(), *list_recipes()} <= set(names(result.stdout))


@pytest.mark.parametrize(
    ("section", "expected"),
    [("models", list_models()), ("losses", list_losses()), ("recipes", list_recipes())],
)
def test_one_section(section: str, expected: list[str]) -> None:
    result = invoke("list", section)
    assert names(result.stdout) == expected
    assert all(len(line.split()) > 1 for line in result.stdout.splitlines()[1:-1]), "no summary"


def test_in_a_terminal_long_rows_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [Row("short", "a word"), Row("a_long_name", "of hyphen-ated-words and  gaps " * 5)]
    plain = format_section("things", rows)
    assert len(plain.splitlines()) == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    folded = format_section("things", rows)
    assert folded.split() == plain.split()
    assert max(map(len, folded.splitlines())) <= 40
    assert all(line.startswith(" " * 15) for line in folded.splitlines()[3:])


def test_models_tell_size_formats_licence_and_source() -> None:
    lines = invoke("list", "models").stdout.splitlines()
    large, wan, own = (
        next(line for line in lines if line.startswith(f"  {name} "))
        for name in ("sd3.5_large", "wan2.2_t2v_a14b", "mmdit_digits")
    )
    for text in ("8.06 B", "apt, diffusers, comfyui", "(gated)", "stable-diffusion-3.5-large"):
        assert text in large
    for text in ("14.29 B", "Apache-2.0", "(tags high_noise, low_noise)", "arXiv 2503.20314"):
        assert text in wan
    assert own.split()[1:4] == ["5.8", "M", "apt"]
    assert "no published weights" in own


def test_pattern() -> None:
    result = invoke("list", "recipes", "digits_apt*")
    assert names(result.stdout) == list_recipes("digits_apt*") != list_recipes()


def test_a_pattern_over_all_sections_leaves_out_empty_ones() -> None:
    result = invoke("list", "all", "hinge")
    assert result.stdout.splitlines()[0] == "losses:"
    assert names(result.stdout) == ["hinge"]


def test_attention_says_what_runs_here_and_why_not() -> None:
    rows = [
        line.split(maxsplit=2) for line in invoke("list", "attention").stdout.splitlines()[1:-1]
    ]
    assert ["native", "available"] in [row[:2] for row in rows]
    assert all(row[1] in ("available", "unavailable") and row[2] for row in rows)


def test_unknown_section() -> None:
    result = invoke("list", "losse")
    assert result.returncode == 2
    assert "'losses'" in result.stderr
    assert "Traceback" not in result.stderr
