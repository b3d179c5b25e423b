"""The models that a recipe starts from, as far as they are known before any weights exist."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from apt.checkpoints.info import ComponentInfo, ModelInfo, SampleInfo, SamplingInfo
from apt.checkpoints.load import ModelBundle, describe, describe_model
from apt.checkpoints.reading import Piece, StoredTensor
from apt.checkpoints.source import is_here
from apt.checkpoints.weights import StoredPieces, begin_at
from apt.condition import EncodedText, TextEncoder
from apt.data.builtin_sources import DIGITS, Folder, Latents
from apt.errors import ConfigError
from apt.methods.base import MethodConfig, StageConfig
from apt.models.architectures import CODECS, MODELS, TEXT_ENCODERS, find_tag, split_tag
from apt.models.cached import CachedCodec
from apt.models.create import describe_codec
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec
from apt.train.config import TrainConfig
from apt.train.recipe_names import stages_of
from apt.train.recipes import RECIPES
from apt.train.resolve import resolve

__all__ = [
    "PlannedModel", "find_model", "is_public", "new_model", "paper_model", "registered_model",
    "sample_size",
]  # fmt: skip

PAPER = "apt_8b"
# Assumed for the paper's model, whose parts are not public: the compression of common video codecs.
_COMPRESSION = (4, 8, 8)
_TEXT_TOKENS = 256


@dataclass(frozen=True)
class PlannedModel:
    """A model without weights.

    Attributes:
        name: the registered name of its backbone.
        config: the backbone's config.
        sample: the size of its outputs; None if unknown.
        text_tokens: the tokens that it reads of a prompt, if its text encoder is not part of a run.
        compression: pixels per latent along time, height and width.
        text_encoder, codec: the parts that a run holds; None for parts that a cache replaces.
        file: identifies its weights; networks of the same file share the weights that do not train.
        found: how the model was determined, in words; empty if it was named.
        sampling: how it is sampled, which a stage may take from it.
    """

    name: str
    config: Any
    sample: SampleInfo | None
    text_tokens: int
    compression: tuple[int, int, int] = _COMPRESSION
    text_encoder: ComponentInfo | None = None
    codec: ComponentInfo | None = None
    file: str = ""
    found: str = ""
    sampling: SamplingInfo = field(default_factory=SamplingInfo)

    def bundle(self, *, loads: bool) -> ModelBundle:
        """Return the model in fp32; the backbone is on the meta device if a run would load it."""
        backbone = self._waiting() if loads else self.config.build()
        return ModelBundle(backbone, self._text_encoder(), self._codec(), self.info)

    @property
    def info(self) -> ModelInfo:
        """The description that the model would have."""
        planned = ComponentInfo(architecture="planned", config={})
        return ModelInfo(
            stage="diffusion",
            model=ComponentInfo(architecture=self.name, config=dataclasses.asdict(self.config)),
            text_encoder=self.text_encoder or planned,
            codec=self.codec or planned,
            sample=self.sample or SampleInfo(frames=1, height=1, width=1, fps=1),
            sampling=self.sampling,
        )

    def _waiting(self) -> DiffusionTransformer:
        """Return the backbone without memory, as if its weights were in a file."""
        with torch.device("meta"):
            backbone: DiffusionTransformer = self.config.build()
        file = Path(self.file or self.name)
        pieces = {
            key: Piece(PlannedTensor(file, key, tuple(value.shape), "F32"))
            for key, value in backbone.state_dict().items()
        }
        begin_at(backbone, StoredPieces(pieces, str(file)))
        return backbone.eval()

    def _text_encoder(self) -> TextEncoder:
        if self.text_encoder is None:
            return PlannedText(self.config, self.text_tokens)
        part = self.text_encoder
        made = TEXT_ENCODERS.configured(part.architecture, part.config).build()
        return cast("TextEncoder", made)

    def _codec(self) -> LatentCodec:
        if self.codec is None:
            time, height, _ = self.compression
            return CachedCodec(
                None,
                channels=self.config.in_channels,
                temporal_compression=time,
                spatial_compression=height,
            )
        part = self.codec
        made: LatentCodec = CODECS.configured(part.architecture, part.config).build()
        return made.requires_grad_(False).eval()


class PlannedTensor(StoredTensor):
    """A tensor of a file that does not exist."""

    @contextmanager
    def mapped(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(self.shape)


class PlannedText(TextEncoder):
    """Embeddings of a fixed length for any prompt, like those of a cache."""

    _here: torch.Tensor

    def __init__(self, config: Any, length: int) -> None:
        super().__init__()
        self.config = config
        self.embedding_dim = config.text_dim
        self.max_length = length
        self._pooled = int(getattr(config, "pooled_dim", 0))
        # Moves with the module, and gives the device for embeddings.
        self.register_buffer("_here", torch.empty(0), persistent=False)

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Return zeros (R, S, E), and (R, P) if the backbone reads a pooled vector."""
        rows = len(prompts)
        here = self._here
        pooled = here.new_zeros(rows, self._pooled) if self._pooled else None
        return EncodedText(here.new_zeros(rows, self.max_length, self.embedding_dim), pooled=pooled)

    def check(self, prompts: Sequence[str]) -> None:
        """Accept any prompts."""


