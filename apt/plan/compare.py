"""Compare a plan with the memory of the same update, run here with real tensors."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

import torch

from apt.distributed.device import pick_device
from apt.distributed.mesh import Layout
from apt.distributed.parallel import Parallel
from apt.methods.base import Stage
from apt.plan.estimate import Job, estimate
from apt.plan.gpus import GIB
from apt.plan.measure import (
    PlannedBatches,
    Usage,
    begin_stage,
    follow_update,
    make_batches,
    name_states,
    share_of_batch,
)
from apt.plan.report import table
from apt.plan.tracking import Tracker

__all__ = ["compared", "counted_usage", "planned_usage", "real_peaks"]


def real_peaks(job: Job, parallel: Parallel) -> dict[str, float]:
    """Run an update, and return the bytes of this rank's tensors at the peak of each part.

    On CUDA the figures come from torch's allocator; otherwise see `counted_usage`.
    """
    if parallel.device.type != "cuda":
        return _totals(counted_usage(job, parallel))
    share_of_batch(job.config, parallel.layout)
    stage = begin_stage(job.config, parallel, job.start, job.others)
    return _on_cuda(stage, make_batches(job.config, stage, job.sample, parallel.layout, Tracker()))


def planned_usage(job: Job, layout: Layout) -> Usage:
    """Return the planned counterpart of an update, for this machine's kind of device.

    Several ranks are simulated in a separate process, because torch remembers their groups and
    would take them for the real ones.
    """
    on_gpu = pick_device(job.config.device).type == "cuda"
    if layout.world_size == 1:
        return estimate(job, layout, gpu=on_gpu)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as apart:
        return apart.submit(estimate, job, layout, gpu=on_gpu).result()


def compared(planned: Usage, job: Job, parallel: Parallel) -> str:
    """Run an update, and return tables of planned and measured memory and, on the CPU, traffic.

    Collective.
    """
    if parallel.device.type == "cuda":
        return _memory(planned, real_peaks(job, parallel), "torch's allocator")
    counted = counted_usage(job, parallel)
    tables = [_memory(planned, _totals(counted), "live tensors")]
    if parallel.world_size > 1:
        tables.append(_collectives(planned, counted))
    return "\n\n".join(tables)


def _memory(planned: Usage, real: Mapping[str, float], how: str) -> str:
    rows = [
        [
            name,
            f"{planned.peaks[name].total / GIB:.3f}",
            f"{size / GIB:.3f}",
            f"{planned.peaks[name].total / size - 1:+.1%}",
        ]
        for name, size in real.items()
    ]
    return table(["GiB at the peak of", "planned", how, "error"], rows)


def _collectives(planned: Usage, counted: Usage) -> str:
    rows = [
        [
            collective.name,
            f"{planned.work.calls[collective]:,}",
            f"{counted.work.calls[collective]:,}",
            f"{planned.work.sent[collective] / 1e6:.2f}",
            f"{counted.work.sent[collective] / 1e6:.2f}",
        ]
        for collective in sorted(
            planned.work.calls.keys() | counted.work.calls.keys(), key=lambda c: (c.kind, c.ranks)
        )
    ]
    header = ["collectives of an update", "planned", "counted", "MB planned", "MB counted"]
    return table(header, rows)


def _totals(usage: Usage) -> dict[str, float]:
    return {name: peak.total for name, peak in usage.peaks.items()}


def counted_usage(job: Job, parallel: Parallel) -> Usage:
    """Run an update on the CPU, and return this rank's live storages and collectives.

    Weights and samples are zeros, which take as much memory as other values.

    Raises ConfigError like `apt.plan.measure.measure`.
    """
    config, tracker = job.config, Tracker()
    share = share_of_batch(config, parallel.layout)
    with tracker.watching():
        stage = begin_stage(config, parallel, job.start, job.others)
        batches = make_batches(config, stage, job.sample, parallel.layout, tracker)
        tracker.name_parts = name_states(stage)
        usage = follow_update(stage, batches, tracker)
    return dataclasses.replace(usage, micro_batches=share // (config.micro_batch_size or share))


def _on_cuda(stage: Stage, batches: PlannedBatches) -> dict[str, float]:
    for trained in stage.trained.values():
        trained.state()  # makes the optimiser's state, which does not exist yet
    device = stage.host.device
    found = {}
    for name, part in stage.parts().items():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        part(batches, 0)
        for trained in stage.trained.values():
            trained.zero_grad()
        torch.cuda.synchronize(device)
        found[name] = float(torch.cuda.max_memory_allocated(device))
    return found
