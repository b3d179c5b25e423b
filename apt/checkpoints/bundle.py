"""A whole model, with all that it takes to generate, and how it is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apt.checkpoints.info import (
    CODEC_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    CodecInfo,
    ComponentInfo,
    ModelInfo,
    write_info,
)
from apt.checkpoints.weights import save_tensors, save_weights
from apt.errors import CheckpointError, ConfigError
from apt.models.protocols import LatentCodec, TextEncoder
from apt.models.transformer import DiffusionTransformer


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which weights a model has, in words that others can use: no folder of this machine.

    Attributes:
        name: built-in name or Hub id; of a local model its recipe, or else its architecture.
        revision: commit on the Hub.
        weights: digest (`apt.checkpoints.source.weights_digest`) of what is local.
    """

    name: str
    revision: str | None = None
    weights: str | None = None


@dataclass
class ModelBundle:
    """A model with all that it takes to generate, and where it was loaded from, if it was."""

    backbone: DiffusionTransformer
    text_encoder: TextEncoder
    codec: LatentCodec
    info: ModelInfo
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if self.backbone.in_channels != self.codec.channels:
            raise ConfigError(
                f"the backbone takes {self.backbone.in_channels} latent channels, the codec makes "
                f"{self.codec.channels}; set in_channels to that"
            )

    def __repr__(self) -> str:
        """In a line: what it is, its parts, and the size of what it makes."""
        info, sample = self.info, self.info.sample
        return (
            f"ModelBundle({info.stage}: {self.backbone!r}, text encoder "
            f"{info.text_encoder.architecture}, codec {info.codec.architecture}, {sample.frames} "
            f"frames of {sample.height}x{sample.width} at {sample.fps:g} fps)"
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
    architecture: str,
    part: DiffusionTransformer | TextEncoder | LatentCodec,
    weights: str | None = None,
) -> ComponentInfo:
    """Describe a part for `apt.json`: its registered name, its config, and its file of weights."""
    return ComponentInfo(
        architecture=architecture, config=dataclasses.asdict(part.config), weights=weights
    )


def save_bundle(
    folder: str | Path,
    bundle: ModelBundle,
    *,
    dtype: torch.dtype | None = None,
    external_text_encoder: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a bundle to a folder, which is created; files of an earlier save are replaced.

    Args:
        folder: where to.
        bundle: its `info` must describe its parts.
        dtype: floating-point type of the weights in the file; None keeps what they have.
        external_text_encoder: leave out the text encoder's weights, because building it from its
            config brings them.
        weights: in place of those that the backbone has; each is asked for once, so that they
            need not all be in memory.

    Raises:
        CheckpointError: if `info` describes other parts, weights are not finite (or do not fit
            `dtype`), or the folder cannot be written.
    """
    root = Path(folder)
    parts = described(bundle)
    for name in ("model", "text_encoder", "codec"):
        if getattr(parts, name) != getattr(bundle.info, name):
            raise CheckpointError(
                f"cannot save to {str(folder)!r}: info.{name}.config differs from the config of "
                "the part itself; describe it with apt.checkpoints.bundle.component_info"
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
        own = bundle.backbone.state_dict()
        save_tensors(root / TRANSFORMER_FILE, own if weights is None else weights, dtype, like=own)
        for given, file, part in (
            (text_weights, TEXT_ENCODER_FILE, bundle.text_encoder),
            (codec_weights, CODEC_FILE, bundle.codec),
        ):
            if given is not None:
                save_weights(root / given, part, dtype)
            else:
                (root / file).unlink(missing_ok=True)
        write_info(root, info)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot save to {str(folder)!r}: {reason}") from error
    return root


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
            "describe it with apt.checkpoints.bundle.component_info"
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


def described(bundle: ModelBundle) -> ModelInfo:
    """`info` with the config that each part has."""
    info = bundle.info

    def in_full(
        said: ComponentInfo, part: DiffusionTransformer | TextEncoder | LatentCodec
    ) -> ComponentInfo:
        return component_info(said.architecture, part, said.weights)

    return dataclasses.replace(
        info,
        model=in_full(info.model, bundle.backbone),
        text_encoder=in_full(info.text_encoder, bundle.text_encoder),
        codec=in_full(info.codec, bundle.codec),
    )
