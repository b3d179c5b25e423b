from __future__ import annotations

import logging
import shutil
from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt.data import folder as folder_module
from apt.data.dataset import Sample
from apt.data.decode import probe, read_clip
from apt.data.folder import VideoFolder, exact_rate
from apt.data.reading import MediaInfo
from apt.data.statistics import read_statistics
from apt.errors import ConfigError, DataError
from tests.data.media import (
    corner_colours,
    noise,
    numbered,
    numbers,
    quadrants,
    rotate,
    truncate,
    write_image,
    write_video,
)

SQUARE = [(9, 32, 32)]


def caption(path: Path, text: str = "") -> Path:
    path.with_suffix(".txt").write_text(text or f"about {path.stem}", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve wide videos, four tall ones and three images, all good."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(12):
        caption(write_video(root / f"wide{i:02}.mp4", numbered(20 + i, 32, 48), 8))
    for i in range(4):
        caption(write_video(root / f"tall{i}.mkv", numbered(20, 48, 32), 8))
    for i in range(3):
        caption(write_image(root / f"image{i}.png", noise(1, 40, 40, i)[0]))
    return root


BUCKETS = [(9, 32, 48), (9, 48, 32), (1, 40, 40)]


def same(a: Sample, b: Sample) -> bool:
    return a.caption == b.caption and torch.equal(a.pixels, b.pixels)


def test_videos_and_images_become_clips_in_their_buckets(mixed: Path) -> None:
    folder = VideoFolder(mixed, buckets=BUCKETS, fps=8)
    assert len(folder) == 19
    assert folder.bucket_sizes() == {(9, 32, 48): 12, (9, 48, 32): 4, (1, 40, 40): 3}
    assert (folder.report.num_videos, folder.report.num_images) == (16, 3)
    assert "no problems" in folder.report.text()
    for index, item in enumerate(folder.items):
        sample = folder[index]
        assert sample.pixels.shape == (3, *item.bucket)
        assert sample.pixels.dtype == torch.float32
        assert sample.pixels.abs().max() <= 1
        assert sample.caption == folder.caption(index) == f"about {item.entry.path.stem}"
        if not item.info.is_image:
            found = numbers(sample.pixels)
            assert found == list(range(found[0], found[0] + 9))


def test_clips_start_anywhere_and_another_pass_starts_elsewhere(mixed: Path) -> None:
    folder = VideoFolder(mixed, buckets=BUCKETS, fps=8)
    index = next(i for i, item in enumerate(folder.items) if item.entry.name == "wide00.mp4")
    starts = [numbers(folder[index + epoch * len(folder)].pixels)[0] for epoch in range(60)]
    assert set(starts) == set(range(12))  # 20 frames hold 12 clips of 9
    again = VideoFolder(mixed, buckets=BUCKETS, fps=8)
    assert starts[:9] == [numbers(again[index + e * len(folder)].pixels)[0] for e in range(9)]
    other = VideoFolder(mixed, buckets=BUCKETS, fps=8, seed=1)
    assert starts[:9] != [numbers(other[index + e * len(folder)].pixels)[0] for e in range(9)]


def test_frame_rates(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "a.mp4", numbered(25, 32, 32), 24))
    for fps, step in ((8, 3), (24, 1), (None, 1)):
        found = numbers(VideoFolder(tmp_path, buckets=SQUARE, fps=fps)[0].pixels)
        assert {b - a for a, b in pairwise(found)} == {step}
    with pytest.raises(DataError, match="8 frames at 7 fps"):
        VideoFolder(tmp_path, buckets=SQUARE, fps=7)


def test_exact_rate() -> None:
    assert exact_rate(29.97) == exact_rate(Fraction(30000, 1001)) == Fraction(30000, 1001)
    assert exact_rate(23.976) == Fraction(24000, 1001)
    assert exact_rate(24) == exact_rate(24.0) == 24
    assert exact_rate(12.5) == Fraction(25, 2)


def test_phones_videos_are_upright(tmp_path: Path) -> None:
    caption(rotate(write_video(tmp_path / "a.mp4", quadrants(9)), 90))
    folder = VideoFolder(tmp_path, buckets=[(9, 32, 48), (9, 48, 32)], fps=8)
    assert folder.items[0].bucket == (9, 48, 32)
    assert corner_colours(folder[0].pixels[:, 0]) == "brwg"


def test_single_frames_of_videos_train_an_image_model(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "a.mp4", numbered(20, 32, 32), 8))
    folder = VideoFolder(tmp_path, buckets=[(1, 32, 32)])
    assert {numbers(folder[epoch].pixels)[0] for epoch in range(80)} > set(range(15))


