"""Loading of models, or parts of them, from a folder, a file, the Hub, or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.checkpoints.info import (
    INFO_FILE,
    PIPELINE_FILE,
    CodecInfo,
    ComponentInfo,
    ModelInfo,
    SampleInfo,
    read_description,
    read_info,
)
from apt.checkpoints.public import (
    describe_file,
    describe_pipeline,
    external_part,
    public_checkpoint,
    single_file,
)
from apt.checkpoints.reading import read_json
from apt.checkpoints.source import ASSETS, Source, is_here, list_pretrained, locate, weights_digest
from apt.checkpoints.weights import Checkpoint, configured, empty_module, load_weights, unbuildable
from apt.condition import PromptCheck, TextEncoder
from apt.device import find_device
from apt.errors import CheckpointError, ConfigError, InputError, MissingPackageError
from apt.models.architectures import CODECS, MODELS, TEXT_ENCODERS, find_tag, split_tag
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Identifies a model's weights for other people, without naming a local folder.

    Attributes:
        name: built-in name or Hub id; for a local model its recipe, or else its architecture.
        revision: commit on the Hub.
        weights: digest of local weights (`apt.checkpoints.source.weights_digest`).
    """

    name: str
    revision: str | None = None
    weights: str | None = None


@dataclass
class ModelBundle:
    """A model with everything needed to generate, and its origin if it was loaded."""

    backbone: DiffusionTransformer
    text_encoder: TextEncoder
    codec: LatentCodec
    info: ModelInfo
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if self.backbone.in_channels != self.codec.channels:
            raise ConfigError(
                f"the backbone takes {self.backbone.in_channels} latent channels, but the codec "
                f"has {self.codec.channels}; set in_channels to the codec's"
            )

    def __repr__(self) -> str:
        """Describe stage, parts and output size in one line."""
        info, sample = self.info, self.info.sample
        return (
            f"ModelBundle({info.stage}: {self.backbone!r}, text encoder "
            f"{info.text_encoder.architecture}, codec {info.codec.architecture}, {sample.frames} "
            f"frames of {sample.height}x{sample.width} at {sample.fps:g} fps)"
        )

    def modules(self) -> list[nn.Module]:
        """Return all parts."""
        return [self.backbone, self.text_encoder, self.codec]

    def own_modules(self) -> list[nn.Module]:
        """Return the networks whose weights belong to this model, not to a public checkpoint.

        The codec is never included: it computes in fp32, or as its config says.
        """
        own_text = self.info.text_encoder.weights is not None
        return [self.backbone, self.text_encoder] if own_text else [self.backbone]


def component_info(
    architecture: str,
    part: DiffusionTransformer | TextEncoder | LatentCodec,
    weights: str | None = None,
) -> ComponentInfo:
    """Describe a part for `apt.json`: its registered name, config and weights file."""
    return ComponentInfo(
        architecture=architecture, config=dataclasses.asdict(part.config), weights=weights
    )


def described(bundle: ModelBundle) -> ModelInfo:
    """Return the bundle's `info` with the actual config of each part."""
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


