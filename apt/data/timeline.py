"""From the times of a video's frames to its rate and length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median_low

_SAME_RATE = Fraction(1, 2000)
"""Half of what lies between 30 and 30000/1001."""


def usual_rate(
    times: Sequence[int], tick: Fraction, declared: Iterable[Fraction | None]
) -> Fraction | None:
    """Frames per second of most of a video, whatever single frames are held.

    The mean over the gaps that are within half and twice the median: rounded times, film on
    television (gaps of 2 and 3 fields) and unsteady phones average out; held and dropped frames
    do not count.

    Args:
        times: of the frames, ascending, in ticks.
        tick: seconds.
        declared: rates that the file names, the most trusted first. One that agrees is taken, as
            it is exact where times are rounded; with fewer than two frames the first one is.

    Returns:
        None if nothing tells.
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
    """`span`, the seconds from first to last frame, or None if it is that of an even rate."""
    even = (frames - 1) / fps
    return None if abs(span - even) * fps <= Fraction(1, 2) else span


def without_second_fields(times: Sequence[int], shown: Sequence[int]) -> Sequence[int]:
    """Times of frames, where an interlaced camera stored each in two packets of one field.

    Args:
        times: of the packets, ascending.
        shown: of the first three frames that the decoder gave.
    """
    paired = len(shown) >= 3 and list(times[0:5:2]) == list(shown[:3])
    return times[::2] if paired else times
