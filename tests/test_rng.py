from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.rng import Draw, generator_for, sample_noise, sample_uniform


def test_seeds_are_the_same_for_ever() -> None:
    """Runs resume, and clips are named by (seed, index): a new hash would break both."""
    assert generator_for(0, "noise", 5, 8).initial_seed() == 7727368015524176453
    assert generator_for().initial_seed() == 6510301506637419378


def test_every_part_of_a_key_counts() -> None:
    keys: list[tuple[int | str, ...]] = [
        (1, 2),
        (2, 1),
        (12,),
        ("12",),
        ("1", 2),
        (1, "2"),
        (1, 2, 0),
        (-1, 2),
        (),
    ]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)


@settings(max_examples=30, deadline=None)
@given(
    num=st.integers(1, 9),
    first=st.integers(0, 10**9),
    shape=st.lists(st.integers(1, 7), max_size=3),
    data=st.data(),
)
def test_splits_do_not_change_draws(
    num: int, first: int, shape: list[int], data: st.DataObject
) -> None:
    """Any split of a batch, over ranks or micro-batches, draws what the whole batch draws."""
    cut = data.draw(st.integers(0, num))
    for whole, left, right in (
        [
            sample_noise(n, shape, Draw(3, 2, first + skip, "z"))
            for n, skip in ((num, 0), (cut, 0), (num - cut, cut))
        ],
        [
            sample_uniform(n, Draw(3, 2, first + skip, "z"))
            for n, skip in ((num, 0), (cut, 0), (num - cut, cut))
        ],
    ):
        assert torch.equal(whole, torch.cat([left, right]))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"offset": 1}, {"stream": "b"}])
def test_each_argument_is_part_of_the_key(change: dict[str, int | str]) -> None:
    base = Draw(0, stream="a")
    draws = (base, dataclasses.replace(base, **change))  # type: ignore[arg-type]
    noise = [sample_noise(1, (4,), draw) for draw in draws]
    assert not torch.equal(*noise)
    uniform = [sample_uniform(1, draw) for draw in draws]
    assert not torch.equal(*uniform)


def test_draws_do_not_touch_torchs_own_state() -> None:
    state = torch.get_rng_state()
    sample_noise(2, (3,), Draw(0, stream="a"))
    sample_uniform(2, Draw(0, stream="a"))
    assert torch.equal(torch.get_rng_state(), state)


def test_torchs_defaults_do_not_matter() -> None:
    draw = Draw(3, stream="a")
    expected = sample_noise(2, (3, 4), draw), sample_uniform(5, draw)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = sample_noise(2, (3, 4), draw), sample_uniform(5, draw)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, usual in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, usual)


def test_noise_is_standard_normal() -> None:
    noise = sample_noise(64, (8, 64), Draw(0, stream="a"))
    assert noise.shape == (64, 8, 64) and noise.dtype == torch.float32
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert noise.pow(4).mean() == pytest.approx(3, abs=0.15)
    # Samples do not resemble each other.
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(64)
    assert correlation.abs().max() < 0.25


def test_uniform_fills_the_unit_interval() -> None:
    u = sample_uniform(2000, Draw(0, stream="a"))
    assert u.shape == (2000,) and u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1
    ordered = u.sort().values
    assert (ordered - torch.linspace(0, 1, 2000)).abs().max() < 1.6 / 2000**0.5


def test_shape_dtype_and_nothing_at_all() -> None:
    assert sample_noise(0, (3, 2), Draw(0, stream="a")).shape == (0, 3, 2)
    assert sample_uniform(0, Draw(0, stream="a")).shape == (0,)
    half = sample_noise(1, (3,), Draw(0, stream="a"), dtype=torch.bfloat16)
    whole = sample_noise(1, (3,), Draw(0, stream="a", device="cpu"))
    assert torch.equal(half, whole.bfloat16())
