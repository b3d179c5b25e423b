"""Time several pieces of work in turns, by the device's own clock."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from apt.errors import InputError

MINIMUM_ROUNDS = 3

# Larger than any L2 cache: writing this much removes the inputs from it.
_FLUSH_BYTES = 256 * 2**20

# How long the device sleeps before a sample. The host needs 0.01 to 1 ms to launch an op, and 100
# ms for a network.
SHORTEST_SLEEP_MS = 0.1
LONGEST_SLEEP_MS = 100.0


@dataclass(frozen=True)
class Work:
    """Work to time, and its preparation, which is not timed.

    Attributes:
        run: takes what `prepare` returned, and launches the work; need not wait for the device.
        prepare: creates what one run consumes, for instance the forward pass of a backward pass.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Sample(NamedTuple):
    """The times of one run.

    Attributes:
        ms: milliseconds of work on the device.
        host_ms: milliseconds that the host took to launch it; on a CPU, the same.
        waited: whether the device started before the host had launched everything, so that `ms` may
            include time of the host.
    """

    ms: float
    host_ms: float
    waited: bool = False


@dataclass(frozen=True)
class Timing:
    """The samples of one piece of work.

    Attributes:
        samples_ms: milliseconds of the device.
        host_ms: milliseconds of the host, for the same samples.
        waited: number of samples that may include time of the host.
    """

    samples_ms: tuple[float, ...]
    host_ms: tuple[float, ...]
    waited: int

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Return the host's figures for a record; none on a CPU, where all time is the host's."""
        if device.type == "cpu":
            return {}
        return {
            "host_ms": median(self.host_ms),
            "share_waited": self.waited / len(self.samples_ms),
        }


class Clock(Protocol):
    """A clock that times one run."""

    def sample(self, work: Work) -> Sample: ...


class HostClock:
    """A clock for work that is done when its call returns."""

    def sample(self, work: Work) -> Sample:
        state = work.prepare()
        start = time.perf_counter()
        work.run(state)
        took = (time.perf_counter() - start) * 1e3
        return Sample(took, took)


class Stream(Protocol):
    """What a clock needs from a device with a queue."""

    def flush(self) -> None:
        """Queue a write that removes the inputs from the caches."""
        ...

    def sleep(self, milliseconds: float) -> None:
        """Queue a pause of about this length."""
        ...

    def mark(self, name: str) -> None:
        """Queue a mark."""
        ...

    def passed(self, name: str) -> bool:
        """Return whether the device has passed a mark."""
        ...

    def between(self, start: str, end: str) -> float:
        """Wait for `end`, and return the milliseconds from one mark to the other."""
        ...


class CudaStream:
    """The current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._l2 = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self._marks: dict[str, torch.cuda.Event] = {}
        self._cycles_per_ms = 1.0
        cycles = 10_000_000
        self._sleep_cycles(cycles)  # loads the kernel
        self.mark("start")
        self._sleep_cycles(cycles)
        self.mark("end")
        # GPU clocks are between 0.2 and 5 GHz
        self._cycles_per_ms = min(max(cycles / self.between("start", "end"), 2e5), 5e6)

    def flush(self) -> None:
        self._l2.zero_()

    def sleep(self, milliseconds: float) -> None:
        self._sleep_cycles(round(milliseconds * self._cycles_per_ms))

    def mark(self, name: str) -> None:
        if name not in self._marks:
            self._marks[name] = torch.cuda.Event(enable_timing=True)
        self._marks[name].record()

    def passed(self, name: str) -> bool:
        return self._marks[name].query()

    def between(self, start: str, end: str) -> float:
        self._marks[end].synchronize()
        return self._marks[start].elapsed_time(self._marks[end])

    @staticmethod
    def _sleep_cycles(cycles: int) -> None:
        torch.cuda._sleep(cycles)