def troubled(root: Path) -> dict[str, str]:
    """A folder with one good video, and the kind of each other file's problem."""
    good = caption(write_video(root / "good.mp4", numbered(20, 32, 32), 8))
    shutil.copy(good, root / "untold.mp4")
    shutil.copy(good, caption(root / "cut.mp4"))
    truncate(root / "cut.mp4", 0.3)
    caption(write_video(root / "short.mp4", numbered(8, 32, 32), 8))
    caption(write_video(root / "tiny.mp4", numbered(20, 16, 16), 8))
    caption(write_image(root / "image.png", noise(1)[0]))
    caption(root / "empty.mp4").touch()
    return {
        "untold.mp4": "missing caption",
        "cut.mp4": "unreadable",
        "empty.mp4": "unreadable",
        "short.mp4": "too short",
        "tiny.mp4": "too small",
        "image.png": "no bucket",
    }


def test_every_unusable_file_is_counted_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = troubled(tmp_path)
    with caplog.at_level(logging.WARNING):
        folder = VideoFolder(tmp_path, buckets=SQUARE, fps=8)
    assert [item.entry.name for item in folder.items] == ["good.mp4"]
    assert {problem.file: problem.kind for problem in folder.report.problems} == expected
    assert folder.report.counts() == dict(Counter(expected.values()))
    text = folder.report.text()
    assert text.startswith("1 video and 0 images in use; 6 skipped")
    assert all(name in text and name in caplog.text for name in expected)
    assert "8 frames at 8 fps" in text
    assert "16x16" in text
    # With other settings, the same folder loses fewer files.
    wide = VideoFolder(tmp_path, buckets=[*SQUARE, (5, 32, 32), (1, 32, 32)], max_upscale=3)
    assert set(wide.report.counts()) == {"unreadable", "missing caption"}


def test_strict_stops_at_the_first_problem(tmp_path: Path) -> None:
    expected = troubled(tmp_path)
    for name, kind in expected.items():
        alone = tmp_path / f"only {name}"
        alone.mkdir()
        for path in tmp_path.glob(f"{Path(name).stem}.*"):
            shutil.copy(path, alone)
        with pytest.raises(DataError, match=f": {name}: {kind}"):
            VideoFolder(alone, buckets=SQUARE, fps=8, strict=True)


def test_a_folder_with_nothing_usable_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        VideoFolder(tmp_path, buckets=SQUARE)
    for word in (".mp4", ".png", "metadata.csv", "metadata.jsonl", ".txt", "no such files"):
        assert word in str(caught.value)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(DataError, match=r"a\.mp4: .*a\.txt is missing"):
        VideoFolder(tmp_path, buckets=SQUARE)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4k \\+ 1"):
        VideoFolder(tmp_path, buckets=[(8, 32, 32)])
    with pytest.raises(ConfigError, match="fps"):
        VideoFolder(tmp_path, buckets=SQUARE, fps=0)
    with pytest.raises(DataError, match="no such folder"):
        VideoFolder(tmp_path / "nowhere", buckets=SQUARE)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch_size=st.integers(1, 30), seed=st.integers(0, 3), start=st.integers(0, 300))
def test_batches_continue_from_any_batch(
    mixed: Path, batch_size: int, seed: int, start: int
) -> None:
    folder = cached(mixed)
    whole = islice(folder.batches(batch_size, seed=seed), start, start + 12)
    later = islice(folder.batches(batch_size, seed=seed, start=start), 12)
    assert list(whole) == list(later)


_FOLDERS: dict[Path, VideoFolder] = {}


def cached(root: Path) -> VideoFolder:
    if root not in _FOLDERS:
        _FOLDERS[root] = VideoFolder(root, buckets=BUCKETS, fps=8)
    return _FOLDERS[root]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 7])
def test_batches_hold_one_bucket_and_use_every_item_equally(mixed: Path, batch_size: int) -> None:
    folder = cached(mixed)
    # After as many passes as a batch has samples, every bucket's leftovers come out even.
    batches = list(islice(folder.batches(batch_size, seed=0), 19))
    for batch in batches:
        assert len(batch) == batch_size
        assert len({folder.items[index % 19].bucket for index in batch}) == 1
    indices = [index for batch in batches for index in batch]
    assert len(set(indices)) == len(indices)
    assert Counter(index % 19 for index in indices) == dict.fromkeys(range(19), batch_size)
    assert {index // 19 for index in indices} == set(range(batch_size))


def test_order_is_shuffled_by_seed_and_pass(mixed: Path) -> None:
    folder = cached(mixed)

    def order(seed: int, epoch: int) -> list[int]:
        return [batch[0] % 19 for batch in islice(folder.batches(1, seed=seed), 19 * (epoch + 1))][
            19 * epoch :
        ]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(one) == list(range(19)) for one in orders)
    assert len(set(map(tuple, [*orders, list(range(19))]))) == 4
    assert order(0, 0) == orders[0]


