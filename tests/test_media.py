from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")

import av
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.data.decode import probe, read_clip
from apt.errors import InputError
from apt.media import (
    SUFFIXES,
    SamplerColumn,
    auto_scale,
    check_settings,
    contact_sheet,
    enlarge,
    moving_sheet,
    read_tags,
    write_contact_sheet,
    write_gif,
    write_html,
    write_media,
    write_mp4,
    write_png,
    write_webp,
)
from apt.media.page import format_ratio, format_seconds
from apt.pixels import to_frames


def moving_square(num_frames: int = 9, size: int = 32) -> torch.Tensor:
    """A saturated square crossing a gradient: every frame differs."""
    ramp = np.linspace(0, 120, size).astype(np.uint8)
    frames = np.zeros((num_frames, size, size, 3), np.uint8)
    frames[..., 2] = ramp[None, :, None]
    for index in range(num_frames):
        frames[index, 8:20, 2 * index : 2 * index + 12] = (250, 40, 30)
    return torch.from_numpy(frames)


def read_mp4(path: Path) -> tuple[np.ndarray, av.video.stream.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), stream


def test_mp4_is_h264_that_browsers_play(tmp_path: Path) -> None:
    frames = moving_square()
    path = write_mp4(tmp_path / "new" / "folder" / "x.mp4", frames, fps=8)
    decoded, stream = read_mp4(path)
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 8
    assert stream.duration * stream.time_base == Fraction(9, 8)
    assert decoded.shape == (9, 256, 256, 3)
    # Lossy, and colour is stored at half the resolution; but the tagged colours come back.
    expected = enlarge(frames.numpy(), 8).astype(int)
    assert np.abs(decoded - expected).mean() < 2
    square = decoded[4, 80:144, 80:144].reshape(-1, 3).mean(axis=0)
    assert np.abs(square - (250, 40, 30)).max() < 6
    assert not list(path.parent.glob(".*")), "no partial file is left"


@pytest.mark.parametrize("fps", [24, 29.97, 0.5])
def test_mp4_keeps_the_frame_rate(tmp_path: Path, fps: float) -> None:
    _, stream = read_mp4(write_mp4(tmp_path / "x.mp4", moving_square(), fps=fps))
    assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(1, 21), st.integers(1, 21))
def test_mp4_takes_any_size(
    tmp_path_factory: pytest.TempPathFactory, num_frames: int, height: int, width: int
) -> None:
    frames = np.full((num_frames, height, width, 3), 200, np.uint8)
    path = write_mp4(tmp_path_factory.mktemp("mp4") / "x.mp4", frames, fps=8, scale=1)
    decoded, _ = read_mp4(path)
    assert decoded.shape == (num_frames, height + height % 2, width + width % 2, 3)
    assert np.abs(decoded.astype(int) - 200).max() <= 4, "the repeated row and column match"


def test_png_holds_the_frames_side_by_side_exactly(tmp_path: Path) -> None:
    frames = moving_square(num_frames=5)
    strip = np.asarray(Image.open(write_png(tmp_path / "x.png", frames, scale=2)))
    assert strip.shape == (64, 5 * 64, 3)
    for index, frame in enumerate(frames.numpy()):
        assert np.array_equal(strip[::2, index * 64 : (index + 1) * 64 : 2], frame)
        assert np.array_equal(strip[1::2, index * 64 + 1 : (index + 1) * 64 : 2], frame)


@pytest.mark.parametrize(("suffix", "tolerance"), [(".gif", 24), (".webp", 0)])
def test_animations_loop_with_every_frame(tmp_path: Path, suffix: str, tolerance: int) -> None:
    frames = moving_square()
    with Image.open(write_media(tmp_path / f"x{suffix}", frames, fps=8)) as image:
        assert image.n_frames == 9
        assert image.size == (256, 256)
        assert image.info["loop"] == 0, "0 is for ever"
        for index in range(9):
            image.seek(index)
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - enlarge(frames[index].numpy(), 8)).max() <= tolerance
            # GIF counts in hundredths of a second.
            assert image.info["duration"] in ((120, 130) if suffix == ".gif" else (125,))


