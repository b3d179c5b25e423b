from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pytest

pytest.importorskip("av")

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.data.decode import is_image, probe, read_clip, read_image, verify
from apt.data.reading import MediaInfo
from apt.data.video import Video
from apt.errors import DataError
from tests.data.media import (
    corner_colours,
    lay,
    noise,
    numbered,
    numbers,
    quadrants,
    rotate,
    truncate,
    write_image,
    write_sound,
    write_video,
)

NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("fps", [Fraction(8), Fraction(25), Fraction(24000, 1001), NTSC])
def test_a_clip_at_the_source_rate_is_the_source(
    tmp_path: Path, suffix: str, fps: Fraction
) -> None:
    # Matroska rounds times to milliseconds: no frame may be doubled or lost to that.
    video = write_video(tmp_path / f"a{suffix}", numbered(30), fps)
    assert numbers(read_clip(video, start=Fraction(0), num_frames=30, fps=fps)) == list(range(30))
    middle = read_clip(video, start=7 / fps, num_frames=9, fps=fps)
    assert numbers(middle) == list(range(7, 16))
    assert middle.shape == (3, 9, 32, 48)
    assert middle.min() >= -1
    assert middle.max() <= 1


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (24, 8, [0, 3, 6, 9, 12]),
        (8, 24, [0, 0, 1, 1, 1, 2, 2, 2, 3]),
        (30, 24, [0, 1, 3, 4, 5, 6, 8, 9, 10]),
        (Fraction(24000, 1001), 24, list(range(9))),
    ],
)
def test_resampling_takes_the_nearest_frame(
    tmp_path: Path, source: int, target: int, expected: list[int]
) -> None:
    video = write_video(tmp_path / "a.mp4", numbered(16), source)
    clip = read_clip(video, start=Fraction(0), num_frames=len(expected), fps=Fraction(target))
    got = numbers(clip)
    # From 30 to 24 fps, 2/24 and 6/24 lie midway between two frames; either is nearest.
    assert all(abs(a - b) <= (source == 30) for a, b in zip(got, expected, strict=True)), got
    times = [Fraction(i, target) for i in range(len(expected))]
    for time, number in zip(times, got, strict=True):
        assert abs(number / Fraction(source) - time) <= Fraction(1, 2) / Fraction(source)


@pytest.fixture(scope="module")
def long_gop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    return write_video(path, numbered(60, 16, 16), 24, gop=13, options={"bf": "3"})


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    first=st.integers(0, 59), fps=st.fractions(5, 60, max_denominator=3), frames=st.integers(1, 13)
)
def test_any_clip_is_the_nearest_frames_or_an_error(
    long_gop: Path, first: int, fps: Fraction, frames: int
) -> None:
    info = probe(long_gop)
    start = Fraction(first, 24)
    if first >= info.clip_starts(frames, fps):
        return
    got = numbers(read_clip(long_gop, start=start, num_frames=frames, fps=fps))
    for i, number in enumerate(got):
        assert abs(Fraction(number, 24) - (start + i / fps)) <= Fraction(1, 48)


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3", "x264-params": "open-gop=1"}])
def test_seeking_gives_what_reading_through_gives(tmp_path: Path, options: dict[str, str]) -> None:
    video = write_video(tmp_path / "a.mp4", noise(40), 10, gop=12, options=options)
    whole = read_clip(video, start=Fraction(0), num_frames=40, fps=Fraction(10))
    for first in (1, 11, 12, 13, 25, 35):
        clip = read_clip(video, start=Fraction(first, 10), num_frames=5, fps=Fraction(10))
        assert (clip == whole[:, first : first + 5]).all()


class CountingFile(BytesIO):
    """Counts the bytes that a reader reads."""

    name = "counting.mp4"
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.taken += len(content)
        return content


def test_a_clip_does_not_read_the_whole_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", noise(200, 64, 64), 10, gop=10, options={"bf": "0"})
    content = video.read_bytes()
    for first in (0, 100, 180):
        file = CountingFile(content)
        clip = read_clip(file, start=Fraction(first, 10), num_frames=9, fps=Fraction(10))
        assert clip.shape[1] == 9
        assert file.taken < len(content) / 4, first
    # The check can fail: reading all frames reads the whole file.
    file = CountingFile(content)
    read_clip(file, start=Fraction(0), num_frames=200, fps=Fraction(10))
    assert file.taken > len(content) * 0.9


