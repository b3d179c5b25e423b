"""Training when several ranks share the tokens of each sample."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from apt.train.logs import read_log
from tests.processes import run_main
from tests.train.sequence_runs import LAYOUTS, PENALTIES, UPDATES
from tests.train.small_runs import STAGES

SAMPLES_APART = ("two of two", "copies")
"""Layouts whose ranks do not all have the same samples."""


def runs(root: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    run_main("tests.train.sequence_runs", root, kind, folder=root)
    return root, json.loads((root / "report.json").read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return runs(tmp_path_factory.mktemp("everything"), "all")


def assert_logs_equal(
    made: tuple[Path, dict[str, Any]], name: str, expected: str, *, monitored: bool = True
) -> None:
    """To 1e-5 of each value; of a penalty, its difference of logits to the rounding of logits.

    The collapse monitor sees only the first rank's samples, so its figures are not compared where
    other ranks have other samples.
    """
    root, report = made
    for run in (name, expected):
        for outcome in report[run]:
            assert outcome["code"] == 0, outcome["output"]
    found, wanted = (list(map(unsquared, read_log(root / run))) for run in (name, expected))
    assert len(found) == len(wanted) >= UPDATES
    for entries in zip(found, wanted, strict=True):
        entry, other = (
            {key: value for key, value in all_of.items() if monitored or key[:8] != "samples/"}
            for all_of in entries
        )
        assert entry == pytest.approx(other, rel=1e-5, abs=2e-6)


def unsquared(entry: dict[str, float]) -> dict[str, float]:
    """Replace each penalty, the square of a small difference of large numbers, by its root."""
    roots = {name: math.sqrt(entry[name] / PENALTIES[name]) for name in PENALTIES if name in entry}
    return {**entry, **roots}


def test_two_ranks_that_share_samples_train_as_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = runs(tmp_path_factory.mktemp("quick"), "quick")
    assert_logs_equal(made, "two/apt", "whole/apt")


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_in_any_layout_train_as_one(
    everything: tuple[Path, dict[str, Any]], stage: str, layout: str
) -> None:
    monitored = layout not in SAMPLES_APART
    assert_logs_equal(everything, f"{layout}/{stage}", f"whole/{stage}", monitored=monitored)


@pytest.mark.slow
def test_two_ranks_then_one_then_four(everything: tuple[Path, dict[str, Any]]) -> None:
    assert_logs_equal(everything, "moved/apt", "longer/apt")
