"""A whole model, and how it or a part of it is loaded: from a folder, a file, the Hub, a name."""

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
        origin = _origin(name_or_folder, source, info)
        bundle = ModelBundle(backbone, text_encoder, codec, info, origin)
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
            subfolder = subfolder or published
            if subfolder is None and _is_own(source):
                checkpoint = _own_checkpoint(source, read_info(source.folder))
            else:
                checkpoint = public_checkpoint(source, subfolder)
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


def find_model(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, ModelInfo, Checkpoint]:
    """Where a whole model is, what it is, and the checkpoint of its backbone; see `load_bundle`."""
    if (path := as_file(name_or_folder)) is not None:
        if revision is not None:
            raise InputError(f"{str(path)!r} is a file, so it has no revision {revision!r}")
        return Source(path.parent), *describe_file(path)
    source, subfolder = locate_model(name_or_folder, revision)
    if is_pipeline(source):
        return source, *describe_pipeline(source, subfolder)
    info = read_info(source.folder)
    return source, info, _own_checkpoint(source, info)


NO_SIZE = SampleInfo(frames=0, height=0, width=0, fps=0.0)
"""Of an autoencoder of others, which does not tell what it was trained on."""


def find_codec(name_or_folder: str | Path) -> tuple[Source, CodecInfo] | None:
    """A folder that holds a codec and no model, of ours or of diffusers; None for anything else."""
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
    """Whether the folder is an autoencoder of diffusers by itself."""
    if (folder / INFO_FILE).exists() or not (folder / "config.json").is_file():
        return False
    name = str(read_json(folder / "config.json").get("_class_name"))
    return any(part in name for part in ("Autoencoder", "VAE", "VQModel"))


def as_file(name_or_path: str | Path) -> Path | None:
    """The path of one file; None for anything else. Built-in names win over files of that name."""
    path = Path(name_or_path).expanduser()
    return path if path.is_file() and str(name_or_path) not in list_pretrained() else None


def locate_model(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, str | None]:
    """As `locate`, for names of registered models ("arch" or "arch.tag") too.

    The second value is where in the folder their transformer is; None leaves that to the folder.
    """
    name = str(name_or_folder)
    if isinstance(name_or_folder, str) and not is_here(name):
        architecture, tag = split_tag(name)
        if architecture in MODELS.names():
            entry = MODELS.pretrained(architecture)[find_tag(architecture, tag or True)]
            return locate(entry.repo, revision or entry.revision), entry.subfolder
    return locate(name_or_folder, revision), None


def is_pipeline(source: Source) -> bool:
    """Whether the folder is a pipeline of diffusers."""
    return (source.folder / PIPELINE_FILE).is_file()


def _is_own(source: Source) -> bool:
    """Whether the folder is one of ours, with the weights that its apt.json names."""
    return not is_pipeline(source) and (source.folder / INFO_FILE).is_file()


def _own_checkpoint(source: Source, info: ModelInfo) -> Checkpoint:
    """The backbone's checkpoint in a folder of ours, fetched if the folder is of the Hub."""
    path, part = source.folder / INFO_FILE, info.model
    if part.weights is None:
        raise CheckpointError(f"{str(path)!r} names no weights of its model")
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
        if not (source.folder / INFO_FILE).exists():
            raise CheckpointError(f"{source.name!r} cannot be used: {error}") from error
        raise unbuildable(source.folder / INFO_FILE, error) from error
