"""The training loop of a stage: updates, logs, checkpoints, and saving after errors."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from apt.checkpoints.runs import EXPORT, SNAPSHOTS
from apt.data.dataset import Batch, TrainingData
from apt.data.loader import make_loader, num_micro_batches, share_of_rank
from apt.distributed.parallel import Parallel
from apt.distributed.watch import is_of_a_collective, watched
from apt.errors import CheckpointError
from apt.files import write_text
from apt.methods.base import MicroBatch, Stage
from apt.train.config import TrainConfig
from apt.train.config_file import OBJECTS, plain
from apt.train.diagnosis import check_replay, where_not_finite
from apt.train.failures import explained
from apt.train.header import header
from apt.train.heldout import HeldOut
from apt.train.host import MicroBatches
from apt.train.lock import FolderInUse, RunLock
from apt.train.logs import RunLog, Update, peak_memory, speed
from apt.train.monitor import (
    CollapseMonitor,
    LatentStatistics,
    TrainingStopped,
    sample_statistics,
)
from apt.train.networks import NonFiniteGradient
from apt.train.outcome import save_outcome
from apt.train.plots import plot_losses
from apt.train.resume import CHECKPOINTS, CONFIG_NAME, model_identities
from apt.train.run_state import State, write_state
from apt.train.sample_sheets import decode_samples, draw_samples, write_sheet
from apt.train.saving import PartsDone, Retention, Saver
from apt.train.signals import StopRequest
from apt.train.weights_and_biases import WandbLog

__all__ = ["Run"]

PLOT_SECONDS = 60.0
"""Least time between drawings of `losses.png`, which happen at checkpoints."""

T = TypeVar("T")


class _Stop(BaseException):
    """Stop between two micro-batches. Not an Exception, so that nothing in between catches it."""


class Run:
    """A running stage: what it trains, its progress, and its files."""

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        parallel: Parallel,
        dataset: TrainingData,
        state: dict[str, Any],
        progress: PartsDone,
        lock: RunLock,
        stop: StopRequest,
        objects: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.config = config
        self.stage = stage
        self.parallel = parallel
        self.dataset = dataset
        self.state = state
        self.progress = progress
        self.lock = lock
        self.stop = stop
        self.objects = objects
        self.run_dir = Path(config.run_dir)
        self.retention = Retention(self.run_dir / CHECKPOINTS, config.keep_checkpoints)
        self.saver = Saver(self.retention, parallel)
        codec, chosen = stage.codec, config.stage.start_field is None
        self.statistics = None if codec is None else LatentStatistics(codec.config, chosen=chosen)
        self.monitor = CollapseMonitor(config.monitor)
        self.models = model_identities(config)
        self.notes: list[str] = []
        self.saved = self.position  # the position of the newest checkpoint
        self.began_to_save = time.monotonic()
        self.moved = self._moves()
        self.at = "start"  # the part of the update
        self.stoppable = False  # whether to stop between micro-batches
        self.told: Exception | None = None  # the error after which a checkpoint was saved
        self.waited = 0.0  # seconds of this update spent waiting for data
        self.heldout: HeldOut | None = None
        self.latent_shape: tuple[int, ...] | None = None  # of the newest samples
        self.draws = True
        self.drawn = time.monotonic()

    @property
    def done(self) -> int:
        """Number of whole updates."""
        return int(self.state["update"])

    @property
    def position(self) -> tuple[int, int]:
        """Number of whole updates, and of parts of the next one."""
        return self.done, len(self.progress.parts)

    def train(self) -> None:
        """Run updates until the end or a stop request; at the end, export the model."""
        try:
            with (
                explained(self.config.run_dir),
                watched(self.parallel.rank, self.parallel.world_size, self._place),
            ):
                self._train()
        except FolderInUse:  # the folder belongs to another process now
            raise
        except Exception as error:
            # If the disk fails here too, the error already says so.
            with contextlib.suppress(OSError):
                self._write_state("failed", " ".join(str(error).split()))
            raise

    def _train(self) -> None:
        config = self.config
        self.parallel.on_main(self._write_config)
        self.parallel.on_main(lambda: self._write_state("running"))
        with self._open_log() as self.log, self.saver:
            about = header(
                config, self.stage, self.dataset, self.state, self.parallel, done=self.done
            )
            for note in [*about, *self.notes]:
                self.log.message(note)
            self.loader = make_loader(
                self.dataset,
                batch_size=config.batch_size,
                micro_batch_size=config.micro_batch_size,
                rank=self.parallel.data_rank,
                world_size=self.parallel.data_size,
                num_workers=config.data.num_workers,
                seed=config.seed,
                start_batch=self.done * self.stage.batches_per_update,
                pin_memory=self.parallel.device.type == "cuda",
            )
            while self.done < config.num_updates and self.update():
                pass
            self._warn(None if self.statistics is None else self.statistics.verdict())
            self.parallel.on_main(self.lock.check)
            self._settle()
            if self.saved != self.position:
                self.save()
                self._settle()
            if self.done < config.num_updates:
                signal = self.stop.signal_name or "a signal to another rank"
                self.log.message(
                    f"{signal}: saved after {self._where()}; continue with --resume "
                    f"(`diffusion-apt train --resume {shlex.quote(str(self.run_dir))}`)"
                )
                self.parallel.on_main(lambda: self._write_state("unfinished", signal))
                return
            self.export(self.run_dir / EXPORT, updates=self.done)
            self.parallel.on_main(self._plot)
        # This also makes all ranks wait, because the next stage reads what rank 0 wrote.
        self.parallel.on_main(lambda: self._write_state("finished"))

    def update(self) -> bool:
        """Run one update, or the rest of one; return False if the run should stop before its end.

        A stop between two micro-batches discards the current part, which has changed no weights.
        """
        begin, config = time.monotonic(), self.config
        self.waited = 0.0
        if self.saver.is_over():
            self._settle()
        if self._stops():
            return False
        shows = bool(config.sample_every) and (self.done + 1) % config.sample_every == 0
        batches = self._micro_batches()
        for number, (name, part) in enumerate(self.stage.parts().items()):
            if number and not self.stage.shares_batch:
                batches.skip()
                batches = self._micro_batches()
            if name in self.progress.parts:
                continue
            self.at = name
            if config.replay_every and self.done % config.replay_every == 0:
                check_replay(self.stage.trained, part, batches[:1], self.done)
            try:
                found = self._stoppable(partial(part, batches, self.done))
            except _Stop:
                return False
            except NonFiniteGradient as error:
                if self.parallel.world_size > 1:  # all ranks have the same norm, so all raise
                    self._save_after_error()
                where = where_not_finite(error, self.stage.trained, part, batches, self.done)
                raise self._not_finite(f"{name}: {where}") from error
            means = self.parallel.mean(found)
            for trained in self.stage.trained.values():
                trained.zero_grad()  # the next part trains another network, and needs the memory
            self._check_finite(means)
            self.progress.finish(name, means)
            self.moved = self._moves()
        self.at = "records"
        metrics = self._record(begin, batches if shows else None)
        batches.skip()
        self.state["update"] += 1
        self.progress.clear()
        self.at = "checkpoint"
        if self._due():
            self.save()
            self.attempt_on_main(self._plot_now_and_then)
        self._watch(metrics)
        return True

    def _record(self, begin: float, shown: Sequence[MicroBatch] | None) -> dict[str, float]:
        """Write all records of an update whose weights have changed; return its metrics.

        Args:
            begin: when the update began.
            shown: its micro-batches, if it has a sample sheet.
        """
        config, update = self.config, self.done + 1
        metrics = dict(self.progress.metrics)
        for name, trained in self.stage.trained.items():
            metrics[f"{name}/learning_rate"] = trained.rate(self.done)
        seconds = time.monotonic() - begin
        if shown is not None:
            metrics |= self._show(update, shown)
        if self.heldout is not None and self.heldout.is_due(update):
            metrics |= self._measure(self.heldout)
        timing = speed(
            Update(seconds, self.waited, config.batch_size, self.latent_shape),
            self.stage.passes(),
            self.parallel,
        )
        memory = peak_memory(self.parallel.device)
        if memory is not None:
            timing["speed/peak_memory_gib"] = memory / 2**30
        self.attempt_on_main(partial(self.log.write, update, metrics, timing))
        if update in config.snapshot_at:
            for weights in ("ema", "raw"):
                folder = self.run_dir / SNAPSHOTS / str(update) / weights
                self.compute(partial(self.export, folder, updates=update, weights=weights))
        return metrics

    def _show(self, update: int, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Write a sample sheet if there is something to show; return metrics for the monitor."""
        config, stage = self.config, self.stage
        preview = self.compute(lambda: draw_samples(stage, config, batches))
        if preview is None:
            return {}
        pixels = self.compute(lambda: decode_samples(stage, preview.latents))
        if pixels is not None:
            path = self.run_dir / "samples" / f"{update:08d}.png"
            title = f"{config.name}, update {update}"
            self.attempt_on_main(partial(write_sheet, path, pixels, preview, title))
            self.attempt_on_main(partial(self.log.picture, update, path))
        if not preview.generated:
            return {}
        return sample_statistics(preview.latents if pixels is None else pixels)

    def _measure(self, heldout: HeldOut) -> dict[str, float]:
        """Measure losses on held-out clips."""

        def prepare(batch: Batch) -> MicroBatches:
            return MicroBatches(self.stage, iter([batch]).__next__, 1)

        work = partial(heldout.measure, self.stage, self.parallel, prepare)
        metrics, problem = self.compute(work)

        def tell() -> None:
            if problem is not None:
                raise problem

        self.attempt(tell)
        return metrics

    def _watch(self, metrics: Mapping[str, float]) -> None:
        try:
            for alarm in self.monitor.observe(self.done, metrics):
                self._warn(str(alarm))
        except TrainingStopped:
            self._settle()
            if self.saved != self.position:
                self.save()
                self._settle()
            raise

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self.log.message(f"warning: {text}")

    # --- work that may fail -------------------------------------------------------------------

    def attempt(self, work: Callable[[], T]) -> T:
        """Run work that this rank does alone; if it fails on any rank, all save and raise."""
        result: T | None = None
        problem: Exception | None = None
        try:
            result = work()
        except Exception as error:
            problem = error
        try:
            self.parallel.agree(problem)
        except Exception as error:
            # Do not save twice for nested attempts, nor when the other ranks are unreachable.
            if error is not self.told and not is_of_a_collective(error):
                self.told = error
                self._save_after_error()
            raise
        return result  # type: ignore[return-value]

    def attempt_on_main(self, work: Callable[[], object]) -> None:
        """Run work on rank 0 like `attempt`."""
        self.attempt(lambda: work() if self.parallel.is_main else None)

    def compute(self, work: Callable[[], T]) -> T:
        """Run work that involves communication.

        If it fails, a single process saves; several ranks cannot, because the others may be stuck
        in a collective.
        """
        return self.attempt(work) if self.parallel.world_size == 1 else work()

    def _stoppable(self, work: Callable[[], T]) -> T:
        """Run a part of an update like `compute`; a stop request ends it before a micro-batch."""
        self.stoppable = True
        try:
            return self.compute(work)
        finally:
            self.stoppable = False

    def _save_after_error(self) -> None:
        """Save the progress, unless it is already saved or weights may be partly updated."""
        try:
            self._settle()
        except CheckpointError as failure:
            self.log.message(f"a checkpoint could not be written: {failure}")
        if self._moves() != self.moved:
            return
        if self.saved != self.position:
            try:
                self.save(tensorboard=False)
                self._settle()
            except Exception as failure:  # the caller raises the error that led here
                self.log.message(
                    f"the state after update {self.done} could not be saved: {failure}"
                )
                return
        if self.saved != (0, 0):
            self.log.message(f"saved after {self._where()}; --resume continues from there")

    def _where(self) -> str:
        parts = f" and the {' and '.join(self.progress.parts)} step of the next"
        return f"update {self.done}{parts if self.progress.parts else ''}"

    def _moves(self) -> int:
        """Return how often optimiser steps have begun."""
        return sum(trained.moves for trained in self.stage.trained.values())

    def _due(self) -> bool:
        """Return whether a checkpoint is due; rank 0's clock decides."""
        config = self.config
        if self.done % config.checkpoint_every == 0 or self.done == config.num_updates:
            return True
        seconds = 60 * config.checkpoint_every_minutes
        if not seconds:
            return False
        passed = time.monotonic() - self.began_to_save
        return self.parallel.any(self.parallel.is_main and passed >= seconds)

    def save(self, *, tensorboard: bool = True) -> None:
        """Start writing a checkpoint, after the previous one; then old ones are deleted."""
        self._settle()
        self.parallel.on_main(self.lock.check)
        self.parallel.on_main(lambda: self.log.sync(tensorboard=tensorboard))
        meta = {
            "config": plain(self.config),
            OBJECTS: self.objects,
            "data": self.dataset.fingerprint,
            "models": self.models,
            **self.progress.as_meta(),
        }
        self.began_to_save = time.monotonic()
        self.saver.begin(self.position, self.state, meta)
        if not self.config.checkpoint_in_background:
            self._settle()

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written. Raises CheckpointError if it fails."""
        self.saved = self.saver.wait() or self.saved

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if bad:
            raise self._not_finite(", ".join(bad))

    def _not_finite(self, what: str) -> TrainingStopped:
        self._settle()
        kept = f"the checkpoint of update {self.saved[0]} is kept"
        return TrainingStopped(
            f"{what} became NaN or infinite in update {self.done + 1}; "
            f"{kept if self.saved[0] else 'nothing was saved yet'}. Lower the learning rate or "
            "raise the R1 weight and start again, or look for broken samples in the data"
        )

    # --- what it reads and writes -------------------------------------------------------------

    def _stops(self) -> bool:
        """Return whether any rank should stop."""
        return self.parallel.any(self.stop.requested or self.lock.lost)

    def _micro_batches(self) -> MicroBatches:
        """Return this rank's micro-batches of the next update."""
        share = share_of_rank(self.config.batch_size, self.parallel.data_size)
        number = num_micro_batches(share, self.config.micro_batch_size)
        return MicroBatches(
            self.stage, self._read, number, watch=self._watch_latents, between=self._between
        )

    def _place(self) -> str:
        """Return where the run is, for the errors of ranks that wait for this one."""
        return f"update {self.done + 1}, {self.at}"

    def _between(self, number: int) -> None:
        """Stop before a micro-batch if requested, unless this part has changed weights."""
        self.at = f"{self.at.partition(',')[0]}, micro-batch {number + 1}"
        if self.stoppable and self._moves() == self.moved and self._stops():
            raise _Stop

    def _read(self) -> Batch:
        begin = time.monotonic()
        batch = self.attempt(lambda: next(self.loader))
        self.waited += time.monotonic() - begin
        return batch

    def _watch_latents(self, pixels: Tensor | None, latents: Tensor) -> None:
        """Record the latent shape; warn once if the codec's statistics do not fit the data."""
        self.latent_shape = tuple(latents.shape[2:])
        if self.parallel.is_main and self.statistics is not None:
            self._warn(self.statistics.observe(pixels, latents))

    def export(self, folder: Path, *, updates: int, weights: str = "ema") -> None:
        """Export what the stage trains to a folder. Collective."""
        save_outcome(
            self.stage, self.config, self.parallel, folder, updates=updates, weights=weights
        )

    def _plot_now_and_then(self) -> None:
        """Draw the curves of the running stage, at most once a minute."""
        if time.monotonic() - self.drawn >= PLOT_SECONDS:
            self._plot()
            self.drawn = time.monotonic()

    def _plot(self) -> None:
        """Draw the curves; without matplotlib, print a message once instead of failing."""
        if not self.draws:
            return
        try:
            plot_losses(self.run_dir)
        except ImportError as error:
            self.draws = False
            self.log.message(
                f"no losses.png ({error}): to draw it, `pip install matplotlib`, and call "
                "apt.train.plots.plot_losses"
            )

    def _open_log(self) -> RunLog:
        """Open the log, which writes only on rank 0."""
        run_dir, total, title = self.run_dir, self.config.num_updates, self.config.name
        logs = [RunLog(run_dir, total, self.done, enabled=False, title=title)]

        def open_here() -> None:
            also = self._open_wandb()
            logs.append(RunLog(run_dir, total, self.done, title=title, also=also))

        self.parallel.on_main(open_here)
        return logs[-1]

    def _open_wandb(self) -> WandbLog | None:
        project = self.config.wandb_project
        if not project:
            return None
        return WandbLog(self.run_dir, project, self.config.name, plain(self.config))

    def _write_config(self) -> None:
        given = {OBJECTS: self.objects} if self.objects else {}
        text = json.dumps({**plain(self.config), **given}, indent=2) + "\n"
        write_text(self.run_dir / CONFIG_NAME, text)

    def _write_state(self, state: State, reason: str = "") -> None:
        if self.parallel.is_main:
            total = self.config.num_updates
            write_state(self.run_dir, state, update=self.done, num_updates=total, reason=reason)
