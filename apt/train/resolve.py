"""Resolve what a configuration leaves open, from the model and the data that it names."""

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
"""Captions on a sample sheet by default."""

Start = ModelInfo | CodecInfo | None
"""Description of the model, or the trained codec, that a stage starts from."""

# The largest share that the first weights of a run may have in the exported average.
_STALE = 0.05
# The largest relative change of a batch size to make it divisible by the ranks.
_ROUNDING = 0.02
_SIZE = ("frames", "height", "width", "fps")


def check_captions(config: TrainConfig) -> None:
    """Raise DataError if a stage that reads captions would find none that it can use.

    This checks later stages of a sequence before the first one trains. It opens no video.
    """
    source = config.data.make_source()
    begins = config.stage.reads_captions and config.stage.start_field is None
    if not begins or not isinstance(source, Files) or not source.path:
        return
    captions = read_captions(source.path, scan=source.scan)
    usable = _takes(prompt_check(config))
    if not any(usable(caption) for caption in captions):
        raise DataError(
            f"{source.path}: the text encoder of {config.name} can use none of the "
            f"{counted(len(captions), 'caption')}; `diffusion-apt data check` shows them"
        )


def resolve(
    config: TrainConfig,
    start: Start,
    before: Mapping[str, Any] | None = None,
    objects: Objects = NO_OBJECTS,
) -> TrainConfig:
    """Return the configuration with nothing left open; see `resolve_with_notes`."""
    return resolve_with_notes(config, start, before, objects)[0]


def resolve_with_notes(
    config: TrainConfig,
    start: Start,
    before: Mapping[str, Any] | None = None,
    objects: Objects = NO_OBJECTS,
    from_main: FromMain = made_here,
) -> tuple[TrainConfig, list[str]]:
    """Return the configuration with nothing left open, and lines that say where values came from.

    Fields that are None take their values from the checkpoint that is continued, from the latent
    cache, from the model that the stage starts from, or from what most files of the folder allow,
    in this order. `ema_warmup` is decided when a run begins.

    Args:
        config: the configuration as written.
        start: the model or codec that the stage starts from; None for random weights.
        before: the configuration in the checkpoint that is continued.
        objects: objects to use instead of what the configuration names.
        from_main: `Parallel.from_main` of several ranks, so that only one reads the folder.

    Raises:
        ConfigError: the path of the folder or cache is missing.
        DataError: the latent cache cannot be read, or the folder has no clips that set a size.
    """
    return _Resolving(config, start, before or {}, objects, from_main).all()


def clips_of(config: TrainConfig, folder: FolderStatistics) -> ClipSize:
    """Return the clips that a run from random weights takes from a folder if it leaves them open.

    Raises DataError if most files are too short or too small.
    """
    resolving = _Resolving(config, None, {}, NO_OBJECTS, made_here)
    data = dataclasses.replace(config.data, size_multiple=resolving.multiple())
    return resolving.of_folder(data, folder)[0]


class _Resolving:
    """A configuration that is being resolved; `before` is empty for a new run."""

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
        """Resolve everything, in an order in which later values can use earlier ones."""
        if isinstance(self.start, ModelInfo):
            stage = self.config.stage.filled(self.start)
            if taken := _newly_set(self.config.stage, stage):
                self.notes.append(f"  {', '.join(taken)}: {self.start_words}")
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
        """Statistics of the folder's files; None for another source."""
        source = self.config.data.make_source()
        if not isinstance(source, Files) or not source.path:
            return None
        captioned, scan = self.config.stage.reads_captions, source.scan
        found: FolderStatistics = self.from_main(
            lambda: read_statistics(source.path, captioned=captioned, scan=scan)
        )
        return found

    def size(self) -> DataConfig:
        """Resolve size and frame rate of clips, and the multiple of sizes."""
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
        """Raise ConfigError for sizes of clips that the model cannot generate."""
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
        """The frames of a clip after the first are a multiple of this; all clips have 4k + 1."""
        return math.lcm(4, self.codec.temporal_compression)

    @property
    def start_words(self) -> str:
        what = "codec" if isinstance(self.start, CodecInfo) else "model"
        return f"taken from the {what} that it starts from"

    def of_folder(self, data: DataConfig, folder: FolderStatistics) -> tuple[ClipSize, str]:
        """Return the clips that most files allow, and the words for where they come from."""
        # Without images, "only" takes single frames of videos; without videos, "none" takes images.
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
        return clip, f"which {'most of ' if several else ''}{folder.words()} can provide"

    @cached_property
    def codec(self) -> LatentCodec:
        """The codec that the stage uses or trains, without its weights."""
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
        """The config of the backbone that is trained, or for which a codec is trained."""
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
        """Return the pixels along a side that become one token."""
        return self.codec.spatial_compression * tokens_multiple(self.backbone_config)

    def model(self) -> Any:
        """Give a new backbone as many channels as its codec, unless they are set."""
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
            f"  sample prompts: {counted(len(found), 'caption')} spread over the folder"
        )
        return found