def test_probe_reads_size_rate_and_length(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", numbered(21, 31, 47), NTSC)
    info = probe(video)
    assert info == MediaInfo(False, 47, 31, 21, NTSC, "h264")
    assert info.duration == pytest.approx(21 * 1001 / 30000)


def test_probe_of_a_container_that_states_no_stream_length(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.webm", numbered(20), 10, codec="libvpx-vp9")
    assert probe(video) == MediaInfo(False, 48, 32, 20, Fraction(10), "vp9")
    assert numbers(read_clip(video, start=Fraction(1), num_frames=10, fps=Fraction(10)))[-1] == 19


def test_variable_frame_rate_follows_the_clock(tmp_path: Path) -> None:
    # Ten frames at 10 per second, then ten at 5 per second.
    pts = [*range(10), *range(10, 30, 2)]
    video = write_video(tmp_path / "a.mp4", numbered(20), 10, pts=pts, options={"bf": "0"})
    clip = read_clip(video, start=Fraction(0), num_frames=13, fps=Fraction(5))
    assert numbers(clip) == [0, 2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize(
    ("clockwise", "corners", "size"),
    [
        (0, "rgbw", (32, 48)),
        (90, "brwg", (48, 32)),
        (180, "wbgr", (32, 48)),
        (270, "gwrb", (48, 32)),
    ],
)
def test_phones_rotation_is_undone(
    tmp_path: Path, clockwise: int, corners: str, size: tuple[int, int]
) -> None:
    video = rotate(write_video(tmp_path / "a.mp4", quadrants()), clockwise)
    info = probe(video)
    assert (info.height, info.width) == size
    clip = read_clip(video, start=Fraction(0), num_frames=3, fps=Fraction(8))
    assert clip.shape[2:] == size
    assert corner_colours(clip[:, 1]) == corners


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((-1, 0, 0, 1), "grwb"),
        ((1, 0, 0, -1), "bwrg"),
        ((0, 1, 1, 0), "rbgw"),
        ((0, -1, -1, 0), "wgbr"),
        ((0.7, -0.1, 0.1, 0.7), "rgbw"),  # neither scale nor a slight tilt is a turn
        ((0, 0, 0, 0), "rgbw"),
    ],
)
def test_mirrored_matrices_are_obeyed(
    tmp_path: Path, matrix: tuple[float, ...], corners: str
) -> None:
    video = lay(write_video(tmp_path / "a.mp4", quadrants()), matrix)
    info = probe(video)
    clip = read_clip(video, start=Fraction(1, 8), num_frames=1, fps=Fraction(8))
    assert clip.shape[2:] == (info.height, info.width)
    assert corner_colours(clip[:, 0]) == corners


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(2), (32, 96)), (Fraction(1, 2), (64, 48)), (None, (32, 48))]
)
def test_pixels_become_square(tmp_path: Path, aspect: Fraction, size: tuple[int, int]) -> None:
    video = write_video(tmp_path / "a.mp4", quadrants(), pixel_aspect=aspect)
    info = probe(video)
    assert (info.height, info.width) == size
    clip = read_clip(video, start=Fraction(0), num_frames=1, fps=Fraction(8))
    assert clip.shape[2:] == size
    assert corner_colours(clip[:, 0]) == "rgbw"


