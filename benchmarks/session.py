"""Shared by the benchmark suites of one pytest session."""

from __future__ import annotations

from collections.abc import Callable

import torch

from apt.bench.ceilings import Ceilings, measure_ceilings
from apt.bench.machine import find_device
from apt.bench.records import Measurement
from apt.bench.timing import Clock, clock_for

Replay = Callable[[Measurement], None]


class ReplayClock:
    """A timer that stands still except when it replays samples."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


REPLAY_CLOCK = ReplayClock()


class Bench:
    """The session's device and its measurements by topic."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.device: torch.device = find_device(None)
        self.clock: Clock = clock_for(self.device)
        self.ceilings: Ceilings = measure_ceilings(self.device, self.clock)
        self.measurements: dict[str, list[Measurement]] = {}

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 50

    @property
    def max_seconds(self) -> float:
        """Time for one case, all variants together."""
        return 2.0 if self.quick else 20.0

    def add(self, topic: str, measurements: list[Measurement]) -> None:
        self.measurements.setdefault(topic, []).extend(measurements)