def paper_model(found: str) -> PlannedModel:
    """Return the shape of the paper's model, which has no public weights."""
    config = MODELS.get(PAPER)()
    return PlannedModel(PAPER, config, None, _TEXT_TOKENS, found=found)


Row = Sequence[TrainConfig]
"""Stages that are planned together: later ones may start from what earlier ones export."""


def find_model(config: TrainConfig, field: str, row: Row = ()) -> PlannedModel:
    """Return the model that a field of a stage names.

    The name is looked up as a registered model, the export of a stage of the row, an existing
    folder, and the export of a recipe, in this order. If the field is empty, the model is that of
    the stage's other field, or else the paper's.

    Raises ConfigError if the name is none of these.
    """
    stage = config.stage
    value = str(getattr(stage, field))
    if value:
        return dataclasses.replace(_named(value, (), row), file=value)
    others = [str(getattr(stage, name)) for name in stage.names_models]
    other = next((value for value in others if value), "")
    if other:
        return dataclasses.replace(
            _named(other, (), row),
            file=other,
            found=f"--stage.{field} is empty, so the model of {other}",
        )
    return paper_model(f"--stage.{field} is empty, so the paper's {PAPER}; choose with --model")


def is_public(stage: StageConfig, field: str) -> bool:
    """Return whether a field of a stage names a registered model, not the export of a run."""
    return split_tag(str(getattr(stage, field)))[0] in MODELS.names()


def _named(value: str, seen: tuple[str, ...], row: Row) -> PlannedModel:
    architecture, tag = split_tag(value)
    if architecture in MODELS.names():
        return _registered(architecture, tag)
    maker = _stage_that_exports(value, row)
    if maker is None and is_here(value):
        return _described(describe_model(value), value)
    maker = maker or _recipe_that_exports(value)
    if maker is None or value in seen:
        raise ConfigError(
            f"{value!r} does not exist yet, and no recipe exports it: name the model that it will "
            "hold by --model, one of `diffusion-apt list models`"
        )
    start = maker.stage.start_field
    words = f"{value} is the export of {maker.name}"
    if start is None:
        return dataclasses.replace(new_model(maker, row), found=words)
    before = str(getattr(maker.stage, start))
    if not before:
        return paper_model(f"{words}, which starts from the paper's model, {PAPER}")
    made_from = _named(before, (*seen, value), row)
    return dataclasses.replace(made_from, found=f"{words}, from {before}")


def registered_model(name: str) -> PlannedModel:
    """Return a model by its registered name.

    Raises InputError for an unknown name, and lists close matches.
    """
    architecture, tag = split_tag(name)
    return _registered(architecture, tag)


def _registered(name: str, tag: str | None) -> PlannedModel:
    config: Any = MODELS.get(name)()
    entries = MODELS.pretrained(name)
    if not entries:
        return PlannedModel(name, config, None, _TEXT_TOKENS)
    entry = entries[find_tag(name, tag or True)]
    return PlannedModel(
        name,
        config,
        entry.sample,
        entry.text_tokens,
        entry.compression,
        sampling=entry.sampling,
    )


