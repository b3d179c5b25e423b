"""Order of samples, statistics, and what is timed. A clock that counts calls replaces time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from apt.bench.timing import (
    LONGEST_SLEEP_MS,
    DeviceClock,
    HostClock,
    Sample,
    Timing,
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

    def sample(self, work: Work) -> Sample:
        self.order.append(str(work.run(work.prepare())))
        return Sample(float(len(self.order)), host_ms=0.5, waited=len(self.order) == 2)


def named(name: str) -> Work:
    return Work(lambda _: name)


def test_every_round_takes_each_once_and_begins_one_further():
    clock = Ticks()
    works = {name: named(name) for name in "abc"}
    samples = time_interleaved(works, clock, rounds=4, warmup=0)
    assert "".join(clock.order) == "abcbcacababc"
    assert samples["b"].samples_ms == (2.0, 4.0, 9.0, 11.0)
    assert samples["b"].host_ms == (0.5,) * 4
    assert [samples[name].waited for name in "abc"] == [0, 1, 0]


def test_warmup_is_not_among_the_samples():
    clock = Ticks()
    samples = time_interleaved({"a": named("a"), "b": named("b")}, clock, rounds=3, warmup=2)
    assert "".join(clock.order[:4]) == "aabb"
    taken = {name: timing.samples_ms for name, timing in samples.items()}
    assert taken == {"a": (5.0, 8.0, 9.0), "b": (6.0, 7.0, 10.0)}
    assert samples["b"].waited == 0


def test_the_time_limit_leaves_three_rounds():
    samples = time_interleaved({"a": named("a")}, Ticks(), rounds=100, max_seconds=0.0)
    assert len(samples["a"].samples_ms) == 3


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
    assert all(sample >= 0 for sample in samples["a"].samples_ms)


def test_statistics():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert quantile([0.0, 1.0, 2.0, 3.0, 4.0], 0.9) == pytest.approx(3.6)


def test_clocks_by_device():
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    with pytest.raises(InputError, match="not on meta"):
        clock_for(torch.device("meta"))


class Queue:
    """A simulated device that works through a queue, and a host that fills it.

    Both have their own clock, in milliseconds. The device begins a piece of work when it is queued
    or when the previous piece is done, whichever is later.
    """

    def __init__(self, flush: float = 0.1) -> None:
        self.host = 0.0
        self.device = 0.0
        self.slept = 0.0
        self._flush = flush
        self._marks: dict[str, float] = {}

    def now(self) -> float:
        """Seconds of the host."""
        return self.host / 1e3

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def flush(self) -> None:
        self.launch(0.005, self._flush)

    def sleep(self, milliseconds: float) -> None:
        self.slept = milliseconds
        self.launch(0.005, milliseconds)

    def mark(self, name: str) -> None:
        self.launch(0.001, 0.0)
        self._marks[name] = self.device

    def passed(self, name: str) -> bool:
        return self._marks[name] <= self.host

    def between(self, start: str, end: str) -> float:
        self.host = max(self.host, self._marks[end])
        return self._marks[end] - self._marks[start]


def clocked(queue: Queue, host: float, device: float, launches: int = 1) -> Timing:
    """Work of several launches, each with a given time on the host and on the device."""

    def run(_: object) -> None:
        for _ in range(launches):
            queue.launch(host, device)

    clock = DeviceClock(queue, now=queue.now)
    return time_interleaved({"a": Work(run)}, clock, rounds=4)["a"]


@pytest.mark.parametrize(("host", "launches"), [(0.02, 1), (0.56, 1), (0.03, 40), (4.0, 5)])
def test_launches_slower_than_the_kernels_are_no_part_of_a_sample(host, launches):
    queue = Queue()
    timing = clocked(queue, host, 0.01, launches)
    assert timing.samples_ms == pytest.approx([0.01 * launches] * 4)
    assert timing.host_ms == pytest.approx([host * launches] * 4)
    assert timing.waited == 0
    assert queue.slept < 3 * host * launches + 0.2  # and no longer than it must


def test_a_slow_launch_is_told_where_no_sleep_is_long_enough():
    host = 2 * LONGEST_SLEEP_MS
    queue = Queue()
    timing = clocked(queue, host, 0.01, launches=3)
    assert timing.waited == 4
    assert queue.slept == 0  # in vain
    assert timing.metrics(torch.device("cuda")) == {
        "host_ms": pytest.approx(3 * host), "share_waited": 1.0,
    }  # fmt: skip


def test_a_sudden_slow_launch_is_taken_again():
    queue, calls = Queue(), []

    def run(_: object) -> None:
        calls.append(None)
        queue.launch(30.0 if len(calls) == 5 else 0.02, 0.01)

    timing = time_interleaved({"a": Work(run)}, DeviceClock(queue, now=queue.now), rounds=4)["a"]
    assert timing.samples_ms == pytest.approx([0.01] * 4)
    assert timing.waited == 0
    assert len(calls) == 3 + 4 + 1


def test_the_host_of_a_cpu_is_its_device():
    (timing,) = time_interleaved({"a": named("a")}, HostClock(), rounds=3).values()
    assert timing.samples_ms == timing.host_ms
    assert timing.metrics(torch.device("cpu")) == {}


def test_a_clock_keeps_no_work_alive():
    clock, queue = DeviceClock(Queue()), Queue()
    held = torch.zeros(3)
    gone = weakref.ref(held)
    clock.sample(Work(lambda _, held=held: queue.launch(0.01, 0.01)))
    del held
    gc.collect()
    assert gone() is None
