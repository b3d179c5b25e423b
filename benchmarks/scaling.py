"""Samples per second of each training stage on several ranks, against one.

    python -m benchmarks.scaling --ranks 1 2 4                       # CPU ranks of this machine
    python -m benchmarks.scaling --ranks 1 2 4 8 --device cuda       # GPUs, in bf16
    python -m benchmarks.scaling --ranks 1 8 --sequence 8 --device cuda

The digits' stages with their recipes' batches, which stay the same for all. Every number of ranks
is a torchrun of its own. On CPU ranks the ratios alone mean anything, and of those that there are
more of than cores not even they.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from apt.bench.timing import median
from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel
from apt.plan.report import table
from benchmarks.training import STAGES, stage_config, steady, train

ROOT = Path(__file__).parents[1]


def measure_ranks(
    stages: Sequence[str], device: str, sequence: int, updates: int
) -> dict[str, float]:
    """Samples per second of each stage on the ranks of this launch; collective."""
    found = {}
    with Parallel.from_environment(device) as ranks:
        shared = ParallelConfig(sequence=min(sequence, ranks.world_size))
        parallel = ranks.laid_out(shared)
        precision: Literal["fp32", "bf16"] = "bf16" if device == "cuda" else "fp32"
        for stage in stages:
            config = stage_config(stage, precision=precision)
            config = dataclasses.replace(config, parallel=shared)
            samples = steady(list(train(config, parallel, updates)))
            found[stage] = config.batch_size / median(samples) * 1e3
            if parallel.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def launch(ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """The same under a torchrun of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speeds.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(ranks), "-m", "benchmarks.scaling",
            "--write", str(out), "--device", options.device, "--sequence", str(options.sequence),
            "--updates", str(options.updates), "--stages", *options.stages,
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
        return found


def ratios(speeds: dict[int, dict[str, float]]) -> str:
    """A table: each stage's samples per second, and how many times those of the first."""
    first = next(iter(speeds.values()))
    rows = [
        [f"{stage}, {ranks}", f"{speed:.3g}", f"{speed / first[stage]:.2f}"]
        for stage in first
        for ranks, found in speeds.items()
        for speed in (found[stage],)
    ]
    return table(["stage, ranks", "samples/s", "ratio"], rows)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sequence", type=int, default=1, help="ranks that share a sample")
    parser.add_argument("--updates", type=int, default=13, help="of which three warm up")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.write is not None:  # a rank of a launch
        found = measure_ranks(options.stages, options.device, options.sequence, options.updates)
        if os.environ.get("RANK", "0") == "0":
            options.write.write_text(json.dumps(found), encoding="utf-8")
        return
    print(ratios({ranks: launch(ranks, options) for ranks in options.ranks}))


if __name__ == "__main__":
    main()
