"""One wrong row among thousands is detected, and rounding is not mistaken for an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.bench.accuracy import ROW, Deviation, deviation

EXACT = torch.randn(
    2, 2048, 3 * ROW, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)
BF16 = Deviation(*2 * [2 * 2**-8 + 2 * 2**-7])  # twice the error of a rounding, and two roundings


def test_a_wholly_wrong_row_of_4096_hides_in_the_norm_of_the_whole():
    found = EXACT.bfloat16()
    assert not deviation(found, EXACT).exceeds(BF16)
    for wrong in (0.0, 1.0):
        planted = found.clone()
        planted[1, 17] = wrong
        error = deviation(planted, EXACT)
        assert error.whole < BF16.whole
        assert error.row > 0.9
        assert "in a row, allowed 0.023" in error.exceeds(BF16)


def test_a_piece_of_a_row_is_enough():
    planted = EXACT.bfloat16()
    planted[0, 5, -ROW:] = 0
    assert deviation(planted, EXACT).row == pytest.approx(1.0)


def test_one_value_off_by_its_size_is_seen_in_fp32():
    planted = EXACT.float()
    planted[0, 0, 0] += 1e-3
    assert deviation(EXACT.float(), EXACT).row < 1e-7
    assert deviation(planted, EXACT).row > 5e-5


def test_a_row_of_cancelling_sums_is_compared_with_the_size_of_other_rows():
    exact = torch.ones(64, ROW, dtype=torch.float64)
    exact[3] = 1e-9
    assert deviation(exact + 1e-6, exact).row < 2e-5
    assert deviation(exact.float() * 0, exact).row == 1.0


@given(
    shape=st.sampled_from([(), (1,), (7,), (ROW,), (ROW + 1,), (3, 5), (2, 3, 2 * ROW + 9)]),
    factor=st.floats(1e-6, 0.5),
    seed=st.integers(0, 9),
)
def test_an_error_in_proportion_is_that_proportion(shape, factor, seed):
    exact = 1 + torch.rand(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    error = deviation(exact * (1 + factor), exact)
    assert error.whole == pytest.approx(factor, rel=1e-6)
    assert error.row == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_nan_is_wrong_wherever_it_is(at):
    found = EXACT[0, 0].clone()
    found[at] = float("nan")
    assert "nan" in deviation(found, EXACT[0, 0]).exceeds(BF16)


def test_another_shape_is_wrong_and_nothing_is_right():
    assert deviation(EXACT[:1], EXACT) == (float("inf"), float("inf"))
    assert deviation(torch.empty(0, 3), torch.empty(0, 3).double()) == (0.0, 0.0)
    assert deviation(torch.zeros(4, 4), torch.zeros(4, 4).double()) == (0.0, 0.0)
