"""A whole model, with all that it takes to generate: saved to a folder and loaded from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from apt.errors import CheckpointError, ConfigError, InputError
from apt.hub import (
    INFO_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    ComponentInfo,
    ModelInfo,
    Source,
    load_weights,
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
from apt.models.pipelines import describe_pipeline, is_pipeline
from apt.models.protocols import Backbone, LatentCodec, TextEncoder
from apt.models.registry import CODECS, TEXT_ENCODERS


@dataclass
class ModelBundle:
    """A model with all that it takes to generate."""

    backbone: Backbone
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
        """The parts that are networks; a codec without weights may be none."""
        parts = (self.backbone, self.text_encoder, self.codec)
        return [part for part in parts if isinstance(part, nn.Module)]

    def own_modules(self) -> list[nn.Module]:
        """The networks whose weights belong to this model, not to a public checkpoint."""
        parts: list[Backbone | TextEncoder] = [self.backbone]
        if self.info.text_encoder.weights is not None:
            parts.append(self.text_encoder)
        return [part for part in parts if isinstance(part, nn.Module)]


def component_info(architecture: str, part: Backbone | TextEncoder | LatentCodec) -> ComponentInfo:
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
    info = dataclasses.replace(
        bundle.info,
        model=dataclasses.replace(bundle.info.model, weights=TRANSFORMER_FILE),
        text_encoder=dataclasses.replace(bundle.info.text_encoder, weights=text_weights),
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        save_weights(root / TRANSFORMER_FILE, _module(bundle.backbone), dtype)
        if text_weights is not None:
            save_weights(root / text_weights, _module(bundle.text_encoder), dtype)
        else:
            (root / TEXT_ENCODER_FILE).unlink(missing_ok=True)
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

    A folder is one that `save_pretrained` wrote, or a pipeline of diffusers of a known family.

    Args:
        name_or_folder: a built-in name (`list_pretrained`), a registered model with published
            weights ("wan2.1_t2v_1.3b", "arch.tag"), a folder, or "owner/name[@revision]".
        revision: of a Hub repository, if it is not behind "@".
        device: where the weights go.
        dtype: floating-point type of this model's own weights, whatever the file has. A text
            encoder or VAE of a public checkpoint keeps the type that its config names.

    Returns:
        The bundle, in evaluation mode. Parts that come from the Hub are pinned to a commit.

    Raises:
        CheckpointError: for a name that is nowhere, a file that is missing, damaged or of a newer
            format, weights that are not finite, or weights of another model.
    """
    source, info, checkpoint = _find(name_or_folder, revision)
    codec = _build_codec(source, info)
    with _building_from(source):
        backbone = checkpoint.load(dtype=dtype, device=device)
        text_encoder = _load_text_encoder(source, info, dtype, device)
        bundle = ModelBundle(backbone, text_encoder, codec, info)
    # A folder may be older than an option of one of its parts, which then has its default.
    bundle.info = _described(bundle)
    for module in bundle.modules():
        module.to(device).eval()
    return bundle


def load_backbone(name_or_folder: str | Path) -> tuple[Backbone, ModelInfo]:
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


def load_codec(name_or_folder: str | Path) -> LatentCodec:
    """As `load_pretrained`, but only the codec, on the CPU."""
    source, info, _ = _find(name_or_folder)
    return _build_codec(source, info)


def describe(name_or_folder: str | Path) -> ModelInfo:
    """What `load_pretrained` would load. Weights of a Hub repository are fetched, but not read."""
    return _find(name_or_folder)[1]


def _find(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, ModelInfo, Checkpoint]:
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
    return cast(TextEncoder, built.to(device).eval())


def _build_codec(source: Source, info: ModelInfo) -> LatentCodec:
    config = configured(CODECS, info.codec, source.folder / INFO_FILE)
    with _building_from(source):
        return cast(LatentCodec, config.build())


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

    def in_full(said: ComponentInfo, part: Backbone | TextEncoder | LatentCodec) -> ComponentInfo:
        found = component_info(said.architecture, part)
        return dataclasses.replace(found, weights=said.weights)

    return dataclasses.replace(
        info,
        model=in_full(info.model, bundle.backbone),
        text_encoder=in_full(info.text_encoder, bundle.text_encoder),
        codec=in_full(info.codec, bundle.codec),
    )


def _module(part: Backbone | TextEncoder) -> nn.Module:
    if not isinstance(part, nn.Module):
        raise TypeError(f"{type(part).__name__} must be an nn.Module to have weights")
    return part
