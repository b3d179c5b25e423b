"""What the GPU command does in which order, what each piece may take, and how it is cut in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from apt.bench.ceilings import Ceilings
from apt.bench.dit import Workload, default_variants
from apt.bench.kernels import COMPILE, OpCase, cases_of, variant_names
from apt.bench.ops import OPS
from apt.bench.shapes import SHAPES, default_shapes
from apt.errors import InputError
from apt.kernels.roofline import Rates
from benchmarks.workloads import FIRST_NETWORKS, WORKLOADS

# Steps in order. What matters most is measured first: a wrong result has no time there either. The
# first call has the networks of `FIRST_NETWORKS` and the ops of `FIRST_SHAPES`, the second others.
CALLS = {
    "first": ("dit", "tests", "training", "kernels"),
    "second": ("sanitizer", "encoders", "dit", "kernels"),
}
STEPS = tuple(dict.fromkeys(step for steps in CALLS.values() for step in steps))
FIRST_SHAPES = {"cuda": ("720p",), "cpu": ("digits", "cpu")}

SECONDS = {"first": 540, "second": 240}
"""Of the two calls; NOTES.md says why. Without a call: both in a row."""

# (frames, height, width): what Wan 2.1 1.3B is published for, and the paper's video
WAN_CLIP, PAPER_CLIP = (81, 480, 832), (49, 720, 1280)

TESTS_SECONDS, SANITIZER_SECONDS = 120, 60  # at most

# By arithmetic: nobody has measured them yet. An op, with what is compiled for it and without.
CASE_SECONDS, UNCOMPILED_SECONDS = 15, 6
# Of a network: two of six variants are compiled, and each runs ten times (three to prepare, one to
# be checked, one to warm up, three to be timed, two for the profile), at 1.6 times the floor.
COMPILE_SECONDS = 60
FLOORS = 6 * 10 * 1.6


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work that a worker does whole or not at all.

    Attributes:
        step: of `STEPS`.
        name: for people, and unlike any other's.
        seconds: that must be left when it begins.
        call: "module:function".
        options: its arguments.
        parts: what it can be narrowed to with the option `only`, if it ends its process.
        alone: whether no other job shares its process, whose memory it needs.
    """

    step: str
    name: str
    seconds: float
    call: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    alone: bool = False

    @property
    def limit(self) -> float:
        """Seconds after which it hangs."""
        return 1.5 * self.seconds + 30

    def split(self) -> list[Job]:
        """Each part by itself. One that is compared with the first is run beside that."""
        first = self.parts[:1] if self.step == "dit" else ()
        return [
            replace(
                self,
                name=f"{self.name} {part} alone",
                seconds=self.seconds / 2,
                options=self.options | {"only": list(dict.fromkeys([*first, part]))},
                parts=(),
                alone=True,
            )
            for part in self.parts
        ]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one call does: steps in order; networks and ops, most important first."""

    steps: tuple[str, ...]
    workloads: tuple[Workload, ...]
    cases: tuple[OpCase, ...]


def choose(
    device: str,
    call: str,
    *,
    steps: Sequence[str] = STEPS,
    models: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
) -> Choice:
    """What a call does on "cuda" or "cpu", narrowed to steps, models and shapes.

    Raises InputError for a model that the device does not run.
    """
    there = WORKLOADS[device]
    known = {w.model: None for w in there}
    for name in models or ():
        if name not in known:
            raise InputError(
                f"on {device} there is no model {name!r}; there are: {', '.join(known)}"
            )
    first = call == "first"
    sizes = [SHAPES[s] for s in shapes] if shapes else default_shapes(torch.device(device))
    sizes = [s for s in sizes if (s.name in FIRST_SHAPES[device]) == first]
    return Choice(
        steps=tuple(step for step in CALLS[call] if step in steps),
        workloads=tuple(
            w
            for w in (there[:FIRST_NETWORKS] if first else there[FIRST_NETWORKS:])
            if w.model in (models or known)
        ),
        # The largest shape of every op first: it is what the targets are about
        cases=tuple(
            case
            for size in sorted(sizes, key=lambda size: -size.tokens)
            for op in OPS.values()
            for case in cases_of(op, size)
        ),
    )


def jobs_of(step: str, choice: Choice, ceilings: Ceilings) -> list[Job]:
    """The jobs of a step, most important first; none for tests and the sanitizer."""
    if step == "dit":
        return [network_job(w, ceilings) for w in choice.workloads]
    if step == "kernels":
        return [op_job(case) for case in choice.cases]
    return {"training": training_jobs, "encoders": encoder_jobs}.get(step, list)()


def network_job(w: Workload, ceilings: Ceilings) -> Job:
    """All variants of a forward pass; the time follows from its floor on this device."""
    rates = Rates(matmul_tflops=ceilings.matmul_tflops, memory_gb_s=ceilings.copy_gb_s)
    return Job(
        step="dit",
        name=f"{w.model} {w.size}",
        seconds=COMPILE_SECONDS + FLOORS * w.cost().floor(rates).matmul,
        call="benchmarks.steps:network",
        options={"workload": asdict(w)},
        parts=tuple(v.label for v in default_variants(torch.device("cuda"))),
        alone=True,
    )


def op_job(case: OpCase) -> Job:
    """The variants of an op at one shape; what torch.compile makes of it, which takes most of the
    time, at the first shapes alone."""
    first = case.shape.name in FIRST_SHAPES["cuda"]
    variants = [v for v in variant_names(case.op) if first or v != COMPILE]
    return Job(
        step="kernels",
        name=f"{case.op.name} {case.shape.name} {case.direction}",
        seconds=CASE_SECONDS if first else UNCOMPILED_SECONDS,
        call="benchmarks.steps:op",
        options={
            "name": case.op.name,
            "shape": case.shape.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "direction": case.direction,
            "only": variants,
        },
        parts=tuple(variants),
    )


def training_jobs() -> list[Job]:
    """The training check: 90 seconds."""
    return [
        Job(
            step="training",
            name="first losses",
            seconds=25,
            call="benchmarks.steps:curve",
            options={"max_seconds": 10},
        ),
        Job(
            step="training",
            name="speed",
            seconds=50,
            call="benchmarks.steps:speed",
            options={"max_seconds": 24},
            parts=("triton", "reference"),
        ),
        Job(step="training", name="large step", seconds=15, call="benchmarks.steps:large_step"),
    ]


def encoder_jobs() -> list[Job]:
    """Wan's clip and bf16 first; fp32, which the pipeline takes by default, at the end."""

    def decode(size: tuple[int, int, int], dtype: str) -> Job:
        return Job(
            step="encoders",
            name=f"VAE decode {'x'.join(map(str, size))} {dtype}",
            seconds=25,
            call="benchmarks.steps:vae",
            options={"size": list(size), "dtype": dtype},
        )

    text = Job(step="encoders", name="text encoder", seconds=20, call="benchmarks.steps:text")
    return [
        decode(WAN_CLIP, "bfloat16"),
        text,
        decode(PAPER_CLIP, "bfloat16"),
        decode(WAN_CLIP, "float32"),
    ]
