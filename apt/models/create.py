"""Build models, text encoders and codecs by registered name."""

from __future__ import annotations

from typing import Any

import torch

from apt.checkpoints.source import find_weights, locate
from apt.checkpoints.weights import Checkpoint
from apt.condition import TextEncoder
from apt.device import find_device
from apt.errors import InputError
from apt.models.architectures import CODECS, MODELS, TEXT_ENCODERS, find_tag, split_tag
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec


def create_model(
    name: str,
    /,
    *,
    pretrained: bool | str = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> DiffusionTransformer:
    """Build a registered backbone, with random or published weights.

    Args:
        name: a registered name, or "name.tag", which means `pretrained="tag"`.
        pretrained: False for random weights, True for the published weights of the first tag, or a
            tag.
        dtype: dtype of the weights, whatever a checkpoint has; None is torch's default.
        device: device of the weights; None is torch's default. Loading published weights needs
            hardly more memory than the weights take there.
        overrides: fields of the config.

    Raises:
        InputError: for an unknown name, tag or field (with close matches), a model without
            published weights, or a device that does not exist.
        CheckpointError: for weights that cannot be fetched or do not fit; see `apt.load_model`.
    """
    if device is not None:
        device = find_device(device)
    name, tag = split_tag(name)
    if tag is not None:
        if pretrained not in (False, True, tag):
            raise InputError(
                f"{name}.{tag} and pretrained={pretrained!r} name different tags; pass only one"
            )
        pretrained = tag
    config = MODELS.configured(name, overrides)
    if pretrained is not False:
        entry = MODELS.pretrained(name)[find_tag(name, pretrained)]
        source = locate(entry.repo, entry.revision)
        source.fetch_component(entry.subfolder)
        weights = find_weights(source.folder / entry.subfolder)
        model: DiffusionTransformer = Checkpoint(weights, name, config).load(
            dtype=dtype or torch.get_default_dtype(), device=device or torch.get_default_device()
        )
        return model
    module = config.build()
    return module.to(device=device, dtype=dtype)


def create_text_encoder(name: str, /, **overrides: Any) -> TextEncoder:
    """Build a registered text encoder; overrides are fields of its config."""
    return TEXT_ENCODERS.configured(name, overrides).build()


def create_codec(name: str, /, **overrides: Any) -> LatentCodec:
    """Build a registered latent codec; overrides are fields of its config."""
    return CODECS.configured(name, overrides).build()


def describe_codec(name: str, /, **overrides: Any) -> LatentCodec:
    """Build a codec that only needs to know its channels and compression.

    Configs of public codecs provide it as `shape()`, which loads no weights. Raises the same errors
    as `create_codec`, except those about weights.
    """
    config = CODECS.configured(name, overrides)
    codec: LatentCodec = config.shape() if hasattr(config, "shape") else config.build()
    return codec
