from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.data.reading import MediaInfo
from apt.data.timeline import irregular_span, usual_rate, without_second_fields

MS = Fraction(1, 1000)


def times(*gaps: int) -> list[int]:
    return list(accumulate(gaps, initial=0))


@pytest.mark.parametrize(
    ("gaps", "declared", "expected"),
    [
        ([62] * 40, (), Fraction(500, 31)),
        ([60] * 24 + [2000], (), Fraction(50, 3)),  # the last frame but one is held
        ([500] + [40] * 30, (), 25),
        ([40] * 10 + [5000] + [40] * 10 + [5000] * 3, (), 25),
        ([33, 33, 34] * 10, (30,), 30),
        ([33, 34, 33] * 400, (Fraction(30000, 1001), 30), 30),
        ([40] * 30, (60000, 12, 25), 25),  # declared, and wrong
        ([50, 33, 50, 34] * 20, (), Fraction(24000, 1001)),  # film on television
        ([40, 40, 80] * 10, (), 25),  # dropped frames
        ([], (None, 8), 8),
        ([], (None, None), None),
        ([40], (24,), 25),
    ],
)
def test_the_usual_rate(
    gaps: list[int], declared: tuple[Fraction | int | None, ...], expected: Fraction | None
) -> None:
    rates = [Fraction(rate) if rate else None for rate in declared]
    found = usual_rate(times(*gaps), MS, rates)
    if expected is None:
        assert found is None
    else:
        assert float(found) == pytest.approx(float(expected), rel=3e-3)


@given(
    fps=st.sampled_from([Fraction(8), Fraction(24000, 1001), Fraction(24), Fraction(30000, 1001)]),
    num=st.integers(2, 300),
    tick=st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 600)]),
)
def test_rounded_times_of_an_even_rate_are_even(fps: Fraction, num: int, tick: Fraction) -> None:
    rounded = [round(i / fps / tick) for i in range(num)]
    assert usual_rate(rounded, tick, [fps]) == fps
    assert irregular_span(num, (rounded[-1] - rounded[0]) * tick, fps) is None


def test_a_held_frame_makes_the_span_irregular() -> None:
    assert irregular_span(10, Fraction(9, 8), Fraction(8)) is None
    assert irregular_span(10, Fraction(10, 8), Fraction(8)) == Fraction(10, 8)


def test_fields_in_two_packets_are_one_frame() -> None:
    assert list(without_second_fields([0, 1, 2, 3, 4, 5], [0, 2, 4])) == [0, 2, 4]
    assert list(without_second_fields([0, 1, 2, 3, 4, 5], [0, 1, 2])) == [0, 1, 2, 3, 4, 5]
    assert list(without_second_fields([0, 1], [0])) == [0, 1]


def test_starts_cover_the_span_and_not_what_is_held_at_the_end() -> None:
    even = MediaInfo(False, 1, 1, 49, Fraction(16), "h264")
    assert even.clip_starts(9, Fraction(16)) == 41
    assert even.clip_starts(9, Fraction(8)) == 33  # from 0 to 2 seconds
    assert even.duration == 49 / 16
    # Ten frames, the fifth of which is held for five seconds.
    held = MediaInfo(False, 1, 1, 10, Fraction(10), "h264", span=Fraction(59, 10))
    assert held.length == 60
    assert held.clip_starts(10, Fraction(10)) == 51
    assert held.clip_frames(Fraction(10)) == 60
    assert held.duration == 6
