from __future__ import annotations

from pathlib import Path

import pytest

from apt.errors import DataError
from apt.evaluate.runs import read_loss_curve, snapshot_folders


def test_reads_a_log_that_a_kill_cut_short(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "discriminator/loss": 1.5}\n'
        '{"step": 2, "samples/contrast": 0.3}\n'
        '{"step": 3, "discriminator/loss": null}\n'
        '{"step": 4, "discriminator/loss": 0.5}\n'
        '{"step": 5, "discrim'
    )
    curve = read_loss_curve(tmp_path, "x")
    assert curve is not None
    assert (curve.updates, curve.losses) == ([1, 4], [1.5, 0.5])
    assert curve.final() == 0.5


def test_no_log_is_no_curve(tmp_path: Path) -> None:
    assert read_loss_curve(tmp_path, "x") is None


@pytest.mark.parametrize(
    "text", ["not json\n", "[1]\n", '{"loss": 1}\n', '{"step": 1, "loss": 2}\n']
)
def test_a_foreign_log_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError):
        read_loss_curve(tmp_path, "x")


def test_snapshots_come_in_the_order_of_updates(tmp_path: Path) -> None:
    for name in ("100/raw", "100/ema", "20/ema", "notes/ema", "5/other"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    found = [(update, weights) for update, weights, _ in snapshot_folders(tmp_path)]
    assert found == [(20, "ema"), (100, "ema"), (100, "raw")]
    assert snapshot_folders(tmp_path / "none") == []
