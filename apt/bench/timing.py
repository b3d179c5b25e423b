"""Times of several pieces of work, in turns, by the device's own clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from apt.errors import InputError

MINIMUM_ROUNDS = 3

# More than any L2 cache: writing it leaves nothing of the inputs there.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Work:
    """What is timed, and what must happen before each time and is not.

    Attributes:
        run: gets what `prepare` returned, launches the work, and need not wait for the device.
        prepare: makes what one run consumes (the forward pass of a backward, for instance).
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Clock(Protocol):
    """Times one run."""

    def sample(self, work: Work) -> float:
        """Milliseconds that the device worked."""
        ...


class HostClock:
    """For work that is done when the call returns."""

    def sample(self, work: Work) -> float:
        state = work.prepare()
        start = time.perf_counter()
        work.run(state)
        return (time.perf_counter() - start) * 1e3


class CudaClock:
    """CUDA events around the work, with the L2 cache cleared before it.

    Clearing takes the device about 0.1 ms, in which the host runs ahead: launches that follow cost
    the device nothing unless the host is slower than the kernels, which a user would wait for too.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, work: Work) -> float:
        state = work.prepare()
        self.flush.zero_()
        self.start.record()
        work.run(state)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def clock_for(device: torch.device) -> Clock:
    """CUDA events on a GPU, the host's clock on the CPU. Raises InputError for other devices."""
    if device.type == "cuda":
        return CudaClock(device)
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
) -> dict[str, tuple[float, ...]]:
    """Samples of each work in milliseconds, taken in turns.

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
    samples: dict[str, list[float]] = {name: [] for name in names}
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
    return {name: tuple(values) for name, values in samples.items()}


def median(samples: Sequence[float]) -> float:
    """The middle sample; of an even number, the mean of the middle two."""
    return float(np.median(samples))


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` in [0, 1] of the samples lie, interpolated."""
    return float(np.quantile(samples, share))
