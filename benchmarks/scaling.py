"""Samples per second of each training stage on several ranks, against one.

    python -m benchmarks.scaling --ranks 1 2 4                       # CPU ranks of this machine
    python -m benchmarks.scaling --ranks 1 2 4 8 --device cuda       # GPUs, in bf16
    python -m benchmarks.scaling --ranks 1 8 --sequence 8 --device cuda

It trains the digits' stages with the same batch for any number of ranks: the recipes' batch on a
GPU, a quarter of it on a CPU. Each number of ranks runs under its own torchrun. They take turns for
several rounds, so that other load on the machine affects all of them alike.

On CPU ranks only ratios are meaningful. The ratio of samples per second is a speed-up only if every
rank has a core to itself. `work` is the processor time of all ranks together, relative to the first
number of ranks: the cost of several ranks, whatever else uses the cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from apt.bench.machine import describe_machine, describe_run, find_device
from apt.bench.records import Measurement, Record, write_record
from apt.bench.tables import markdown, record_table
from apt.bench.timing import median
from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel
from benchmarks.training import STAGES, stage_config, steady, train

ROOT = Path(__file__).parents[1]

Times = dict[str, dict[str, list[float]]]
"""By stage, for each update after the warm-up, in milliseconds: "clock" is the time of the update,
"work" the processor time of all ranks."""

_BATCH = {"cpu": 8, "cuda": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """The training to time."""

    stages: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    batch_size: int
    sequence: int
    updates: int

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        return "bf16" if self.device == "cuda" else "fp32"


def measure_ranks(trial: Trial) -> Times:
    """Return the times of each stage on the ranks of this launch. Collective."""
    found: Times = {}
    with Parallel.from_environment(trial.device) as ranks:
        shared = ParallelConfig(sequence=min(trial.sequence, ranks.world_size))
        parallel = ranks.laid_out(shared)
        for stage in trial.stages:
            config = stage_config(stage, precision=trial.precision)
            config = dataclasses.replace(config, parallel=shared, batch_size=trial.batch_size)
            done, work = [], []
            begin = time.process_time()
            for update in train(config, parallel, trial.updates):
                done.append(update)
                work.append((time.process_time() - begin) * 1e3)
                begin = time.process_time()
            clock = list(steady(done))
            of_all = [sum(ranks.of_each(mine)) for mine in work]
            found[stage] = {"clock": clock, "work": of_all[-len(clock) :]}
            if parallel.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def launch(ranks: int, trial: Trial) -> Times:
    """Return `measure_ranks` of a torchrun with so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(ranks), "-m", "benchmarks.scaling", "--write", str(out),
            "--device", trial.device, "--sequence", str(trial.sequence),
            "--updates", str(trial.updates), "--batch-size", str(trial.batch_size),
            "--stages", *trial.stages,
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        found: Times = json.loads(out.read_text(encoding="utf-8"))
        return found


def measure(
    numbers: Sequence[int], trial: Trial, rounds: int, max_seconds: float
) -> dict[int, list[Times]]:
    """Return the times of each number of ranks, round by round.

    Each round begins with the next number. Stops after the round that exceeds `max_seconds`.
    """
    found: dict[int, list[Times]] = {ranks: [] for ranks in numbers}
    began = time.monotonic()
    for number in range(rounds):
        first = number % len(numbers)
        for ranks in [*numbers[first:], *numbers[:first]]:
            times = launch(ranks, trial)
            found[ranks].append(times)
            speeds = [
                f"{stage} {trial.batch_size / median(taken['clock']) * 1e3:.3g}"
                for stage, taken in times.items()
            ]
            words = f"round {number + 1} of {rounds}, ranks {ranks}: {', '.join(speeds)} samples/s"
            print(f"{words}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        if time.monotonic() - began > max_seconds:
            break
    return found


def measurements(found: Mapping[int, Sequence[Times]], trial: Trial) -> list[Measurement]:
    """Compare each stage on each number of ranks with the first number.

    Ratios are of medians within one round. The figures are the median over rounds and, for the
    clock, also the lowest and the highest.
    """
    reference = next(iter(found.values()))
    made = []
    for stage in trial.stages:
        for ranks, rounds in found.items():

            def times_first(
                kind: str, stage: str = stage, rounds: Sequence[Times] = rounds
            ) -> list[float]:
                return [
                    median(times[stage][kind]) / median(base[stage][kind])
                    for base, times in zip(reference, rounds, strict=True)
                ]

            faster = [1 / ratio for ratio in times_first("clock")]
            samples = tuple(taken for times in rounds for taken in times[stage]["clock"])
            case: dict[str, str | int] = {
                "stage": stage,
                "ranks": ranks,
                "sequence": min(trial.sequence, ranks),
                "batch": trial.batch_size,
                "precision": trial.precision,
            }
            metrics = {
                "samples/s": trial.batch_size / median(samples) * 1e3,
                "ratio": median(faster),
                "lowest": min(faster),
                "highest": max(faster),
            }
            if trial.device == "cpu":
                metrics["work"] = median(times_first("work"))
            made.append(Measurement(case=case, samples_ms=samples, metrics=metrics))
    return made


def make_record(made: Sequence[Measurement], trial: Trial, load: float) -> Record:
    """Make the record of a run; `load` is that of the machine before it."""
    note = ""
    if trial.device == "cpu":
        note = (
            f"CPU ranks of one thread each, on {os.cpu_count()} cores shared with other jobs (load "
            f"{load:.1f} before the run, {os.getloadavg()[0]:.1f} after it), so only ratios are "
            "meaningful. Ratio: samples per second relative to the first number of ranks, with the "
            "lowest and highest of all rounds; a speed-up only if every rank has a core to itself. "
            "Work: processor time of all ranks together, relative to the first number of ranks."
        )
    return Record(
        topic="scaling",
        note=note,
        provenance=describe_run(),
        machine=describe_machine(find_device(trial.device)),
        ceilings={},
        measurements=tuple(made),
    )


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, help="samples of an update, over all ranks")
    parser.add_argument("--sequence", type=int, default=1, help="ranks that share a sample")
    parser.add_argument(
        "--updates", type=int, default=6, help="per launch; the first three warm up"
    )
    parser.add_argument("--rounds", type=int, default=3, help="launches of each number of ranks")
    parser.add_argument(
        "--max-seconds", type=float, default=600, help="start no further round after this time"
    )
    parser.add_argument("--out", type=Path, help="folder for the record; by default none is kept")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    trial = Trial(
        stages=tuple(options.stages),
        device=options.device,
        batch_size=options.batch_size or _BATCH[options.device],
        sequence=options.sequence,
        updates=options.updates,
    )
    if options.write is not None:  # a rank of a launch
        times = measure_ranks(trial)
        if os.environ.get("RANK", "0") == "0":
            options.write.write_text(json.dumps(times), encoding="utf-8")
        return
    load = os.getloadavg()[0]
    found = measure(options.ranks, trial, options.rounds, options.max_seconds)
    made = measurements(found, trial)
    record = make_record(made, trial, load)
    print("\n\n".join(part for part in (record.note, record_table(record)) if part))
    if options.out is not None:
        page = write_record(record, options.out).with_suffix(".md")
        page.write_text(markdown(record, []), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
