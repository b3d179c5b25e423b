"""The training loop: the same for every stage, for one process and for many."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.data.loader import make_loader
from apt.data.sample import Batch, TrainingData
from apt.errors import CheckpointError, ConfigError
from apt.train import checkpoint
from apt.train.adversarial import Adversarial
from apt.train.config import AdversarialConfig, DistillConfig, PretrainConfig, TrainConfig
from apt.train.datasets import make_dataset, with_cached_size
from apt.train.distill import Distill
from apt.train.export import export
from apt.train.logs import RunLog
from apt.train.monitor import CollapseMonitor, TrainingStopped, sample_statistics
from apt.train.networks import initial_bundle
from apt.train.parallel import Parallel
from apt.train.plots import plot_losses
from apt.train.pretrain import Pretrain
from apt.train.samples import decode_samples, draw_samples, write_sheet
from apt.train.signals import StopRequest
from apt.train.stage import MicroBatch, Stage

_STAGES: dict[type, type[Stage]] = {
    PretrainConfig: Pretrain,
    DistillConfig: Distill,
    AdversarialConfig: Adversarial,
}
# What a resumed run may change: how long it goes on, and what it writes, but not what it computes.
_FREE_FIELDS = (
    "run_dir",
    "num_updates",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "snapshot_at",
    "sample_every",
    "sample_prompts",
    "monitor",
)


def run(config: TrainConfig, *, resume: bool = False, parallel: Parallel | None = None) -> Path:
    """Train one stage to its end, or to a stop request, and return the run's folder.

    The folder gets `config.json`, `log.jsonl` and TensorBoard files, `checkpoints/`, `samples/`,
    `snapshots/<update>/{ema,raw}/`, `losses.png`, and the finished model in `export/`.

    SIGTERM and Ctrl-C save a checkpoint and leave. With `resume`, the newest checkpoint that
    verifies is continued; on the CPU the result equals an uninterrupted run bit for bit. Stages in
    a row share one `parallel`, because a process group is joined once; alone, a run makes its own.

    Raises:
        ConfigError: the configuration is wrong, does not fit the checkpoint, or the folder holds a
            run and `resume` is off.
        CheckpointError: nothing to resume, or a checkpoint cannot be written.
        TrainingStopped: a loss is not finite, or the collapse monitor was told to stop.
    """
    config = with_cached_size(config)
    run_dir = Path(config.run_dir)
    if parallel is None:
        with Parallel.from_environment(config.device) as parallel:
            return run(config, resume=resume, parallel=parallel)
    with StopRequest() as stop:
        found = _find_checkpoint(run_dir, resume)
        before = None
        if found is not None:
            before = checkpoint.read_meta(found)
            _check_resumable(config, before["config"], found)
        dataset = make_dataset(config.data, seed=config.seed)
        stage = _STAGES[type(config.stage)](config, initial_bundle(config), parallel)
        for part in (stage.start.codec, stage.start.text_encoder):
            if isinstance(part, nn.Module):
                part.to(parallel.device)
        state = _state(stage)
        if found is not None:
            checkpoint.load(found, state, verified=True)
        done = int(state["update"])
        if parallel.is_main:
            _write_config(run_dir, config)
        with RunLog(run_dir, config.num_updates, done, parallel.is_main, title=config.name) as log:
            if before is not None and before["data"] != dataset.fingerprint:
                log.message(
                    f"warning: the data are not those of {found}: files or captions were added, "
                    "removed or changed, so samples do not continue where they stopped"
                )
            if config.data.source == "latents" and config.sample_every and config.sample_prompts:
                log.message(
                    "no sample sheets: a run on a latent cache loads no codec to decode with; the "
                    "monitor looks at latents. `diffusion-apt generate --model` draws samples"
                )
            for text in stage.warnings():
                log.message(f"warning: {text}")
            done = _loop(config, stage, dataset, state, log, stop)
            if done < config.num_updates:
                log.message(
                    f"{stop.signal_name}: saved after update {done}; continue with --resume"
                )
                return run_dir
            export(stage, parallel, run_dir / "export", updates=done)
        if parallel.is_main:
            plot_losses(run_dir)
        # The next stage, on any rank, reads what rank 0 has written.
        parallel.barrier()
    return run_dir


def _loop(
    config: TrainConfig,
    stage: Stage,
    dataset: TrainingData,
    state: dict[str, Any],
    log: RunLog,
    stop: StopRequest,
) -> int:
    """Updates until the end or a stop request; returns how many are done."""
    parallel, run_dir = stage.parallel, Path(config.run_dir)
    meta = {"config": plain(config), "data": dataset.fingerprint}
    loader = make_loader(
        dataset,
        batch_size=config.batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
        start_batch=int(state["update"]),
    )
    monitor = CollapseMonitor(config.monitor)
    saved = int(state["update"])
    while state["update"] < config.num_updates:
        if parallel.any(stop.requested):
            break
        begin = time.monotonic()
        batch = next(loader)
        metrics = parallel.mean(stage.update(_micro_batches(config, stage, batch), state["update"]))
        _check_finite(metrics, state["update"], saved)
        state["update"] += 1
        update = state["update"]
        if config.sample_every and update % config.sample_every == 0 and config.sample_prompts:
            latents = draw_samples(stage, config.sample_prompts)
            pixels = decode_samples(stage, latents)
            metrics |= sample_statistics(latents if pixels is None else pixels)
            if parallel.is_main and pixels is not None:
                path = run_dir / "samples" / f"{update:08d}.png"
                title = f"{config.name}, update {update}"
                write_sheet(path, pixels, config.sample_prompts, title)
        log.write(update, metrics, {"seconds_per_update": time.monotonic() - begin})
        if update in config.snapshot_at:
            for weights in ("ema", "raw"):
                folder = run_dir / "snapshots" / str(update) / weights
                export(stage, parallel, folder, updates=update, weights=weights)
        if update % config.checkpoint_every == 0 or update == config.num_updates:
            saved = _save(config, state, meta, log)
        try:
            for alarm in monitor.observe(update, metrics):
                log.message(f"warning: {alarm}")
        except TrainingStopped:
            _save(config, state, meta, log)
            raise
    if saved != state["update"]:
        _save(config, state, meta, log)
    return int(state["update"])


def _micro_batches(config: TrainConfig, stage: Stage, batch: Batch) -> list[MicroBatch]:
    """This rank's samples as latents, in equal parts."""
    share = len(batch.captions)
    size = config.micro_batch_size or share
    if share % size:
        raise ConfigError(
            f"micro_batch_size {size} must divide a rank's share of the batch, {share} samples"
        )
    codec, device = stage.start.codec, stage.parallel.device

    def latents(start: int) -> Tensor:
        if batch.latents is not None:
            return batch.latents[start : start + size].to(device).float()
        assert batch.pixels is not None
        return codec.encode(batch.pixels[start : start + size].to(device)).float()

    return [
        MicroBatch(
            x=latents(i),
            captions=batch.captions[i : i + size],
            offset=batch.offset + i,
        )
        for i in range(0, share, size)
    ]


