"""A video's frame rate and length from the times of its frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median_low

_SAME_RATE = Fraction(1, 2000)
"""Half of the relative difference between 30 and 30000/1001."""


def usual_rate(
    times: Sequence[int], tick: Fraction, declared: Iterable[Fraction | None]
) -> Fraction | None:
    """Return the frame rate of most of a video, ignoring single frames that are held.

    It is computed from the mean of the gaps between half and twice the median gap. Rounded times,
    telecined film (gaps of 2 and 3 fields) and the jitter of phones average out; held and dropped
    frames are ignored.

    Args:
        times: of the frames, ascending, in ticks.
        tick: length of a tick in seconds.
        declared: rates that the file states, most trusted first. One that agrees is returned,
            because it is exact while times are rounded. With fewer than two frames, the first rate
            is returned.

    Returns:
        Frames per second, or None if the rate is unknown.
    """
    named = [rate for rate in declared if rate]
    gaps = [after - before for before, after in pairwise(times)]
    if not gaps:
        return named[0] if named else None
    middle = median_low(gaps)
    usual = [gap for gap in gaps if middle < 2 * gap and gap < 2 * middle]
    measured = len(usual) / (sum(usual) * tick)
    slack = _SAME_RATE + Fraction(1, sum(usual))
    for rate in named:
        if abs(rate / measured - 1) <= slack:
            return rate
    return measured.limit_denominator(1001)


def irregular_span(frames: int, span: Fraction, fps: Fraction) -> Fraction | None:
    """Return `span`, the seconds from first to last frame, or None if the rate is even."""
    even = (frames - 1) / fps
    return None if abs(span - even) * fps <= Fraction(1, 2) else span


def without_second_fields(times: Sequence[int], shown: Sequence[int]) -> Sequence[int]:
    """Return the times of frames, if an interlaced camera stored each field in its own packet.

    Args:
        times: of the packets, ascending.
        shown: times of the first three frames from the decoder.
    """
    paired = len(shown) >= 3 and list(times[0:5:2]) == list(shown[:3])
    return times[::2] if paired else times
