"""Samples per second of each training stage on several ranks, against one.

    python -m benchmarks.scaling --ranks 1 2 4                       # CPU ranks of this machine
    python -m benchmarks.scaling --ranks 1 2 4 8 --device cuda       # GPUs, in bf16
    python -m benchmarks.scaling --ranks 1 8 --sequence 8 --device cuda

The digits' stages, with a batch that is the same for any number of ranks: on a GPU the recipes',
on a CPU half of it. Every number of ranks is a torchrun of its own, and they take turns for
several rounds, so that another load on the machine falls on all alike. On CPU ranks the ratios
alone mean anything; with more ranks than cores, they show what ranks cost and no speed-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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

Times = dict[str, list[float]]
"""Milliseconds of each update after those that warm up, by stage."""

_BATCH = {"cpu": 16, "cuda": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What is timed."""

    stages: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    batch_size: int
    sequence: int
    updates: int

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        return "bf16" if self.device == "cuda" else "fp32"


def measure_ranks(trial: Trial) -> Iterator[tuple[str, list[float]]]:
    """The times of each stage on the ranks of this launch; collective."""
    with Parallel.from_environment(trial.device) as ranks:
        shared = ParallelConfig(sequence=min(trial.sequence, ranks.world_size))
        parallel = ranks.laid_out(shared)
        for stage in trial.stages:
            config = stage_config(stage, precision=trial.precision)
            config = dataclasses.replace(config, parallel=shared, batch_size=trial.batch_size)
            yield stage, list(steady(list(train(config, parallel, trial.updates))))
            if parallel.device.type == "cuda":
                torch.cuda.empty_cache()


def launch(ranks: int, trial: Trial) -> Times:
    """The same under a torchrun of so many ranks."""
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


def measure(numbers: Sequence[int], trial: Trial, rounds: int) -> dict[int, list[Times]]:
    """The times of each number of ranks, round by round; each round begins with another."""
    found: dict[int, list[Times]] = {ranks: [] for ranks in numbers}
    for number in range(rounds):
        first = number % len(numbers)
        for ranks in [*numbers[first:], *numbers[:first]]:
            times = launch(ranks, trial)
            found[ranks].append(times)
            speeds = [
                f"{stage} {trial.batch_size / median(taken) * 1e3:.3g}"
                for stage, taken in times.items()
            ]
            words = f"round {number + 1} of {rounds}, ranks {ranks}: {', '.join(speeds)} samples/s"
            print(f"{words}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


def measurements(found: Mapping[int, Sequence[Times]], trial: Trial) -> list[Measurement]:
    """Each stage on each number of ranks, with how many times as fast as on the first it is.

    A ratio is of medians within one round; of these, the median and both ends are told.
    """
    reference = next(iter(found.values()))
    made = []
    for stage in trial.stages:
        for ranks, rounds in found.items():
            ratios = [
                median(base[stage]) / median(times[stage])
                for base, times in zip(reference, rounds, strict=True)
            ]
            samples = tuple(taken for times in rounds for taken in times[stage])
            case: dict[str, str | int] = {
                "stage": stage,
                "ranks": ranks,
                "sequence": min(trial.sequence, ranks),
                "batch": trial.batch_size,
                "precision": trial.precision,
            }
            metrics = {
                "samples/s": trial.batch_size / median(samples) * 1e3,
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
            made.append(Measurement(case=case, samples_ms=samples, metrics=metrics))
    return made


def make_record(made: Sequence[Measurement], trial: Trial, load: float) -> Record:
    """The record of a run; `load` is the machine's before it."""
    note = ""
    if trial.device == "cpu":
        note = (
            f"CPU ranks of one thread each, on {os.cpu_count()} cores that others use too (load "
            f"before the run: {load:.1f}): the ratios alone mean anything, and where there are "
            "more ranks than cores, they show what ranks cost and no speed-up."
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
    parser.add_argument("--batch-size", type=int, help="of an update over all ranks")
    parser.add_argument("--sequence", type=int, default=1, help="ranks that share a sample")
    parser.add_argument("--updates", type=int, default=8, help="of which three warm up")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each number of ranks")
    parser.add_argument("--out", type=Path, help="a folder for the record; without, none is kept")
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
        found = dict(measure_ranks(trial))
        if os.environ.get("RANK", "0") == "0":
            options.write.write_text(json.dumps(found), encoding="utf-8")
        return
    load = os.getloadavg()[0]
    made = measurements(measure(options.ranks, trial, options.rounds), trial)
    record = make_record(made, trial, load)
    print("\n\n".join(part for part in (record.note, record_table(record)) if part))
    if options.out is not None:
        page = write_record(record, options.out).with_suffix(".md")
        page.write_text(markdown(record, []), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
