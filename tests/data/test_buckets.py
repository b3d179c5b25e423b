from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.data import buckets
from apt.data.buckets import (
    ASPECT_RATIOS,
    Bucket,
    best_bucket,
    check_buckets,
    make_buckets,
    resize_and_crop,
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


def test_best_bucket_follows_shape_and_length() -> None:
    buckets = make_buckets(1280 * 720, 16, frames=[17, 49])
    assert best_bucket(buckets, frames=200, height=1080, width=1920) == (49, 720, 1280)
    assert best_bucket(buckets, frames=48, height=1080, width=1920) == (17, 720, 1280)
    assert best_bucket(buckets, frames=200, height=1920, width=1080) == (49, 1280, 720)
    assert best_bucket(buckets, frames=16, height=1080, width=1920) is None
    assert best_bucket(buckets, frames=200, height=360, width=640) is None
    # A few missing rows are no reason to drop a file.
    assert best_bucket(buckets, frames=49, height=718, width=1278) == (49, 720, 1280)


def test_a_frame_of_the_right_size_is_untouched() -> None:
    frame = torch.randint(0, 256, (3, 17, 23), dtype=torch.uint8)
    pixels = resize_and_crop(frame, (17, 23))
    assert pixels.dtype == torch.float32
    assert ((pixels + 1) * 127.5).round().to(torch.uint8).equal(frame)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    source=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_size_is_filled(source: tuple[int, int], size: tuple[int, int]) -> None:
    frame = torch.full((3, *source), 200, dtype=torch.uint8)
    pixels = resize_and_crop(frame, size)
    assert pixels.shape == (3, *size)
    assert torch.allclose(pixels, torch.tensor(200 / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [0.4, 0.5, 0.75, 1.3])
def test_resizing_agrees_with_pillow(scale: float, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    size = (round(40 * scale), round(60 * scale))
    ours = resize_and_crop(torch.from_numpy(picture).permute(2, 0, 1), size)
    for channel, plane in enumerate(ours.numpy()):
        # In floats: on bytes Pillow also rounds and clips between its two passes.
        grey = Image.fromarray(picture[..., channel].astype(np.float32))
        theirs = np.asarray(grey.resize(size[::-1], Image.Resampling.BICUBIC))
        assert np.abs((plane + 1) * 127.5 - theirs.clip(0, 255)).max() < 0.05


@pytest.mark.parametrize(("source", "size"), [((20, 60), (20, 20)), ((60, 20), (20, 20))])
def test_the_crop_is_central(source: tuple[int, int], size: tuple[int, int]) -> None:
    frame = torch.zeros(3, *source, dtype=torch.uint8)
    long = source.index(60)
    frame.narrow(long + 1, 20, 20).fill_(255)
    assert (resize_and_crop(frame, size) == 1).all()


def test_oblong_pixels_are_stretched() -> None:
    frame = torch.zeros(3, 20, 20, dtype=torch.uint8)
    frame[:, :, 10:] = 255
    pixels = resize_and_crop(frame, (20, 40), display_size=(20, 40))
    assert (pixels[:, :, :17] < -0.9).all()
    assert (pixels[:, :, 23:] > 0.9).all()


def test_bands_of_a_large_picture_are_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = torch.randint(0, 256, (3, 97, 131), dtype=torch.uint8)
    for size in ((30, 41), (97, 60), (120, 131), (97, 131)):
        whole = resize_and_crop(frame, size)
        with monkeypatch.context() as patch:
            patch.setattr(buckets, "_BAND", 131 * 10)
            assert torch.equal(resize_and_crop(frame, size), whole)
    assert torch.equal(resize_and_crop(frame.float(), (30, 41)), resize_and_crop(frame, (30, 41)))
