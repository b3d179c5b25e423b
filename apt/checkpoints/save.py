"""Saving of whole models and codecs as folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from apt.checkpoints.info import (
    CODEC_FILE,
    TEXT_ENCODER_FILE,
    TRANSFORMER_FILE,
    CodecInfo,
    write_info,
)
from apt.checkpoints.load import ModelBundle, component_info, described
from apt.checkpoints.weights import save_tensors, save_weights
from apt.errors import CheckpointError
from apt.pixels import LatentCodec


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
        folder: the folder to write.
        bundle: the model; its `info` must describe its parts.
        dtype: dtype of floating-point weights in the file; None keeps theirs.
        external_text_encoder: leave out the text encoder's weights, because it loads them when it
            is built from its config.
        weights: used instead of the backbone's; each is accessed once, so that they need not all be
            in memory.

    Raises:
        CheckpointError: if `info` describes other parts, weights are not finite (or do not fit
            `dtype`), or the folder cannot be written.
    """
    root = Path(folder)
    parts = described(bundle)
    for name in ("model", "text_encoder", "codec"):
        if getattr(parts, name) != getattr(bundle.info, name):
            raise CheckpointError(
                f"cannot save to {str(folder)!r}: info.{name}.config differs from the part's own "
                "config; describe the part with apt.checkpoints.load.component_info"
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
    """Write a codec with its weights to a folder, which is created.

    Args:
        folder: the folder to write.
        codec: the codec.
        info: the description of the codec.
        dtype: dtype of floating-point weights in the file; None keeps theirs.

    Raises:
        CheckpointError: if `info` describes another codec, weights are not finite, or the folder
            cannot be written.
    """
    root = Path(folder)
    if component_info(info.codec.architecture, codec).config != info.codec.config:
        raise CheckpointError(
            f"cannot save to {str(folder)!r}: info.codec.config differs from the codec's own "
            "config; describe the codec with apt.checkpoints.load.component_info"
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
