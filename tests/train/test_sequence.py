"""Training when several ranks share the tokens of each sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apt.train.logs import read_log
from tests.train.sequence_runs import LAYOUTS, QUICK, UPDATES
from tests.train.small_runs import STAGES

ROOT = Path(__file__).parents[2]


def runs(root: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.sequence_runs", str(root), kind]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads((root / "report.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return runs(tmp_path_factory.mktemp("quick"), "quick")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return runs(tmp_path_factory.mktemp("everything"), "everything")


def assert_logs_equal(made: tuple[Path, dict[str, Any]], name: str, expected: str) -> None:
    root, report = made
    for run in (name, expected):
        for outcome in report[run]:
            assert outcome["code"] == 0, outcome["output"]
    found, wanted = read_log(root / name), read_log(root / expected)
    assert len(found) == len(wanted) >= UPDATES
    for entry, other in zip(found, wanted, strict=True):
        # Differences of logits are of their size.
        assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_that_share_samples_train_as_one(quick, stage: str) -> None:
    assert_logs_equal(quick, f"{QUICK[0]}/{stage}", f"whole/{stage}")


def test_one_process_goes_on_where_two_ranks_stopped(quick) -> None:
    assert_logs_equal(quick, "moved/apt", "whole/apt")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in QUICK])
@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks_train_as_one(everything, stage: str, layout: str) -> None:
    assert_logs_equal(everything, f"{layout}/{stage}", f"whole/{stage}")


@pytest.mark.slow
def test_two_ranks_then_one_then_four(everything) -> None:
    assert_logs_equal(everything, "moved/apt", "longer/apt")
