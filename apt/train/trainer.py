"""Train one stage in its run folder; start it or resume it. The same for all stages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from apt.checkpoints.info import CodecInfo, ModelInfo
from apt.checkpoints.load import ModelBundle, describe
from apt.condition import TextEncoder
from apt.data.loader import num_micro_batches, share_of_rank
from apt.distributed.launch import restarts
from apt.distributed.parallel import Parallel
from apt.errors import CheckpointError, ConfigError, InputError, counted
from apt.methods.base import MethodConfig, Stage
from apt.models.architectures import CODECS
from apt.models.cached import CachedCodec
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec
from apt.train import checkpoint
from apt.train.config import TrainConfig
from apt.train.datasets import kept_apart, make_dataset
from apt.train.failures import explained
from apt.train.heldout import divide
from apt.train.host import RunHost
from apt.train.lock import RunLock
from apt.train.loop import Run
from apt.train.objects import NO_OBJECTS, Objects, check_same_objects
from apt.train.resolve import Start, advice, prompt_check, resolve_with_notes, rounded
from apt.train.resume import (
    COLLECTIVES,
    Resume,
    check_resumable,
    find_start,
    is_done_as_asked,
    recorded_objects,
)
from apt.train.run_state import is_of_this_job
from apt.train.saving import PartsDone
from apt.train.signals import StopRequest

__all__ = ["laid_out", "make_stage", "run"]


def run(
    config: TrainConfig,
    *,
    model: DiffusionTransformer | None = None,
    text_encoder: TextEncoder | None = None,
    codec: LatentCodec | None = None,
    bundles: Mapping[str, ModelBundle] | None = None,
    dataset: Any = None,
    resume: Resume = False,
    start_over: bool = False,
    take_over: bool = False,
    parallel: Parallel | None = None,
    stop: StopRequest | None = None,
) -> Path:
    """Train one stage to its end, or to a stop request, and return the run's folder.

    The folder gets `config.json`, `state.json`, `log.jsonl`, `speed.jsonl`, TensorBoard files,
    `checkpoints/`, `samples/`, `snapshots/<update>/{ema,raw}/`, `losses.png`, which is redrawn
    during the run, the finished model in `export/`, and a lock while the run lasts. TensorBoard
    files need tensorboard, and `losses.png` needs matplotlib; without them, a run prints a message
    and continues.

    On SIGTERM or Ctrl-C, a run saves a checkpoint and stops before the next micro-batch. After an
    error it also saves if it can. A resumed run continues from the newest intact checkpoint and
    does not repeat finished parts of an update; on the CPU its result equals that of an
    uninterrupted run bit for bit. Ranks that torchrun restarts resume by themselves.

    Objects replace what the configuration names, and train from the weights that they have; all
    ranks must be given the same. The exported folder includes them, and can be loaded after an
    import of the module that registers their classes. Such a run can only be resumed in Python,
    with objects of the same classes and shapes, and the same number of clips.

    Args:
        config: the configuration of the run.
        model: a backbone for a stage that starts from random weights, instead of
            `config.model.name`.
        text_encoder, codec: likewise. A text encoder trains if any of its parameters does; a codec
            trains only in a stage for codecs.
        bundles: models instead of those that fields of the stage name, by field:
            `{"generator": bundle, "discriminator": bundle}`.
        dataset: clips instead of `config.data.source`: a map-style data set whose items are pairs
            of pixels (3, T, H, W), float32 in [-1, 1], and a caption; see
            `apt.data.clips.check_clips`. Its first clip sets the size if the configuration leaves
            it open.
        resume: resume the run in the folder; with "auto", resume if there is one, else start. A run
            that is finished with this configuration is left as it is.
        start_over: begin again if all checkpoints are damaged or gone.
        take_over: take the folder over from another process that is still using it.
        parallel: the ranks, which successive stages share, because a process group is joined once;
            None joins them for this run.
        stop: the stop request, likewise.

    Raises:
        ConfigError: the configuration or an object is wrong or does not fit the checkpoint, or the
            folder holds a run and `resume` is False.
        DataError: the clips cannot be trained on.
        CheckpointError: there is nothing to resume, or a checkpoint cannot be written.
        FolderInUse: another process is training in the folder.
        LostRankError: another rank is dead or hangs; the message names it.
        TrainingStopped: a loss is not finite, or the collapse monitor stopped the run.
        InputError: the disk is full or memory ran out.
    """
    objects = Objects(
        model=model,
        text_encoder=text_encoder,
        codec=codec,
        bundles=bundles or {},
        dataset=dataset,
    )
    objects.check(config)
    kinds = objects.kinds()
    config.data.make_source()
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        if parallel is None:
            parallel = stack.enter_context(
                Parallel.from_environment(
                    config.device,
                    config=config.parallel,
                    timeout=timedelta(minutes=config.timeout_minutes),
                    records=run_dir / COLLECTIVES,
                )
            )
        parallel = laid_out(config, parallel)
        if stop is None:
            stop = stack.enter_context(StopRequest())
        # Rank 0's disk decides for all.
        asked = bool(resume) and not (start_over or kinds)
        if asked and parallel.any(parallel.is_main and is_done_as_asked(config)):
            parallel.on_main(lambda: print(_finished(config), file=sys.stderr))
            return run_dir
        stack.enter_context(explained(config.run_dir))
        # Each node's torchrun counts restarts by itself, so any rank's count decides. A run from
        # before this launch is not resumed.
        if parallel.any(restarts() > 0) and parallel.any(
            parallel.is_main and is_of_this_job(run_dir)
        ):
            # Ranks of the attempt before may still hold the lock.
            resume, take_over = resume or "auto", True
        lock = stack.enter_context(_locked(run_dir, parallel, resume, take_over))
        found = find_start(run_dir, resume, start_over=start_over)
        recorded = recorded_objects(run_dir, found) if resume else None
        if recorded is not None:
            check_same_objects(kinds, recorded, config.run_dir)
        _prepare(config, objects, kinds, found, parallel, lock, stop).train()
    return run_dir


def _finished(config: TrainConfig) -> str:
    """Return the message for resuming a run that is already finished."""
    uses = f"`diffusion-apt generate --model {config.run_dir}` samples from it, "
    if not isinstance(config.stage, MethodConfig):
        uses = ""
    return (
        f"{config.name}: already finished after {counted(config.num_updates, 'update')}; {uses}a "
        "larger --num-updates continues training"
    )


def laid_out(config: TrainConfig, parallel: Parallel) -> Parallel:
    """Return the ranks in the layout of a run.

    Raises ConfigError if the layout does not fit them, or if several ranks cannot train the stage.
    """
    if parallel.world_size > 1:
        config.stage.check_sharded()
    return parallel.laid_out(config.parallel)


@contextlib.contextmanager
def _locked(
    run_dir: Path, parallel: Parallel, resume: Resume, take_over: bool
) -> Iterator[RunLock]:
    """Lock the run's folder on rank 0."""
    if resume is True and not run_dir.is_dir():
        find_start(run_dir, resume)  # raises before the lock would create the folder
    lock = RunLock(run_dir, take_over=take_over)
    with contextlib.ExitStack() as stack:
        parallel.on_main(lambda: stack.enter_context(lock))
        yield lock


