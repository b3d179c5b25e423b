from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from apt.data.dataset import Batch, Sample
from apt.data.folder import VideoFolder
from apt.data.loader import make_loader
from apt.errors import ConfigError, DataError
from tests.data.media import noise, truncate, write_image, write_video

BUCKETS = [(9, 24, 40), (1, 24, 24)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos that need resizing, one that breaks in training, and images."""
    root = tmp_path_factory.mktemp("loader")
    for i in range(8):
        write_video(root / f"v{i}.mp4", noise(14, 30, 50, i), 8, faststart=True, gop=3)
    truncate(root / "v3.mp4", 0.2)
    for i in range(4):
        write_image(root / f"i{i}.png", noise(1, 30, 30, 50 + i)[0])
    for path in list(root.iterdir()):
        path.with_suffix(".txt").write_text(f"about {path.stem}")
    return root


def folder(root: Path, **options: bool) -> VideoFolder:
    return VideoFolder(root, buckets=BUCKETS, fps=8, **options)


def take(loader: Iterator[Batch], num: int) -> list[Batch]:
    return list(islice(loader, num))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.captions == other.captions
        assert (one.offset, one.batch_index) == (other.offset, other.batch_index)
        assert one.problems == other.problems
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_neither_order_nor_values(root: Path, num_workers: int) -> None:
    alone, helped = folder(root), folder(root)
    expected = take(make_loader(alone, batch_size=4, seed=5), 9)
    got = take(make_loader(helped, batch_size=4, seed=5, num_workers=num_workers), 9)
    assert_equal(expected, got)
    assert {tuple(batch.pixels.shape) for batch in got} == {(4, 3, 9, 24, 40), (4, 3, 1, 24, 24)}
    assert any(batch.problems for batch in got)
    # What failed in a worker is in the report here.
    assert helped.report.problems == alone.report.problems
    assert [problem.file for problem in helped.report.problems] == ["v3.mp4"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_continues_at_the_exact_sample(root: Path, num_workers: int) -> None:
    expected = take(make_loader(folder(root), batch_size=3, seed=1), 10)
    loader = make_loader(folder(root), batch_size=3, seed=1, start_batch=4, num_workers=num_workers)
    assert_equal(expected[4:], take(loader, 6))
    assert [batch.batch_index for batch in expected] == list(range(10))


def test_ranks_share_each_global_batch(root: Path) -> None:
    whole = take(make_loader(folder(root), batch_size=4, seed=2), 6)
    ranks = [
        take(make_loader(folder(root), batch_size=4, rank=rank, world_size=2, seed=2), 6)
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.pixels, torch.cat([first.pixels, second.pixels]))
        assert batch.captions == first.captions + second.captions
        assert (first.offset, second.offset) == (0, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_strict_errors_reach_the_main_process_as_one_line(root: Path, num_workers: int) -> None:
    loader = make_loader(folder(root, strict=True), batch_size=4, seed=0, num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        take(loader, 20)
    assert "v3.mp4: unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)


class Faulty:
    """A data set of the user's own with a mistake in it."""

    fingerprint = "faulty"

    def __getitem__(self, index: int) -> Sample:
        raise RuntimeError("sizes of tensors must match")

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        while True:
            yield [0] * batch_size


def test_a_mistake_in_a_data_set_is_not_taken_for_a_death() -> None:
    with pytest.raises(RuntimeError, match="sizes of tensors must match"):
        take(make_loader(Faulty(), batch_size=1, num_workers=1), 1)


class Processes:
    """Samples that contain the process and process group that made them."""

    fingerprint = "processes"

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(3, 1, 2, 2), f"{os.getpid()} {os.getpgrp()}")

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        while True:
            yield [0] * batch_size


def test_workers_are_out_of_reach_of_ctrl_c() -> None:
    captions = [
        caption
        for batch in take(make_loader(Processes(), batch_size=1, num_workers=2), 4)
        for caption in batch.captions
    ]
    processes, groups = zip(*map(str.split, captions), strict=True)
    assert len(set(processes)) == 2
    assert str(os.getpid()) not in processes
    assert str(os.getpgrp()) not in groups


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 5, "world_size": 2}, "multiple of the 2 ranks, for example 4"),
        ({"batch_size": 0}, "positive multiple"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers -1"),
        ({"batch_size": 4, "start_batch": -1}, "start_batch -1"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_loader(Processes(), **options)
