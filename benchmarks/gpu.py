"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

Correctness of every op on this GPU, then times of the DiT and of every op, records, gates, and one
short table for each. It fits into ten minutes. In this order, so that what is dropped when time is
short is what matters least: tests, which must leave the next step its time; the DiTs of the paper
and of Wan 2.1 at their full sizes; ops, largest shapes first; the other networks. What the time
does not reach is listed, and each record is written as soon as it has something, so that an
interrupted run loses little.

Needs torch >= 2.11 with its triton, einops, numpy, safetensors and pytest; no network, and neither
pytest-benchmark nor the command line's packages. liger-kernel is measured beside ours where it is
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from apt.bench.ceilings import Ceilings, measure_ceilings
from apt.bench.dit import Workload, default_variants, measure_dit
from apt.bench.kernels import COMPILE, OpCase, cases_of, measure_op, variant_names
from apt.bench.machine import describe_machine, find_device
from apt.bench.ops import OPS
from apt.bench.records import Measurement, first_line
from apt.bench.shapes import SHAPES, default_shapes
from apt.bench.timing import Clock, clock_for
from apt.errors import InputError
from apt.kernels.roofline import Rates
from benchmarks.archive import RESULTS, Judged, judge
from benchmarks.workloads import RESERVED, WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("tests", "dit", "kernels")
TESTS = ("tests/kernels/test_gpu.py",)

CASE_SECONDS = 15  # of an op, with what it compiles
# Of a network: two of six variants are compiled, and each runs ten times (three to prepare, one to
# be checked, one to warm up, three to be timed, two for the profile), at 1.6 times the floor. This
# is arithmetic; nobody has measured it yet.
COMPILE_SECONDS = 60
FLOORS = 6 * 10 * 1.6


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work that is done whole or not at all.

    Attributes:
        step: of `STEPS`.
        name: for people.
        seconds: that must be left when it begins.
        run: does it.
    """

    step: str
    name: str
    seconds: float
    run: Callable[[], None]


class Session:
    """One run against the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.deadline = time.monotonic() + 60 * options.minutes
        self.device: torch.device = find_device(options.device)
        self.folder: Path = options.out
        self.commit: str | None = options.commit
        self.rehearsal = self.device.type == "cpu"
        self.clock: Clock = clock_for(self.device)
        self.ceilings: Ceilings = measure_ceilings(self.device, self.clock)
        self.measurements: dict[str, list[Measurement]] = {}
        self.judged: dict[str, Judged] = {}
        self.not_reached: list[str] = []
        self.failures: list[str] = []

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, topic: str, found: Sequence[Measurement]) -> None:
        """Keep measurements, and write all of the topic so far."""
        self.measurements.setdefault(topic, []).extend(found)
        before = self.judged.get(topic)
        judged = judge(
            topic,
            self.measurements[topic],
            self.ceilings,
            self.device,
            # One record for the whole run, however often it is written
            provenance=before.record.provenance if before else None,
            commit=self.commit,
        )
        judged.write(self.folder)
        self.judged[topic] = judged

    def run_tests(self, reserve: float) -> None:
        """Every op against fp64 on this device, in a process of its own.

        They stop at half of the time, and where `reserve` seconds are left.
        """
        if importlib.util.find_spec("pytest") is None:
            self.failures.append("pytest is missing: ops were checked only as they were timed")
            return
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
        print("+", " ".join(["python", *command[1:]]), flush=True)
        limit = max(min(self.seconds_left / 2, self.seconds_left - reserve), 1)
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit)
        except subprocess.TimeoutExpired:
            self.not_reached.append(f"the rest of the tests (their {limit:.0f} s were up)")
            return
        if done.returncode:
            self.failures.append(f"tests on the GPU failed (exit code {done.returncode})")

    def measure_network(self, workload: Workload) -> None:
        variants = [
            v for v in default_variants(self.device) if v.mode != "compile" or not self.rehearsal
        ]
        found = measure_dit(
            workload,
            variants,
            device=self.device,
            clock=self.clock,
            ceilings=self.ceilings,
            rounds=5,
            max_seconds=40,
        )
        self.add("dit", found)

    def measure_case(self, case: OpCase) -> None:
        found = measure_op(
            case,
            device=self.device,
            clock=self.clock,
            ceilings=self.ceilings,
            rounds=5 if self.rehearsal else 50,
            only=[v for v in variant_names(case.op) if v != COMPILE or not self.rehearsal],
            max_seconds=5,
        )
        self.add("kernels", found)

    def jobs(self, workloads: Sequence[Workload], cases: Sequence[OpCase]) -> list[Job]:
        """In the order of the module's docstring."""
        networks = [
            Job(
                step="dit",
                name=f"{w.model} {w.size}",
                seconds=network_seconds(w, self.ceilings),
                run=partial(self.measure_network, w),
            )
            for w in workloads
        ]
        ops = [
            Job(
                step="kernels",
                name=f"{case.op.name} {case.shape.name} {case.direction}",
                seconds=CASE_SECONDS,
                run=partial(self.measure_case, case),
            )
            for case in cases
        ]
        return [*networks[:RESERVED], *ops, *networks[RESERVED:]]

    def work(self, job: Job) -> None:
        """Do it if there is time; what breaks is a failure of the run, and ends nothing else."""
        if self.seconds_left < job.seconds and not self.rehearsal:
            self.not_reached.append(f"{job.step} {job.name}, which may take {job.seconds:.0f} s")
            return
        print(f"... {job.step}: {job.name}, {self.seconds_left:.0f} s left", flush=True)
        try:
            job.run()
        # What one case breaks is reported, with its traceback; the others still get their times
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{job.step} {job.name} {first_line(error)}")

    def finish(self) -> int:
        """Print what was found; the exit code is 1 if something failed."""
        for topic, judged in self.judged.items():
            print(f"\n{judged.report()}\n\nrecorded: {judged.record.stem}.json and .md")
            if judged.fails:
                wrong = [m.label for m in judged.wrong]
                self.failures.append(f"{topic}: {', '.join([*wrong, *judged.record.failed])}")
        for name in self.not_reached:
            print(f"not reached in time: {name}")
        for failure in self.failures:
            print(f"FAILED: {failure}")
        return 1 if self.failures else 0


