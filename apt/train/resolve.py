"""What a configuration leaves open, filled in from the model and the data that it names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from apt.checkpoints.info import CodecInfo, ModelInfo, SampleInfo
from apt.checkpoints.load import describe, load_prompt_check
from apt.condition import PromptCheck
from apt.data.buckets import check_size
from apt.data.builtin_sources import DIGITS, OBJECT, Files
from apt.data.latents import read_cache_info
from apt.data.statistics import (
    ClipSize,
    FolderStatistics,
    choose_clip,
    choose_prompts,
    read_captions,
    read_statistics,
)
from apt.device import computes_in_bf16
from apt.distributed.parallel import FromMain, made_here
from apt.errors import DataError, InputError, counted
from apt.methods.base import MethodConfig
from apt.models.architectures import MODELS, TEXT_ENCODERS
from apt.models.create import describe_codec
from apt.models.transformer import tokens_multiple
from apt.pixels import LatentCodec
from apt.train.config import DataConfig, TrainConfig
from apt.train.objects import NO_OBJECTS, Objects

__all__ = [
    "NUM_PROMPTS",
    "Start",
    "advice",
    "check_captions",
    "clips_of",
    "prompt_check",
    "resolve",
    "resolve_with_notes",
    "rounded",
]

NUM_PROMPTS = 6
"""Captions on a sample sheet, where nobody chose any."""

Start = ModelInfo | CodecInfo | None
"""What is said of the model, or the trained codec, that a stage starts from."""

# The share of an exported average that the weights may have which the run began with.
_STALE = 0.05
# The share of a batch that may be added or left out so that it divides by the ranks.
_ROUNDING = 0.02
_SIZE = ("frames", "height", "width", "fps")


def check_captions(config: TrainConfig) -> None:
    """Raise DataError if a stage that reads captions would find none that it can use.

    For stages that come after others, whose work would be lost; no file is opened.
    """
    source = config.data.make_source()
    begins = config.stage.reads_captions and config.stage.start_field is None
    if not begins or not isinstance(source, Files) or not source.path:
        return
    captions = read_captions(source.path, scan=source.scan)
    usable = _takes(prompt_check(config))
    if not any(usable(caption) for caption in captions):
        raise DataError(
            f"{source.path}: the text encoder of {config.name} takes none of its "
            f"{counted(len(captions), 'caption')}; `diffusion-apt data check` shows them"
        )


def resolve(
    config: TrainConfig,
    start: Start,
    before: Mapping[str, Any] | None = None,
    objects: Objects = NO_OBJECTS,
) -> TrainConfig:
    """The configuration with nothing left open; see `resolve_with_notes`."""
    return resolve_with_notes(config, start, before, objects)[0]


def resolve_with_notes(
    config: TrainConfig,
    start: Start,
    before: Mapping[str, Any] | None = None,
    objects: Objects = NO_OBJECTS,
    from_main: FromMain = made_here,
) -> tuple[TrainConfig, list[str]]:
    """The configuration with nothing left open, and lines that say where its size came from.

    What the configuration has None for is as it was in the checkpoint that is continued; or else as
    the latent cache has it, or the model that the stage starts from; or else as most files of the
    folder can give it. `ema_warmup` is decided when a run begins.

    Args:
        config: as it was written.
        start: what the stage starts from; None for random weights.
        before: the configuration in the checkpoint that is continued.
        objects: in place of what the configuration names.
        from_main: `Parallel.from_main` of several ranks, of which one then reads the folder.

    Raises:
        ConfigError: the path of the folder or cache is missing.
        DataError: the latent cache cannot be read, or the folder has no clips to take a size of.
    """
    return _Resolving(config, start, before or {}, objects, from_main).all()


def clips_of(config: TrainConfig, folder: FolderStatistics) -> ClipSize:
    """The clips that a run from random weights takes of a folder, where it leaves them open.

    Raises DataError if most files are too short or too small.
    """
    resolving = _Resolving(config, None, {}, NO_OBJECTS, made_here)
    data = dataclasses.replace(config.data, size_multiple=resolving.multiple())
    return resolving.of_folder(data, folder)[0]


class _Resolving:
    """One configuration on its way; `before` is empty for a run that begins."""

    def __init__(
        self,
        config: TrainConfig,
        start: Start,
        before: Mapping[str, Any],
        objects: Objects,
        from_main: FromMain,
    ) -> None:
        self.config = config
        self.start = start
        self.before = before
        self.objects = objects
        self.from_main = from_main
        self.notes: list[str] = []

    def all(self) -> tuple[TrainConfig, list[str]]:
        """Everything, each with what was settled before it."""
        if isinstance(self.start, ModelInfo):
            stage = self.config.stage.filled(self.start)
            if taken := _newly_set(self.config.stage, stage):
                self.notes.append(f"  {', '.join(taken)}: {self.start_words} is sampled")
            self.config = dataclasses.replace(self.config, stage=stage)
        self.config = dataclasses.replace(self.config, model=self.model(), data=self.size())
        self.check_size(self.config.data)
        self.config = dataclasses.replace(
            self.config,
            ema_warmup=self.ema_warmup(),
            negative_prompt=self.negative_prompt(),
            precision=self.precision(),
        )
        return dataclasses.replace(self.config, sample_prompts=self.prompts()), self.notes

    @cached_property
    def folder(self) -> FolderStatistics | None:
        """The files of the folder; None for another source."""
        source = self.config.data.make_source()
        if not isinstance(source, Files) or not source.path:
            return None
        captioned, scan = self.config.stage.reads_captions, source.scan
        found: FolderStatistics = self.from_main(
            lambda: read_statistics(source.path, captioned=captioned, scan=scan)
        )
        return found

    def size(self) -> DataConfig:
        """Size and rate of clips, and what sizes are multiples of."""
        data = self.config.data
        taken = self.before.get("data", {})
        data = dataclasses.replace(
            data,
            **{
                name: taken[name]
                for name in (*_SIZE, "size_multiple")
                if getattr(data, name) is None and name in taken
            },
        )
        source = data.make_source()
        cache = source.latent_cache()
        only_images = data.images == "only"
        if cache is not None:
            info = read_cache_info(cache)
            return dataclasses.replace(
                data,
                frames=1 if only_images else info.frames,
                height=info.height,
                width=info.width,
                fps=info.fps,
            )
        if data.size_multiple is None and data.source not in (DIGITS, OBJECT):
            data = dataclasses.replace(data, size_multiple=self.multiple())
        still_open = [name for name in _SIZE if getattr(data, name) is None]
        if not still_open:
            return data
        if only_images and data.frames is None:
            data = dataclasses.replace(data, frames=1)
        clip: SampleInfo | ClipSize
        if self.start is not None and self.start.sample.frames:
            clip, origin = self.start.sample, self.start_words
        elif self.folder is not None:
            clip, origin = self.of_folder(data, self.folder)
        else:
            others = ", ".join(f"--data.{name}" for name in still_open)
            clip, origin = data.clip, f"the default of {others}"
            if data.source in (DIGITS, OBJECT):
                origin = ""
        data = dataclasses.replace(
            data,
            **{name: getattr(clip, name) for name in _SIZE if getattr(data, name) is None},
        )
        if origin:
            self.notes.append(f"  size: {_words(data.clip)}, {origin}")
        return data

    def check_size(self, data: DataConfig) -> None:
        """Raise ConfigError for clips of files that the model could not make."""
        if isinstance(data.make_source(), Files):
            clip, multiple = data.clip, data.size_multiple or 1
            check_size(
                clip.frames,
                clip.height,
                clip.width,
                multiple=multiple,
                frame_step=self.frame_step,
                prefix="data.",
            )

    @property
    def frame_step(self) -> int:
        """Frames of a clip are a multiple of it after the first; all have 4k + 1."""
        return math.lcm(4, self.codec.temporal_compression)

    @property
    def start_words(self) -> str:
        what = "codec" if isinstance(self.start, CodecInfo) else "model"
        return f"as the {what} that it starts from"

    def of_folder(self, data: DataConfig, folder: FolderStatistics) -> tuple[ClipSize, str]:
        """What most files give, and where that is from."""
        # Of videos alone "only" takes single frames, and "none" takes images alone.
        if data.images == "only" and folder.images:
            folder = dataclasses.replace(folder, videos=[])
        elif data.images == "none" and folder.videos:
            folder = dataclasses.replace(folder, images=[])
        clip = choose_clip(
            folder,
            multiple=data.size_multiple or 1,
            max_frames=data.max_frames,
            max_pixels=data.max_pixels,
            frame_step=self.frame_step,
            frames=data.frames,
            height=data.height,
            width=data.width,
            fps=data.fps,
            native_ratio=data.native_ratio,
        )
        several = len(folder.videos) + len(folder.images) > 1
        return clip, f"which {'most of ' if several else ''}{folder.words()} can give"

    @cached_property
    def codec(self) -> LatentCodec:
        """The codec that the stage works in or trains: its shape, not its weights."""
        if self.objects.codec is not None:
            return self.objects.codec
        field = self.config.stage.start_field
        if field is not None and field in self.objects.bundles:
            return self.objects.bundles[field].codec
        model = self.config.model
        if self.start is not None:
            part = self.start.codec
        elif source := self.config.stage.trained_codec():
            part = describe(source).codec
        else:
            return describe_codec(model.codec, **model.codec_options)
        return describe_codec(part.architecture, **part.config)

    @property
    def backbone_config(self) -> Any:
        """The config of the backbone that is trained, or that a codec is made for."""
        if self.objects.model is not None:
            return self.objects.model.config
        field = self.config.stage.start_field
        if field is not None and field in self.objects.bundles:
            return self.objects.bundles[field].backbone.config
        if isinstance(self.start, ModelInfo):
            part = self.start.model
            return MODELS.configured(part.architecture, part.config)
        model = self.config.model
        return MODELS.configured(model.name, model.options)

    def multiple(self) -> int:
        """Pixels along a side that become one token."""
        return self.codec.spatial_compression * tokens_multiple(self.backbone_config)

    def model(self) -> Any:
        """A new backbone takes as many channels as its codec has, unless it was said how many."""
        config = self.config
        begins = isinstance(config.stage, MethodConfig) and config.stage.start_field is None
        if not begins or self.objects.model is not None or "in_channels" in config.model.options:
            return config.model
        takes = getattr(self.backbone_config, "in_channels", self.codec.channels)
        if takes == self.codec.channels:
            return config.model
        options = {**config.model.options, "in_channels": self.codec.channels}
        return dataclasses.replace(config.model, options=options)

    def ema_warmup(self) -> bool:
        config = self.config
        if config.ema_warmup is not None:
            return config.ema_warmup
        if self.before:
            return bool(self.before.get("ema_warmup"))
        return config.stage.start_field is None and _stale_share(config) > _STALE

    def negative_prompt(self) -> str:
        if self.config.negative_prompt is not None:
            return self.config.negative_prompt
        if self.before:
            return str(self.before.get("negative_prompt", ""))
        return self.start.sampling.negative_prompt if isinstance(self.start, ModelInfo) else ""

    def precision(self) -> Any:
        if self.config.precision != "auto":
            return self.config.precision
        if self.before:
            return self.before["precision"]
        return "bf16" if computes_in_bf16(self.config.device) else "fp32"

    def prompts(self) -> tuple[str, ...]:
        config = self.config
        if config.sample_prompts is not None:
            return config.sample_prompts
        if self.before:
            return tuple(self.before.get("sample_prompts", ()))
        if not config.sample_every or not config.stage.reads_captions:
            return ()
        if isinstance(self.start, ModelInfo) and (shown := self.start.sample_prompts()):
            return shown
        if self.folder is None:
            return ()
        usable = _takes(prompt_check(config, self.objects))
        found = choose_prompts(self.folder.captions, NUM_PROMPTS, usable)
        self.notes.append(
            f"  sample prompts: {counted(len(found), 'caption')} from all over the folder"
        )
        return found


def _newly_set(written: Any, filled: Any) -> list[str]:
    """The options of a stage, those of its losses too, that were None: "cfg_scale 2"."""
    found: list[str] = []
    for field in dataclasses.fields(written):
        old, new = getattr(written, field.name), getattr(filled, field.name)
        if dataclasses.is_dataclass(old):
            found += _newly_set(old, new)
        elif old is None and new is not None:
            found.append(
                f"{field.name} {new:g}" if isinstance(new, float) else f"{field.name} {new}"
            )
    return found


def _takes(check: PromptCheck | None) -> Callable[[str], bool]:
    def usable(caption: str) -> bool:
        try:
            if check is not None:
                check([caption])
        except InputError:
            return False
        return bool(caption)

    return usable


def rounded(config: TrainConfig, data_size: int) -> tuple[TrainConfig, str | None]:
    """A batch size that does not divide by the ranks made one that does, and what is said of it.

    Only where that is next to nothing; the loader says what is wrong with others.

    Args:
        data_size: ranks, or groups of them, that have samples of their own.
    """
    unit = data_size * max(config.micro_batch_size, 1)
    size = max(1, round(config.batch_size / unit)) * unit
    if size == config.batch_size or abs(size - config.batch_size) > _ROUNDING * config.batch_size:
        return config, None
    each = f" with micro-batches of {config.micro_batch_size}" if config.micro_batch_size else ""
    said = (
        f"batch_size {config.batch_size} does not divide by {data_size} data ranks{each}: rounded "
        f"to {size}; --batch-size {size} continues the run on other numbers of ranks"
    )
    return dataclasses.replace(config, batch_size=size), said


def prompt_check(config: TrainConfig, objects: Objects = NO_OBJECTS) -> PromptCheck | None:
    """What the run's text encoder checks captions with.

    None if a cache has its embeddings, or captions do not matter. `objects` are in place of names.
    """
    if not config.stage.reads_captions:
        return None
    field = config.stage.start_field
    cache = config.data.make_source().latent_cache()
    if cache is not None and read_cache_info(cache).text_encoder:
        return None
    if field is not None and field in objects.bundles:
        return objects.bundles[field].text_encoder.check
    if objects.text_encoder is not None:
        return objects.text_encoder.check
    if field is not None:
        return load_prompt_check(config.stage.source(field))
    model = config.model
    encoder = TEXT_ENCODERS.configured(model.text_encoder, model.text_encoder_options)
    return encoder.prompt_check()


def advice(config: TrainConfig, start: SampleInfo | None) -> list[str]:
    """What is doubtful about a resolved configuration, and what to do about it."""
    found = []
    optimizer, updates = config.optimizer, config.num_updates
    rising, falling = optimizer.warmup_updates, optimizer.decay_updates
    if rising + falling > updates:
        found.append(
            f"{rising} updates of warm-up and {falling} of decay are more than the run's {updates}:"
            " the learning rate never reaches its value; set --optimizer.warmup-updates"
        )
    share = _stale_share(config)
    if share > _STALE and not config.ema_warmup:
        decay = _STALE ** (1 / updates)
        found.append(
            f"{share:.0%} of the exported average will be the weights that the run starts from "
            f"(ema_decay {config.ema_decay:g} over {updates} updates); --ema-decay {decay:.3g} "
            f"would leave {_STALE:.0%}, and snapshots have the raw weights too"
        )
    if start is not None:
        found += _size_differs(start, config.data)
    return found


def _stale_share(config: TrainConfig) -> float:
    """How much of the average the first weights are at the end, without a warm-up."""
    return float(config.ema_decay**config.num_updates)


def _size_differs(model: SampleInfo, data: DataConfig) -> list[str]:
    clip = data.clip
    frames = clip.frames != model.frames and data.images != "only"
    size = (clip.height, clip.width) != (model.height, model.width)
    rate = clip.fps != model.fps and clip.fps and model.fps and data.images != "only"
    if not (frames or size or rate):
        return []
    return [
        f"the model that this stage starts from was trained on {_words(model)}, this stage is "
        f"trained on, and exported for, {_words(clip)}"
    ]


def _words(clip: SampleInfo) -> str:
    if clip.frames == 1:
        return f"images of {clip.height}x{clip.width}"
    rate = f" at {clip.fps:g} fps" if clip.fps else ""
    return f"{clip.frames} frames of {clip.height}x{clip.width}{rate}"