def _state(stage: Stage) -> dict[str, Any]:
    """All that a resumed run needs. Random draws and data order follow from the update's number."""
    state: dict[str, Any] = {name: trained.state() for name, trained in stage.trained.items()}
    return {**state, **stage.extra_state(), "update": 0}


def _save(config: TrainConfig, state: dict[str, Any], meta: dict[str, Any], log: RunLog) -> int:
    root = Path(config.run_dir) / "checkpoints"
    log.sync()
    checkpoint.save(root, state["update"], state, meta)
    checkpoint.prune(root, config.keep_checkpoints, set())
    return int(state["update"])


def _check_finite(metrics: Mapping[str, float], update: int, saved: int) -> None:
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if bad:
        kept = f"the checkpoint of update {saved} is kept" if saved else "nothing was saved yet"
        raise TrainingStopped(
            f"{', '.join(bad)} became NaN or infinite in update {update + 1}; {kept}. Lower the "
            "learning rate or raise the R1 weight, and start again, or look for broken samples in "
            "the data"
        )


def _find_checkpoint(run_dir: Path, resume: bool) -> Path | None:
    found = checkpoint.latest(run_dir / "checkpoints")
    if found is not None and not resume:
        raise ConfigError(
            f"{run_dir} already holds a run ({found.name}); continue it with --resume, or choose "
            "another --run-dir"
        )
    if found is None and resume and (run_dir / "config.json").is_file():
        # The run was stopped before its first checkpoint: it begins anew.
        return None
    if found is None and resume:
        raise CheckpointError(f"{run_dir} holds no run to resume; start it without --resume")
    return found


def _check_resumable(config: TrainConfig, before: dict[str, Any], path: Path) -> None:
    now, before = _by_option(plain(config)), _by_option(before)
    changed = [
        f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
        for key in sorted(now.keys() | before.keys())
        if key.split(".")[0] not in _FREE_FIELDS and now.get(key) != before.get(key)
    ]
    if changed:
        raise ConfigError(
            f"the configuration does not fit the checkpoint {path}: {'; '.join(changed)}. Resume "
            "with the same configuration, or start a new run in another --run-dir"
        )


def _by_option(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as {"stage.r1_weight": value}: the names of the command's options."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _by_option(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _write_config(run_dir: Path, config: TrainConfig) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(config), indent=2) + "\n"
    (run_dir / "config.json").write_text(text, encoding="utf-8")
