"""One forward pass of `apt_8b` and of the smaller presets, with random weights.

On a GPU it runs in CUDA graphs, at 49 frames of 1280x720 and 832x480 and at 1024 px, and is
compared with the paper's 2.65 s on one H100 and with real time, 49 / 24 = 2.04 s. On a CPU the same
code measures small presets, which tests the code without a GPU.
"""

from __future__ import annotations

import functools

import pytest

from apt.bench.dit import Variant, Workload, default_variants, measure_dit
from apt.bench.machine import find_device
from apt.bench.records import Measurement
from benchmarks.session import REPLAY_CLOCK, Bench, Replay
from benchmarks.workloads import WORKLOADS

DEVICE = find_device(None)


@functools.cache
def measure(workload: Workload, bench: Bench) -> dict[str, Measurement]:
    """Measure all variants when the first of them is asked for."""
    variants = [v for v in default_variants(DEVICE) if not (bench.quick and v.mode == "compile")]
    found = measure_dit(
        workload,
        variants,
        device=bench.device,
        clock=bench.clock,
        ceilings=bench.ceilings,
        rounds=min(bench.rounds, 20),
        max_seconds=3 * bench.max_seconds,
    )
    bench.add("dit", found)
    return {v.label: m for v, m in zip(variants, found, strict=True)}


@pytest.mark.parametrize(
    ("workload", "variant"),
    [
        pytest.param(
            workload,
            variant,
            marks=pytest.mark.benchmark(
                group=f"{workload.model} {workload.size}", timer=REPLAY_CLOCK
            ),
            id=f"{workload.model}-{workload.size}-{variant.label}",
        )
        for workload in WORKLOADS[DEVICE.type]
        for variant in default_variants(DEVICE)
    ],
)
def test_forward(workload: Workload, variant: Variant, bench: Bench, replay: Replay) -> None:
    if bench.quick and workload is not WORKLOADS[DEVICE.type][0]:
        pytest.skip("--quick measures only the first workload")
    if bench.quick and variant.mode == "compile":
        pytest.skip("--quick compiles nothing")
    replay(measure(workload, bench)[variant.label])
