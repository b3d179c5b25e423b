"""The header that a run prints before its first update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apt.data.builtin_sources import DIGITS
from apt.data.dataset import TrainingData
from apt.data.folder import VideoFolder
from apt.device import total_memory
from apt.distributed.parallel import Parallel
from apt.distributed.tensors import local
from apt.errors import counted
from apt.methods.base import Stage
from apt.train.config import TrainConfig

__all__ = ["header"]

_GIB = 2**30


def header(
    config: TrainConfig,
    stage: Stage,
    dataset: TrainingData,
    state: Mapping[str, Any],
    parallel: Parallel,
    *,
    done: int,
) -> list[str]:
    """Return the lines of the header: what is trained, on which data, where and how.

    Lines have at most 80 columns, except for long names.

    Args:
        config: a resolved configuration.
        stage: the stage, with its networks on this rank.
        dataset: the data set of the run.
        state: all state that training changes, by name.
        parallel: the ranks.
        done: updates before this attempt.
    """
    begins = f", continued from update {done}" if done else ""
    lines = [
        f"{config.name}: {counted(config.num_updates, 'update')} of "
        f"{counted(config.batch_size, 'sample')}{begins}"
    ]
    lines += [f"  {name}: {_parameters(part.module)}" for name, part in stage.trained.items()]
    lines += [f"  {text}" for text in _data(config, dataset)]
    if not stage.shares_batch:
        lines.append(f"  batches: separate ones for {' and '.join(stage.parts())}")
    ranks = f", {parallel.world_size} ranks" if parallel.world_size > 1 else ""
    if parallel.layout.shard != parallel.world_size:
        ranks += f" ({parallel.layout})"
    there = total_memory(parallel.device)
    has = "" if there is None else f" with {there / _GIB:.1f} GiB"
    lines.append(f"  device: {parallel.device}{has}{ranks}, {config.precision}")
    # Gradients, and activations, which depend on the batch, come on top.
    held = f"{_size(state) / _GIB:.2f} GiB"
    lines.append(f"  weights, averages and optimiser states on this rank: {held}")
    return [*lines, f"  folder: {config.run_dir}"]


def _parameters(module: nn.Module) -> str:
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    every, training = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    part = "" if training == every else f", {_count(training)} of them train"
    return f"{_count(every)} parameters{part}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _data(config: TrainConfig, dataset: TrainingData) -> list[str]:
    """Return the lines about the source, and the number of clips in each bucket."""
    clip = config.data.clip
    rate = f" at {clip.fps:g} fps" if clip.fps else ""
    place = "the built-in stream" if config.data.source == DIGITS else config.data.path
    lines = [f"data: {config.data.source}" + (f", {place}" if place else "")]
    if not isinstance(dataset, VideoFolder):
        return [*lines, f"clips: {clip.frames}x{clip.height}x{clip.width}{rate}"]
    sizes = sorted(dataset.bucket_sizes().items(), key=lambda item: -item[1])
    lines += [
        f"clips: {number:,} of {bucket}{rate if bucket.frames > 1 else ''}"
        for bucket, number in sizes
    ]
    return lines


def _size(state: Any) -> int:
    """Return the bytes that the tensors of a tree take on this rank."""
    if isinstance(state, Mapping):
        return sum(_size(value) for value in state.values())
    if not isinstance(state, Tensor):
        return 0
    part = local(state)
    return part.numel() * part.element_size()
