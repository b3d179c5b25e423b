"""Weights & Biases with the real package, offline."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apt.errors import InputError
from apt.train.logs import RunLog
from apt.train.weights_and_biases import ID_NAME, WandbLog


@pytest.mark.slow
def test_it_gets_metrics_and_sheets_and_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 4)  # a sheet may be large
    image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    ids = []
    for first in (0, 1):
        also = WandbLog(tmp_path, "tests", "digits", {"seed": 3})
        with RunLog(tmp_path, 2, first, also=also) as log:
            log.write(first + 1, {"generator/loss": 0.5}, {"speed/seconds_per_update": 0.1})
            log.picture(first + 1, tmp_path / "sheet.png")
        ids.append((tmp_path / ID_NAME).read_text())
    assert ids[0] == ids[1]
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0].strip()}"))
    assert runs
    assert any(path.stat().st_size for run in runs for path in run.glob("*.wandb"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples*.png"))


def test_without_the_package_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion-apt\[wandb\]'"):
        WandbLog(tmp_path, "tests", "digits", {})
