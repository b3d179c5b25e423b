"""Turns, statistics, and what is and is not timed. A clock that counts calls stands for time."""

from __future__ import annotations

import gc

import pytest
import torch

from apt.bench.timing import (
    HostClock,
    Work,
    clock_for,
    median,
    quantile,
    time_interleaved,
)
from apt.errors import InputError


class Ticks:
    """A clock whose time is the number of samples that it has taken."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def sample(self, work: Work) -> float:
        self.order.append(str(work.run(work.prepare())))
        return float(len(self.order))


def named(name: str) -> Work:
    return Work(lambda _: name)


def test_every_round_takes_each_once_and_begins_one_further():
    clock = Ticks()
    works = {name: named(name) for name in "abc"}
    samples = time_interleaved(works, clock, rounds=4, warmup=0)
    assert "".join(clock.order) == "abcbcacababc"
    assert samples["b"] == (2.0, 4.0, 9.0, 11.0)


def test_warmup_is_not_among_the_samples():
    clock = Ticks()
    samples = time_interleaved({"a": named("a"), "b": named("b")}, clock, rounds=3, warmup=2)
    assert "".join(clock.order[:4]) == "aabb"
    assert samples == {"a": (5.0, 8.0, 9.0), "b": (6.0, 7.0, 10.0)}


def test_the_time_limit_leaves_three_rounds():
    samples = time_interleaved({"a": named("a")}, Ticks(), rounds=100, max_seconds=0.0)
    assert len(samples["a"]) == 3


@pytest.mark.parametrize(
    ("works", "rounds", "message"),
    [({}, 5, "nothing to time"), ({"a": named("a")}, 2, "at least 3 rounds, got 2")],
)
def test_too_little_to_time_is_refused(works, rounds, message):
    with pytest.raises(InputError, match=message):
        time_interleaved(works, Ticks(), rounds=rounds)


def test_garbage_is_not_collected_in_a_sample_and_is_afterwards():
    seen = []
    time_interleaved({"a": Work(lambda _: seen.append(gc.isenabled()))}, HostClock(), rounds=3)
    assert seen[-3:] == [False] * 3
    assert gc.isenabled()


def test_collection_goes_on_after_an_error():
    def fail(_: object) -> None:
        if not gc.isenabled():
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        time_interleaved({"a": Work(fail)}, HostClock(), rounds=3)
    assert gc.isenabled()


def test_preparing_happens_before_each_run_and_reaches_it():
    made, used = [], []

    def prepare() -> int:
        made.append(len(made))
        return made[-1]

    samples = time_interleaved({"a": Work(used.append, prepare)}, HostClock(), rounds=3, warmup=1)
    assert used == made == [0, 1, 2, 3]
    assert all(sample >= 0 for sample in samples["a"])


def test_statistics():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert quantile([0.0, 1.0, 2.0, 3.0, 4.0], 0.9) == pytest.approx(3.6)


def test_clocks_by_device():
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    with pytest.raises(InputError, match="not on meta"):
        clock_for(torch.device("meta"))