def _described(info: ModelInfo, value: str) -> PlannedModel:
    config = MODELS.configured(info.model.architecture, info.model.config)
    own_text = info.text_encoder.weights is not None
    entries = MODELS.pretrained(info.model.architecture)
    entry = next(iter(entries.values()), None)
    return PlannedModel(
        info.model.architecture,
        config,
        info.sample,
        _TEXT_TOKENS if entry is None else entry.text_tokens,
        _COMPRESSION if entry is None else entry.compression,
        text_encoder=info.text_encoder if own_text else None,
        codec=None if entry is not None else info.codec,
        found=f"read from {value}",
        sampling=info.sampling,
    )


def new_model(config: TrainConfig, row: Row = ()) -> PlannedModel:
    """Return the model that a stage builds when it starts from no other."""
    model, codec, sampling = config.model, _new_codec(config, row), SamplingInfo()
    if isinstance(config.stage, MethodConfig):
        sampling = config.stage.sampling(sampling)
    backbone: Any = MODELS.configured(model.name, model.options)
    if "in_channels" not in model.options:  # as in `apt.train.resolve`
        channels = describe_codec(codec.architecture, **codec.config).channels
        backbone = dataclasses.replace(backbone, in_channels=channels)
    return PlannedModel(
        model.name,
        backbone,
        _new_clips(config, codec),
        _TEXT_TOKENS,
        text_encoder=ComponentInfo(
            architecture=model.text_encoder, config=dict(model.text_encoder_options)
        ),
        codec=codec,
        sampling=sampling,
    )


def _new_clips(config: TrainConfig, codec: ComponentInfo) -> SampleInfo:
    """Return the clips that the run would choose; the largest if the folder does not exist."""
    data = config.data
    is_there = bool(data.path) and Path(data.path).is_dir()
    if isinstance(data.make_source(), (Folder, Latents)) and not is_there:
        side = math.isqrt(data.max_pixels)
        largest = {"frames": data.max_frames, "height": side, "width": side, "fps": 0.0}
        still_open: dict[str, Any] = {
            name: size for name, size in largest.items() if getattr(data, name) is None
        }
        return dataclasses.replace(data, **still_open).clip
    stage = config.stage
    if stage.trained_codec():
        named_otherwise: dict[str, Any] = {"codec": ""}
        stage = dataclasses.replace(stage, **named_otherwise)
    model = dataclasses.replace(
        config.model, codec=codec.architecture, codec_options=dict(codec.config)
    )
    known = dataclasses.replace(config, stage=stage, model=model, sample_prompts=())
    return resolve(known, None).data.clip


def _new_codec(config: TrainConfig, row: Row) -> ComponentInfo:
    source = config.stage.trained_codec()
    maker = _stage_that_exports(source, row) if source else config
    if maker is None and is_here(source):
        return describe(source).codec
    maker = maker or _recipe_that_exports(source)
    if maker is None:
        raise ConfigError(
            f"codec {source!r} does not exist yet, and no recipe exports it; name another by "
            "--stage.codec"
        )
    model = maker.model
    return ComponentInfo(architecture=model.codec, config=dict(model.codec_options))


def _stage_that_exports(folder: str, row: Row) -> TrainConfig | None:
    return next((config for config in row if f"{config.run_dir}/export" == folder), None)


def _recipe_that_exports(folder: str) -> TrainConfig | None:
    for name in RECIPES.names():
        if found := _stage_that_exports(folder, stages_of(RECIPES.get(name)())):
            return found
    return None


def sample_size(config: TrainConfig, start: PlannedModel) -> SampleInfo:
    """Return the size and frame rate of the clips that a run is planned for.

    They come from the configuration, or else from the model that the run starts from.

    Raises ConfigError if neither has them.
    """
    data = config.data
    default = start.sample
    if default is None and data.source == DIGITS:
        default = data.clip
    frames = 1 if data.images == "only" and data.frames is None else data.frames
    values = {"frames": frames, "height": data.height, "width": data.width, "fps": data.fps}
    if default is None:
        missing = [name for name in ("frames", "height", "width") if values[name] is None]
        if missing:
            raise ConfigError(
                f"the {' and '.join(missing)} of the clips must be set: add "
                + ", ".join(f"--data.{name}" for name in missing)
            )
        default = SampleInfo(frames=1, height=1, width=1, fps=1)
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(default, **given)
