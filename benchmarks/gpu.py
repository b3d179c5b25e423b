"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu`.

Correctness of every op on this GPU, then times of the DiT and of every op, records, gates, and one
short table. It fits into ten minutes: what the time does not reach is listed, and each record is
written as soon as it has something, so that an interrupted run loses little.

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
from collections.abc import Iterator, Sequence
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
from benchmarks.archive import RESULTS, Judged, judge
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("tests", "dit", "kernels")
TESTS = ("tests/kernels/test_gpu.py",)


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

    def run_tests(self) -> None:
        """Every op against fp64 on this device, in a process of its own."""
        if importlib.util.find_spec("pytest") is None:
            self.failures.append("pytest is missing: ops were checked only as they were timed")
            return
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
        print("+", " ".join(["python", *command[1:]]), flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=max(self.seconds_left / 2, 1))
        except subprocess.TimeoutExpired:
            self.not_reached.append("the rest of the tests (half of the time was up)")
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
            max_seconds=60,
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
    if "tests" in options.steps and not session.rehearsal:
        session.run_tests()
    networks = [
        ("dit", f"{w.model} {w.size}", lambda w=w: session.measure_network(w)) for w in workloads
    ]
    for step, name, work in [
        *networks[:1],
        *(
            (
                "kernels",
                f"{case.op.name} {case.shape.name} {case.direction}",
                lambda case=case: session.measure_case(case),
            )
            for case in cases
        ),
        *networks[1:],
    ]:
        if step not in options.steps:
            continue
        # A case of an op takes seconds, a network up to two minutes
        if session.seconds_left < (15 if step == "kernels" else 120) and not session.rehearsal:
            session.not_reached.append(name)
            continue
        print(f"... {step}: {name}, {session.seconds_left:.0f} s left", flush=True)
        try:
            work()
        # What one case breaks is reported, with its traceback; the others still get their times
        except Exception as error:
            traceback.print_exc()
            session.failures.append(f"{step} {name} {first_line(error)}")
    return session.finish()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure everything on this GPU."
    )
    made.add_argument("--minutes", type=float, default=9.5, help="stop starting new work after")
    made.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="what to do")
    made.add_argument("--shape", nargs="+", choices=SHAPES, help="shapes of ops (default: all)")
    made.add_argument("--model", nargs="+", help="models of the networks (default: all)")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for records")
    made.add_argument("--commit", help="of this copy, where it is no git checkout")
    made.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu rehearses the command on small shapes; nothing is compiled",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
