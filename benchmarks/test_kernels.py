"""Each op of `apt.kernels`, forward and backward: ours, eager torch, torch.compile and Liger.

Correctness comes first: a variant whose outputs or gradients differ from fp64 is not timed. An op
that is added to `apt.bench.ops.OPS` is measured here without further changes.
"""

from __future__ import annotations

import functools

import pytest

from apt.bench.kernels import COMPILE, cases_of, is_ours, measure_op, variant_names
from apt.bench.machine import find_device
from apt.bench.ops import OPS
from apt.bench.records import Measurement
from apt.bench.shapes import default_shapes
from benchmarks.session import REPLAY_CLOCK, Bench, Replay

CASES = {
    f"{op.name}-{shape.name}-{case.direction}": case
    for op in OPS.values()
    for shape in default_shapes(find_device(None))
    for case in cases_of(op, shape)
}


@functools.cache
def measure(name: str, bench: Bench) -> dict[str, Measurement]:
    """Measure all variants of a case when the first of them is asked for."""
    case = CASES[name]
    names = variant_names(case.op)
    found = measure_op(
        case,
        device=bench.device,
        clock=bench.clock,
        ceilings=bench.ceilings,
        rounds=bench.rounds,
        only=[n for n in names if n != COMPILE] if bench.quick else None,
        max_seconds=bench.max_seconds,
    )
    bench.add("kernels", found)
    return {str(measurement.case["variant"]): measurement for measurement in found}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(
            name,
            variant,
            marks=pytest.mark.benchmark(group=name, timer=REPLAY_CLOCK),
            id=f"{name}-{variant}",
        )
        for name, case in CASES.items()
        for variant in variant_names(case.op)
    ],
)
def test_op(name: str, variant: str, bench: Bench, replay: Replay) -> None:
    if bench.quick and CASES[name].shape.name != "digits":
        pytest.skip("--quick measures only the digits' shape")
    measurement = measure(name, bench).get(variant)
    if measurement is None:
        pytest.skip("--quick compiles nothing")
    if measurement.status == "wrong" and not is_ours(CASES[name].op, variant):
        pytest.skip(f"the peer's result is wrong: {measurement.reason}")
    replay(measurement)
