"""One stage under way: its updates, what is written of them, and what is saved when one fails."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from apt.data.dataset import Batch, TrainingData
from apt.data.loader import make_loader
from apt.distributed.parallel import Parallel
from apt.errors import ConfigError
from apt.files import write_text
from apt.memory import peak_memory
from apt.methods.base import MicroBatch, Stage
from apt.train import checkpoint
from apt.train.config import TrainConfig
from apt.train.config_file import OBJECTS, plain
from apt.train.failures import explained
from apt.train.header import header
from apt.train.latent_statistics import LatentStatistics
from apt.train.lock import FolderInUse, RunLock
from apt.train.logs import RunLog
from apt.train.monitor import CollapseMonitor, TrainingStopped, sample_statistics
from apt.train.outcome import save_outcome
from apt.train.parts_done import PartsDone
from apt.train.plots import plot_losses
from apt.train.resume import CHECKPOINTS, CONFIG_NAME, model_identities
from apt.train.retention import Retention
from apt.train.run_state import State, write_state
from apt.train.sample_sheets import decode_samples, draw_samples, write_sheet
from apt.train.signals import StopRequest
from apt.train.speed import Update, speed
from apt.train.weights_and_biases import WandbLog

__all__ = ["Run", "micro_batches"]

PLOT_SECONDS = 60.0
"""Between drawings of `losses.png` while a run goes on, which are made with checkpoints."""

T = TypeVar("T")


class Run:
    """One stage under way: what is trained, how far it is, and where it is written."""

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
        codec = stage.codec
        self.statistics = None if codec is None else LatentStatistics(codec.config, config)
        self.monitor = CollapseMonitor(config.monitor)
        self.models = model_identities(config)
        self.notes: list[str] = []
        self.saved = self.position  # of the newest checkpoint
        self.moved = self._moves()
        self.latent_shape: tuple[int, ...] | None = None  # of the newest samples
        self.draws = True
        self.drawn = time.monotonic()

    @property
    def done(self) -> int:
        """Whole updates."""
        return int(self.state["update"])

    @property
    def position(self) -> tuple[int, int]:
        """Whole updates, and parts of the next one."""
        return self.done, len(self.progress.parts)

    def train(self) -> None:
        """Updates until the end or a stop request; then the finished model."""
        try:
            with explained(self.config.run_dir):
                self._train()
        except FolderInUse:  # what is in the folder is another's now
            raise
        except Exception as error:
            # A disk that refuses is in the error already.
            with contextlib.suppress(OSError):
                self._write_state("failed", " ".join(str(error).split()))
            raise

    def _train(self) -> None:
        config = self.config
        self.parallel.on_main(self._write_config)
        self.parallel.on_main(lambda: self._write_state("running"))
        with self._open_log() as self.log:
            about = header(
                config, self.stage, self.dataset, self.state, self.parallel, done=self.done
            )
            for note in [*about, *self.notes]:
                self.log.message(note)
            self.loader = make_loader(
                self.dataset,
                batch_size=config.batch_size,
                rank=self.parallel.data_rank,
                world_size=self.parallel.data_size,
                num_workers=config.data.num_workers,
                seed=config.seed,
                start_batch=self.done,
            )
            while self.done < config.num_updates and self.update():
                pass
            self._warn(None if self.statistics is None else self.statistics.verdict())
            self.parallel.on_main(self.lock.check)
            if self.saved != self.position:
                self.save()
            if self.done < config.num_updates:
                signal = self.stop.signal_name or "a signal to another rank"
                self.log.message(
                    f"{signal}: saved after update {self.done}; continue with --resume"
                )
                self.parallel.on_main(lambda: self._write_state("unfinished", signal))
                return
            self.export(self.run_dir / "export", updates=self.done)
            self.parallel.on_main(self._plot)
        # The next stage, on any rank, reads what rank 0 has written.
        self.parallel.on_main(lambda: self._write_state("finished"))

    def update(self) -> bool:
        """One update, or the rest of one; False if the run is to stop instead."""
        begin, config = time.monotonic(), self.config
        batch = self.attempt(self._next_batch)
        waited = time.monotonic() - begin
        if self.parallel.any(batch is None):
            return False
        assert batch is not None
        due = {n: p for n, p in self.stage.parts().items() if n not in self.progress.parts}
        shows = bool(config.sample_every) and (self.done + 1) % config.sample_every == 0
        needed = due or shows
        micro_batches = self.compute(partial(self._micro_batches, batch)) if needed else []
        if micro_batches:
            self.latent_shape = tuple(micro_batches[0].x.shape[2:])
        for name, part in due.items():
            means = self.parallel.mean(self.compute(partial(part, micro_batches, self.done)))
            for trained in self.stage.trained.values():
                trained.zero_grad()  # the next part is another network's, and needs the memory
            _check_finite(means, self.done, self.saved[0])
            self.progress.finish(name, means)
            self.moved = self._moves()
        metrics = self._record(begin, waited, micro_batches if shows else None)
        self.state["update"] += 1
        self.progress.clear()
        if self.done % config.checkpoint_every == 0 or self.done == config.num_updates:
            self.save()
            self.attempt_on_main(self._plot_now_and_then)
        self._watch(metrics)
        return True

    def _record(
        self, begin: float, waited: float, shown: Sequence[MicroBatch] | None
    ) -> dict[str, float]:
        """Everything that is written of an update whose weights have moved; returns its metrics.

        It began at `begin` and waited so many seconds for data. `shown` are the micro-batches of an
        update that has a sample sheet.
        """
        config, update = self.config, self.done + 1
        metrics = dict(self.progress.metrics)
        for name, trained in self.stage.trained.items():
            metrics[f"{name}/learning_rate"] = trained.rate(self.done)
        seconds = time.monotonic() - begin
        if shown is not None:
            metrics |= self._show(update, shown)
        timing = speed(
            Update(seconds, waited, config.batch_size, self.latent_shape),
            self.stage.passes(),
            self.parallel,
        )
        memory = peak_memory(self.parallel.device)
        if memory is not None:
            timing["speed/peak_memory_gib"] = memory / 2**30
        self.attempt_on_main(partial(self.log.write, update, metrics, timing))
        if update in config.snapshot_at:
            for weights in ("ema", "raw"):
                folder = self.run_dir / "snapshots" / str(update) / weights
                self.compute(partial(self.export, folder, updates=update, weights=weights))
        return metrics

    def _show(self, update: int, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Write a sample sheet if there is something to show; returns what the monitor looks at."""
        config, stage = self.config, self.stage
        preview = self.compute(lambda: draw_samples(stage, config, batches))
        if preview is None:
            return {}
        pixels = self.compute(lambda: decode_samples(stage, preview.latents))
        if pixels is not None:
            path = self.run_dir / "samples" / f"{update:08d}.png"
            title = f"{config.name}, update {update}"
            self.attempt_on_main(partial(write_sheet, path, pixels, preview.names, title))
            self.attempt_on_main(partial(self.log.picture, update, path))
        return sample_statistics(preview.latents if pixels is None else pixels)

    def _watch(self, metrics: Mapping[str, float]) -> None:
        try:
            for alarm in self.monitor.observe(self.done, metrics):
                self._warn(str(alarm))
        except TrainingStopped:
            if self.saved != self.position:
                self.save()
            raise

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self.log.message(f"warning: {text}")

    # --- work that may fail -------------------------------------------------------------------

    def attempt(self, work: Callable[[], T]) -> T:
        """Work of this rank by itself; if it fails on any, all save what is done, and raise."""
        result: T | None = None
        problem: Exception | None = None
        try:
            result = work()
        except Exception as error:
            problem = error
        try:
            self.parallel.agree(problem)
        except Exception:
            self._save_after_error()
            raise
        return result  # type: ignore[return-value]

    def attempt_on_main(self, work: Callable[[], object]) -> None:
        """The same for work of rank 0."""
        self.attempt(lambda: work() if self.parallel.is_main else None)

    def compute(self, work: Callable[[], T]) -> T:
        """Work in which ranks need each other.

        A single process saves if it fails; of several, the others cannot be asked to.
        """
        return self.attempt(work) if self.parallel.world_size == 1 else work()

    def _save_after_error(self) -> None:
        """Save what is done, unless it is saved, or weights may have been moved in part."""
        if self._moves() != self.moved:
            return
        if self.saved != self.position:
            try:
                self.save(tensorboard=False)
            except Exception as failure:  # the error that led here is the one to raise
                self.log.message(f"the state after update {self.done} is not saved: {failure}")
                return
        if self.saved != (0, 0):
            more = f" and the {' and '.join(self.progress.parts)} of the next"
            where = f"{self.done}{more if self.progress.parts else ''}"
            self.log.message(f"saved after update {where}; --resume continues there")

    def _moves(self) -> int:
        """How often weights began to move."""
        return sum(trained.moves for trained in self.stage.trained.values())

    def save(self, *, tensorboard: bool = True) -> None:
        """Write a checkpoint, and delete old ones."""
        self.parallel.on_main(self.lock.check)
        self.parallel.on_main(lambda: self.log.sync(tensorboard=tensorboard))
        meta = {
            "config": plain(self.config),
            OBJECTS: self.objects,
            "data": self.dataset.fingerprint,
            "models": self.models,
            **self.progress.as_meta(),
        }
        path = checkpoint.save(self.retention.root, self.done, self.state, meta)
        self.saved = self.position
        self.retention.trust(path)
        self.retention.prune()

    # --- what it reads and writes -------------------------------------------------------------

    def _next_batch(self) -> Batch | None:
        """This rank's share of the next batch; None if the run is to stop."""
        return None if self.stop.requested or self.lock.lost else next(self.loader)

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        return micro_batches(self.config, self.stage, batch, watch=self._watch_latents)

    def _watch_latents(self, pixels: Tensor | None, latents: Tensor) -> None:
        """Say once if the codec's statistics are those of other data."""
        if self.parallel.is_main and self.statistics is not None:
            self._warn(self.statistics.observe(pixels, latents))

    def export(self, folder: Path, *, updates: int, weights: str = "ema") -> None:
        """Write what the stage trains as a folder; every rank must call it."""
        save_outcome(
            self.stage, self.config, self.parallel, folder, updates=updates, weights=weights
        )

    def _plot_now_and_then(self) -> None:
        """Draw the curves of a run under way, at most once a minute."""
        if time.monotonic() - self.drawn >= PLOT_SECONDS:
            self._plot()
            self.drawn = time.monotonic()

    def _plot(self) -> None:
        """Draw the curves; a run does not fail for want of matplotlib, and says so once."""
        if not self.draws:
            return
        try:
            plot_losses(self.run_dir)
        except ImportError as error:
            self.draws = False
            self.log.message(
                f"no losses.png ({error}): `pip install matplotlib`, then "
                "`apt.train.plots.plot_losses`"
            )

    def _open_log(self) -> RunLog:
        """The log, which only rank 0 has."""
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