class DeviceClock:
    """A clock that puts marks around the work in the device's queue, after clearing its caches.

    Before the first mark, the device sleeps for longer than the host took to launch this work last
    time. All work is thus queued before it starts, and a sample includes no time of Python, however
    small the kernels are; the host's time is reported separately. If the device starts before the
    host has launched everything, the sample is repeated with a longer sleep. Work that waits for
    the device, or takes longer to launch than `LONGEST_SLEEP_MS`, is reported as it is.
    """

    def __init__(self, stream: Stream, now: Callable[[], float] = time.perf_counter) -> None:
        self._stream, self._now = stream, now
        self._sleep_ms: weakref.WeakKeyDictionary[Work, float] = weakref.WeakKeyDictionary()
        self._in_vain: weakref.WeakKeyDictionary[Work, int] = weakref.WeakKeyDictionary()

    def sample(self, work: Work) -> Sample:
        if self._in_vain.get(work, 0) == 2:  # once may be due to a compiler or another process
            return self._sample(work, 0.0)
        sleep = self._sleep_ms.get(work, SHORTEST_SLEEP_MS)
        sample = self._sample(work, sleep)
        while sample.waited and sleep < LONGEST_SLEEP_MS:
            sleep = min(10 * sleep, LONGEST_SLEEP_MS)
            sample = self._sample(work, sleep)
        self._in_vain[work] = self._in_vain.get(work, 0) + 1 if sample.waited else 0
        self._sleep_ms[work] = min(2 * sample.host_ms + SHORTEST_SLEEP_MS, LONGEST_SLEEP_MS)
        return sample

    def _sample(self, work: Work, sleep: float) -> Sample:
        state = work.prepare()
        self._stream.flush()
        self._stream.sleep(sleep)
        self._stream.mark("start")
        begun = self._now()
        work.run(state)
        host_ms = (self._now() - begun) * 1e3
        self._stream.mark("end")
        waited = self._stream.passed("start")
        return Sample(self._stream.between("start", "end"), host_ms, waited)


def clock_for(device: torch.device) -> Clock:
    """Return CUDA events on a GPU, the host's clock on a CPU. Raises InputError for others."""
    if device.type == "cuda":
        return DeviceClock(CudaStream(device))
    if device.type == "cpu":
        return HostClock()
    raise InputError(f"benchmarks run on cuda and cpu, not on {device.type}")


def check_rounds(rounds: int) -> None:
    """Raise InputError for fewer than three rounds, whose median means nothing."""
    if rounds < MINIMUM_ROUNDS:
        raise InputError(f"timing needs at least {MINIMUM_ROUNDS} rounds, got {rounds}")


def time_interleaved(
    works: Mapping[str, Work],
    clock: Clock,
    *,
    rounds: int,
    warmup: int = 3,
    max_seconds: float | None = None,
) -> dict[str, Timing]:
    """Take samples of each piece of work, in turns.

    Every round takes one sample of each, and starts one further than the round before. So neither
    falling clocks nor what the work before leaves behind favours any of them.

    Args:
        works: the work to time, by name.
        clock: clock of the device that does the work.
        rounds: samples of each.
        warmup: untimed runs of each before.
        max_seconds: stop after the round that exceeds this time, but not before three rounds.

    Raises:
        InputError: for nothing to time, or fewer than three rounds.
    """
    if not works:
        raise InputError("there is nothing to time")
    check_rounds(rounds)
    names = list(works)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmup):
            clock.sample(works[name])
    began = time.monotonic()
    collecting = gc.isenabled()
    gc.disable()  # a collection during a sample would count as its time
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(clock.sample(works[name]))
            late = max_seconds is not None and time.monotonic() - began > max_seconds
            if late and number + 1 >= MINIMUM_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(
            samples_ms=tuple(sample.ms for sample in taken),
            host_ms=tuple(sample.host_ms for sample in taken),
            waited=sum(sample.waited for sample in taken),
        )
        for name, taken in samples.items()
    }


def median(samples: Sequence[float]) -> float:
    """Return the middle sample, or the mean of the middle two."""
    return float(np.median(samples))


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the interpolated value below which `share` in [0, 1] of the samples lie."""
    return float(np.quantile(samples, share))
