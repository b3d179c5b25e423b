"""What a run says of itself before its first update."""

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
    """Lines of at most 80 columns, except names: what is trained, on what, where and how.

    Args:
        config: with nothing left open.
        stage: its networks, as they are on this rank.
        dataset: of the run.
        state: all that training changes, by name.
        parallel: the ranks.
        done: updates before this attempt.
    """
    begins = f", on from update {done}" if done else ""
    lines = [
        f"{config.name}: {counted(config.num_updates, 'update')} of "
        f"{counted(config.batch_size, 'sample')}{begins}"
    ]
    lines += [f"  {name}: {_parameters(part.module)}" for name, part in stage.trained.items()]
    lines += [f"  {text}" for text in _data(config, dataset)]
    if not stage.shares_batch:
        lines.append(f"  each of {' and '.join(stage.parts())} has a batch of its own")
    ranks = f", {parallel.world_size} ranks" if parallel.world_size > 1 else ""
    if parallel.layout.shard != parallel.world_size:
        ranks += f" ({parallel.layout})"
    there = total_memory(parallel.device)
    has = "" if there is None else f" with {there / _GIB:.1f} GiB"
    lines.append(f"  device: {parallel.device}{has}{ranks}, {config.precision}")
    # Gradients come on top, and activations, which depend on the batch.
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
    """The source, and how many clips there are in each bucket."""
    clip = config.data.clip
    rate = f" at {clip.fps:g} fps" if clip.fps else ""
    place = "the built-in stream" if config.data.source == DIGITS else config.data.path
    lines = [f"data: {config.data.source}" + (f", {place}" if place else "")]
    if not isinstance(dataset, VideoFolder):
        return [*lines, f"clips: {clip.frames} frames of {clip.height}x{clip.width}{rate}"]
    sizes = sorted(dataset.bucket_sizes().items(), key=lambda item: -item[1])
    lines += [
        f"clips: {number:,} of {bucket}{rate if bucket.frames > 1 else ''}"
        for bucket, number in sizes
    ]
    return lines


def _size(state: Any) -> int:
    """Bytes of the tensors in a tree, as this rank has them."""
    if isinstance(state, Mapping):
        return sum(_size(value) for value in state.values())
    if not isinstance(state, Tensor):
        return 0
    part = local(state)
    return part.numel() * part.element_size()
