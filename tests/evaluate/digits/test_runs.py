from __future__ import annotations

from pathlib import Path

import pytest

from apt.errors import DataError
from apt.evaluate.digits.results import Cost, Curve
from apt.evaluate.digits.runs import DISCRIMINATOR_LOSS, read_cost, read_curves, snapshot_folders


def test_reads_a_log_that_a_kill_cut_short(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "discriminator/loss": 1.5}\n'
        '{"step": 2, "samples/contrast": 0.3}\n'
        '{"step": 3, "discriminator/loss": null}\n'
        '{"step": 4, "discriminator/loss": 0.5}\n'
        '{"step": 5, "discrim'
    )
    curves = read_curves(tmp_path)
    assert curves.keys() == {DISCRIMINATOR_LOSS}
    curve = curves[DISCRIMINATOR_LOSS]
    assert (curve.updates, curve.values) == ([1, 4], [1.5, 0.5])
    assert curve.end().mean == 0.5


def test_the_end_of_a_curve_is_that_of_blocks() -> None:
    values = [9.0] * 60 + [1.0] * 10 + [3.0] * 10
    end = Curve(updates=list(range(80)), values=values).end()
    assert (end.mean, end.std) == (2.0, pytest.approx(2**0.5))


def test_no_log_is_no_curve(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}


@pytest.mark.parametrize(
    "text", ["not json\n", "[1]\n", '{"loss": 1}\n', '{"step": 1, "loss": 2}\n']
)
def test_a_foreign_log_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError):
        read_curves(tmp_path)


def test_the_time_of_a_stage_is_that_of_its_updates(tmp_path: Path) -> None:
    assert read_cost(tmp_path, "apt", 1) is None
    (tmp_path / "apt").mkdir()
    (tmp_path / "apt" / "speed.jsonl").write_text(
        '{"step": 1, "speed/seconds_per_update": 2.0, "speed/data_wait_seconds": 1.0}\n'
        '{"step": 2, "speed/seconds_per_update": 3.5}\n'
        '{"step": 3, "speed/sec'
    )
    assert read_cost(tmp_path, "apt", 2) == Cost(run=2, stage="apt", updates=2, seconds=5.5)
    (tmp_path / "apt" / "speed.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="is not a log entry"):
        read_cost(tmp_path, "apt", 1)


def test_snapshots_come_in_the_order_of_updates(tmp_path: Path) -> None:
    for name in ("100/raw", "100/ema", "20/ema", "notes/ema", "5/other"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    found = [(update, weights) for update, weights, _ in snapshot_folders(tmp_path)]
    assert found == [(20, "ema"), (100, "ema"), (100, "raw")]
    assert snapshot_folders(tmp_path / "none") == []
