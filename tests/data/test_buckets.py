from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.data.buckets import (
    ASPECT_RATIOS,
    Bucket,
    best_bucket,
    check_buckets,
    make_buckets,
)
from apt.errors import ConfigError


def test_the_papers_sizes_are_buckets() -> None:
    assert Bucket(49, 720, 1280) in make_buckets(1280 * 720, 16, frames=[1, 49])
    assert Bucket(1, 1024, 1024) in make_buckets(1024 * 1024, 16)
    assert make_buckets(32 * 32, 4, frames=[9], aspect_ratios=[Fraction(1)]) == [(9, 32, 32)]


@settings(max_examples=40, deadline=None)
@given(
    side=st.integers(16, 1500),
    multiple=st.sampled_from([1, 4, 8, 16]),
    levels=st.integers(1, 3),
    frames=st.lists(st.integers(0, 12).map(lambda k: 4 * k + 1), min_size=1, max_size=3),
)
def test_buckets_keep_the_budget_and_the_multiple(
    side: int, multiple: int, levels: int, frames: list[int]
) -> None:
    buckets = make_buckets(side**2, multiple, frames=frames, levels=levels)
    assert len(set(buckets)) == len(buckets)
    assert {bucket.frames for bucket in buckets} == set(frames)
    for bucket in buckets:
        assert bucket.height * bucket.width <= side**2
        assert bucket.height % multiple == bucket.width % multiple == 0
        assert min(bucket) >= 1


def test_shapes_and_areas_are_near_what_was_asked() -> None:
    for ratio in ASPECT_RATIOS:
        (bucket,) = make_buckets(1280 * 720, 16, aspect_ratios=[ratio])
        assert bucket.width / bucket.height == pytest.approx(float(ratio), rel=0.05)
        assert bucket.height * bucket.width > 0.93 * 1280 * 720
    areas = {bucket.height * bucket.width for bucket in make_buckets(512 * 512, 8, levels=3)}
    assert min(areas) < 512 * 512 / 3.5


@pytest.mark.parametrize("arguments", [(0, 1), (100, 0), (63, 8)])
def test_impossible_budgets(arguments: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="max_pixels"):
        make_buckets(*arguments)


@pytest.mark.parametrize(("sizes", "says"), [([], "no buckets"), ([(8, 32, 32)], "5 or 9")])
def test_check_buckets_refuses(sizes: list[tuple[int, int, int]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_buckets(sizes)
    with pytest.raises(ConfigError):
        check_buckets([(9, 0, 32)])


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(10, 3000),
    width=st.integers(10, 3000),
    frames=st.sampled_from([1, 5, 20, 60]),
    upscale=st.sampled_from([1.0, 1.1, math.inf]),
)
def test_best_bucket_never_enlarges_and_nothing_keeps_more(
    height: int, width: int, frames: int, upscale: float
) -> None:
    buckets = make_buckets(512 * 512, 16, frames=[1, 17, 49], levels=2)

    def kept(bucket: Bucket) -> float:
        # Cover the bucket, then compare the area of the crop, in the source's own pixels.
        scale = max(bucket.height / height, bucket.width / width)
        crop = (bucket.height / scale) * (bucket.width / scale)
        return crop / (height * width) * bucket.frames * bucket.height * bucket.width

    fitting = [
        bucket
        for bucket in buckets
        if bucket.frames <= frames
        and bucket.height <= height * upscale
        and bucket.width <= width * upscale
    ]
    best = best_bucket(buckets, frames=frames, height=height, width=width, max_upscale=upscale)
    if best is None:
        assert not fitting
    else:
        assert best in fitting
        assert kept(best) >= max(map(kept, fitting)) * (1 - 1e-9)


def test_if_two_buckets_keep_as_much_the_one_that_crops_nothing_wins() -> None:
    exact, wider = Bucket(1, 48, 64), Bucket(1, 48, 80)  # 3072 pixels, and 4/5 of 3840
    for scale in (2, 3, 5, 7, 11):
        assert best_bucket([exact, wider], frames=1, height=48 * scale, width=64 * scale) == exact


def test_best_bucket_follows_shape_and_length() -> None:
    buckets = make_buckets(1280 * 720, 16, frames=[17, 49])
    assert best_bucket(buckets, frames=200, height=1080, width=1920) == (49, 720, 1280)
    assert best_bucket(buckets, frames=48, height=1080, width=1920) == (17, 720, 1280)
    assert best_bucket(buckets, frames=200, height=1920, width=1080) == (49, 1280, 720)
    assert best_bucket(buckets, frames=16, height=1080, width=1920) is None
    assert best_bucket(buckets, frames=200, height=360, width=640) is None
    # A few missing rows are no reason to drop a file.
    assert best_bucket(buckets, frames=49, height=718, width=1278) == (49, 720, 1280)