def test_one_video_fills_a_batch_with_many_clips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caption(write_video(tmp_path / "a.mp4", numbered(30, 32, 32), 8))
    folder = VideoFolder(tmp_path, buckets=SQUARE, fps=8)
    with caplog.at_level(logging.WARNING):
        batch = next(folder.batches(8, seed=0))
    assert "1 item for batches of 8" in caplog.text
    assert sorted(batch) == list(range(8))
    assert len({numbers(folder[index].pixels)[0] for index in batch}) > 3
    with pytest.raises(ConfigError):
        next(folder.batches(0, seed=0))


def broken_later(root: Path, num: int = 6, bad: tuple[int, ...] = (2,)) -> VideoFolder:
    """A folder in which all headers are sound but some files are broken."""
    for i in range(num):
        video = write_video(root / f"{i}.mp4", noise(9, 32, 32, i), 8, faststart=True)
        caption(video)
        if i in bad:
            truncate(video, 0.4)
    return VideoFolder(root, buckets=SQUARE, fps=8)


def test_a_file_that_fails_in_training_is_replaced_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = broken_later(tmp_path)
    assert len(folder) == 6
    assert not folder.report.problems
    with caplog.at_level(logging.WARNING):
        sample = folder[2]
    assert [(problem.kind, problem.file) for problem in sample.problems] == [
        ("unreadable", "2.mp4")
    ]
    assert folder.report.problems == list(sample.problems)
    assert "2.mp4" in caplog.text
    stand_in = next(i for i in range(6) if sample.caption == f"about {i}")
    assert stand_in != 2
    expected = read_clip(
        tmp_path / f"{stand_in}.mp4", start=Fraction(0), num_frames=9, fps=Fraction(8)
    )
    assert torch.equal(sample.pixels, expected)
    # Neither the passes' order nor what failed before matters.
    fresh = VideoFolder(tmp_path, buckets=SQUARE, fps=8)
    assert same(fresh[2 + 6 * 5], folder[2 + 6 * 5])
    assert same(fresh[2], sample)
    assert len({folder[2 + 6 * epoch].caption for epoch in range(12)}) > 2
    assert len(folder.report.problems) == 1


def test_strict_stops_at_a_file_that_fails_in_training(tmp_path: Path) -> None:
    broken_later(tmp_path)
    folder = VideoFolder(tmp_path, buckets=SQUARE, fps=8, strict=True)
    assert folder[1].caption == "about 1"
    with pytest.raises(DataError, match=r"2\.mp4: unreadable"):
        folder[2]


def test_a_folder_that_is_gone_is_an_error_not_an_endless_search(tmp_path: Path) -> None:
    folder = broken_later(tmp_path, num=3, bad=())
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match="3 files of bucket 9x32x32 in a row"):
        folder[0]


def test_negative_indices_are_refused(mixed: Path) -> None:
    with pytest.raises(IndexError):
        cached(mixed)[-1]


def test_the_fingerprint_sees_what_would_change_the_samples(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "a.mp4", numbered(12, 32, 32), 8))
    caption(write_video(tmp_path / "b.mp4", numbered(12, 32, 32), 8))

    def fingerprint(**options: int) -> str:
        return VideoFolder(tmp_path, buckets=SQUARE, **{"fps": 8, **options}).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    seen = {first, fingerprint(seed=1), fingerprint(fps=7)}
    (tmp_path / "a.txt").write_text("another caption")
    seen.add(fingerprint())
    (tmp_path / "b.txt").unlink()
    seen.add(fingerprint())
    assert len(seen) == 5


def test_a_file_is_looked_at_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def watching(file: Path) -> MediaInfo:
        looked.append(file.name)
        return probe(file)

    monkeypatch.setattr(folder_module, "probe", watching)
    for name in ("a.mp4", "b.mp4"):
        write_video(caption(tmp_path / name), noise(9, 16, 16), 8)
    sizes = read_statistics(tmp_path)
    VideoFolder(tmp_path, buckets=[(9, 16, 16)])
    assert sorted(looked) == ["a.mp4", "b.mp4"] and len(sizes.videos) == 2
    write_video(tmp_path / "b.mp4", noise(13, 16, 16), 8)
    assert VideoFolder(tmp_path, buckets=[(9, 16, 16)]).items[1].info.frames == 13
    assert looked[2:] == ["b.mp4"]
