from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.data import doom
from apt.data.doom import FPS, DoomClips
from apt.errors import ConfigError, InputError
from tests.cli.shell import error_line, invoke


def places(*steps: tuple[float, float, float], count: int = 5) -> np.ndarray:
    """A path (T, 3) of equal steps in x, y and heading, starting where the heading wraps around."""
    way = np.cumsum([(0.0, 0.0, 350.0), *steps * (count - 1)], axis=0)
    way[:, 2] %= 360
    return way


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (places((0, 0, 0)), "stands still"),
        (places((6 * np.cos(np.radians(350)), 6 * np.sin(np.radians(350)), 0)), "moves forward"),
        (places((0, 0, -4)), "turns right"),
        (places((0, 0, 4)), "turns left"),
    ],
)
def test_what_a_camera_did_is_told_from_where_it_was(way: np.ndarray, words: str) -> None:
    """Headings grow counter-clockwise, as in the engine."""
    did = [motion.words for motion in doom._MOTIONS if doom._did(motion, way)]
    assert did == [words]


def test_a_camera_that_was_held_up_did_not_move() -> None:
    way = places((6.0, -1.0, 0))
    way[3:, :2] = way[2, :2]
    assert not [motion for motion in doom._MOTIONS if doom._did(motion, way)]


def test_without_vizdoom_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vizdoom", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"need vizdoom.*pip install diffusion-apt\[vizdoom\]"):
        DoomClips()
    result = invoke("data", "vizdoom", tmp_path / "clips", "--num", "2")
    assert "pip install diffusion-apt[vizdoom]" in error_line(result)
    assert not (tmp_path / "clips").exists()


def test_sizes_that_cannot_be_rendered() -> None:
    for size in ({"frames": 0}, {"height": 121}, {"width": 0}):
        with pytest.raises(ConfigError, match="at most 160x120 pixels"):
            DoomClips(**size)


@pytest.fixture(scope="module")
def clips() -> Iterator[DoomClips]:
    pytest.importorskip("vizdoom")
    with DoomClips(3, frames=5, height=32, width=48) as made:
        yield made


def test_a_clip_is_a_pure_function_of_seed_and_index(clips: DoomClips) -> None:
    first = clips[1]
    assert first.pixels.shape == (3, 5, 32, 48) and first.pixels.dtype == torch.float32
    assert first.pixels.abs().max() <= 1 and first.pixels.std() > 0.05
    others = [clips[2], clips[0]]
    again = clips[1]
    assert torch.equal(again.pixels, first.pixels) and again.caption == first.caption
    assert all(not torch.equal(other.pixels, first.pixels) for other in others)
    with DoomClips(3, frames=5, height=32, width=48) as elsewhere:
        assert torch.equal(elsewhere[1].pixels, first.pixels)


def test_captions_say_what_the_camera_does(clips: DoomClips) -> None:
    for index in range(8):
        sample = clips[index]
        assert sample.caption.startswith("first-person view of a")
        change = (sample.pixels[:, 1:] - sample.pixels[:, :-1]).abs().mean()
        if "turns" in sample.caption or "moves" in sample.caption:
            assert change > 0.005, sample.caption
        if "stands still" in sample.caption and "in sight" not in sample.caption:
            assert change < 0.02, sample.caption


def test_nothing_is_left_where_it_is_called(tmp_path: Path) -> None:
    pytest.importorskip("vizdoom")
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        result = invoke("data", "vizdoom", "clips", "--num", "2", "--frames", "5", "--height", "32")
        assert result.returncode == 0, result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["clips"]
        checked = invoke("data", "check", "clips")
    finally:
        os.chdir(here)
    assert result.stdout == "2 videos and metadata.csv in clips\n"
    for fact in ("2 videos, 0 images", "64x32 (2)", f"{float(FPS):g} fps (2)", "no problems"):
        assert fact in checked.stdout
