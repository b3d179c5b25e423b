"""The plan of the GPU command: its order, the time for each piece, and its two calls."""

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

# Steps in order, the most important first; those that measure also check results. The first call
# has the networks of `FIRST_NETWORKS` and the ops of `FIRST_SHAPES`, the second has the others.
CALLS = {
    "first": ("dit", "tests", "training", "kernels"),
    "second": ("sanitizer", "encoders", "dit", "kernels"),
}
STEPS = tuple(dict.fromkeys(step for steps in CALLS.values() for step in steps))
FIRST_SHAPES = {"cuda": ("720p",), "cpu": ("digits", "cpu")}

SECONDS = {"first": 540, "second": 240}
"""Time for each call; NOTES.md says why. Without `--call`, both run one after the other."""

# (frames, height, width): the size that Wan 2.1 1.3B is published for, and the paper's
WAN_CLIP, PAPER_CLIP = (81, 480, 832), (49, 720, 1280)

TESTS_SECONDS, SANITIZER_SECONDS = 120, 60  # at most

# Estimates, not measured yet. For an op, with and without compilation.
CASE_SECONDS, UNCOMPILED_SECONDS = 15, 6
# For a network: two of six variants are compiled, and each runs ten times (three to prepare, one to
# check, one to warm up, three to time, two for the profile), at 1.6 times the floor.
COMPILE_SECONDS = 60
FLOORS = 6 * 10 * 1.6


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work that a worker does completely or not at all.

    Attributes:
        step: one of `STEPS`.
        name: unique name, for people.
        seconds: time that must be left when it starts.
        call: "module:function".
        options: arguments of the function.
        parts: values for the option `only`, to run it in parts if it kills its process.
        alone: whether it needs its own process, for the memory.
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
        """Seconds after which the job counts as hung."""
        return 1.5 * self.seconds + 30

    def split(self) -> list[Job]:
        """Return a job for each part. Networks also run the first part, to compare with it."""
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
    """The work of one call: steps in order; networks and ops, most important first."""

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
    """Return the work of a call on "cuda" or "cpu", restricted to steps, models and shapes.

    Raises InputError for a model that is not measured on the device.
    """
    there = WORKLOADS[device]
    known = {w.model: None for w in there}
    for name in models or ():
        if name not in known:
            raise InputError(
                f"model {name!r} is not measured on {device}; choose from: {', '.join(known)}"
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
        # The largest shape of every op first: the targets are for that
        cases=tuple(
            case
            for size in sorted(sizes, key=lambda size: -size.tokens)
            for op in OPS.values()
            for case in cases_of(op, size)
        ),
    )


def jobs_of(step: str, choice: Choice, ceilings: Ceilings) -> list[Job]:
    """Return the jobs of a step, most important first; none for tests and the sanitizer."""
    if step == "dit":
        return [network_job(w, ceilings) for w in choice.workloads]
    if step == "kernels":
        return [op_job(case) for case in choice.cases]
    return {"training": training_jobs, "encoders": encoder_jobs}.get(step, list)()


def network_job(w: Workload, ceilings: Ceilings) -> Job:
    """Return the job for all variants of a forward pass; its time follows from the floor here."""
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
    """Return the job for the variants of an op at one shape.

    torch.compile, which takes most of the time, is included at the first shapes only.
    """
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
    """Return the jobs of the training check, 90 seconds in all."""
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
    """Return the VAE and text encoder jobs: bf16 first, then fp32, the pipeline's default."""

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
