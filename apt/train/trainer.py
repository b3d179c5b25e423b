"""Training one stage: a folder of its own, begun or continued, the same for all stages."""

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

    The folder gets `config.json`, `state.json`, `log.jsonl`, `speed.jsonl` and TensorBoard files,
    `checkpoints/`, `samples/`, `snapshots/<update>/{ema,raw}/`, `losses.png`, drawn anew as the run
    goes on, and the finished model in `export/`; while the run lasts, a lock. TensorBoard files
    need tensorboard, `losses.png` matplotlib: a run without them says so, and goes on.

    SIGTERM and Ctrl-C save a checkpoint and leave before the next micro-batch, and so does an
    error, if it can; the parts of an update that are done are not done again when the run goes on.
    What continues is the newest checkpoint that verifies; on the CPU the result equals an
    uninterrupted run bit for bit. Ranks that torchrun starts again continue by themselves.

    Objects stand in for what the configuration names, and are trained as they are, from the weights
    that they have; several ranks must be handed the same. Their parts are in the exported folder,
    which others load once the module that registers such parts is imported. Only Python can
    continue such a run, with objects of the same class and shapes, and as many clips.

    Args:
        config: what to train.
        model: a backbone for a stage that begins anew, in place of `config.model.name`.
        text_encoder, codec: likewise. A text encoder trains if any of its parameters does; a codec
            only in a stage for codecs.
        bundles: models in place of those that fields of the stage name, by the field:
            `{"generator": bundle, "discriminator": bundle}`.
        dataset: clips in place of `config.data.source`: map-style, item i a pair of pixels
            (3, T, H, W) float32 in [-1, 1] and a caption; see `apt.data.clips.check_clips`. Where
            the configuration leaves the size open, it is that of the first clip.
        resume: continue the run in the folder; "auto": if there is one. One that is finished, as it
            is asked for, is left as it is.
        start_over: begin again where all checkpoints are damaged or gone.
        take_over: take the folder from another process that still has it.
        parallel: shared by stages in a row, as a process group is joined once; alone, a run makes
            its own.
        stop: likewise.

    Raises:
        ConfigError: the configuration or an object is wrong or does not fit the checkpoint, or the
            folder holds a run and `resume` is off.
        DataError: clips that cannot be trained on.
        CheckpointError: nothing to resume, or a checkpoint cannot be written.
        FolderInUse: another process trains in the folder.
        LostRankError: another rank is dead or hangs, and which.
        TrainingStopped: a loss is not finite, or the collapse monitor was told to stop.
        InputError: the disk or the memory does not suffice.
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
        # Of the first rank's disk, for all.
        asked = bool(resume) and not (start_over or kinds)
        if asked and parallel.any(parallel.is_main and is_done_as_asked(config)):
            parallel.on_main(lambda: print(_finished(config), file=sys.stderr))
            return run_dir
        stack.enter_context(explained(config.run_dir))
        # torchrun counts restarts on each node by itself. A folder that held another run before
        # this launch is left alone.
        if parallel.any(restarts() > 0) and parallel.any(
            parallel.is_main and is_of_this_job(run_dir)
        ):
            # The ranks that were ended may still have the lock.
            resume, take_over = resume or "auto", True
        lock = stack.enter_context(_locked(run_dir, parallel, resume, take_over))
        found = find_start(run_dir, resume, start_over=start_over)
        recorded = recorded_objects(run_dir, found) if resume else None
        if recorded is not None:
            check_same_objects(kinds, recorded, config.run_dir)
        _prepare(config, objects, kinds, found, parallel, lock, stop).train()
    return run_dir


def _finished(config: TrainConfig) -> str:
    """What is said where a run that is finished is asked to go on."""
    uses = f"`diffusion-apt generate --model {config.run_dir}` samples from it, "
    if not isinstance(config.stage, MethodConfig):
        uses = ""
    return (
        f"{config.name}: finished after {counted(config.num_updates, 'update')}; {uses}a larger "
        "--num-updates trains on"
    )


