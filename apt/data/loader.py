"""From a data set to the micro-batches of one rank."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset, get_worker_info

from apt.data.dataset import Batch, EncodedSample, Sample, TrainingData
from apt.data.report import DataReport, Problem
from apt.errors import ConfigError, DataError
from apt.pixels import to_uint8


@runtime_checkable
class Reporting(Protocol):
    """A data set that keeps a report of files that failed."""

    report: DataReport


@runtime_checkable
class Named(Protocol):
    """A data set that can tell which file a sample comes from."""

    def file_name(self, index: int) -> str:
        """The file of sample `index`, without opening it."""
        ...


@runtime_checkable
class Rounding(Protocol):
    """A data set whose pixels come of pictures of 8 bits.

    They wait and travel to the device as such, in a quarter of the memory.
    """

    eight_bits: bool


def make_loader(
    dataset: TrainingData,
    *,
    batch_size: int,
    micro_batch_size: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    seed: int = 0,
    start_batch: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """One rank's micro-batches for ever, in an order that no number of workers changes.

    Global batch `n` is the n-th of `dataset.batches(batch_size, seed=seed)`; this rank gets a
    contiguous share of it, as `share_of_rank(...)` micro-batches. Nothing larger than a micro-batch
    is ever made. Starting at `start_batch` continues exactly where a loader that has given
    `start_batch` batches stopped, whatever its workers had prepared.

    Args:
        dataset: samples that depend on their index alone.
        batch_size: samples in a global batch, over all ranks.
        micro_batch_size: samples that are handed out at once; 0 is all of the rank's share.
        rank, world_size: which slice.
        num_workers: processes that decode ahead, each two micro-batches; 0 decodes here.
        seed: of the order.
        start_batch: number of the first global batch.
        pin_memory: put what workers have made into memory that a GPU copies from by itself.

    Raises:
        ConfigError: if the batch or the rank's share cannot be split evenly, or a number is out of
            range.
        DataError: while iterating, from the data set, also when it arose in a worker, or a worker
            that died; says which file it was decoding.
    """
    if not 0 <= rank < world_size or num_workers < 0 or start_batch < 0:
        raise ConfigError(
            f"expected 0 <= rank < world_size, num_workers >= 0 and start_batch >= 0, got rank "
            f"{rank} of {world_size}, num_workers {num_workers}, start_batch {start_batch}"
        )
    share = share_of_rank(batch_size, world_size)
    parts = num_micro_batches(share, micro_batch_size)
    plan = _Plan(dataset, batch_size, seed, start_batch, rank * share, share // parts, parts)
    context = _context()
    slices = _Slices(dataset, context, num_workers)
    loader = DataLoader(
        slices,
        sampler=plan,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=context if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
        pin_memory=pin_memory,
    )
    return _batches(loader, slices)


def share_of_rank(batch_size: int, world_size: int) -> int:
    """A rank's samples of a global batch. Raises ConfigError if they are not as many for all."""
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"the global batch size {batch_size} must be a positive multiple of the {world_size} "
            f"ranks, for example {max(1, batch_size // world_size) * world_size}"
        )
    return batch_size // world_size


def num_micro_batches(share: int, micro_batch_size: int) -> int:
    """How many make up a rank's share. Raises ConfigError if they are not of equal size."""
    size = micro_batch_size or share
    if share % size:
        raise ConfigError(
            f"micro_batch_size {size} must divide a rank's share of the batch, {share} samples"
        )
    return share // size


def _context() -> BaseContext:
    """How workers start: as usual, or afresh where this is not the main thread.

    A process that is forked in a thread may hold a copy of a lock that another thread had taken,
    and wait for it for ever.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    return multiprocessing.get_context(None if in_main_thread else "spawn")


_Key = tuple[int, int, list[int]]
"""Of a micro-batch: the number of its global batch, its place in it, and its samples' indices."""


@dataclass(frozen=True)
class _Plan(Iterable[_Key]):
    """The keys of this rank's micro-batches; iterated in the main process only."""

    dataset: TrainingData
    batch_size: int
    seed: int
    start: int
    offset: int
    size: int
    parts: int

    def __iter__(self) -> Iterator[_Key]:
        batches = self.dataset.batches(self.batch_size, seed=self.seed, start=self.start)
        for number, batch in enumerate(batches, self.start):
            for part in range(self.parts):
                first = self.offset + part * self.size
                yield number, first, batch[first : first + self.size]


class _Slices(Dataset[Batch | DataError]):
    """Makes a micro-batch at once: the unit of work of a worker."""

    def __init__(self, dataset: TrainingData, context: BaseContext, num_workers: int) -> None:
        self.dataset = dataset
        self._rounds = isinstance(dataset, Rounding) and dataset.eight_bits
        # Process and sample of each worker, for the one that dies over a file.
        self._at_work = context.Array("q", 2 * num_workers)

    def __getitem__(self, key: _Key) -> Batch | DataError:
        number, first, indices = key
        try:
            samples = [self._sample(index) for index in indices]
            return Batch.collate(samples, offset=first, batch_index=number)
        except DataError as error:
            # torch would rebuild it around a worker's traceback; users are owed the one line.
            return DataError(str(error))

    def _sample(self, index: int) -> Sample | EncodedSample:
        worker = get_worker_info()
        if worker is not None:
            self._at_work[2 * worker.id : 2 * worker.id + 2] = [os.getpid(), index]
        sample = self.dataset[index]
        if self._rounds and isinstance(sample, Sample):
            return dataclasses.replace(sample, pixels=to_uint8(sample.pixels))
        return sample

    def of_the_dead(self) -> list[str]:
        """The files that workers which are no longer there were decoding."""
        if not isinstance(self.dataset, Named):
            return []
        pairs = self._at_work[:]
        return sorted(
            self.dataset.file_name(index)
            for pid, index in zip(pairs[::2], pairs[1::2], strict=True)
            if pid and not _alive(pid)
        )


def _batches(loader: Iterable[Batch | DataError], slices: _Slices) -> Iterator[Batch]:
    batches = _start(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            # Not "Caught RuntimeError in DataLoader worker", which is a data set's own.
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            files = ", ".join(slices.of_the_dead())
            raise DataError(
                "a process that decodes ahead died"
                + (f" at {files}" if files else "")
                + f" ({str(error).splitlines()[0].rstrip('. ')}). A broken file can do that "
                "(`diffusion-apt data check` tests all), and so can a lack of memory (fewer "
                "--data.num-workers)"
            ) from error
        if isinstance(batch, DataError):
            raise batch
        _record(slices.dataset, batch.problems)
        yield batch


def _start(loader: Iterable[Batch | DataError]) -> Iterator[Batch | DataError]:
    """Start the workers, and let their deaths be seen where a batch is asked for, only."""
    before = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    batches = iter(loader)
    if before is not None and signal.getsignal(signal.SIGCHLD) != before:
        # torch's handler raises wherever the main process is: in the middle of an optimiser's step,
        # for one, whose weights could then not be saved.
        signal.signal(signal.SIGCHLD, before)
    return batches


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


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
