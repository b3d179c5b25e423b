"""`diffusion-apt data digits` and `data check`."""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

import pytest

from apt.data.decode import read_clip
from apt.data.digits import MovingDigits
from tests.cli.shell import error_line, invoke


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    result = invoke("data", "digits", folder, "--num", "3", "--seed", "5", "--split", "test")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"3 videos and metadata.csv in {folder}\n"
    return folder


def test_writes_videos_and_captions(digits: Path) -> None:
    with (digits / "metadata.csv").open(newline="") as file:
        captions = {row["file_name"]: row["caption"] for row in csv.DictReader(file)}
    dataset = MovingDigits(5, "test")
    assert list(captions.values()) == [dataset.caption(index) for index in range(3)]
    assert {path.name for path in digits.iterdir()} == {*captions, "metadata.csv"}


def test_writes_free_digits(tmp_path: Path) -> None:
    result = invoke("data", "digits", tmp_path, "--num", "1", "--setting", "free")
    assert result.returncode == 0, result.stderr
    clip = read_clip(tmp_path / "000000.mp4", start=Fraction(0), num_frames=9, fps=Fraction(8))
    assert (clip - MovingDigits(setting="free")[0].pixels).abs().mean() < 0.01


def test_check_of_a_good_folder(digits: Path) -> None:
    result = invoke("data", "check", digits)
    assert result.returncode == 0, result.stderr
    for fact in ("3 videos, 0 images", "32x32 (3)", "8 fps (3)", "no problems"):
        assert fact in result.stdout
    # As `train own` takes it, which never enlarges and finds 9 frames.
    assert "  --size tiny: 9 frames of 32x32 (height x width), at 8 fps" in result.stdout
    assert f"`train own --data.path {digits}`" in result.stdout


def test_check_reports_broken_files_and_fails(digits: Path, tmp_path: Path) -> None:
    for file in digits.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content[: len(content) // 2] if file.name == "000001.mp4" else content
        )
    result = invoke("data", "check", tmp_path)
    assert result.returncode == 2
    assert "2 videos, 0 images" in result.stdout
    assert "000001.mp4" in result.stdout
    assert "1 problem in" in result.stderr


def test_check_names_captions_that_a_model_cannot_read(digits: Path, tmp_path: Path) -> None:
    for file in digits.glob("*.mp4"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / file.name).with_suffix(".txt").write_text("a red seven")
    (tmp_path / "000001.txt").write_text("word " * 65)
    (tmp_path / "000002.txt").write_text("Größe")
    assert invoke("data", "check", tmp_path, "--headers-only").returncode == 0
    result = invoke("data", "check", tmp_path, "--headers-only", "--model", "digits")
    assert result.returncode == 2
    assert "000001.mp4: the prompt has 65 words, but at most 64 fit" in result.stdout
    assert "000002.mp4: the prompt 'Größe' has characters" in result.stdout
    assert "2 problems in" in result.stderr


def test_check_of_an_empty_folder(tmp_path: Path) -> None:
    result = invoke("data", "check", tmp_path)
    assert result.returncode == 2
    assert "nothing to train on" in result.stderr


@pytest.mark.parametrize("command", [["data", "digits"], ["data", "check"]])
def test_a_folder_must_be_named(command: list[str]) -> None:
    result = invoke(*command)
    assert result.returncode == 2
    assert "DIR" in result.stderr


def test_bad_input(tmp_path: Path) -> None:
    assert "no such folder" in error_line(invoke("data", "check", tmp_path / "missing"))
    assert "must be positive" in error_line(invoke("data", "digits", tmp_path, "--num", "0"))
    file = tmp_path / "file"
    file.touch()
    assert "cannot be written" in error_line(invoke("data", "digits", file, "--num", "1"))
