from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import ratios

ROOT = Path(__file__).parents[2]


def test_speeds_are_told_by_those_of_the_first() -> None:
    speeds = {1: {"apt": 10.0, "distill": 4.0}, 4: {"apt": 25.0, "distill": 4.0}}
    rows = [line.split() for line in ratios(speeds).splitlines()[1:]]
    assert rows == [
        ["apt,", "1", "10", "1.00"],
        ["apt,", "4", "25", "2.50"],
        ["distill,", "1", "4", "1.00"],
        ["distill,", "4", "4", "1.00"],
    ]


@pytest.mark.slow
def test_ranks_train_every_stage() -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--ranks", "2", "--updates", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split(",")[0] for line in done.stdout.splitlines()[1:]] == [
        "pretrain", "distill", "apt",
    ]  # fmt: skip
