"""Times of several pieces of work, in turns, by the device's own clock."""

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

# More than any L2 cache: writing it leaves nothing of the inputs there.
_FLUSH_BYTES = 256 * 2**20

# Of the device before a sample. An op's launches take the host 0.01 to 1 ms, a network's 100.
SHORTEST_SLEEP_MS = 0.1
LONGEST_SLEEP_MS = 100.0


@dataclass(frozen=True)
class Work:
    """What is timed, and what must happen before each time and is not.

    Attributes:
        run: gets what `prepare` returned, launches the work, and need not wait for the device.
        prepare: makes what one run consumes (the forward pass of a backward, for instance).
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Sample(NamedTuple):
    """One run.

    Attributes:
        ms: that the device worked.
        host_ms: that the host took to launch it; on a CPU the same time.
        waited: whether the device was done with what came before while the host still launched, so
            that `ms` may hold time of the host.
    """

    ms: float
    host_ms: float
    waited: bool = False


@dataclass(frozen=True)
class Timing:
    """Samples of one work.

    Attributes:
        samples_ms: milliseconds of the device.
        host_ms: milliseconds of the host, beside each.
        waited: how many samples may hold time of the host.
    """

    samples_ms: tuple[float, ...]
    host_ms: tuple[float, ...]
    waited: int

    def metrics(self, device: torch.device) -> dict[str, float]:
        """What records tell of the host: nothing on a CPU, whose time is the host's."""
        if device.type == "cpu":
            return {}
        return {
            "host_ms": median(self.host_ms),
            "share_waited": self.waited / len(self.samples_ms),
        }


class Clock(Protocol):
    """Times one run."""

    def sample(self, work: Work) -> Sample: ...


class HostClock:
    """For work that is done when the call returns."""

    def sample(self, work: Work) -> Sample:
        state = work.prepare()
        start = time.perf_counter()
        work.run(state)
        took = (time.perf_counter() - start) * 1e3
        return Sample(took, took)


class Stream(Protocol):
    """What a clock needs of a device that works through a queue."""

    def flush(self) -> None:
        """Queue what leaves nothing of the inputs in a cache."""
        ...

    def sleep(self, milliseconds: float) -> None:
        """Queue doing nothing for about so long."""
        ...

    def mark(self, name: str) -> None:
        """Queue a mark."""
        ...

    def passed(self, name: str) -> bool:
        """Whether the device is past a mark."""
        ...

    def between(self, start: str, end: str) -> float:
        """Wait for `end`; milliseconds from one mark to the other."""
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
        # Clocks are at least 0.2 GHz; nobody's reach 5
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
    """Marks in the device's queue around the work, with its caches cleared before.

    The device sleeps between the clearing and the first mark, for longer than the host took to
    launch this work the last time. So the whole work is queued before it begins, and a sample holds
    no Python, however small the kernels are; the host's time is reported beside it. A sample that
    began before its launches were done is taken again with a longer sleep. Work that waits for the
    device, or that takes longer to launch than `LONGEST_SLEEP_MS`, is reported as it is.
    """

    def __init__(self, stream: Stream, now: Callable[[], float] = time.perf_counter) -> None:
        self._stream, self._now = stream, now
        self._sleep_ms: weakref.WeakKeyDictionary[Work, float] = weakref.WeakKeyDictionary()
        self._in_vain: weakref.WeakKeyDictionary[Work, int] = weakref.WeakKeyDictionary()

    def sample(self, work: Work) -> Sample:
        if self._in_vain.get(work, 0) == 2:  # once may be a compiler's or a neighbour's doing
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
    """CUDA events on a GPU, the host's clock on the CPU. Raises InputError for other devices."""
    if device.type == "cuda":
        return DeviceClock(CudaStream(device))
    if device.type == "cpu":
        return HostClock()
    raise InputError(f"times are taken on cuda and cpu, not on {device.type}")


def check_rounds(rounds: int) -> None:
    """Raise InputError for fewer than three rounds: there is no median to speak of."""
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
    """Samples of each work, taken in turns.

    Every round takes one sample of each, beginning one further than the last round did: neither
    clocks that sink nor a neighbour's leftovers favour any of them.

    Args:
        works: by name.
        clock: of the device that does them.
        rounds: samples of each.
        warmup: runs of each before; their times are dropped.
        max_seconds: stop after the round that passes this, but not before three rounds.

    Raises:
        InputError: nothing to time, or fewer than three rounds.
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
    gc.disable()  # a collection in the middle of a sample would count as its time
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
    """The middle sample; of an even number, the mean of the middle two."""
    return float(np.median(samples))


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` in [0, 1] of the samples lie, interpolated."""
    return float(np.quantile(samples, share))
