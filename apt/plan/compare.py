"""Compare a plan with the memory of the same update, run here with real tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch

from apt.distributed.device import pick_device
from apt.distributed.mesh import Layout
from apt.distributed.parallel import Parallel
from apt.methods.base import Stage
from apt.plan.estimate import Job, estimate
from apt.plan.gpus import GIB
from apt.plan.measure import (
    PlannedBatches,
    begin_stage,
    follow_update,
    make_batches,
    name_states,
    share_of_batch,
)
from apt.plan.report import table
from apt.plan.tracking import Tracker

__all__ = ["compared", "planned_peaks", "real_peaks"]


def real_peaks(job: Job, parallel: Parallel) -> dict[str, float]:
    """Run an update, and return the bytes of this rank's tensors at the peak of each part.

    Weights and samples are zeros, which take as much memory as other values. On CUDA the figures
    come from torch's allocator; on the CPU live storages are counted.

    Raises ConfigError like `apt.plan.measure.measure`.
    """
    config, cuda = job.config, parallel.device.type == "cuda"
    share_of_batch(config, parallel.layout)
    tracker = Tracker()
    with contextlib.nullcontext() if cuda else tracker.watching():
        stage = begin_stage(config, parallel, job.start, job.others)
        batches = make_batches(config, stage, job.sample, parallel.layout, tracker)
        if cuda:
            return _on_cuda(stage, batches)
        tracker.name_parts = name_states(stage)
        usage = follow_update(stage, batches, tracker)
    return {name: peak.total for name, peak in usage.peaks.items()}


def planned_peaks(job: Job, layout: Layout) -> dict[str, float]:
    """Return the planned counterparts of `real_peaks`, for this machine's kind of device."""
    on_gpu = pick_device(job.config.device).type == "cuda"
    usage = estimate(job, layout, gpu=on_gpu)
    return {name: peak.total for name, peak in usage.peaks.items()}


def compared(planned: Mapping[str, float], job: Job, parallel: Parallel) -> str:
    """Measure the real peaks, and return a table of them beside the planned ones."""
    rows = [
        [
            name,
            f"{planned[name] / GIB:.3f}",
            f"{size / GIB:.3f}",
            f"{planned[name] / size - 1:+.1%}",
        ]
        for name, size in real_peaks(job, parallel).items()
    ]
    how = "torch's allocator" if parallel.device.type == "cuda" else "live tensors"
    return table(["GiB at the peak of", "planned", how, "error"], rows)


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
