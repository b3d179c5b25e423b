"""Public checkpoints: which of our models they are, and the parts that they are used with.

A checkpoint is a diffusers folder (a pipeline, or its transformer), or one safetensors file in the
layout of its authors or of ComfyUI. A diffusers pipeline, with transformer, text encoders and VAE,
is a whole model: the transformer becomes our module, and text encoders and VAE stay where they are,
as external parts whose configs name the folder, or the repository and its commit.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from apt.checkpoints.foreign import looks_like
from apt.checkpoints.info import (
    INFO_FILE,
    PIPELINE_FILE,
    ComponentInfo,
    ModelInfo,
    read_info,
)
from apt.checkpoints.layouts import Family, all_families, diffusion_model, map_keys
from apt.checkpoints.reading import StoredTensor, read_json, read_pipeline, read_stored
from apt.checkpoints.source import Source, find_weights, locate
from apt.checkpoints.weights import Checkpoint, check_kind, shapes_of
from apt.errors import CheckpointError, InputError, listed
from apt.models.architectures import (
    CODECS,
    MODELS,
    TEXT_ENCODERS,
    BuildableText,
    PretrainedEntry,
)
from apt.registry import Buildable, Registry, replace_typed


def public_checkpoint(source: Source, subfolder: str | None = None) -> Checkpoint:
    """Return the backbone's checkpoint in a public folder, downloaded if it is on the Hub.

    Raises CheckpointError, which says what the folder is, if it cannot be loaded.
    """
    folder = source.folder
    if subfolder is None and (folder / PIPELINE_FILE).is_file():
        subfolder = "transformer"
    source.fetch_component(subfolder or "")
    part = folder / (subfolder or "")
    if not part.is_dir():
        raise CheckpointError(
            f"{str(folder)!r} has no folder {subfolder!r}; pass the transformer's as subfolder"
        )
    if not (part / "config.json").exists():
        if any(part.glob("*.safetensors")):
            return single_file(find_weights(part), None, None)
        read_info(part)  # raises, and says what the folder is
    config_file = read_json(part / "config.json")
    class_name = config_file.get("_class_name")
    weights = find_weights(part)
    for family in all_families():
        if family.diffusers_class == class_name:
            config = family.from_diffusers(config_file)
            experts = len(list(folder.glob("transformer*/config.json")))
            return Checkpoint(weights, nearest_architecture(config, experts), config)
    if looks_like_original(weights):
        # Authors may put their own config.json beside weights in their layout.
        return single_file(weights, None, None)
    known = ", ".join(family.diffusers_class for family in all_families())
    raise CheckpointError(
        f"{str(part)!r} holds a {class_name or config_file.get('model_type') or 'model'!r}, which "
        f"this package does not support; use a checkpoint of {known}"
    )


def single_file(
    path: Path, architecture: str | None, options: Mapping[str, Any] | None
) -> Checkpoint:
    """Return the checkpoint in one file; see `load_model`.

    Raises CheckpointError if no registered model has exactly these tensors.
    """
    if architecture is not None:
        config = MODELS.configured(architecture, options or {})
        return Checkpoint(path, architecture, config)
    if options:
        raise InputError("options need an architecture; pass it too")
    stored = diffusion_model(read_stored(path))
    kind = looks_like(stored.keys(), {f.name: f.marks for f in all_families()})
    for family in all_families():
        if family.name == kind:
            check_kind(path, family, stored)
            for name in MODELS.names():
                config = MODELS.get(name)()
                if type(config) is family.config_class and _fits(stored, config, family):
                    return Checkpoint(path, name, config)
            raise CheckpointError(
                f"{str(path)!r} looks like the {family.name} family, but none of its registered "
                f"sizes has exactly these tensors: {_shape_of_blocks(stored)}; pass architecture "
                "and options, such as the depth"
            )
    if kind is not None:
        raise CheckpointError(
            f"{str(path)!r} is {kind}; expected a diffusion transformer of the families "
            f"{', '.join(family.name for family in all_families())}"
        )
    raise CheckpointError(
        f"cannot tell what {str(path)!r} holds: its keys ({listed(sorted(stored))}) belong to no "
        f"supported family; pass architecture, one of {', '.join(MODELS.names())}"
    )


def _shape_of_blocks(stored: Mapping[str, StoredTensor]) -> str:
    """Describe the number and width of the blocks, as far as the keys tell."""
    numbers = {int(found[1]) for key in stored if (found := re.search(r"blocks\.(\d+)\.", key))}
    widths = collections.Counter(t.shape[-1] for t in stored.values() if len(t.shape) == 2)
    width = widths.most_common(1)[0][0] if widths else 0
    return f"it has {len(numbers)} blocks and is {width} wide"


def looks_like_original(path: Path) -> bool:
    """Whether the keys of a checkpoint are those of a family, in either layout."""
    marks = {family.name: family.marks for family in all_families()}
    return looks_like(diffusion_model(read_stored(path)).keys(), marks) in marks


def nearest_architecture(config: Buildable, experts: int = 1) -> str:
    """Return the registered model of this config's class that differs from it in fewest fields.

    `experts` is the number of transformers in the pipeline, which decides between models of the
    same shape.
    """
    mine = dataclasses.asdict(cast(Any, config))

    def distance(name: str) -> tuple[int, int]:
        other = dataclasses.asdict(cast(Any, MODELS.get(name)()))
        folders = {entry.subfolder for entry in MODELS.pretrained(name).values()}
        return sum(mine[field] != other[field] for field in mine), abs(len(folders) - experts)

    same_class = [name for name in MODELS.names() if type(MODELS.get(name)()) is type(config)]
    return min(same_class, key=distance)


@functools.lru_cache
def _kept_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Cache `shapes_of`: a file that may be of a family is compared with all of its sizes."""
    return shapes_of(config)