def laid_out(config: TrainConfig, parallel: Parallel) -> Parallel:
    """The ranks in the layout of a run.

    Raises ConfigError if they are not those of it, or its stage cannot be trained by several.
    """
    if parallel.world_size > 1:
        config.stage.check_sharded()
    return parallel.laid_out(config.parallel)


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
    config: TrainConfig,
    objects: Objects,
    kinds: Mapping[str, Mapping[str, Any]],
    found: Path | None,
    parallel: Parallel,
    lock: RunLock,
    stop: StopRequest,
) -> Run:
    """Everything that a run needs, at the state of its checkpoint if there is one.

    `kinds` are those of the objects as they were handed over: adapters change them.
    """
    meta = checkpoint.read_meta(found) if found is not None else None
    config = objects.named(config)
    start = _start(config, objects)
    before = None if meta is None else meta["config"]
    config, found_out = resolve_with_notes(config, start, before, objects, parallel.from_main)
    config, rounding = rounded(config, parallel.data_size)
    # Refused now, before anything is loaded.
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
            f"  held out: {counted(len(heldout), 'clip')}, measured every {heldout.every}"
        )
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
    if config.sample_every and isinstance(stage.codec, CachedCodec):
        made.notes.append(
            "no sample sheets: a run on a latent cache loads no codec to decode with; the "
            "monitor looks at latents. `diffusion-apt generate --model` draws samples"
        )
    elif config.sample_every and config.stage.reads_captions and not config.sample_prompts:
        made.notes.append("no sample sheets: --sample-prompts names what they would show")
    trained_on = start.sample if isinstance(start, ModelInfo) else None
    made.notes += (f"warning: {text}" for text in [*stage.warnings(), *advice(config, trained_on)])
    return made


def _check_measures(config: TrainConfig, stage: Stage) -> None:
    if config.heldout.is_on and type(stage).heldout is Stage.heldout:
        raise ConfigError(
            f"{type(stage).__qualname__} measures nothing on clips that are held out; give it a "
            "method heldout(), or leave out --heldout"
        )


def _check_moved_data(config: TrainConfig, before: Mapping[str, Any], found: Path) -> None:
    """Raise ConfigError for data at another path that are other data, and where clips that were
    trained on would be held out."""
    if config.heldout.share or config.heldout.clips:
        raise ConfigError(
            f"the data of {found} are not what they were, so that clips which were trained on "
            "could be held out now; put the files back as they were, or start a new run in another "
            "--run-dir"
        )
    was, now = before["data"]["path"], config.data.path
    if was != now:
        raise ConfigError(
            f"the data of {found} were at {was!r}, and those at {now!r} are others: files, "
            "captions or sizes differ. Resume with the same data, or start a new run in another "
            "--run-dir"
        )


def make_stage(config: TrainConfig, parallel: Parallel, objects: Objects = NO_OBJECTS) -> Stage:
    """The networks of a run, on this rank's device."""
    return RunHost(config, parallel, objects).begin()


def _start(config: TrainConfig, objects: Objects) -> Start:
    """What is said of the model, or the trained codec, that the stage starts from."""
    stage, field = config.stage, config.stage.start_field
    if field is not None:
        bundle = objects.bundles.get(field)
        info = _describe(stage.source(field), field) if bundle is None else bundle.info
        return info if isinstance(info, ModelInfo) else None  # loading says what is wrong with it
    codec = stage.trained_codec()
    found = _describe(codec, "codec") if codec else None
    # A whole model that lends its codec was made for other clips.
    return found if isinstance(found, CodecInfo) else None


def _describe(source: str, field: str) -> ModelInfo | CodecInfo:
    """What is said of a model, or an error that says which option named it."""
    try:
        return describe(source)
    except CheckpointError as error:
        option = f"--stage.{field.replace('_', '-')}"
        others = ""
        if field == "codec":
            others = (
                "; a codec can also be a folder or a Hub id of an autoencoder of diffusers, and "
                f"with --codec one of these: {', '.join(CODECS.names())}"
            )
        raise type(error)(f"{option} names what this stage starts from: {error}{others}") from error


def _state(stage: Stage) -> dict[str, Any]:
    """All that a resumed run needs. Random draws and data order follow from the update's number."""
    state: dict[str, Any] = {name: trained.state() for name, trained in stage.trained.items()}
    return {**state, **stage.extra_state(), "update": 0}


def _check_prompts(config: TrainConfig, stage: Stage) -> None:
    """Raise InputError now for a prompt that a later update would stop at."""
    try:
        stage.check_prompts((config.sample_prompts or ()) if config.sample_every else ())
    except InputError as error:
        raise InputError(
            f"--negative-prompt or --sample-prompts cannot be encoded: {error}"
        ) from error