def load_bundle(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ModelBundle:
    """Load a whole model: built-in, from a folder, or from the Hub.

    A folder is one that `save_bundle` wrote, or a diffusers pipeline of a supported family. A
    safetensors file is a transformer of a registered size, in any layout that `load_model` reads;
    text encoder and VAE are then those of the model's published weights.

    Args:
        name_or_folder: a built-in name (`list_pretrained`), a registered model with published
            weights ("wan2.1_t2v_1.3b", "arch.tag"), a folder, a file, or "owner/name[@revision]".
        revision: revision of a Hub repository, if not given after "@".
        device: device of the weights. On "meta" the backbone has no weights yet, but an `origin`
            from which `apt.checkpoints.origin.fill_from_origins` loads them; the other parts are
            on the CPU.
        dtype: dtype of this model's own weights, whatever the file has. A text encoder or VAE of a
            public checkpoint has the dtype that its config names.

    Returns:
        The bundle, in evaluation mode. Parts from the Hub are pinned to a commit.

    Raises:
        CheckpointError: for an unknown name, a file that is missing, damaged or of a newer format,
            weights that are not finite, or weights of another model.
        InputError: for a device that this machine does not have.
    """
    device = find_device(device)
    beside = torch.device("cpu") if device.type == "meta" else device
    source, info, checkpoint = find_model(name_or_folder, revision)
    codec = _load_codec(source, info.codec)
    with _building_from(source):
        backbone = checkpoint.load(dtype=dtype, device=device)
        text_encoder = _load_text_encoder(source, info, dtype, beside)
        origin = _origin(name_or_folder, source, info)
        bundle = ModelBundle(backbone, text_encoder, codec, info, origin)
    # A folder may be older than an option of one of its parts, which then has the default value.
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
    """Load only a model's backbone; `load_bundle` also loads text encoder and codec.

    Args:
        name_or_path: a folder of ours or of diffusers, a safetensors file or an index of shards, a
            built-in or registered name, or "owner/name[@revision]" on the Hub.
        subfolder: folder of the transformer in a folder; None is the top, or "transformer" in a
            pipeline.
        filename: name of one safetensors file in the folder or repository.
        revision: commit, tag or branch on the Hub.
        architecture: registered name of the model in a single file. None finds the registered model
            whose tensors have exactly these names and shapes.
        options: fields of its config that differ from the registered ones.
        dtype, device: those of the weights, whatever the file has; "meta" as in `load_bundle`.

    Raises:
        CheckpointError: if there is no model, or its weights are damaged, of another model, or do
            not fit; the message names missing, unexpected and wrongly shaped tensors.
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
                    f"{source.name!r} has no file {filename!r}; name one that it has"
                )
            checkpoint = single_file(source.folder / filename, architecture, options)
        elif architecture is not None or options:
            raise InputError("architecture and options are for a single file; pass filename too")
        else:
            subfolder = subfolder or published
            if subfolder is None and _is_own(source):
                checkpoint = _own_checkpoint(source, read_info(source.folder))
            else:
                checkpoint = public_checkpoint(source, subfolder)
            with _building_from(source):
                return checkpoint.load(dtype=dtype, device=device)
    return checkpoint.load(dtype=dtype, device=device)


def load_text_encoder(name_or_folder: str | Path) -> TextEncoder:
    """Load only a model's text encoder, on the CPU; weights of the model's own are in fp32."""
    source, info, _ = find_model(name_or_folder)
    return _load_text_encoder(source, info, torch.float32, "cpu")


def load_prompt_check(name_or_folder: str | Path) -> PromptCheck:
    """Return the prompt check of a model's text encoder, without loading its weights."""
    source, info, _ = find_model(name_or_folder)
    config = configured(TEXT_ENCODERS, info.text_encoder, source.folder / INFO_FILE)
    with _building_from(source):
        return config.prompt_check()


def load_codec(name_or_folder: str | Path) -> LatentCodec:
    """Load only a model's codec, on the CPU; also from the folder of a codec."""
    alone = find_codec(name_or_folder)
    if alone is not None:
        source, found = alone
        return _load_codec(source, found.codec)
    source, info, _ = find_model(name_or_folder)
    return _load_codec(source, info.codec)


def describe_model(name_or_folder: str | Path) -> ModelInfo:
    """Return the description of a model. Weights of a Hub repository are downloaded, but not read.

    Raises CheckpointError as `load_bundle` does, and for the folder of a codec.
    """
    return find_model(name_or_folder)[1]


def describe(name_or_folder: str | Path) -> ModelInfo | CodecInfo:
    """Return the description of a model or a codec; see `describe_model`."""
    alone = find_codec(name_or_folder)
    return describe_model(name_or_folder) if alone is None else alone[1]


def find_model(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, ModelInfo, Checkpoint]:
    """Return a model's source, description and backbone checkpoint; see `load_bundle`."""
    if (path := as_file(name_or_folder)) is not None:
        if revision is not None:
            raise InputError(
                f"{str(path)!r} is a file, so it has no revision {revision!r}; leave it out"
            )
        return Source(path.parent), *describe_file(path)
    source, subfolder = locate_model(name_or_folder, revision)
    if is_pipeline(source):
        return source, *describe_pipeline(source, subfolder)
    info = read_info(source.folder)
    return source, info, _own_checkpoint(source, info)


NO_SIZE = SampleInfo(frames=0, height=0, width=0, fps=0.0)
"""The sample size of a third-party autoencoder, whose training size is unknown."""


def find_codec(name_or_folder: str | Path) -> tuple[Source, CodecInfo] | None:
    """Return a folder of ours or of diffusers that has only a codec; None for anything else."""
    if as_file(name_or_folder) is not None:
        return None
    source, _ = locate_model(name_or_folder)
    if is_pipeline(source):
        return None
    if _is_autoencoder(source.folder):
        codec = external_part(CODECS, "diffusers_vae", source)
        return source, CodecInfo(codec=codec, sample=NO_SIZE)
    info = read_description(source.folder)
    return (source, info) if isinstance(info, CodecInfo) else None


def _is_autoencoder(folder: Path) -> bool:
    """Whether the folder is a single autoencoder of diffusers."""
    if (folder / INFO_FILE).exists() or not (folder / "config.json").is_file():
        return False
    name = str(read_json(folder / "config.json").get("_class_name"))
    return any(part in name for part in ("Autoencoder", "VAE", "VQModel"))


def as_file(name_or_path: str | Path) -> Path | None:
    """Return the path of a file; None for anything else, or if it is also a built-in name."""
    path = Path(name_or_path).expanduser()
    return path if path.is_file() and str(name_or_path) not in list_pretrained() else None


def locate_model(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, str | None]:
    """Locate a model like `locate`, also by registered name ("arch" or "arch.tag").

    The second value is the transformer's subfolder for a registered name, else None.
    """
    name = str(name_or_folder)
    if isinstance(name_or_folder, str) and not is_here(name):
        architecture, tag = split_tag(name)
        if architecture in MODELS.names():
            entry = MODELS.pretrained(architecture)[find_tag(architecture, tag or True)]
            return locate(entry.repo, revision or entry.revision), entry.subfolder
    return locate(name_or_folder, revision), None


def is_pipeline(source: Source) -> bool:
    """Whether the folder is a diffusers pipeline."""
    return (source.folder / PIPELINE_FILE).is_file()


def _is_own(source: Source) -> bool:
    """Whether the folder is a model folder of ours, with an apt.json."""
    return not is_pipeline(source) and (source.folder / INFO_FILE).is_file()


def _own_checkpoint(source: Source, info: ModelInfo) -> Checkpoint:
    """Return the backbone's checkpoint in a folder of ours, downloaded if it is on the Hub."""
    path, part = source.folder / INFO_FILE, info.model
    if part.weights is None:
        raise CheckpointError(
            f"{str(path)!r} does not name the weights of its model; copy or export it again"
        )
    source.fetch([part.weights])
    return Checkpoint(
        source.folder / part.weights, part.architecture, configured(MODELS, part, path)
    )


def _origin(name_or_folder: str | Path, source: Source, info: ModelInfo) -> Origin:
    file = as_file(name_or_folder)
    if file is None and source.repo is not None:
        return Origin(name=source.repo, revision=source.revision)
    place = file or source.folder
    recipe = None if file is not None else info.training.get("recipe")
    name = place.name if place.parent == ASSETS else str(recipe or info.model.architecture)
    return Origin(name=name, weights=weights_digest(place))


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
    """Load a codec; if its weights are in the folder, it is in fp32 and frozen."""
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
    """Turn a part's InputError into a CheckpointError: bad options come from the folder."""
    try:
        yield
    except (CheckpointError, MissingPackageError):
        raise
    except InputError as error:
        if not (source.folder / INFO_FILE).exists():
            raise CheckpointError(f"{source.name!r} cannot be used: {error}") from error
        raise unbuildable(source.folder / INFO_FILE, error) from error