def _fits(stored: Mapping[str, StoredTensor], config: Buildable, family: Family) -> bool:
    expected = _kept_shapes(cast(Any, config))
    if len(stored) > len(expected):
        return False
    pieces = map_keys(stored, expected.keys(), family.rules_for(config))
    return {key: piece.shape for key, piece in pieces.items()} == expected


def describe_pipeline(source: Source, subfolder: str | None = None) -> tuple[ModelInfo, Checkpoint]:
    """Return the description of a pipeline's folder, and its transformer's checkpoint.

    Our exports also have an apt.json, which says how the model was trained and is sampled; a
    pipeline without one is a diffusion model.

    Raises CheckpointError for an unsupported transformer, missing parts, or code.
    """
    read_pipeline(source.folder / PIPELINE_FILE)
    checkpoint = public_checkpoint(source, subfolder)
    return _describe(source, checkpoint), checkpoint


def describe_file(path: Path) -> tuple[ModelInfo, Checkpoint]:
    """Return the description and checkpoint of a public transformer in one file.

    Text encoder and VAE are those of the first published weights of its size, from the Hub or its
    cache. The file counts as a diffusion model.

    Raises CheckpointError, which says what the file is, if it fits no registered model.
    """
    checkpoint = single_file(path, None, None)
    entry = pretrained_entry(checkpoint.architecture)
    info = _describe(locate(entry.repo, entry.revision), checkpoint)
    training = {**info.training, "source": path.name, "revision": None}
    return dataclasses.replace(info, stage="diffusion", training=training), checkpoint


def _describe(source: Source, checkpoint: Checkpoint) -> ModelInfo:
    """Describe a model with this transformer and the other parts of a pipeline."""
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
    """Return the first published weights of a registered model, which name its other parts.

    Raises CheckpointError for a model without published weights.
    """
    entries = MODELS.pretrained(architecture)
    if not entries:
        raise CheckpointError(
            f"{architecture!r} has no published weights, so its text encoder and VAE are unknown; "
            "load only the backbone with apt.load_model"
        )
    return next(iter(entries.values()))


def external_part(
    registry: Registry[Buildable] | Registry[BuildableText], name: str, source: Source
) -> ComponentInfo:
    """Describe a registered text encoder or codec, loaded from this source."""
    registered = registry.get(name)()
    try:
        config = replace_typed(registered, {"repo": source.name, "revision": source.revision})
    except InputError as error:
        raise CheckpointError(f"cannot load {name!r} from {source.name!r}: {error}") from error
    return ComponentInfo(architecture=name, config=dataclasses.asdict(cast(Any, config)))


def _scheduler_shift(source: Source) -> float | None:
    path = source.folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return None
    config = read_json(path)
    # UniPC and FlowMatchEuler use different names.
    shift = config.get("flow_shift", config.get("shift"))
    return float(shift) if isinstance(shift, (int, float)) and shift > 0 else None
