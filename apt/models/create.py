"""Parts by their registered names."""

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
    """Build a registered backbone, with random or with published weights.

    Args:
        name: a registered name, or "name.tag", which means `pretrained="tag"`.
        pretrained: False: random weights. True: the published ones, of the first tag if there are
            several. A tag: those.
        dtype: of the weights, whatever a checkpoint has; None is torch's default.
        device: where they go; None is torch's default. Published weights are loaded with hardly
            more memory than they take there.
        overrides: fields of the config.

    Raises:
        InputError: an unknown name, tag or field, with close matches, no published weights, or no
            such device.
        CheckpointError: weights that cannot be fetched or do not fit; see `apt.load_model`.
    """
    if device is not None:
        device = find_device(device)
    name, tag = split_tag(name)
    if tag is not None:
        if pretrained not in (False, True, tag):
            raise InputError(f"{name}.{tag} and pretrained={pretrained!r} name two tags; name one")
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
    """A codec that tells its channels and compression, and need not do more.

    A config that reads the weights of others gives it as `shape()`. Raises as `create_codec`,
    except for faults of weights.
    """
    config = CODECS.configured(name, overrides)
    codec: LatentCodec = config.shape() if hasattr(config, "shape") else config.build()
    return codec
