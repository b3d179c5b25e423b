"""Training one stage: a folder of its own, begun or continued, the same for all stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apt.errors import ConfigError, InputError
from apt.methods.base import Stage
from apt.models.bundle import describe
from apt.models.cached import CachedCodec
from apt.train import checkpoint
from apt.train.config import TrainConfig
from apt.train.datasets import make_dataset
from apt.train.failures import explained
from apt.train.host import RunHost
from apt.train.lock import RunLock
from apt.train.loop import Run
from apt.train.networks import starts_from
from apt.train.parallel import Parallel
from apt.train.progress import Progress
from apt.train.resolve import advice, prompt_check, resolve
from apt.train.resume import Resume, check_resumable, find_start
from apt.train.signals import StopRequest

__all__ = ["make_stage", "run"]


def run(
    config: TrainConfig,
    *,
    resume: Resume = False,
    start_over: bool = False,
    take_over: bool = False,
    parallel: Parallel | None = None,
    stop: StopRequest | None = None,
) -> Path:
    """Train one stage to its end, or to a stop request, and return the run's folder.

    The folder gets `config.json`, `state.json`, `log.jsonl`, `speed.jsonl` and TensorBoard files,
    `checkpoints/`, `samples/`, `snapshots/<update>/{ema,raw}/`, `losses.png`, drawn anew as the run
    goes on, and the finished model in `export/`; while the run lasts, a lock. TensorBoard files
    need tensorboard, `losses.png` matplotlib: a run without them says so, and goes on.

    SIGTERM and Ctrl-C save a checkpoint and leave, and so does an error, if it can: also in the
    middle of an update, which is then finished when the run goes on. What continues is the newest
    checkpoint that verifies; on the CPU the result equals an uninterrupted run bit for bit.

    Args:
        config: what to train.
        resume: continue the run in the folder; "auto": if there is one.
        start_over: begin again where all checkpoints are damaged or gone.
        take_over: take the folder from another process that still has it.
        parallel: shared by stages in a row, as a process group is joined once; alone, a run makes
            its own.
        stop: likewise.

    Raises:
        ConfigError: the configuration is wrong, does not fit the checkpoint, or the folder holds a
            run and `resume` is off.
        CheckpointError: nothing to resume, or a checkpoint cannot be written.
        FolderInUse: another process trains in the folder.
        TrainingStopped: a loss is not finite, or the collapse monitor was told to stop.
        InputError: the disk or the memory does not suffice.
    """
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        if parallel is None:
            parallel = stack.enter_context(Parallel.from_environment(config.device))
        if stop is None:
            stop = stack.enter_context(StopRequest())
        stack.enter_context(explained(config.run_dir))
        lock = stack.enter_context(_locked(run_dir, parallel, resume, take_over))
        found = find_start(run_dir, resume, start_over=start_over)
        _prepare(config, found, parallel, lock, stop).train()
    return run_dir


@contextlib.contextmanager
def _locked(
    run_dir: Path, parallel: Parallel, resume: Resume, take_over: bool
) -> Iterator[RunLock]:
    """The run's folder for this run alone; rank 0 has the lock."""
    if resume is True and not run_dir.is_dir():
        find_start(run_dir, resume)  # says that there is nothing, and makes no folder to say so
    lock = RunLock(run_dir, take_over=take_over)
    with contextlib.ExitStack() as stack:
        parallel.on_main(lambda: stack.enter_context(lock))
        yield lock


def _prepare(
    config: TrainConfig, found: Path | None, parallel: Parallel, lock: RunLock, stop: StopRequest
) -> Run:
    """Everything that a run needs, at the state of its checkpoint if there is one."""
    meta = checkpoint.read_meta(found) if found is not None else None
    source = starts_from(config)
    start = None if source is None else describe(source).sample
    config = resolve(config, start, None if meta is None else meta["config"])
    taken: list[str] = []
    if found is not None and meta is not None:
        taken = check_resumable(config, meta, found, checkpoint.step_of(found))
    dataset = make_dataset(config.data, seed=config.seed, check=prompt_check(config))
    stage = make_stage(config, parallel)
    _check_prompts(config, stage)
    state = _state(stage)
    if found is not None:
        checkpoint.load(found, state, verified=True)
    made = Run(config, stage, parallel, dataset, state, Progress.from_meta(meta), lock, stop)
    if found is not None and meta is not None:
        made.retention.trust(found)
        if taken:
            made.notes.append(f"goes on from {found.name} with other options: {'; '.join(taken)}")
        if meta["data"] != dataset.fingerprint:
            _check_moved_data(config, meta["config"], found)
            made.notes.append(
                f"warning: the data are not those of {found}: files or captions were added, "
                "removed or changed, so samples do not continue where they stopped"
            )
    if config.sample_every and config.sample_prompts and isinstance(stage.codec, CachedCodec):
        made.notes.append(
            "no sample sheets: a run on a latent cache loads no codec to decode with; the "
            "monitor looks at latents. `diffusion-apt generate --model` draws samples"
        )
    made.notes += (f"warning: {text}" for text in [*stage.warnings(), *advice(config, start)])
    return made


def _check_moved_data(config: TrainConfig, before: Mapping[str, Any], found: Path) -> None:
    """Raise ConfigError for data at another path that are other data."""
    was, now = before["data"]["path"], config.data.path
    if was != now:
        raise ConfigError(
            f"the data of {found} were at {was!r}, and those at {now!r} are others: files, "
            "captions or sizes differ. Resume with the same data, or start a new run in another "
            "--run-dir"
        )


def make_stage(config: TrainConfig, parallel: Parallel) -> Stage:
    """The networks of a run, on this rank's device."""
    stage = config.stage.begin(RunHost(config, parallel))
    for part in stage.frozen:
        part.to(parallel.device)
    return stage


def _state(stage: Stage) -> dict[str, Any]:
    """All that a resumed run needs. Random draws and data order follow from the update's number."""
    state: dict[str, Any] = {name: trained.state() for name, trained in stage.trained.items()}
    return {**state, **stage.extra_state(), "update": 0}


def _check_prompts(config: TrainConfig, stage: Stage) -> None:
    """Raise InputError now for a prompt that a later update would stop at."""
    try:
        stage.check_prompts(config.sample_prompts if config.sample_every else ())
    except InputError as error:
        raise InputError(
            f"--negative-prompt or --sample-prompts cannot be encoded: {error}"
        ) from error
