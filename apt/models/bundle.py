"""A whole model, with all that it takes to generate: saved to a folder and loaded from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from apt.device import find_device
from apt.errors import CheckpointError, ConfigError, InputError
from apt.hub import (
    CODEC_FILE,
    INFO_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    CodecInfo,
    ComponentInfo,
    ModelInfo,
    Source,
    list_pretrained,
    load_weights,
    read_description,
    read_info,
    save_weights,
    write_info,
)
from apt.models.loading import (
    Checkpoint,
    configured,
    empty_module,
    find_checkpoint,
    locate_model,
    unbuildable,
)
from apt.models.pipelines import describe_file, describe_pipeline, is_pipeline
from apt.models.protocols import LatentCodec, PromptCheck, TextEncoder
from apt.models.registry import CODECS, TEXT_ENCODERS
from apt.models.transformer import DiffusionTransformer


@dataclass
class ModelBundle:
    """A model with all that it takes to generate."""

    backbone: DiffusionTransformer
    text_encoder: TextEncoder
    codec: LatentCodec
    info: ModelInfo

    def __post_init__(self) -> None:
        if self.backbone.in_channels != self.codec.channels:
            raise ConfigError(
                f"the backbone takes {self.backbone.in_channels} latent channels, the codec makes "
                f"{self.codec.channels}; set in_channels to that"
            )

    def modules(self) -> list[nn.Module]:
        """All parts."""
        return [self.backbone, self.text_encoder, self.codec]

    def own_modules(self) -> list[nn.Module]:
        """The networks whose weights belong to this model, not to a public checkpoint.

        A codec is never among them: it computes in fp32, or as its config says.
        """
        own_text = self.info.text_encoder.weights is not None
        return [self.backbone, self.text_encoder] if own_text else [self.backbone]


def component_info(
    architecture: str, part: DiffusionTransformer | TextEncoder | LatentCodec
) -> ComponentInfo:
    """Describe a part for `apt.json`: the name it is registered under, and its config."""
    return ComponentInfo(architecture=architecture, config=dataclasses.asdict(part.config))


def save_pretrained(
    folder: str | Path,
    bundle: ModelBundle,
    *,
    dtype: torch.dtype | None = None,
    external_text_encoder: bool = False,
) -> Path:
    """Write a bundle to a folder, which is created; files of an earlier save are replaced.

    Args:
        folder: where to.
        bundle: its `info` must describe its parts.
        dtype: floating-point type of the weights in the file; None keeps what they have.
        external_text_encoder: leave out the text encoder's weights, because building it from its
            config brings them.

    Raises:
        CheckpointError: if `info` describes other parts, weights are not finite (or do not fit
            `dtype`), or the folder cannot be written.
    """
    root = Path(folder)
    described = _described(bundle)
    for name in ("model", "text_encoder", "codec"):
        if getattr(described, name) != getattr(bundle.info, name):
            raise CheckpointError(
                f"cannot save to {str(folder)!r}: info.{name}.config differs from the config of "
                "the part itself; describe it with apt.models.bundle.component_info"
            )
    text_weights = None if external_text_encoder else TEXT_ENCODER_FILE
    codec_weights = None if bundle.info.codec.weights is None else CODEC_FILE
    info = dataclasses.replace(
        bundle.info,
        model=dataclasses.replace(bundle.info.model, weights=TRANSFORMER_FILE),
        text_encoder=dataclasses.replace(bundle.info.text_encoder, weights=text_weights),
        codec=dataclasses.replace(bundle.info.codec, weights=codec_weights),
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        save_weights(root / TRANSFORMER_FILE, bundle.backbone, dtype)
        for weights, file, part in (
            (text_weights, TEXT_ENCODER_FILE, bundle.text_encoder),
            (codec_weights, CODEC_FILE, bundle.codec),
        ):
            if weights is not None:
                save_weights(root / weights, part, dtype)
            else:
                (root / file).unlink(missing_ok=True)
        write_info(root, info)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot save to {str(folder)!r}: {reason}") from error
    return root


def load_pretrained(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ModelBundle:
    """Load a whole model: built-in, from a folder, or from the Hub.

    A folder is one that `save_pretrained` wrote, or a pipeline of diffusers of a known family. A
    safetensors file is a transformer of a registered size, in any layout that `from_pretrained`
    reads; its text encoder and VAE are those of the model's published weights.

    Args:
        name_or_folder: a built-in name (`list_pretrained`), a registered model with published
            weights ("wan2.1_t2v_1.3b", "arch.tag"), a folder, a file, or "owner/name[@revision]".
        revision: of a Hub repository, if it is not behind "@".
        device: where the weights go.
        dtype: floating-point type of this model's own weights, whatever the file has. A text
            encoder or VAE of a public checkpoint keeps the type that its config names.

    Returns:
        The bundle, in evaluation mode. Parts that come from the Hub are pinned to a commit.

    Raises:
        CheckpointError: for a name that is nowhere, a file that is missing, damaged or of a newer
            format, weights that are not finite, or weights of another model.
        InputError: for a device that this machine does not have.
    """
    device = find_device(device)
    source, info, checkpoint = _find(name_or_folder, revision)
    codec = _build_codec(source, info.codec)
    with _building_from(source):
        backbone = checkpoint.load(dtype=dtype, device=device)
        text_encoder = _load_text_encoder(source, info, dtype, device)
        bundle = ModelBundle(backbone, text_encoder, codec, info)
    # A folder may be older than an option of one of its parts, which then has its default.
    bundle.info = _described(bundle)
    for module in bundle.modules():
        module.to(device).eval()
    return bundle


def load_backbone(name_or_folder: str | Path) -> tuple[DiffusionTransformer, ModelInfo]:
    """As `load_pretrained`, but only the backbone, in fp32 on the CPU, and what its folder says.

    A discriminator needs no text encoder or VAE of its own, and those can be larger than it is.
    """
    source, info, checkpoint = _find(name_or_folder)
    with _building_from(source):
        return checkpoint.load(), info


def load_text_encoder(name_or_folder: str | Path) -> TextEncoder:
    """As `load_pretrained`, but only the text encoder, its own weights in fp32, on the CPU."""
    source, info, _ = _find(name_or_folder)
    return _load_text_encoder(source, info, torch.float32, "cpu")


def load_prompt_check(name_or_folder: str | Path) -> PromptCheck:
    """What the model's text encoder checks prompts with, without its weights."""
    source, info, _ = _find(name_or_folder)
    config = configured(TEXT_ENCODERS, info.text_encoder, source.folder / INFO_FILE)
    with _building_from(source):
        return config.prompt_check()


