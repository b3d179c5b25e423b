"""Losses on clips that are held out of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apt.data.dataset import Batch, TrainingData
from apt.data.heldout import Divisible, hold_out
from apt.distributed.parallel import Parallel
from apt.errors import ConfigError, DataError
from apt.methods.base import MicroBatch, Stage
from apt.train.config import DataConfig, HeldoutConfig, TrainConfig

__all__ = ["HeldOut", "divide"]

PREFIX = "heldout/"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Clips that are not trained on.

    Attributes:
        clips: the data set that contains them.
        groups: their indices in it, grouped by shape.
        size: number of clips in one pass.
        every: updates between measurements.
    """

    clips: TrainingData
    groups: Sequence[Sequence[int]]
    size: int
    every: int

    def __len__(self) -> int:
        """The number of held-out clips."""
        return sum(map(len, self.groups))

    def is_due(self, update: int) -> bool:
        """Return whether a measurement is due after this many updates."""
        return update % self.every == 0

    @torch.no_grad()
    def measure(
        self,
        stage: Stage,
        parallel: Parallel,
        prepare: Callable[[Batch], Sequence[MicroBatch]],
    ) -> tuple[dict[str, float], Exception | None]:
        """Measure the averaged weights; return the figures, and this rank's data error if any.

        Collective; each rank measures some of the clips. Afterwards the weights are as before, even
        after an error, so they can be saved.
        """
        sums: dict[str, float] = {}
        problem: Exception | None = None
        trained = stage.generator
        assert trained.ema is not None
        with trained.ema.applied(trained.module):
            for offset, items, weight in self._share(parallel):
                batches: Sequence[MicroBatch] = ()
                try:
                    samples = [self.clips[item] for item in items]
                    batches = prepare(Batch.collate(samples, offset=offset, batch_index=0))
                except DataError as error:
                    problem = error
                if parallel.any(problem is not None):
                    return {}, problem
                for batch in batches:
                    for name, value in stage.heldout(batch).items():
                        sums[name] = sums.get(name, 0.0) + weight * len(batch) * float(value)
        means = parallel.mean(sums)
        share = len(self) / parallel.data_size
        return {f"{PREFIX}{name}": total / share for name, total in means.items()}, None

    def _share(self, parallel: Parallel) -> Iterator[tuple[int, Sequence[int], int]]:
        """Yield this rank's chunks: the position of the first sample, the items, and a weight of 1.

        Ranks compute together, so all need the same number of chunks: some get the first one again,
        with a weight of 0.
        """
        chunks: list[tuple[int, Sequence[int], int]] = []
        offset = 0
        for group in self.groups:
            for start in range(0, len(group), self.size):
                items = group[start : start + self.size]
                chunks.append((offset, items, 1))
                offset += len(items)
        first, items, _ = chunks[0]
        chunks += [(first, items, 0)] * (-len(chunks) % parallel.data_size)
        yield from chunks[parallel.data_rank :: parallel.data_size]


def divide(
    config: TrainConfig,
    dataset: TrainingData,
    apart: Any | None,
    open_other: Callable[[DataConfig], TrainingData],
    *,
    ranks: int,
) -> tuple[TrainingData, HeldOut | None]:
    """Split the data into clips to train on and held-out clips, if any.

    Args:
        config: a resolved configuration.
        dataset: all clips that could be trained on.
        apart: clips that the source itself keeps apart.
        open_other: opens the data set of another configuration.
        ranks: number of ranks that share a batch.

    Raises:
        ConfigError: nothing can be held out of such data, or `heldout.path` is trained on.
    """
    asked = config.heldout
    if not asked.is_on:
        return dataset, None
    size = config.micro_batch_size or max(config.batch_size // ranks, 1)

    def held(clips: TrainingData, groups: Mapping[Any, Sequence[int]]) -> HeldOut:
        return HeldOut(clips, list(groups.values()), size, asked.every)

    if asked.path:
        _check_apart(config.data, asked)
        other = open_other(dataclasses.replace(config.data, path=asked.path))
        if not isinstance(other, Divisible):
            raise ConfigError(
                "--heldout.path needs a source with a fixed number of clips, but "
                f"{config.data.source!r} is endless; use --heldout.clips"
            )
        return dataset, held(other, other.members)
    if apart is not None:
        if not asked.clips:
            raise ConfigError(
                "--heldout.share needs a source with a fixed number of clips, but "
                f"{config.data.source!r} is endless; set a number of clips, such as "
                "--heldout.clips 64"
            )
        return dataset, held(apart, {None: range(asked.clips)})
    if not isinstance(dataset, Divisible):
        raise ConfigError(
            f"nothing can be held out of the data source {config.data.source!r}, because it sets "
            "its own order; return held-out clips from its open_heldout, or name a folder of them "
            "with --heldout.path"
        )
    kept, left_out = hold_out(dataset, share=asked.share, clips=asked.clips)
    return kept, held(left_out, left_out.members)


def _check_apart(data: DataConfig, asked: HeldoutConfig) -> None:
    if data.make_source().latent_cache() is not None:
        raise ConfigError(
            "--heldout.path names a folder of clips, but this run uses a latent cache, which has "
            "no embeddings of their captions: encode all clips together, and use --heldout.share"
        )
    if not data.path:
        raise ConfigError(
            "--heldout.path needs a source that reads a folder (--data.path), but this run reads "
            "none; use --heldout.clips"
        )
    trained, held = Path(data.path).resolve(), Path(asked.path).resolve()
    if trained == held or trained in held.parents or held in trained.parents:
        raise ConfigError(
            f"--heldout.path {asked.path} and --data.path {data.path} overlap, so held-out clips "
            "would be trained on; separate the folders, or use --heldout.share"
        )
