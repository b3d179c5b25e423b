from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from apt.train import checkpoint
from apt.train.saving import Retention


def save(retention: Retention, step: int) -> None:
    state: dict[str, Any] = {"net": torch.full((8,), float(step)), "step": step}
    retention.trust(checkpoint.save(retention.root, step, state, {}))
    retention.prune()


def harm(retention: Retention, step: int) -> None:
    """Flip a bit; neither name nor size change."""
    (file,) = (retention.root / f"step_{step:08d}").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def steps(retention: Retention) -> list[int]:
    return sorted(checkpoint.step_of(retention.root / name) for name in os.listdir(retention.root))


def test_newer_damaged_checkpoints_never_displace_a_good_one(tmp_path: Path) -> None:
    first = Retention(tmp_path / "c", 2)
    for step in (10, 20, 30):
        save(first, step)
    assert steps(first) == [20, 30]
    for step in (20, 30):
        harm(first, step)
    resumed = Retention(tmp_path / "c", 1)
    for step in (5, 6):
        save(resumed, step)
        newest = resumed.root / f"step_{step:08d}"
        assert checkpoint.is_intact(newest)
        assert steps(resumed) == [step, 20, 30]
    save(resumed, 30)  # takes the place of a damaged one, and what is older goes
    assert steps(resumed) == [30]


def test_a_checkpoint_that_rots_during_the_run_does_not_count(tmp_path: Path) -> None:
    retention = Retention(tmp_path / "c", 2)
    for step in (1, 2):
        save(retention, step)
    harm(retention, 2)
    save(retention, 3)
    assert steps(retention) == [1, 2, 3]
    save(retention, 4)
    assert steps(retention) == [3, 4]


def test_checkpoints_of_an_earlier_process_count_if_they_verify(tmp_path: Path) -> None:
    for step in (1, 2):
        save(Retention(tmp_path / "c", 3), step)
    save(Retention(tmp_path / "c", 2), 3)
    assert steps(Retention(tmp_path / "c", 2)) == [2, 3]
