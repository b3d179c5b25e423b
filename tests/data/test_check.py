from __future__ import annotations

from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("rich")

from rich.console import Console

from apt.data.check import FolderCheck, check_folder
from apt.errors import DataError
from tests.data.media import noise, numbered, truncate, write_image, write_video


def text(check: FolderCheck) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(check.render())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", numbered(24, 31, 47), 24)
    write_video(tmp_path / "b [1].mp4", numbered(16), 8)
    write_image(tmp_path / "ü.png", noise(1, 20, 30)[0])
    (tmp_path / "metadata.csv").write_text(
        "file_name,caption\na.mp4,a grey [bold]square[/bold]\nb [1].mp4,a ramp\nü.png,noise\n",
        encoding="utf-8",
    )
    return tmp_path


def test_a_good_folder(folder: Path) -> None:
    check = check_folder(folder)
    assert check.ok
    assert (check.num_files, check.num_videos, check.num_images) == (3, 2, 1)
    assert check.resolutions == {(47, 31): 1, (48, 32): 1, (30, 20): 1}
    assert check.durations == [1.0, 2.0]
    assert check.frame_rates == {Fraction(24): 1, Fraction(8): 1}
    assert check.codecs == {"h264": 2, "png": 1}
    assert check.captions == ["a grey [bold]square[/bold]", "a ramp", "noise"]
    shown = text(check)
    for part in ("2 videos, 1 image", "47x31 (1)", "24 fps (1)", "1.00 to 2.00 s", "no problems"):
        assert part in shown
    assert "a grey [bold]square[/bold]" in shown  # captions are not markup


def test_broken_and_uncaptioned_files_are_named(folder: Path) -> None:
    cut = write_video(folder / "cut.mp4", noise(30), 8, faststart=True, gop=5)
    truncate(cut, 0.5)
    (folder / "cut.txt").write_text("whole no more")
    (folder / "empty.mp4").touch()
    check = check_folder(folder)
    assert not check.ok
    assert {(problem.file, problem.kind) for problem in check.problems} == {
        ("cut.mp4", "unreadable"),
        ("empty.mp4", "missing caption"),
        ("empty.mp4", "unreadable"),
    }
    assert (check.num_files, check.num_videos) == (5, 2)
    assert len(check.captions) == 3
    shown = text(check)
    assert "3 problems" in shown
    assert "cut.mp4" in shown
    assert str(folder / "cut.mp4") not in shown  # the name says it once


def test_headers_only_overlooks_what_is_further_in(folder: Path) -> None:
    cut = write_video(folder / "cut.mp4", noise(30), 8, faststart=True, gop=5)
    truncate(cut, 0.5)
    (folder / "cut.txt").write_text("whole no more")
    check = check_folder(folder, decode=False)
    assert check.ok
    assert check.num_videos == 3
    assert "headers only" in text(check)


def test_progress_counts_every_file(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    check_folder(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_an_empty_folder_says_what_it_looked_for(tmp_path: Path) -> None:
    check = check_folder(tmp_path)
    assert not check.ok
    assert "metadata.csv" in text(check)
    with pytest.raises(DataError, match="no such folder"):
        check_folder(tmp_path / "nowhere")


def test_files_that_are_passed_over_are_counted(folder: Path) -> None:
    (folder / "notes.md").touch()
    (folder / "clip.jxl").touch()
    (folder / "a.txt").mkdir()
    check = check_folder(folder)
    assert check.left_aside == {".md": 1}
    assert [(problem.file, problem.kind) for problem in check.problems] == [
        ("clip.jxl", "unknown suffix")
    ]
    assert ".md (1)" in text(check)
