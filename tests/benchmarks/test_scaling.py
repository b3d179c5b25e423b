from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apt.bench.records import read_records
from benchmarks import scaling
from benchmarks.scaling import Times, Trial, measure, measurements

ROOT = Path(__file__).parents[2]
TRIAL = Trial(stages=("distill", "apt"), device="cpu", batch_size=10, sequence=2, updates=5)


def test_speeds_are_told_by_those_of_the_first_in_the_same_round() -> None:
    # The machine is half as fast in the second round: neither ratio knows.
    found: dict[int, list[Times]] = {
        1: [{"distill": [100.0], "apt": [400.0]}, {"distill": [200.0], "apt": [800.0]}],
        4: [{"distill": [100.0], "apt": [100.0]}, {"distill": [200.0], "apt": [400.0]}],
    }
    made = measurements(found, TRIAL)
    ratios = {(m.case["stage"], m.case["ranks"]): dict(m.metrics) for m in made}
    assert ratios["distill", 4] == {
        "samples/s": pytest.approx(10 / 0.15), "ratio": 1, "lowest": 1, "highest": 1,
    }  # fmt: skip
    assert ratios["apt", 4]["ratio"] == 3
    assert (ratios["apt", 4]["lowest"], ratios["apt", 4]["highest"]) == (2, 4)
    assert [m.case["sequence"] for m in made] == [1, 2, 1, 2]
    assert made[3].samples_ms == (100.0, 400.0)


def test_numbers_of_ranks_take_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = []

    def launch(ranks: int, trial: Trial) -> Times:
        order.append(ranks)
        return {"apt": [1e3 / ranks]}

    monkeypatch.setattr(scaling, "launch", launch)
    measure([1, 2, 4], TRIAL, rounds=2)
    assert order == [1, 2, 4, 2, 4, 1]
    assert "round 2 of 2, ranks 4: apt 40 samples/s" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_train_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--ranks", "2", "--updates", "1"]
    command += ["--rounds", "1", "--batch-size", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    (record,) = read_records(tmp_path, "scaling")
    assert [m.case["stage"] for m in record.measurements] == ["pretrain", "distill", "apt"]
    assert "--ranks 2" in record.provenance.command
    assert json.loads((tmp_path / f"{record.stem}.json").read_text())["note"]
    assert "## Gates" not in (tmp_path / f"{record.stem}.md").read_text()