def micro_batches(
    config: TrainConfig,
    stage: Stage,
    batch: Batch,
    *,
    watch: Callable[[Tensor | None, Tensor], None] | None = None,
) -> list[MicroBatch]:
    """This rank's samples in equal parts, as latents if the stage has a codec.

    `watch` sees latents, and the pixels that they were made of if they were made here.
    """
    share = len(batch.captions)
    size = config.micro_batch_size or share
    if share % size:
        raise ConfigError(
            f"micro_batch_size {size} must divide a rank's share of the batch, {share} samples"
        )
    codec, device = stage.codec, stage.host.device

    def latents(start: int) -> Tensor:
        pixels = None
        if batch.latents is not None:
            x = batch.latents[start : start + size].to(device).float()
        else:
            assert batch.pixels is not None
            pixels = batch.pixels[start : start + size].to(device)
            if codec is None:
                return pixels
            with stage.host.autocast() if codec.encodes_in_autocast else contextlib.nullcontext():
                x = codec.encode(pixels).float()
        if watch is not None:
            watch(pixels, x)
        return x

    return [
        MicroBatch(
            x=latents(i),
            captions=batch.captions[i : i + size],
            extra={name: value[i : i + size].to(device) for name, value in batch.extra.items()},
            offset=batch.offset + i,
        )
        for i in range(0, share, size)
    ]


def _check_finite(metrics: Mapping[str, float], update: int, saved: int) -> None:
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if bad:
        kept = f"the checkpoint of update {saved} is kept" if saved else "nothing was saved yet"
        raise TrainingStopped(
            f"{', '.join(bad)} became NaN or infinite in update {update + 1}; {kept}. Lower the "
            "learning rate or raise the R1 weight, and start again, or look for broken samples in "
            "the data"
        )
