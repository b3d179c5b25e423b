from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

import numpy as np
from matplotlib.image import imread
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apt.errors import DataError
from apt.train.logs import LOG_NAME, SPEED_NAME, RunLog, read_log
from apt.train.plots import plot_losses


def metrics(step: int) -> dict[str, float]:
    return {"loss/d": 1.0 / step, "loss/g": 0.1 * step, "gradient": float(step)}


def write(run_dir: Path, first: int, last: int, total: int = 10) -> None:
    with RunLog(run_dir, total, first) as log:
        for step in range(first + 1, last + 1):
            log.write(step, metrics(step), timing={"time/step": 0.1})
            log.sync()


def test_lines_are_json_with_the_step_first(tmp_path: Path):
    write(tmp_path, 0, 2)
    text = (tmp_path / LOG_NAME).read_text()
    assert text.splitlines()[1] == '{"step": 2, "loss/d": 0.5, "loss/g": 0.2, "gradient": 2.0}'
    assert read_log(tmp_path)[0] == {"step": 1, **metrics(1)}


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', '{"step": 9}'])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, tail: str):
    write(tmp_path / "whole", 0, 10)
    write(tmp_path / "parts", 0, 8)
    with (tmp_path / "parts" / LOG_NAME).open("a") as file:
        file.write(tail)
    write(tmp_path / "parts", 5, 10)
    whole, parts = ((tmp_path / n / LOG_NAME).read_bytes() for n in ("whole", "parts"))
    assert parts == whole
    write(tmp_path / "parts", 0, 10)
    assert (tmp_path / "parts" / LOG_NAME).read_bytes() == whole


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    write(tmp_path, 0, 8)
    write(tmp_path, 5, 10)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/d")] == list(range(1, 11))
    assert len(events.Scalars("time/step")) == 10


def test_what_the_clock_says_has_a_file_of_its_own(tmp_path: Path):
    write(tmp_path, 0, 8)
    write(tmp_path, 5, 10)
    speed = read_log(tmp_path, SPEED_NAME)
    assert speed == [{"step": step, "time/step": 0.1} for step in range(1, 11)]
    assert not any("time" in key for entry in read_log(tmp_path) for key in entry)


def test_tensorboard_has_the_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sheet = np.zeros((4, 6, 3), np.uint8)
    sheet[1, 2] = (255, 0, 128)
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    with monkeypatch.context() as large, RunLog(tmp_path / "run", 10, 0) as log:
        # As of 49 frames of 720p for several prompts.
        large.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        log.picture(3, tmp_path / "sheet.png")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (shown,) = events.Images("samples")
    assert shown.step == 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), sheet)


def test_lines_have_room_in_eighty_columns(tmp_path: Path, capfd):
    long = {
        "discriminator/loss": 1.23456789,
        "discriminator/r1_with_a_long_name": 1e-12,
        "generator/loss": -123456.789,
    }
    with RunLog(tmp_path, 1_000_000, 0, title="a_recipe_of_a_very_long_name", interval=0.0) as log:
        for step in (1, 999_999):
            log.write(step, long)
    for line in capfd.readouterr().err.splitlines():
        assert len(line) <= 80
        assert "D loss 1.235" in line and "G loss -1.235e+05" in line and "left" in line


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path):
    with RunLog(tmp_path, 1, 0) as log:
        log.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    line = (tmp_path / LOG_NAME).read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with RunLog(tmp_path / "run", 10, 0, enabled=False) as log:
        log.write(1, {"a": 1.0})
        log.message("hello")
        log.sync()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_lines_come_at_intervals(tmp_path: Path, capfd):
    with RunLog(tmp_path, 300, 0, title="digits", interval=1e9) as log:
        for step in range(1, 101):
            log.write(step, {"loss": 0.5})
        log.message("[bold] checkpoint in /some/[odd] folder " + "x" * 200)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("digits: 1/300") and "left" in lines[0] and "loss 0.5" in lines[0]
    assert lines[1] == "[bold] checkpoint in /some/[odd] folder " + "x" * 200
    assert lines[2].startswith("digits: 100/300")


def test_three_updates_tell_how_long_the_others_take(tmp_path: Path, capfd):
    with RunLog(tmp_path, 1003, 0, interval=1e9) as log:
        for step, seconds in enumerate((9.0, 2.0, 2.5, 100.0), 1):
            log.write(step, {"loss": 0.5}, {"speed/seconds_per_update": seconds})
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "expected" in line]
    assert line == "  expected time: 0:41:40 for 1,000 updates of 2.5 s"
    for waited, said in ((0.5, False), (1.5, True)):
        with RunLog(tmp_path / str(waited), 9, 0, interval=1e9) as log:
            for step in (1, 2, 3):
                timing = {"speed/seconds_per_update": 2.5, "speed/data_wait_seconds": waited}
                log.write(step, {"loss": 0.5}, timing)
        found = "  60% of it is spent waiting for data" in capfd.readouterr().err
        assert found is said
    with RunLog(tmp_path / "short", 3, 0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 0.5}, {"speed/seconds_per_update": 1.0})
    assert "expected" not in capfd.readouterr().err


def test_on_a_terminal_of_eighty_columns_a_bar_is_drawn(tmp_path: Path):
    pty = pytest.importorskip("pty")
    code = (
        "import sys; from pathlib import Path; from apt.train.logs import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), 20000, 19990, title='digits_latent_pretrain')\n"
        "values = {'generator/grad_norm': 3.0, 'discriminator/loss': 0.5, 'generator/loss': 0.25}\n"
        "[log.write(step, values) for step in range(19991, 20001)]; log.close()"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "TERM": "xterm",
        "COLUMNS": "80",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0, drawn
    for text in ("digits_latent", "20000/20000", "D loss 0.5", "G loss 0.25"):
        assert text in drawn


def test_a_foreign_log_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="training run"):
        read_log(tmp_path)
    (tmp_path / LOG_NAME).write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(DataError, match="no log"):
        read_log(tmp_path)
    (tmp_path / LOG_NAME).write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        RunLog(tmp_path, 10, 5)
    with pytest.raises(DataError, match="line 2"):
        read_log(tmp_path)


def test_losses_are_drawn(tmp_path: Path):
    write(tmp_path, 0, 9)
    with RunLog(tmp_path, 10, 9) as log:
        log.write(10, {"loss/d": float("nan"), "late": 3.0})
    image = imread(plot_losses(tmp_path))
    assert image.shape[0] > 600 and image.shape[1] > 1000  # d, g and gradient in a row, late below
    assert not list(tmp_path.glob(".losses*"))
    assert len({tuple(pixel) for pixel in image[::3, ::3].reshape(-1, image.shape[2])}) > 10
    (tmp_path / LOG_NAME).write_text("")
    with pytest.raises(DataError, match="no metrics"):
        plot_losses(tmp_path)