def _newly_set(written: Any, filled: Any) -> list[str]:
    """Return the options of a stage and its losses that were None, such as "cfg_scale 2"."""
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
    """Round a batch size to a multiple of the ranks if that changes little, and return a note.

    The loader raises an error for other batch sizes.

    Args:
        config: the configuration.
        data_size: number of ranks, or groups of ranks, with their own samples.
    """
    unit = data_size * max(config.micro_batch_size, 1)
    size = max(1, round(config.batch_size / unit)) * unit
    if size == config.batch_size or abs(size - config.batch_size) > _ROUNDING * config.batch_size:
        return config, None
    each = f" with micro-batches of {config.micro_batch_size}" if config.micro_batch_size else ""
    said = (
        f"batch_size {config.batch_size} is not divisible by {data_size} data ranks{each}: rounded "
        f"to {size}; to resume on another number of ranks, set --batch-size {size}"
    )
    return dataclasses.replace(config, batch_size=size), said


def prompt_check(config: TrainConfig, objects: Objects = NO_OBJECTS) -> PromptCheck | None:
    """Return the check of captions of the run's text encoder.

    Returns None if a cache has the embeddings, or if the stage reads no captions. `objects` replace
    what the configuration names.
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
    """Return warnings about a resolved configuration, with advice."""
    found = []
    optimizer, updates = config.optimizer, config.num_updates
    rising, falling = optimizer.warmup_updates, optimizer.decay_updates
    if rising + falling > updates:
        found.append(
            f"warm-up ({rising}) and decay ({falling}) take more updates than the run has "
            f"({updates}), so the learning rate never reaches its full value; set "
            "--optimizer.warmup-updates"
        )
    share = _stale_share(config)
    if share > _STALE and not config.ema_warmup:
        decay = _STALE ** (1 / updates)
        found.append(
            f"the weights that the run starts from will make up {share:.0%} of the exported "
            f"average (ema_decay {config.ema_decay:g}, updates: {updates}); --ema-decay "
            f"{decay:.3g} would reduce this to {_STALE:.0%}; snapshots also have the raw weights"
        )
    if start is not None:
        found += _size_differs(start, config.data)
    return found


def _stale_share(config: TrainConfig) -> float:
    """Return the share of the first weights in the final average, without a warm-up."""
    return float(config.ema_decay**config.num_updates)


def _size_differs(model: SampleInfo, data: DataConfig) -> list[str]:
    clip = data.clip
    frames = clip.frames != model.frames and data.images != "only"
    size = (clip.height, clip.width) != (model.height, model.width)
    rate = clip.fps != model.fps and clip.fps and model.fps and data.images != "only"
    if not (frames or size or rate):
        return []
    return [
        f"the model that this stage starts from was trained on {_words(model)}, but this stage "
        f"trains on, and exports for, {_words(clip)}"
    ]


def _words(clip: SampleInfo) -> str:
    if clip.frames == 1:
        return f"images of {clip.height}x{clip.width}"
    rate = f" at {clip.fps:g} fps" if clip.fps else ""
    return f"{clip.frames} frames of {clip.height}x{clip.width}{rate}"