def load_codec(name_or_folder: str | Path) -> LatentCodec:
    """As `load_pretrained`, but only the codec, on the CPU; of a codec's own folder too."""
    return find_codec(name_or_folder)[0]


def find_codec(name_or_folder: str | Path) -> tuple[LatentCodec, ComponentInfo]:
    """As `load_codec`, and how the codec is described, with its whole config."""
    alone = _find_codec_alone(name_or_folder)
    if alone is not None:
        source, part = alone[0], alone[1].codec
    else:
        source, info, _ = _find(name_or_folder)
        part = info.codec
    codec = _build_codec(source, part)
    described = component_info(part.architecture, codec)
    return codec, dataclasses.replace(described, weights=part.weights)


def save_codec(
    folder: str | Path, codec: LatentCodec, info: CodecInfo, *, dtype: torch.dtype | None = None
) -> Path:
    """Write a codec that has weights of its own to a folder, which is made.

    Args:
        folder: where to.
        codec: to save.
        info: must describe it.
        dtype: of the weights in the file; None keeps what they have.

    Raises:
        CheckpointError: `info` describes another codec, weights that are not finite, or a disk
            that refuses.
    """
    root = Path(folder)
    if component_info(info.codec.architecture, codec).config != info.codec.config:
        raise CheckpointError(
            f"cannot save to {str(folder)!r}: info.codec.config differs from the codec's config; "
            "describe it with apt.models.bundle.component_info"
        )
    info = dataclasses.replace(info, codec=dataclasses.replace(info.codec, weights=CODEC_FILE))
    try:
        root.mkdir(parents=True, exist_ok=True)
        save_weights(root / CODEC_FILE, codec, dtype)
        write_info(root, info)
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {str(folder)!r}: {error.strerror or error}"
        ) from error
    return root


def describe(name_or_folder: str | Path) -> ModelInfo | CodecInfo:
    """What a model or a codec alone is. Weights of a Hub repository are fetched, but not read."""
    alone = _find_codec_alone(name_or_folder)
    return _find(name_or_folder)[1] if alone is None else alone[1]


def _find_codec_alone(name_or_folder: str | Path) -> tuple[Source, CodecInfo] | None:
    """A folder that holds a codec and no model; None for anything else."""
    path = Path(name_or_folder).expanduser()
    if path.is_file() and str(name_or_folder) not in list_pretrained():
        return None
    source, _ = locate_model(name_or_folder)
    if is_pipeline(source):
        return None
    info = read_description(source.folder)
    return (source, info) if isinstance(info, CodecInfo) else None


def _find(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, ModelInfo, Checkpoint]:
    path = Path(name_or_folder).expanduser()
    if path.is_file() and str(name_or_folder) not in list_pretrained():
        if revision is not None:
            raise InputError(f"{str(path)!r} is a file, so it has no revision {revision!r}")
        return Source(path.parent), *describe_file(path)
    source, subfolder = locate_model(name_or_folder, revision)
    if is_pipeline(source):
        return source, *describe_pipeline(source, subfolder)
    info = read_info(source.folder)
    return source, info, find_checkpoint(source)


def _load_text_encoder(
    source: Source, info: ModelInfo, dtype: torch.dtype, device: torch.device | str
) -> TextEncoder:
    part = info.text_encoder
    config = configured(TEXT_ENCODERS, part, source.folder / INFO_FILE)
    with _building_from(source):
        built = config.build() if part.weights is None else empty_module(config, dtype)
    if part.weights is not None:
        source.fetch([part.weights])
        load_weights(source.folder / part.weights, built, device=device)
    return built.to(device).eval()


def _build_codec(source: Source, part: ComponentInfo) -> LatentCodec:
    """A codec, in fp32 and frozen if its weights are the folder's."""
    config = configured(CODECS, part, source.folder / INFO_FILE)
    with _building_from(source):
        if part.weights is None:
            return config.build()
        module: LatentCodec = empty_module(config)
    source.fetch([part.weights])
    load_weights(source.file(part.weights), module)
    return module.requires_grad_(False).eval()


@contextmanager
def _building_from(source: Source) -> Iterator[None]:
    """Options that a part refuses are the folder's fault."""
    try:
        yield
    except CheckpointError:
        raise
    except InputError as error:
        raise unbuildable(source.folder / INFO_FILE, error) from error


def _described(bundle: ModelBundle) -> ModelInfo:
    """`info` with the config that each part has."""
    info = bundle.info

    def in_full(
        said: ComponentInfo, part: DiffusionTransformer | TextEncoder | LatentCodec
    ) -> ComponentInfo:
        found = component_info(said.architecture, part)
        return dataclasses.replace(found, weights=said.weights)

    return dataclasses.replace(
        info,
        model=in_full(info.model, bundle.backbone),
        text_encoder=in_full(info.text_encoder, bundle.text_encoder),
        codec=in_full(info.codec, bundle.codec),
    )