def test_a_size_is_covered_and_cropped(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", quadrants(height=40, width=100))
    clip = read_clip(video, start=Fraction(0), num_frames=1, fps=Fraction(8), size=(20, 20))
    assert clip.shape == (3, 1, 20, 20)
    assert corner_colours(clip[:, 0]) == "rgbw"


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) in [-1, 1] to (H, W, 3) uint8."""
    levels = (np.asarray(pixels) + 1) * 127.5
    return np.round(levels).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_image_formats(tmp_path: Path, suffix: str) -> None:
    picture = np.full((21, 33, 3), (200, 100, 50), np.uint8)
    path = write_image(tmp_path / f"a{suffix}", picture)
    got = as_bytes(read_image(path)[:, 0]).astype(int)
    assert np.abs(got - picture).max() <= (0 if suffix in (".png", ".bmp", ".tiff") else 4)
    assert is_image(path)
    assert probe(path).is_image


def test_transparency_shows_white_and_16_bit_greys_keep_their_scale(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 1).all()
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png")[:, 0, 0, 0].tolist() == [1, -1, -1]
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").mean() == pytest.approx(0, abs=0.01)


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in numbered(6) * 10]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    info = probe(tmp_path / "a.gif")
    assert (info.is_image, info.frames, info.fps) == (False, 6, 10)
    clip = read_clip(tmp_path / "a.gif", start=Fraction(0), num_frames=6, fps=Fraction(10))
    assert numbers(clip) == [10 * i for i in range(6)]


def test_clip_starts_and_lengths() -> None:
    info = MediaInfo(False, 1, 1, 24, Fraction(24), "h264")
    assert [info.clip_starts(n, Fraction(24)) for n in (1, 9, 24, 25)] == [24, 16, 1, 0]
    assert [info.clip_starts(n, Fraction(8)) for n in (1, 8, 9)] == [24, 3, 0]
    for fps in (Fraction(8), Fraction(24), Fraction(25), NTSC):
        longest = info.clip_frames(fps)
        assert info.clip_starts(longest, fps) > 0
        assert info.clip_starts(longest + 1, fps) == 0


def broken_files(folder: Path) -> dict[str, Path]:
    good = write_video(folder / "good.mp4", noise(30), options={"bf": "0"})
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.png").touch()
    write_image(folder / "cut.png", noise(1)[0])
    write_image(folder / "cut.jpg", noise(1, 64, 64)[0])
    (folder / "index_lost.mp4").write_bytes(good.read_bytes())
    return {
        "empty.mp4": folder / "empty.mp4",
        "text.mp4": folder / "text.mp4",
        "empty.png": folder / "empty.png",
        "cut.png": truncate(folder / "cut.png", 0.5),
        "cut.jpg": truncate(folder / "cut.jpg", 0.5),
        "index_lost.mp4": truncate(folder / "index_lost.mp4", 0.7),
        "sound.mp4": write_sound(folder / "sound.mp4"),
        "missing.mp4": folder / "missing.mp4",
    }


def test_broken_files_are_data_errors_that_name_the_file(tmp_path: Path) -> None:
    for name, path in broken_files(tmp_path).items():
        with pytest.raises(DataError, match=name):
            verify(path)
        if name not in ("cut.png", "cut.jpg"):  # their headers are whole
            with pytest.raises(DataError, match=name):
                probe(path)


def test_a_download_cut_short_is_found_where_it_ends(tmp_path: Path) -> None:
    video = write_video(
        tmp_path / "a.mp4", noise(40), 10, gop=5, faststart=True, options={"bf": "0"}
    )
    verify(video)
    truncate(video, 0.5)
    assert probe(video).frames == 40  # the header knows nothing of it
    assert read_clip(video, start=Fraction(0), num_frames=9, fps=Fraction(10)).shape[1] == 9
    with pytest.raises(DataError, match=r"a\.mp4: (ends after|cannot be decoded|damaged)"):
        read_clip(video, start=Fraction(25, 10), num_frames=9, fps=Fraction(10))
    with pytest.raises(DataError):
        verify(video)


@pytest.mark.parametrize(
    ("share", "garbage"),
    # The first breaks the stream's framing, which FFmpeg refuses; the second is within a frame,
    # which FFmpeg patches up and marks.
    [(0.5, b"\x55" * 3000), (0.61, b"\xff" * 300)],
)
def test_damage_inside_a_file_is_found(tmp_path: Path, share: float, garbage: bytes) -> None:
    video = write_video(
        tmp_path / "a.mp4", noise(40), 10, gop=10, faststart=True, options={"bf": "0"}
    )
    content = bytearray(video.read_bytes())
    at = int(len(content) * share)
    content[at : at + len(garbage)] = garbage
    video.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: (damaged at|cannot be decoded)"):
        verify(video)
    with pytest.raises(DataError, match=r"a\.mp4: (damaged at|cannot be decoded)"):
        read_clip(video, start=Fraction(0), num_frames=40, fps=Fraction(10))


def test_a_clip_past_the_end_is_an_error(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", numbered(20), 10)
    with pytest.raises(DataError, match="ends after"):
        read_clip(video, start=Fraction(1), num_frames=12, fps=Fraction(10))
    with pytest.raises(DataError, match="ends after"):
        read_clip(video, start=Fraction(10), num_frames=1, fps=Fraction(10))


def test_an_index_that_leads_behind_the_clip_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(40), 10, gop=5)
    info = probe(path)
    asked = []
    seek = Video.seek

    def two_seconds_late(video: Video, seconds: Fraction) -> None:
        asked.append(seconds)
        seek(video, seconds + 2)

    monkeypatch.setattr(Video, "seek", two_seconds_late)
    clip = read_clip(path, start=Fraction(2), num_frames=9, fps=Fraction(10), info=info)
    assert numbers(clip) == list(range(20, 29))
    assert asked == [2, 1]
