from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.data.buckets import MAX_UPSCALE, best_bucket, make_buckets
from apt.data.reading import MediaInfo
from apt.data.statistics import (
    ClipSize,
    FolderStatistics,
    choose_clip,
    choose_prompts,
    read_captions,
    read_statistics,
)
from apt.errors import DataError
from tests.data.media import numbered, write_image, write_video


def video(width: int, height: int, frames: int = 60, fps: Fraction | int = 24) -> MediaInfo:
    return MediaInfo(False, width, height, frames, Fraction(fps), "h264")


def image(width: int, height: int) -> MediaInfo:
    return MediaInfo(True, width, height, 1, Fraction(0), "png")


def chosen(*files: MediaInfo, **options: int | float | bool) -> ClipSize:
    videos = [info for info in files if not info.is_image]
    images = [info for info in files if info.is_image]
    found = FolderStatistics(Path("clips"), videos, images, [])
    limits = {"multiple": 16, "max_frames": 49, "max_pixels": 1280 * 720}
    return choose_clip(found, **{**limits, **options})  # type: ignore[arg-type]


def test_like_clips_are_taken_as_they_are() -> None:
    assert chosen(*[video(320, 176, 33, 16)] * 3) == ClipSize(33, 176, 320, 16.0)
    assert chosen(video(320, 176, 35, 16)) == ClipSize(33, 176, 320, 16.0)
    assert chosen(video(90, 160)) == ClipSize(49, 144, 80, 24.0)


def test_a_few_odd_files_do_not_decide() -> None:
    most = [video(640, 368, 49, 24)] * 19
    assert chosen(*most, video(64, 48, 3, 2)) == ClipSize(49, 368, 640, 24.0)
    # Two in ten do.
    small = chosen(*[video(640, 368, 49, 24)] * 8, *[video(320, 176, 21, 12)] * 2)
    assert (small.frames, small.fps) == (21, 12.0)
    assert small.height * small.width <= 1.25 * 320 * 176


def test_limits_are_of_the_model() -> None:
    clip = chosen(video(1920, 1080, 500), max_frames=17, max_pixels=64 * 64)
    assert clip.frames == 17 and 0.7 * 64 * 64 <= clip.height * clip.width <= 64 * 64
    assert 1.3 < clip.width / clip.height < 2.2


def test_lengths_are_those_that_the_codec_folds() -> None:
    clip = video(320, 176, 30, 16)
    assert [chosen(clip, frame_step=step).frames for step in (4, 8, 12)] == [29, 25, 25]
    with pytest.raises(DataError, match="fewer than 9 frames at 16 fps"):
        chosen(video(320, 176, 8, 16), frame_step=8)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([24, 24, Fraction(24000, 1001)], 24.0),
        ([60, 30, 30], 30.0),
        ([60, 60], 30.0),
        ([50, 25], 25.0),
        ([12, 15, 24], 12.0),
        ([Fraction(60000, 1001)], 30000 / 1001),
        ([120], 30.0),
    ],
)
def test_the_rate_is_one_that_repeats_no_frame(
    rates: list[Fraction | int], expected: float
) -> None:
    assert chosen(*(video(64, 64, 600, rate) for rate in rates)).fps == pytest.approx(expected)


def test_what_is_settled_stays() -> None:
    clips = [video(320, 176, 33, 16)] * 3
    assert chosen(*clips, frames=5, fps=8.0) == ClipSize(5, 176, 320, 8.0)
    assert chosen(*clips, fps=8.0).frames == 17
    assert chosen(*clips, fps=0.0) == ClipSize(33, 176, 320, 0.0)
    assert chosen(*clips, height=96) == ClipSize(33, 96, 176, 16.0)
    assert chosen(*clips, width=96).height == 48
    assert chosen(*clips, frames=1).frames == 1


def test_images_alone_are_clips_of_one_frame() -> None:
    photos = [image(400 + i, 300 + i) for i in range(500)]  # a size each
    clip = chosen(*photos, max_pixels=256 * 256)
    assert (clip.frames, clip.fps) == (1, 0.0)
    assert 1 <= clip.width / clip.height < 1.4
    # Beside videos they do not decide.
    assert chosen(video(320, 176, 33, 16), *photos) == ClipSize(33, 176, 320, 16.0)


def test_clips_that_cannot_move_are_said_to_be_too_short() -> None:
    with pytest.raises(DataError, match="2 of 3 videos have fewer than 5 frames at 24 fps"):
        chosen(video(64, 64, 3), video(64, 64, 4), video(64, 64, 60))
    assert chosen(video(64, 64, 3), video(64, 64, 7), video(64, 64, 60)).frames == 5
    assert chosen(video(64, 64, 3), frames=1).frames == 1


def test_files_below_the_least_size_are_said_to_be_too_small() -> None:
    with pytest.raises(DataError, match=r"those of 8x6 pixels, are smaller than .* 16x16"):
        chosen(image(8, 6))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(16, 2000), st.integers(16, 2000)), min_size=1, max_size=12),
    st.sampled_from([(8, 32 * 32), (16, 64 * 64), (16, 256 * 256), (32, 720 * 1280)]),
)
def test_at_most_one_in_ten_is_too_small(
    sizes: list[tuple[int, int]], limits: tuple[int, int]
) -> None:
    multiple, most = limits
    try:
        clip = chosen(*(video(*size) for size in sizes), multiple=multiple, max_pixels=most)
    except DataError:
        assert min(min(size) for size in sizes) * MAX_UPSCALE < multiple
        return
    assert clip.height % multiple == clip.width % multiple == 0
    assert clip.height * clip.width <= most
    buckets = make_buckets(clip.height * clip.width, multiple)
    fitting = sum(bool(best_bucket(buckets, frames=1, height=h, width=w)) for w, h in sizes)
    if all(min(size) >= 2 * multiple and max(size) < 2 * min(size) for size in sizes):
        assert fitting >= 0.9 * len(sizes)
    else:
        assert fitting >= 0.5 * len(sizes)


def test_prompts_are_from_all_over_the_folder_and_always_the_same() -> None:
    captions = [f"{kind} {i}" for kind in ("dog", "cat", "owl") for i in range(10)]
    shown = choose_prompts(captions, 6)
    assert shown == choose_prompts(captions * 2, 6)
    assert [text.split()[0] for text in shown] == ["dog", "dog", "cat", "cat", "owl", "owl"]
    assert choose_prompts(["a", "b", "a"], 6) == ("a", "b")
    assert choose_prompts(["a", "bb", "c"], 1, lambda text: len(text) == 2) == ("bb",)


def test_a_folder_is_read_with_and_without_captions(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(9, 32, 48), 8)
    write_image(tmp_path / "b.png", numbered(1, 40, 40)[0])
    with pytest.raises(DataError, match=r"(?s)nothing usable.*a.mp4: a.txt is missing"):
        read_statistics(tmp_path)
    with pytest.raises(DataError, match="nothing usable"):
        read_captions(tmp_path)
    assert read_statistics(tmp_path, captioned=False).words() == "1 video and 1 image"
    (tmp_path / "a.txt").write_text("a clip")
    found = read_statistics(tmp_path)
    assert found.words() == "1 video" and found.captions == read_captions(tmp_path) == ["a clip"]
    (tmp_path / "a.mp4").write_bytes(b"none")
    with pytest.raises(DataError, match="1 file that cannot be read"):
        read_statistics(tmp_path)