@pytest.mark.parametrize("fps", [8, 13, 24, 30, 60])
@pytest.mark.parametrize(("suffix", "unit"), [(".gif", 10), (".webp", 1)])
def test_an_animation_lasts_as_long_as_its_frames(
    tmp_path: Path, suffix: str, unit: int, fps: int
) -> None:
    with Image.open(write_media(tmp_path / f"x{suffix}", moving_square(), fps=fps)) as image:
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert sum(durations) == pytest.approx(9 * 1000 / fps, abs=unit / 2)
    assert all(abs(duration - 1000 / fps) < unit for duration in durations)


def test_matroska_loses_nothing_and_equal_videos_are_equal_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (3, 7, 5, 3), dtype=np.uint8)
    path = write_media(tmp_path / "a.mkv", frames, fps=12.5, scale=1)
    info = probe(path)
    assert (info.fps, info.frames) == (12.5, 3)
    clip = read_clip(path, start=Fraction(0), num_frames=3, fps=info.fps, info=info)
    assert np.array_equal(to_frames(clip[None])[0], frames)
    again = write_media(tmp_path / "b.mkv", frames, fps=12.5, scale=1)
    assert again.read_bytes() == path.read_bytes()


def test_large_webp_is_compressed_with_loss(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2, 257, 257, 3), dtype=np.uint8)
    lossy = write_webp(tmp_path / "x.webp", frames, fps=8).stat().st_size
    assert lossy < frames.size / 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_frame_is_enough(tmp_path: Path, suffix: str) -> None:
    assert write_media(tmp_path / f"x{suffix.upper()}", moving_square(1), fps=8).stat().st_size > 0


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(32, 32, 8), (256, 999, 1), (720, 1280, 1), (96, 500, 2)]
)
def test_only_small_frames_are_enlarged(height: int, width: int, expected: int) -> None:
    assert auto_scale(height, width) == expected


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(9, 32, 32, 3), "uint8"),
        (torch.zeros(1, 9, 32, 32, 3, dtype=torch.uint8), "one sample"),
        (torch.zeros(9, 3, 32, 32, dtype=torch.uint8), "frames, height, width, 3"),
        (torch.zeros(0, 32, 32, 3, dtype=torch.uint8), "frames, height, width, 3"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_frames_are_refused(
    tmp_path: Path, suffix: str, frames: torch.Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_media(tmp_path / f"x{suffix}", frames, fps=8)
    assert not list(tmp_path.iterdir())


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    frames = moving_square()
    with pytest.raises(InputError, match="fps"):
        write_mp4(tmp_path / "x.mp4", frames, fps=0)
    with pytest.raises(InputError, match="scale"):
        write_gif(tmp_path / "x.gif", frames, fps=8, scale=0)
    with pytest.raises(InputError, match=r"'\.avi' is not one of \.mp4, \.mkv, \.gif"):
        write_media(tmp_path / "x.avi", frames, fps=8)
    with pytest.raises(InputError, match=r"must end in \.mp4"):
        write_mp4(tmp_path / "x.mov", frames, fps=8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_path_that_cannot_be_written_is_an_input_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        write_media(tmp_path / "file" / f"x{suffix}", moving_square(), fps=8)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_name_is_no_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_media(f"scene:1{suffix}", moving_square(), fps=8, tags={"prompt": "x"})
    assert read_tags(path) == {"prompt": "x"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_mp4(tmp_path / "x.mp4", moving_square(), fps=8)
    before = path.read_bytes()
    with pytest.raises(InputError):
        write_mp4(path, moving_square().float(), fps=8)
    assert path.read_bytes() == before


def find_cell(sheet: np.ndarray, cell: np.ndarray) -> tuple[int, int]:
    """Row and column where `cell` lies in the sheet, exactly."""
    height, width = cell.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width), axis=(0, 1))
    hits = np.argwhere((windows == cell.transpose(2, 0, 1)[None, None]).all(axis=(2, 3, 4)))
    assert len(hits) == 1, f"the cell occurs {len(hits)} times"
    return int(hits[0][0]), int(hits[0][1])


def test_contact_sheet_has_every_cell_in_its_place(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, (2, 3, 1, 6, 6, 3), dtype=np.uint8)
    path = write_contact_sheet(
        tmp_path / "sheet.png",
        [list(row) for row in cells],
        rows=["first", "a prompt that is far too long for one line of a narrow caption column"],
        columns=["1 step\nfine print", "2 steps", "25 steps"],
        title="Title",
        scale=1,
    )
    sheet = np.asarray(Image.open(path))
    places = [[find_cell(sheet, cell[0]) for cell in row] for row in cells]
    rows = [[y for y, _ in row] for row in places]
    columns = [[x for _, x in row] for row in places]
    assert len(set(rows[0])) == len(set(rows[1])) == 1
    assert rows[0][0] < rows[1][0]
    assert columns[0] == columns[1] == sorted(columns[0])
    # Text left of the cells and above them, ink on paper.
    assert (sheet[rows[0][0] :, : columns[0][0] - 4] < 100).any()
    assert (sheet[: rows[0][0] - 2, columns[0][0] :] < 100).any()
    # The long caption wraps and stays clear of the cells.
    gap = sheet[rows[1][0] :, columns[0][0] - 10 : columns[0][0]]
    assert (gap == 255).all()


def test_contact_sheet_shows_all_frames_of_a_cell() -> None:
    frames = moving_square(3)
    sheet = np.asarray(contact_sheet([[frames]], rows=["x"], columns=["y"], scale=1))
    places = [find_cell(sheet, frame) for frame in frames.numpy()]
    assert [y for y, _ in places] == [places[0][0]] * 3
    assert [x - places[0][1] for _, x in places] == [0, 34, 68]


def test_contact_sheet_breaks_words_that_do_not_fit() -> None:
    frames = moving_square(1)
    long = np.asarray(contact_sheet([[frames]], rows=["x" * 300], columns=["y"]))
    short = np.asarray(contact_sheet([[frames]], rows=["x"], columns=["y"]))
    assert long.shape[1] == short.shape[1]
    assert long.shape[0] > short.shape[0], "the row grows with its caption"


def test_contact_sheet_refuses_tables_that_do_not_fit() -> None:
    a, b = moving_square(2), moving_square(3)
    with pytest.raises(InputError, match="2 cells"):
        contact_sheet([[a]], rows=["x"], columns=["y", "z"])
    with pytest.raises(InputError, match="1 rows of cells, 2 row captions"):
        contact_sheet([[a]], rows=["x", "y"], columns=["z"])
    with pytest.raises(InputError, match="one shape"):
        contact_sheet([[a, b]], rows=["x"], columns=["y", "z"])
    with pytest.raises(InputError, match="caption for every row"):
        contact_sheet([], rows=[], columns=["y"])


def columns_for(folder: Path) -> list[SamplerColumn]:
    files = [
        [write_mp4(folder / f"{i}{j}.mp4", moving_square(i + j + 1), fps=8) for i in range(2)]
        for j in range(2)
    ]
    return [
        SamplerColumn(name="1 step", detail="APT", seconds=0.02, files=files[0]),
        SamplerColumn(name="25 steps", detail="diffusion", seconds=1.0, files=files[1]),
    ]


def test_page_is_whole_and_safe(tmp_path: Path) -> None:
    columns = columns_for(tmp_path)
    page = write_html(
        tmp_path / "page" / "index.html",
        title="A & B",
        prompts=['a "quoted" one', "<script>alert(1)</script>"],
        columns=columns,
        note="On 2 < 3 cores",
    ).read_text(encoding="utf-8")
    videos = re.findall(r'<video ([^>]*) src="data:video/mp4;base64,([^"]+)">', page)
    assert len(videos) == 4
    assert all(word in flags for flags, _ in videos for word in ("muted", "playsinline"))
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert "http" not in page and "url(" not in page
    assert page.count("<script") == 1 and "&lt;script&gt;" in page
    assert "prefers-reduced-motion" in page and page.count("<button") == 1
    assert "A &amp; B" in page and "On 2 &lt; 3 cores" in page
    assert "50× faster" in page and "20 ms" in page and "1 s per video · reference" in page
    # Row by row: the second video is the second sampler's of the first prompt.
    import base64

    assert base64.b64decode(videos[1][1]) == columns[1].files[0].read_bytes()


def test_a_page_of_pictures_has_nothing_to_hold(tmp_path: Path) -> None:
    file = write_webp(tmp_path / "a.webp", moving_square(1), fps=8)
    column = SamplerColumn(name="1 step", detail="", seconds=1, files=[file])
    page = write_html(tmp_path / "a.html", title="", prompts=["a"], columns=[column]).read_text()
    assert page.count("<img") == 1 and "<button" not in page and "<script" not in page


def test_a_moving_sheet_is_the_sheet_of_each_frame() -> None:
    cells = [[moving_square(3), 255 - moving_square(3)]]
    names = {"rows": ["x"], "columns": ["y", "z"]}
    frames = moving_sheet(cells, **names, scale=2)
    assert len(frames) == len(cells[0][0])
    for t, frame in enumerate(frames):
        still = contact_sheet([[cell[t : t + 1] for cell in cells[0]]], **names, scale=2)
        assert np.array_equal(frame, np.asarray(still))
    assert (frames[0] != frames[1]).any()


def test_page_refuses_what_it_cannot_show(tmp_path: Path) -> None:
    columns = columns_for(tmp_path)
    page = tmp_path / "index.html"
    with pytest.raises(InputError, match="one file for each of 3 prompts"):
        write_html(page, title="", prompts=["a", "b", "c"], columns=columns)
    with pytest.raises(InputError, match="at least one"):
        write_html(page, title="", prompts=["a"], columns=[])
    missing = SamplerColumn(name="x", detail="", seconds=1, files=[tmp_path / "no.mp4"])
    with pytest.raises(InputError, match="cannot read"):
        write_html(page, title="", prompts=["a"], columns=[missing])
    text = SamplerColumn(name="x", detail="", seconds=1, files=[tmp_path / "no.txt"])
    with pytest.raises(InputError, match="not a video"):
        write_html(page, title="", prompts=["a"], columns=[text])
    timeless = SamplerColumn(name="x", detail="", seconds=0, files=[tmp_path / "00.mp4"])
    with pytest.raises(InputError, match="above 0"):
        write_html(page, title="", prompts=["a"], columns=[timeless])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.02134, "21.3 ms"), (1.2345, "1.23 s"), (0.9996, "1 s"), (65, "65 s")]
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("ratio", "text"), [(1, "1.0×"), (9.94, "9.9×"), (9.96, "10×")])
def test_ratios_are_readable(ratio: float, text: str) -> None:
    assert format_ratio(ratio) == text


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("x.avi", (2, 8, 8), {}, "the suffix '.avi' is not one of"),
        ("x", (2, 8, 8), {}, "the suffix '' is not one of"),
        ("x.mp4", (2, 8, 8), {"fps": float("nan")}, "fps must be above 0"),
        ("x.mp4", (2, 8, 8), {"fps": 0}, "fps must be above 0"),
        ("x.gif", (2, 8, 8), {"fps": 0.001}, "fps must be at least 0.01"),
        ("x.gif", (2, 8, 8), {"scale": 0}, "scale must be a whole number of at least 1"),
        ("x.mp4", (2, 8, 16386), {}, "at most 16384 pixels a side"),
        ("x.webp", (2, 16384, 8), {}, "at most 16383 pixels a side"),
        ("x.gif", (2, 8, 65536), {}, "at most 65535 pixels a side"),
        ("x.png", (2**20, 1024, 2048), {}, "at most 2147483647 pixels a side"),
        ("x.gif", (10**6, 60000, 60000), {}, "needs more than"),
    ],
)
def test_settings_that_cannot_be_written(
    name: str, size: tuple[int, int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(name, size, **{"fps": 8, **options})


@pytest.mark.parametrize(
    ("name", "side"), [("x.mp4", 16384), ("x.webp", 16383), ("x.gif", 65535), ("x.PNG", 70000)]
)
def test_the_largest_that_can_be_written(name: str, side: int, tmp_path: Path) -> None:
    check_settings(name, (1, 2, side), fps=8, scale=1)
    video = np.zeros((1, 2, side, 3), np.uint8)
    assert write_media(tmp_path / name, video, fps=8, scale=1).stat().st_size
