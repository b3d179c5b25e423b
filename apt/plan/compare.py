"""A plan held against the memory that the same update takes here, in real tensors."""

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
    """Bytes of this rank's tensors at the peak of each part of an update, run for real.

    Weights are zeros and samples too: what they are takes as much memory as any other. On CUDA it
    is what torch's allocator says; on the CPU live storages are counted.

    Raises ConfigError as `apt.plan.measure.measure`.
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
    """What a plan says of the same, for the device that is here."""
    on_gpu = pick_device(job.config.device).type == "cuda"
    usage = estimate(job, layout, gpu=on_gpu)
    return {name: peak.total for name, peak in usage.peaks.items()}


def compared(planned: Mapping[str, float], job: Job, parallel: Parallel) -> str:
    """A table of both."""
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
    return table(["GiB at the peak of", "planned", how, "off by"], rows)


def _on_cuda(stage: Stage, batches: PlannedBatches) -> dict[str, float]:
    for trained in stage.trained.values():
        trained.state()  # makes what the optimiser does not have yet
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
