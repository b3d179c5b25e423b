"""The example in two dimensions runs with the functions of the package, and draws its picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


def test_it_fits_on_a_few_screens() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150


def test_it_draws_its_picture(tmp_path: Path) -> None:
    curves = runpy.run_path(str(EXAMPLE))["main"](tmp_path, updates=(20, 5, 50))
    assert (tmp_path / "minimal.png").is_file()
    assert {name: len(curve) for name, curve in curves.items()} == {"APT": 2, "APT without R1": 2}


@pytest.mark.slow
def test_r1_is_what_keeps_the_game_at_rest(tmp_path: Path) -> None:
    curves = runpy.run_path(str(EXAMPLE))["main"](tmp_path)
    late = {name: sum(curve[-20:]) / 20 for name, curve in curves.items()}
    assert late["APT"] < 0.6 * curves["APT"][0]
    assert late["APT without R1"] > 2 * late["APT"]
