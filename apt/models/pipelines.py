"""Pipelines of diffusers: a folder with transformer, text encoders and VAE, as one of our models.

The transformer becomes our module; text encoders and VAE stay where they are, as external parts
whose configs name the folder, or the repository and its commit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from apt.errors import CheckpointError, InputError
from apt.hub import (
    INFO_FILE,
    PIPELINE_FILE,
    ComponentInfo,
    ModelInfo,
    Source,
    locate,
    read_info,
)
from apt.hub.inert import read_json, read_pipeline
from apt.hub.pretrained import PretrainedEntry
from apt.models.architectures import CODECS, MODELS, TEXT_ENCODERS, Buildable, BuildableText
from apt.models.loading import Checkpoint, find_checkpoint, single_file
from apt.registry import Registry, replace_typed


def is_pipeline(source: Source) -> bool:
    """Whether the folder is a pipeline of diffusers."""
    return (source.folder / PIPELINE_FILE).is_file()


def describe_pipeline(source: Source, subfolder: str | None = None) -> tuple[ModelInfo, Checkpoint]:
    """What a pipeline's folder holds, and its transformer's checkpoint.

    An export of ours has an apt.json beside, which adds how it was trained and is sampled; a
    pipeline without one is a diffusion model.

    Raises CheckpointError for a transformer of no family, parts that are not there, or code.
    """
    read_pipeline(source.folder / PIPELINE_FILE)
    checkpoint = find_checkpoint(source, subfolder)
    return _describe(source, checkpoint), checkpoint


def describe_file(path: Path) -> tuple[ModelInfo, Checkpoint]:
    """What one file of a public transformer is, with the other parts of the model it belongs to.

    The file has the transformer alone; text encoder and VAE are those of the first published
    weights of its size, in the Hub's cache or fetched. It counts as a diffusion model.

    Raises CheckpointError for a file that no registered model fits, saying what it is.
    """
    checkpoint = single_file(path, None, None)
    entry = pretrained_entry(checkpoint.architecture)
    info = _describe(locate(entry.repo, entry.revision), checkpoint)
    training = {**info.training, "source": path.name, "revision": None}
    return dataclasses.replace(info, stage="diffusion", training=training), checkpoint


def _describe(source: Source, checkpoint: Checkpoint) -> ModelInfo:
    """A model with this transformer, and the other parts of a pipeline."""
    entry = pretrained_entry(checkpoint.architecture)
    source.fetch(["scheduler/*.json"])
    model = ComponentInfo(
        architecture=checkpoint.architecture,
        config=dataclasses.asdict(cast(Any, checkpoint.config)),
    )
    text_encoder = external_part(TEXT_ENCODERS, entry.text_encoder, source)
    codec = external_part(CODECS, entry.codec, source)
    if (source.folder / INFO_FILE).is_file():
        info = read_info(source.folder)
        return dataclasses.replace(info, model=model, text_encoder=text_encoder, codec=codec)
    shift = _scheduler_shift(source)
    sampling = entry.sampling
    if shift is not None:
        sampling = dataclasses.replace(sampling, timestep_shift=shift)
    return ModelInfo(
        stage="diffusion",
        model=model,
        text_encoder=text_encoder,
        codec=codec,
        sample=entry.sample,
        sampling=sampling,
        training={"source": source.name, "revision": source.revision, "license": entry.license},
    )


def pretrained_entry(architecture: str) -> PretrainedEntry:
    """The first published weights of a registered model, whose parts go with it.

    Raises CheckpointError for a model without any.
    """
    entries = MODELS.pretrained(architecture)
    if not entries:
        raise CheckpointError(
            f"{architecture!r} has no published weights, so it is unknown which text encoder and "
            "VAE go with it; load the backbone alone with apt.from_pretrained"
        )
    return next(iter(entries.values()))


def external_part(
    registry: Registry[Buildable] | Registry[BuildableText], name: str, source: Source
) -> ComponentInfo:
    """A registered text encoder or codec, taken from this source."""
    registered = registry.get(name)()
    try:
        config = replace_typed(registered, {"repo": source.name, "revision": source.revision})
    except InputError as error:
        raise CheckpointError(f"{name!r} cannot be taken from {source.name!r}: {error}") from error
    return ComponentInfo(architecture=name, config=dataclasses.asdict(cast(Any, config)))


def _scheduler_shift(source: Source) -> float | None:
    path = source.folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return None
    config = read_json(path)
    # UniPC and FlowMatchEuler spell it differently.
    shift = config.get("flow_shift", config.get("shift"))
    return float(shift) if isinstance(shift, (int, float)) and shift > 0 else None