def network_seconds(workload: Workload, ceilings: Ceilings) -> float:
    """What `Session.measure_network` is given, from the floor of one pass on this device."""
    rates = Rates(matmul_tflops=ceilings.matmul_tflops, memory_gb_s=ceilings.copy_gb_s)
    return COMPILE_SECONDS + FLOORS * workload.cost().floor(rates).matmul


def reserved_seconds(jobs: Sequence[Job]) -> float:
    """What the tests must leave: the time of the networks before the first op."""
    first_op = next((i for i, job in enumerate(jobs) if job.step == "kernels"), len(jobs))
    return sum(job.seconds for job in jobs[: min(first_op, RESERVED)])


def cases_in_order(device: torch.device) -> Iterator[OpCase]:
    """The largest shape of every op first: it is what the targets are about."""
    for shape in reversed(default_shapes(device)):
        for op in OPS.values():
            yield from cases_of(op, shape)


def chosen_workloads(device: str, models: Sequence[str] | None) -> list[Workload]:
    """Those of the models; None: all. Raises InputError for a model that a device does not run."""
    there = WORKLOADS[device]
    names = {w.model: None for w in there}
    for name in models or ():
        if name not in names:
            raise InputError(
                f"on {device} there is no model {name!r}; there are: {', '.join(names)}"
            )
    return [w for w in there if w.model in (models or names)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that were asked for; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        workloads = chosen_workloads(options.device, options.model)
        session = Session(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = describe_machine(session.device)
    print(f"{machine.device}, torch {machine.torch}, triton {machine.triton or 'absent'}")
    print(
        f"ceilings: copy {session.ceilings.copy_gb_s:.0f} GB/s, matmul "
        f"{session.ceilings.matmul_tflops:.4g} TFLOP/s",
        flush=True,
    )
    cases = list(cases_in_order(session.device))
    if options.shape:
        cases = [case for case in cases if case.shape.name in options.shape]
    jobs = [job for job in session.jobs(workloads, cases) if job.step in options.steps]
    if "tests" in options.steps and not session.rehearsal:
        session.run_tests(reserve=reserved_seconds(jobs))
    for job in jobs:
        session.work(job)
    return session.finish()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check every op on this GPU against fp64, time ops and networks, write records "
        "and judge them. What --minutes does not reach is listed at the end: run it again with "
        "--steps, --model or --shape.",
    )
    made.add_argument(
        "--minutes",
        type=float,
        default=9.5,
        help="begin nothing that may take longer than what is left of them (default: %(default)s)",
    )
    made.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        default=STEPS,
        help="tests: ops against fp64; dit: forward passes; kernels: times of ops (default: all)",
    )
    made.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        metavar="NAME",
        help=f"shapes of ops, of {', '.join(SHAPES)} (default: all that the device is meant for)",
    )
    models = dict.fromkeys(w.model for w in WORKLOADS["cuda"])
    made.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help=f"networks, of {', '.join(models)} (default: all)",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where records are written (default: benchmarks/results)",
    )
    made.add_argument("--commit", metavar="HASH", help="of a copy that is no git checkout")
    made.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu rehearses the command on small shapes: nothing is compiled, and no test is run",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
