"""`diffusion-apt bench kernels`: time the fused ops on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from apt.cli.app import parse
from apt.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BenchKernels:
    """Time the fused ops, forward and backward, against eager torch, torch.compile and Liger.

    Every variant is first checked against fp64, and is not timed if it is wrong. Percentages are of
    this machine's rates for copies and matrix products, measured in the same run.
    """

    op: tuple[str, ...] = ()
    """Ops to time; by default all."""
    shape: tuple[str, ...] = ()
    """digits, 1024px, 480p, 720p, cpu; by default those that suit the device."""
    variant: tuple[str, ...] = ()
    """Variants to time: triton, eager, compile, liger, or attention backends; by default all."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type; auto is that of the models with each shape."""
    rounds: int = 50
    """Timing samples per variant; the variants take turns."""
    max_seconds: float = 10.0
    """Time limit per case, for all variants together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Measure and print one table. Exits with 1 if a result of our own kernels was wrong."""
    options = parse(BenchKernels, args, prog=prog)

    import torch

    from apt.bench.ceilings import measure_ceilings
    from apt.bench.kernels import cases_of, is_ours, measure_op, variant_names
    from apt.bench.machine import describe_machine, describe_run, find_device
    from apt.bench.ops import OPS
    from apt.bench.records import Measurement, Record
    from apt.bench.shapes import SHAPES, default_shapes
    from apt.bench.tables import record_table
    from apt.bench.timing import check_rounds, clock_for
    from apt.cli.progress import progress_bar

    ops = [OPS[name] for name in known(options.op, OPS, "op") or OPS]
    device = find_device(None if options.device == "auto" else options.device)
    chosen = known(options.shape, SHAPES, "shape")
    shapes = [SHAPES[name] for name in chosen] or default_shapes(device)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    known(options.variant, {name: op for op in ops for name in variant_names(op)}, "variant")
    check_rounds(options.rounds)

    clock = clock_for(device)
    ceilings = measure_ceilings(device, clock)
    cases = [case for shape in shapes for op in ops for case in cases_of(op, shape, dtype)]
    found: list[Measurement] = []
    with progress_bar("measuring", len(cases)) as update:
        for number, case in enumerate(cases, start=1):
            names = variant_names(case.op)
            only = [name for name in names if not options.variant or name in options.variant]
            found += measure_op(
                case,
                device=device,
                clock=clock,
                ceilings=ceilings,
                rounds=options.rounds,
                only=only,
                max_seconds=options.max_seconds,
            )
            update(number)
    record = Record(
        topic="kernels",
        note="",
        provenance=describe_run(),
        machine=describe_machine(device),
        ceilings=ceilings.as_dict(),
        measurements=tuple(found),
    )
    print(record.machine.describe())
    print(f"measured {ceilings.describe()}")
    print(f"\n{record_table(record)}")
    if any(
        m.status == "wrong" and is_ours(OPS[str(m.case["op"])], str(m.case["variant"]))
        for m in found
    ):
        sys.exit(
            "some results of our own kernels are wrong on this machine (see above); please report "
            "this"
        )


def known(names: Sequence[str], existing: Iterable[str], what: str) -> list[str]:
    """Return the names unchanged. Raises InputError for an unknown one."""
    choices = list(existing)
    for name in names:
        if name not in choices:
            raise InputError(f"unknown {what} {name!r}; choose from: {', '.join(choices)}")
    return list(names)