def _prepare(
    config: TrainConfig,
    objects: Objects,
    kinds: Mapping[str, Mapping[str, Any]],
    found: Path | None,
    parallel: Parallel,
    lock: RunLock,
    stop: StopRequest,
) -> Run:
    """Set up a run, with the state of its checkpoint if there is one.

    `kinds` describe the objects as they were given, before adapters are added.
    """
    meta = checkpoint.read_meta(found) if found is not None else None
    config = objects.named(config)
    start = _start(config, objects)
    before = None if meta is None else meta["config"]
    config, found_out = resolve_with_notes(config, start, before, objects, parallel.from_main)
    config, rounding = rounded(config, parallel.data_size)
    # Raise errors now, before anything is loaded.
    num_micro_batches(share_of_rank(config.batch_size, parallel.data_size), config.micro_batch_size)
    taken: list[str] = []
    if found is not None and meta is not None:
        taken = check_resumable(config, meta, found, checkpoint.step_of(found))
    seed, captioned = config.seed, config.stage.reads_captions
    check, from_main = prompt_check(config, objects), parallel.from_main
    opened = partial(make_dataset, seed=seed, check=check, captioned=captioned, from_main=from_main)
    apart = None
    if config.heldout.is_on:
        apart = kept_apart(config.data, seed=seed, check=check, captioned=captioned)
    everything = opened(config.data, dataset=objects.dataset)
    ranks = parallel.data_size
    dataset, heldout = divide(config, everything, apart, opened, ranks=ranks)
    stage = make_stage(config, parallel, objects)
    _check_measures(config, stage)
    _check_prompts(config, stage)
    state = _state(stage)
    if found is not None:
        checkpoint.load(found, state, verified=True)
    done = PartsDone.from_meta(meta)
    made = Run(config, stage, parallel, dataset, state, done, lock, stop, kinds)
    made.notes += found_out
    if rounding:
        made.notes.append(rounding)
    made.heldout = heldout
    if heldout is not None:
        made.notes.append(
            f"  held out: {counted(len(heldout), 'clip')}, measured every "
            f"{counted(heldout.every, 'update')}"
        )
    if found is not None and meta is not None:
        made.retention.trust(found)
        if taken:
            made.notes.append(f"continues {found.name} with other options: {'; '.join(taken)}")
        if meta["data"] != dataset.fingerprint:
            _check_moved_data(config, meta["config"], found)
            made.notes.append(
                f"warning: the data have changed since {found}: files or captions were added, "
                "removed or changed, so the order of samples does not continue where it stopped"
            )
    if config.sample_every and isinstance(stage.codec, CachedCodec):
        made.notes.append(
            "no sample sheets: a run on a latent cache loads no codec to decode them, and the "
            "monitor checks latents; `diffusion-apt generate --model` draws samples"
        )
    elif config.sample_every and config.stage.reads_captions and not config.sample_prompts:
        made.notes.append("no sample sheets: --sample-prompts names what they would show")
    trained_on = start.sample if isinstance(start, ModelInfo) else None
    made.notes += (f"warning: {text}" for text in [*stage.warnings(), *advice(config, trained_on)])
    return made


