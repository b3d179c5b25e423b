"""Everything that needs a GPU, in one command: `python -m benchmarks.gpu --out FOLDER`.

It times the DiTs of the paper and of Wan 2.1 at full size, checks every op against fp64, runs a
training check, and times every op, the VAE and the text encoder. It writes records, checks gates
and prints one short table at the end. `--call first` and `--call second` split it in two, for
machines that are lent for minutes. NOTES.md says what to do with each outcome.

Every step and every network runs in its own process. An illegal access kills only that process; its
work is named, and measured again variant by variant at the end. Work that does not fit into the
time is listed. Each record is written as soon as it has a measurement, so an interrupted run loses
little.

It needs torch >= 2.11 with its triton, einops, numpy, pillow, safetensors, scikit-learn (for the
digits that are trained on) and pytest. It needs no network, no pytest-benchmark and none of the
command line's packages. Parts that need diffusers, transformers or liger-kernel are skipped without
them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apt.bench.ceilings import Ceilings
from apt.bench.machine import Provenance, describe_machine, describe_run, find_device
from apt.bench.records import Measurement, write_record
from apt.bench.shapes import SHAPES
from apt.errors import InputError
from apt.files import write_text
from benchmarks import plan
from benchmarks.archive import RESULTS, Judged, judge
from benchmarks.events import Event
from benchmarks.plan import CALLS, STEPS, Choice, Job
from benchmarks.pytest_events import VARIABLE
from benchmarks.summary import TestCounts, summary_table
from benchmarks.watch import Exit, watch
from benchmarks.workloads import WORKLOADS

TESTS = ("tests/kernels/test_gpu.py", "tests/kernels")
# Sizes that no tile divides, where a wrong kernel would read or write out of bounds
SANITIZED = ("tests/kernels/test_gpu.py", "-k", "test_accuracy and triton and (3x77x120 or 1x1x64)")
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")

TEST_LIMIT = 120  # seconds for one test, compilation included
START_LIMIT = 120  # seconds before a process's first piece of work, and between two


@dataclass(frozen=True)
class Failure:
    """A failure, and its output or traceback."""

    name: str
    text: str = ""


class Session:
    """One run with a deadline."""

    def __init__(self, options: argparse.Namespace, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.device: torch.device = find_device(options.device)
        self.folder: Path = options.out or RESULTS
        self.provenance: Provenance = describe_run()  # one for all records
        if options.commit is not None:
            self.provenance = replace(self.provenance, commit=options.commit)
        self.rehearsal = self.device.type == "cpu"
        self.ceilings: Ceilings | None = None
        self.measurements: dict[str, list[Measurement]] = {}
        self.judged: dict[str, Judged] = {}
        self.checks: dict[str, str] = {}
        self.again: list[Job] = []
        self.not_reached: dict[str, list[str]] = {}  # names by step
        self.failures: list[Failure] = []
        self.temporary = Path(tempfile.mkdtemp(prefix="apt-benchmarks-"))

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def measure_ceilings(self) -> bool:
        """Measure the device's rates; return False if that fails, and nothing can be measured."""
        job = Job(step="ceilings", name="ceilings", seconds=1, call="benchmarks.steps:ceilings")
        self.run_jobs([job])
        return self.ceilings is not None

    def run(self, choice: Choice) -> None:
        """Run the steps of a call, in order."""
        assert self.ceilings is not None
        if self.rehearsal:  # one process: a CPU needs no isolation
            checks = [step for step in choice.steps if step in ("tests", "sanitizer")]
            self.checks |= dict.fromkeys(checks, "not run: they need a GPU")
            self.run_jobs([j for s in choice.steps for j in plan.jobs_of(s, choice, self.ceilings)])
            return
        for step in choice.steps:
            if step == "tests":
                self.run_tests("tests", [*TESTS], plan.TESTS_SECONDS)
            elif step == "sanitizer":
                self.run_sanitizer()
            else:
                self.run_step(plan.jobs_of(step, choice, self.ceilings))

    def run_step(self, jobs: Sequence[Job]) -> None:
        """Run jobs that need their own process one by one, then the others together."""
        alone = [job for job in jobs if job.alone]
        for job in alone:
            self.run_jobs([job])
        together = [job for job in jobs if job not in alone]
        if together:
            self.run_jobs(together)

    def run_again(self) -> None:
        """Run the jobs that killed their process again, variant by variant, to time the others."""
        again, self.again = self.again, []
        self.run_step(again)

    def run_jobs(self, jobs: Sequence[Job]) -> None:
        """Run jobs in a worker, and start another worker after each job that kills it."""
        by_name = {job.name: job for job in jobs}
        folder = Path(tempfile.mkdtemp(dir=self.temporary))
        context = {
            "device": self.device.type,
            "rehearsal": self.rehearsal,
            "ceilings": None if self.ceilings is None else self.ceilings.as_dict(),
        }
        told = {"context": context, "deadline": self.deadline, "jobs": [asdict(j) for j in jobs]}
        (folder / "plan.json").write_text(json.dumps(told), encoding="utf-8")
        events, begun = folder / "events.jsonl", set[str]()

        def on_event(event: Event) -> None:
            name = event["name"]
            if event["kind"] in ("begin", "skip"):
                begun.add(name)
            if event["kind"] == "begin":
                left = f"{self.seconds_left:.0f} s left"
                print(f"... {by_name[name].step}: {name}, {left}", flush=True)
            elif event["kind"] == "skip":
                self.miss(by_name[name])
            elif event["kind"] == "end":
                self.take(by_name[name], event)

        def on_death(death: Exit) -> None:
            if death.name:
                self.lose(by_name[death.name], death.reason, death.output, time_up=death.time_up)
            elif not begun and not death.time_up:
                self.fail(f"{jobs[0].step}: the process {death.reason}", death.output)

        # Limits are for GPUs; a rehearsal on a busy CPU ends at the deadline only
        patience = math.inf if self.rehearsal else 1.0
        watch(
            [sys.executable, "-m", "benchmarks.worker", str(folder / "plan.json"), str(events)],
            events,
            limit=lambda name: patience * by_name[name].limit,
            start_limit=patience * START_LIMIT,
            deadline=self.deadline,
            on_event=on_event,
            on_death=on_death,
        )
        for name in by_name:
            if name not in begun:
                self.miss(by_name[name])

    def take(self, job: Job, event: Event) -> None:
        """Take the result of a job: measurements, a traceback, or an unusable GPU."""
        if "lost" in event:
            text = event.get("traceback") or reasons(event.get("measurements", ()))
            self.lose(job, f"left the GPU unusable: {event['lost']}", text)
        elif "traceback" in event:
            self.fail(f"{job.step}: {job.name}", event["traceback"])
        elif "ceilings" in event:
            self.ceilings = Ceilings.from_dict(event["ceilings"])
        else:
            self.add(job.step, read_measurements(event["measurements"]))

    def lose(self, job: Job, reason: str, text: str, *, time_up: bool = False) -> None:
        """Note a job that killed its process."""
        if time_up:
            self.not_reached.setdefault(job.step, []).append(f"the rest of {job.name}")
            return
        self.fail(f"{job.step}: {job.name} {reason}", text)
        self.again += job.split()

    def add(self, topic: str, found: Sequence[Measurement]) -> None:
        """Keep measurements, and write the topic's record so far."""
        assert self.ceilings is not None
        self.measurements.setdefault(topic, []).extend(found)
        judged = judge(
            topic,
            self.measurements[topic],
            self.ceilings,
            self.device,
            provenance=self.provenance,
        )
        write_record(judged.record, self.folder)
        self.judged[topic] = judged

    def run_tests(
        self,
        name: str,
        chosen: list[str],
        seconds: float,
        *,
        under: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Exit | None:
        """Run GPU tests in their own process, and start another after each test that kills it.

        Args:
            name: name of the check.
            chosen: arguments of pytest.
            seconds: time limit.
            under: a command to run pytest under.
            env: variables added to this process's environment.

        Returns:
            How the last process ended; None if nothing was run.
        """
        if importlib.util.find_spec("pytest") is None:
            self.fail(f"{name}: pytest is missing, so ops are checked only when they are timed")
            return None
        events = Path(tempfile.mkdtemp(dir=self.temporary)) / "events.jsonl"
        command = [*under, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.pytest_events", *chosen]
        print(f"... {name}: pytest {' '.join(chosen)}, {self.seconds_left:.0f} s left", flush=True)
        counts = TestCounts()

        def on_event(event: Event) -> None:
            if event["kind"] == "collected":
                counts.collected = counts.collected or event["number"]
            elif event["kind"] == "end":
                counts.add(event["outcome"])
                if event["outcome"] == "failed":
                    lost = f" left the GPU unusable: {event['lost']}" if "lost" in event else ""
                    self.fail(f"{name}: {event['name']}{lost}", event["traceback"])

        def on_death(death: Exit) -> None:
            if death.time_up:
                self.not_reached.setdefault(name, []).append("the rest of them")
            elif death.name:
                counts.add("failed")
                self.fail(f"{name}: {death.name} {death.reason}", death.output)
            elif not counts.collected:
                self.fail(f"{name}: pytest {death.reason}", death.output)

        ended = watch(
            command,
            events,
            limit=lambda test: TEST_LIMIT,
            start_limit=START_LIMIT,
            deadline=min(self.deadline, time.monotonic() + seconds),
            on_event=on_event,
            on_death=on_death,
            # No other plugin is needed
            env={VARIABLE: str(events), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **(env or {})},
        )
        self.checks[name] = str(counts)
        return ended

    def run_sanitizer(self) -> None:
        """Run the ragged kernel tests under compute-sanitizer, if it is installed."""
        tool = next(filter(None, map(shutil.which, SANITIZERS)), None)
        if tool is None:
            self.checks["sanitizer"] = "skipped: compute-sanitizer is not installed"
            return
        errors = 9  # exit code
        under = [tool, "--tool", "memcheck", "--error-exitcode", str(errors)]
        # Each tensor gets its own allocation, so that accesses past its end are noticed
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        seconds = plan.SANITIZER_SECONDS
        ended = self.run_tests("sanitizer", [*SANITIZED], seconds, under=under, env=alone)
        if ended is not None and ended.code == errors:
            self.fail("sanitizer: accesses out of bounds", ended.output)

    def miss(self, job: Job) -> None:
        self.not_reached.setdefault(job.step, []).append(f"{job.name} ({job.seconds:.0f} s)")

    def fail(self, name: str, text: str = "") -> None:
        self.failures.append(Failure(name, text))

    def finish(self) -> int:
        """Write the page, print its short form, and return exit code 1 if something failed."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        for topic, judged in self.judged.items():
            if judged.fails:
                names = [*(m.label for m in judged.wrong), *judged.record.failed]
                self.fail(f"{topic}: {len(names)} wrong, or failed a gate", "\n".join(names))
        table = summary_table(self.checks, self.measurements)
        missed = [
            f"not reached in time: {step}: {', '.join(names)}"
            for step, names in self.not_reached.items()
        ]
        failed = [f"FAILED: {failure.name}" for failure in self.failures]
        texts = [
            f"FAILED: {failure.name}\n\n```\n{failure.text.rstrip()}\n```"
            for failure in self.failures
            if failure.text
        ]
        if self.judged:
            parts = ["\n".join([*missed, *failed]), table, *texts]
            pages = [judged.page() for judged in self.judged.values()]
            stem = next(iter(self.judged.values())).record.stem.rpartition("_")[0]
            page = "# One run of `benchmarks.gpu`\n\n" + "\n\n".join(filter(None, parts))
            write_text(self.folder / f"{stem}_gpu.md", "\n\n".join([page, *pages]))
        for failure in self.failures:
            if failure.text:
                print(f"\nFAILED: {failure.name}\n{shortened(failure.text)}")
        print("\n".join(["", *missed, *failed, "", table, "", where(self.folder)]), flush=True)
        return 1 if self.failures else 0


def read_measurements(found: Sequence[dict[str, Any]]) -> list[Measurement]:
    """Read what `benchmarks.steps.told` returned."""
    return [Measurement(**m | {"samples_ms": tuple(m["samples_ms"])}) for m in found]


def reasons(measurements: Sequence[dict[str, Any]]) -> str:
    """Return why measurements are wrong, in the order in which they were tried."""
    return "\n".join(
        f"{' '.join(map(str, m['case'].values()))}: {m['reason']}"
        for m in measurements
        if m["status"] == "wrong"
    )


def shortened(text: str, lines: int = 12) -> str:
    """Return the end of a traceback; the page has all of it."""
    kept = text.rstrip().splitlines()
    return "\n".join([*(["..."] if len(kept) > lines else []), *kept[-lines:]])


def where(folder: Path) -> str:
    """Say where the records are, which must be copied from a machine that is lent."""
    return f"RECORDS ARE IN {folder}" + (
        "" if folder != RESULTS else "  (--out was not given: on a lent machine, copy them away)"
    )


def kernels_in_cache() -> str:
    """Say how many kernels Triton finds in its cache, which may come from another machine."""
    default = Path.home() / ".triton" / "cache"
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or default)
    found = len(list(folder.glob("*/*.cubin")))
    named = "" if "TRITON_CACHE_DIR" in os.environ else "; set TRITON_CACHE_DIR to use another"
    return f"Triton's cache holds {found} kernels{named}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen calls and return the exit code."""
    options = parser().parse_args(argv)
    calls = [options.call] if options.call else list(CALLS)
    seconds = sum(plan.SECONDS[call] for call in calls)
    if options.minutes is not None:
        seconds = 60 * options.minutes
    try:
        choices = [
            plan.choose(
                options.device,
                call,
                steps=options.steps,
                models=options.model,
                shapes=options.shape,
            )
            for call in calls
        ]
        session = Session(options, seconds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe_machine(session.device).describe())
    print(f"{where(session.folder)}\n{kernels_in_cache()}\n{seconds:.0f} s", flush=True)
    if session.measure_ceilings():
        assert session.ceilings is not None
        print(f"ceilings: {session.ceilings.describe()}", flush=True)
        for choice in choices:
            session.run(choice)
        session.run_again()
    print(kernels_in_cache())
    return session.finish()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check every op on this GPU against fp64, time networks, ops and training, "
        "write records and judge them. Work that does not fit into the time is listed at the end: "
        "run it with --steps, --model or --shape.",
    )
    budgets = ", ".join(f"{call} {seconds} s" for call, seconds in plan.SECONDS.items())
    made.add_argument(
        "--call",
        choices=tuple(CALLS),
        help="first: the networks of the paper and of Wan, tests, the training check, ops at 720p; "
        "second: the sanitizer, VAE and text encoder, other networks, ops at other sizes "
        "(default: first, then second)",
    )
    made.add_argument(
        "--minutes",
        type=float,
        help=f"time limit; work that may not fit into it is not started (default: {budgets})",
    )
    made.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, help="steps of the call (default: all)"
    )
    made.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        metavar="NAME",
        help=f"shapes of ops: {', '.join(SHAPES)} (default: all that are meant for the device)",
    )
    models = dict.fromkeys(w.model for w in WORKLOADS["cuda"])
    made.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help=f"networks: {', '.join(models)} (default: all)",
    )
    made.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for records (default: benchmarks/results)",
    )
    made.add_argument("--commit", metavar="HASH", help="commit of a copy that has no git history")
    made.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu rehearses the command on small shapes, without compilation and without tests",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
