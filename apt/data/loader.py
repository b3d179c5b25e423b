"""From a data set to the batches of one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset

from apt.data.report import DataReport, Problem
from apt.data.sample import Batch, TrainingData
from apt.errors import ConfigError, DataError


@runtime_checkable
class Reporting(Protocol):
    """A data set that keeps a report of files that failed."""

    report: DataReport


def make_loader(
    dataset: TrainingData,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    start_batch: int = 0,
) -> Iterator[Batch]:
    """One rank's batches for ever, in an order that no number of workers changes.

    Global batch `n` is the n-th of `dataset.batches(batch_size, seed=seed)`; this rank gets a
    contiguous slice of it. Starting at `start_batch` continues exactly where a loader that has
    given `start_batch` batches stopped, whatever its workers had prepared.

    Args:
        dataset: samples that depend on their index alone.
        batch_size: samples in a global batch, over all ranks.
        rank, world_size: which slice.
        num_workers: processes that decode ahead; 0 decodes here.
        seed: of the order.
        start_batch: number of the first global batch.

    Raises:
        ConfigError: if the batch cannot be split evenly, or a number is out of range.
        DataError: while iterating, from the data set, also when it arose in a worker.
    """
    if not 0 <= rank < world_size or num_workers < 0 or start_batch < 0:
        raise ConfigError(
            f"expected 0 <= rank < world_size, num_workers >= 0 and start_batch >= 0, got rank "
            f"{rank} of {world_size}, num_workers {num_workers}, start_batch {start_batch}"
        )
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"the global batch size {batch_size} must be a positive multiple of the {world_size} "
            f"ranks, for example {max(1, batch_size // world_size) * world_size}"
        )
    share = batch_size // world_size
    offset = rank * share
    plan = _Plan(dataset, batch_size, seed, start_batch, offset, share)
    loader = DataLoader(
        _Slices(dataset, offset),
        sampler=plan,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_start_worker if num_workers else None,
    )
    return _batches(loader, dataset)


@dataclass(frozen=True)
class _Plan(Iterable[tuple[int, list[int]]]):
    """The (number, indices) of this rank's slices; iterated in the main process only."""

    dataset: TrainingData
    batch_size: int
    seed: int
    start: int
    offset: int
    share: int

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        batches = self.dataset.batches(self.batch_size, seed=self.seed, start=self.start)
        for number, batch in enumerate(batches, self.start):
            yield number, batch[self.offset : self.offset + self.share]


class _Slices(Dataset[Batch | DataError]):
    """Makes a whole slice at once: the unit of work of a worker."""

    def __init__(self, dataset: TrainingData, offset: int) -> None:
        self._dataset = dataset
        self._offset = offset

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch | DataError:
        number, indices = key
        try:
            samples = [self._dataset[index] for index in indices]
        except DataError as error:
            # torch would rebuild it around a worker's traceback; users are owed the one line.
            return DataError(str(error))
        return Batch.collate(samples, offset=self._offset, batch_index=number)


def _batches(loader: Iterable[Batch | DataError], dataset: TrainingData) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        _record(dataset, batch.problems)
        yield batch


def _record(dataset: TrainingData, problems: Iterable[Problem]) -> None:
    # A worker's report dies with the worker.
    if isinstance(dataset, Reporting):
        for problem in problems:
            dataset.report.add(problem)


def _start_worker(worker: int) -> None:
    # Ctrl-C, or a signal to the whole process group, must stop the run at a step's end with its
    # state saved. A worker that dies of the signal first would take the run down with it.
    if sys.platform != "win32":
        os.setpgrp()