def _check_measures(config: TrainConfig, stage: Stage) -> None:
    if config.heldout.is_on and type(stage).heldout is Stage.heldout:
        raise ConfigError(
            f"{type(stage).__qualname__} has no measures for held-out clips; implement its "
            "heldout(), or leave out --heldout"
        )


def _check_moved_data(config: TrainConfig, before: Mapping[str, Any], found: Path) -> None:
    """Raise ConfigError if another path has other data, or changed data affect held-out clips."""
    if config.heldout.share or config.heldout.clips:
        raise ConfigError(
            f"the data have changed since {found}, so clips that were trained on could be held "
            "out now; restore the files, or start a new run in another --run-dir"
        )
    was, now = before["data"]["path"], config.data.path
    if was != now:
        raise ConfigError(
            f"the data of {found} were at {was!r}, but those at {now!r} differ in files, captions "
            "or sizes. Resume with the same data, or start a new run in another --run-dir"
        )


def make_stage(config: TrainConfig, parallel: Parallel, objects: Objects = NO_OBJECTS) -> Stage:
    """Return the stage of a run, with its networks on this rank's device."""
    return RunHost(config, parallel, objects).begin()


def _start(config: TrainConfig, objects: Objects) -> Start:
    """Return the description of the model, or the trained codec, that the stage starts from."""
    stage, field = config.stage, config.stage.start_field
    if field is not None:
        bundle = objects.bundles.get(field)
        info = _describe(stage.source(field), field) if bundle is None else bundle.info
        return info if isinstance(info, ModelInfo) else None  # loading will raise the error
    codec = stage.trained_codec()
    found = _describe(codec, "codec") if codec else None
    # If the codec is part of a whole model, that model's clips do not apply here.
    return found if isinstance(found, CodecInfo) else None


def _describe(source: str, field: str) -> ModelInfo | CodecInfo:
    """Return the description of a model; errors also name the option."""
    try:
        return describe(source)
    except CheckpointError as error:
        option = f"--stage.{field.replace('_', '-')}"
        others = ""
        if field == "codec":
            others = (
                "; a codec can also be a folder or Hub id of a diffusers autoencoder, or with "
                f"--codec one of: {', '.join(CODECS.names())}"
            )
        raise type(error)(f"cannot start from {option}: {error}{others}") from error


def _state(stage: Stage) -> dict[str, Any]:
    """Return all state that resuming needs; the update's number determines draws and data order."""
    state: dict[str, Any] = {name: trained.state() for name, trained in stage.trained.items()}
    return {**state, **stage.extra_state(), "update": 0}


def _check_prompts(config: TrainConfig, stage: Stage) -> None:
    """Raise InputError now for a prompt that would stop the run at a later update."""
    try:
        stage.check_prompts((config.sample_prompts or ()) if config.sample_every else ())
    except InputError as error:
        raise InputError(
            f"--negative-prompt or --sample-prompts cannot be encoded: {error}"
        ) from error
