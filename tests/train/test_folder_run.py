"""Training from a folder of real files, and what a resume reports if they changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt.data.digits import FPS, MovingDigits
from apt.data.write import write_video_folder
from apt.methods import PretrainConfig
from apt.train.config import DataConfig, ModelConfig, TrainConfig
from apt.train.trainer import run

MODEL = ModelConfig(options={"hidden_size": 24, "depth": 1, "num_heads": 2})


def config(root: Path, num_updates: int) -> TrainConfig:
    return TrainConfig(
        name="folder",
        run_dir=str(root / "run"),
        stage=PretrainConfig(),
        model=MODEL,
        data=DataConfig(source="folder", path=str(root / "clips")),
        num_updates=num_updates,
        batch_size=2,
        device="cpu",
    )


def test_a_resume_says_so_when_the_files_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_video_folder(MovingDigits(0), tmp_path / "clips", 3, FPS)
    run(config(tmp_path, 1))
    run(config(tmp_path, 2), resume=True)
    assert "the data have changed" not in capfd.readouterr().err

    write_video_folder(MovingDigits(0), tmp_path / "clips", 4, FPS)
    run(config(tmp_path, 3), resume=True)
    assert "the data have changed" in capfd.readouterr().err
