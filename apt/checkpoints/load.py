"""Models loaded: whole, or a part of one; from a folder, a file, the Hub, or by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apt.checkpoints.bundle import ModelBundle, described
from apt.checkpoints.checkpoint import configured, empty_module, unbuildable
from apt.checkpoints.find import (
    as_file,
    find_checkpoint,
    find_codec,
    find_model,
    locate_model,
    single_file,
)
from apt.checkpoints.info import INFO_FILE, CodecInfo, ComponentInfo, ModelInfo
from apt.checkpoints.source import Source
from apt.checkpoints.weights import load_weights
from apt.device import find_device
from apt.errors import CheckpointError, InputError, MissingPackageError
from apt.models.architectures import CODECS, TEXT_ENCODERS
from apt.models.protocols import LatentCodec, PromptCheck, TextEncoder
from apt.models.transformer import DiffusionTransformer


def load_bundle(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ModelBundle:
    """Load a whole model: built-in, from a folder, or from the Hub.

    A folder is one that `save_bundle` wrote, or a pipeline of diffusers of a known family. A
    safetensors file is a transformer of a registered size, in any layout that `load_model` reads;
    its text encoder and VAE are those of the model's published weights.

    Args:
        name_or_folder: a built-in name (`list_pretrained`), a registered model with published
            weights ("wan2.1_t2v_1.3b", "arch.tag"), a folder, a file, or "owner/name[@revision]".
        revision: of a Hub repository, if it is not behind "@".
        device: where the weights go. On "meta" the backbone has none yet, but the `origin` that
            `apt.checkpoints.origin.fill_from_origins` gives it them from; the other parts are on
            the CPU.
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
    beside = torch.device("cpu") if device.type == "meta" else device
    source, info, checkpoint = find_model(name_or_folder, revision)
    codec = _load_codec(source, info.codec)
    with _building_from(source):
        backbone = checkpoint.load(dtype=dtype, device=device)
        text_encoder = _load_text_encoder(source, info, dtype, beside)
        bundle = ModelBundle(backbone, text_encoder, codec, info)
    # A folder may be older than an option of one of its parts, which then has its default.
    bundle.info = described(bundle)
    codec.to(beside)
    for module in bundle.modules():
        module.eval()
    return bundle


def load_model(
    name_or_path: str | Path,
    *,
    subfolder: str | None = None,
    filename: str | None = None,
    revision: str | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiffusionTransformer:
    """Load a model's backbone alone; `load_bundle` loads it with text encoder and codec.

    Args:
        name_or_path: a folder of ours or of diffusers, a safetensors file or an index of shards, a
            built-in or registered name, or "owner/name[@revision]" on the Hub.
        subfolder: where in a folder the transformer is; None is its top, or "transformer" in a
            pipeline.
        filename: of one safetensors file in the folder or repository.
        revision: commit, tag or branch on the Hub.
        architecture: registered name of what a single file holds. None finds the registered model
            whose tensors have just these names and shapes.
        options: fields of its config that differ from what is registered.
        dtype, device: of the weights, whatever the file has; "meta" as in `load_bundle`.

    Raises:
        CheckpointError: nothing there, damaged or foreign weights, or ones that do not fit, naming
            what is missing, unexpected and wrongly shaped.
    """
    device = find_device(device)
    if (path := as_file(name_or_path)) is not None:
        checkpoint = single_file(path, architecture, options)
    else:
        source, published = locate_model(name_or_path, revision)
        if filename is not None:
            source.fetch([filename])
            if not (source.folder / filename).is_file():
                raise CheckpointError(
                    f"{source.name!r} has no file {filename!r}; name one that is there"
                )
            checkpoint = single_file(source.folder / filename, architecture, options)
        elif architecture is not None or options:
            raise InputError("architecture and options are for a single file; name it too")
        else:
            checkpoint = find_checkpoint(source, subfolder or published)
            with _building_from(source):
                return checkpoint.load(dtype=dtype, device=device)
    return checkpoint.load(dtype=dtype, device=device)


def load_text_encoder(name_or_folder: str | Path) -> TextEncoder:
    """As `load_bundle`, but only the text encoder, its own weights in fp32, on the CPU."""
    source, info, _ = find_model(name_or_folder)
    return _load_text_encoder(source, info, torch.float32, "cpu")


def load_prompt_check(name_or_folder: str | Path) -> PromptCheck:
    """What the model's text encoder checks prompts with, without its weights."""
    source, info, _ = find_model(name_or_folder)
    config = configured(TEXT_ENCODERS, info.text_encoder, source.folder / INFO_FILE)
    with _building_from(source):
        return config.prompt_check()


def load_codec(name_or_folder: str | Path) -> LatentCodec:
    """As `load_bundle`, but only the codec, on the CPU; of a codec's own folder too."""
    alone = find_codec(name_or_folder)
    if alone is not None:
        source, found = alone
        return _load_codec(source, found.codec)
    source, info, _ = find_model(name_or_folder)
    return _load_codec(source, info.codec)


def describe_model(name_or_folder: str | Path) -> ModelInfo:
    """What a whole model is. Weights of a Hub repository are fetched, but not read.

    Raises CheckpointError as `load_bundle`, also for a codec alone.
    """
    return find_model(name_or_folder)[1]


def describe(name_or_folder: str | Path) -> ModelInfo | CodecInfo:
    """As `describe_model`, and what a codec alone is."""
    alone = find_codec(name_or_folder)
    return describe_model(name_or_folder) if alone is None else alone[1]


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


def _load_codec(source: Source, part: ComponentInfo) -> LatentCodec:
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
    """Options that a part refuses are the folder's fault; a package that is missing is not."""
    try:
        yield
    except (CheckpointError, MissingPackageError):
        raise
    except InputError as error:
        raise unbuildable(source.folder / INFO_FILE, error) from error
