"""Backbones from checkpoints: found, understood, and loaded with little more memory than they take.

A checkpoint is a folder of ours (apt.json), a folder of diffusers (a pipeline, or its transformer),
or one safetensors file in the layout of its authors or of ComfyUI.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from apt.device import find_device
from apt.errors import CheckpointError, InputError
from apt.hub import INFO_FILE, PIPELINE_FILE, ComponentInfo, Source, locate, read_info
from apt.hub.inert import read_json
from apt.hub.mismatch import listed, looks_like
from apt.hub.stored import StoredTensor, find_weights, read_stored
from apt.hub.weights import fill
from apt.models.families import Family
from apt.models.layouts import (
    all_families,
    diffusion_model,
    family_marks,
    family_of,
    map_keys,
)
from apt.models.registry import MODELS, Buildable, find_tag, split_tag
from apt.models.transformer import DiffusionTransformer
from apt.registry import Registry, replace_typed

C = TypeVar("C", bound=Buildable)

WEIGHTS_STEM = "diffusion_pytorch_model"
"""How diffusers names the weights of a transformer."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a backbone's weights are, and what they are weights of.

    Attributes:
        weights: a safetensors file, or the index of shards.
        architecture: registered name; `config` may differ from what is registered.
        config: to build from.
    """

    weights: Path
    architecture: str
    config: Buildable

    def load(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> DiffusionTransformer:
        """Build and load, strictly; the backbone is in evaluation mode.

        Peak memory is that of the loaded model and one tensor: it is built without memory, and
        each tensor is cast on its way from the mapped file.
        """
        module: DiffusionTransformer = empty_module(self.config, dtype)
        stored = diffusion_model(read_stored(self.weights))
        family = family_of(self.config)
        if family is not None:
            check_kind(self.weights, family, stored)
        rules = () if family is None else family.rules_for(self.config)
        pieces = map_keys(stored, module.state_dict().keys(), rules)
        fill(module, pieces, source=str(self.weights), device=device, marks=family_marks())
        return module.to(device).eval()


def from_pretrained(
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
    """Load a backbone alone; `apt.load_pretrained` loads it with text encoder and codec.

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
        dtype, device: of the weights, whatever the file has.

    Raises:
        CheckpointError: nothing there, damaged or foreign weights, or ones that do not fit, naming
            what is missing, unexpected and wrongly shaped.
    """
    device = find_device(device)
    path = Path(name_or_path).expanduser()
    if path.is_file():
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
    return checkpoint.load(dtype=dtype, device=device)


def locate_model(
    name_or_folder: str | Path, revision: str | None = None
) -> tuple[Source, str | None]:
    """As `locate`, for names of registered models ("arch" or "arch.tag") too.

    The second value is where in the folder their transformer is; None leaves that to the folder.
    """
    name = str(name_or_folder)
    if isinstance(name_or_folder, str) and not Path(name).exists():
        architecture, tag = split_tag(name)
        if architecture in MODELS.names():
            entry = MODELS.pretrained(architecture)[find_tag(architecture, tag or True)]
            return locate(entry.repo, revision or entry.revision), entry.subfolder
    return locate(name_or_folder, revision), None


def load_registered(
    name: str,
    tag: str,
    overrides: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiffusionTransformer:
    """Load the published weights of a registered model; see `apt.create_model`."""
    entry = MODELS.pretrained(name)[tag]
    source = locate(entry.repo, entry.revision)
    config = replace_typed(MODELS.get(name)(), overrides)
    _fetch_component(source, entry.subfolder)
    weights = find_weights(source.folder / entry.subfolder, WEIGHTS_STEM)
    return Checkpoint(weights, name, config).load(dtype=dtype, device=device)


def find_checkpoint(source: Source, subfolder: str | None = None) -> Checkpoint:
    """The backbone's checkpoint in a folder, fetched if the folder is of the Hub.

    Raises CheckpointError that says what the folder is, if it is none that can be loaded.
    """
    folder = source.folder
    if subfolder is None and (folder / PIPELINE_FILE).is_file():
        subfolder = "transformer"
    if subfolder is None and (folder / INFO_FILE).is_file():
        info = read_info(folder).model
        if info.weights is None:
            raise CheckpointError(f"{str(folder / INFO_FILE)!r} names no weights of its model")
        source.fetch([info.weights])
        config = configured(MODELS, info, folder / INFO_FILE)
        return Checkpoint(folder / info.weights, info.architecture, config)
    _fetch_component(source, subfolder or "")
    part = folder / (subfolder or "")
    if not part.is_dir():
        raise CheckpointError(f"{str(folder)!r} has no folder {subfolder!r}")
    if not (part / "config.json").exists():
        if any(part.glob("*.safetensors")):
            return single_file(find_weights(part, WEIGHTS_STEM), None, None)
        read_info(part)  # raises, and says what the folder is
    config_file = read_json(part / "config.json")
    class_name = config_file.get("_class_name")
    weights = find_weights(part, WEIGHTS_STEM)
    for family in all_families():
        if family.diffusers_class == class_name:
            config = family.from_diffusers(config_file)
            experts = len(list(folder.glob("transformer*/config.json")))
            return Checkpoint(weights, nearest_architecture(config, experts), config)
    if looks_like_original(weights):
        # Authors also put a config.json of their own beside their layout.
        return single_file(weights, None, None)
    known = ", ".join(family.diffusers_class for family in all_families())
    raise CheckpointError(
        f"{str(part)!r} holds a {class_name or config_file.get('model_type') or 'model'!r}, which "
        f"is no transformer that this package knows ({known})"
    )


def single_file(
    path: Path, architecture: str | None, options: Mapping[str, Any] | None
) -> Checkpoint:
    """The checkpoint in one file; see `from_pretrained`.

    Raises CheckpointError if no registered model has just these tensors.
    """
    if architecture is not None:
        config = replace_typed(MODELS.get(architecture)(), options or {})
        return Checkpoint(path, architecture, config)
    if options:
        raise InputError("options need an architecture to be options of")
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
                f"{str(path)!r} looks like the {family.name} family, but no registered size of it "
                f"has just these tensors: {_shape_of_blocks(stored)}; pass architecture and "
                "options, such as the depth"
            )
    if kind is not None:
        raise CheckpointError(
            f"{str(path)!r} is {kind}; expected a diffusion transformer of the families "
            f"{', '.join(family.name for family in all_families())}"
        )
    raise CheckpointError(
        f"cannot tell what {str(path)!r} holds: its keys ({listed(sorted(stored))}) belong to no "
        f"family known here; pass architecture, one of {', '.join(MODELS.names())}"
    )


def check_kind(path: Path, family: Family, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError that says what a checkpoint of the family is, if it is none of those
    that our module takes."""
    relative = family.relative({key: tensor.shape for key, tensor in stored.items()})
    if relative is not None:
        raise CheckpointError(
            f"{str(path)!r} is {relative}; of the family {family.name!r} only the plain "
            f"{family.makes} models are here: use the checkpoint of one"
        )


def _shape_of_blocks(stored: Mapping[str, StoredTensor]) -> str:
    """How many blocks there are and how wide, as far as the keys tell."""
    numbers = {int(found[1]) for key in stored if (found := re.search(r"blocks\.(\d+)\.", key))}
    widths = collections.Counter(t.shape[-1] for t in stored.values() if len(t.shape) == 2)
    width = widths.most_common(1)[0][0] if widths else 0
    return f"it has {len(numbers)} blocks and is {width} wide"


def looks_like_original(path: Path) -> bool:
    """Whether the keys of a checkpoint are those of a family, in one layout or the other."""
    marks = {family.name: family.marks for family in all_families()}
    return looks_like(diffusion_model(read_stored(path)).keys(), marks) in marks


def nearest_architecture(config: Buildable, experts: int = 1) -> str:
    """The registered model of this config's class that differs from it in the fewest fields.

    `experts` is the number of transformers in the pipeline, which decides between models of one
    shape.
    """
    mine = dataclasses.asdict(cast(Any, config))

    def distance(name: str) -> tuple[int, int]:
        other = dataclasses.asdict(cast(Any, MODELS.get(name)()))
        folders = {entry.subfolder for entry in MODELS.pretrained(name).values()}
        return sum(mine[field] != other[field] for field in mine), abs(len(folders) - experts)

    same_class = [name for name in MODELS.names() if type(MODELS.get(name)()) is type(config)]
    return min(same_class, key=distance)


def configured(registry: Registry[C], part: ComponentInfo, origin: Path) -> C:
    """The config of a part as a folder describes it; what it refuses is the folder's fault."""
    if part.architecture not in registry.names():
        raise CheckpointError(
            f"{str(origin)!r} describes the {registry.kind} {part.architecture!r}, which is not "
            "registered here: import the module that registers it (diffusion-apt --import MODULE), "
            "or use a newer version of this package, if it is one of that"
        )
    try:
        return replace_typed(registry.get(part.architecture)(), part.config)
    except InputError as error:
        raise unbuildable(origin, error) from error


def unbuildable(origin: Path, error: InputError) -> CheckpointError:
    """The error for a description that a part refuses."""
    return CheckpointError(
        f"{str(origin)!r} describes a model that cannot be built: {error}; it may come from a "
        "newer version of this package"
    )


def empty_module(config: Buildable, dtype: torch.dtype | None = None) -> Any:
    """The module of a config on the meta device, for `apt.hub.weights.fill`.

    `dtype` casts it as `module.to` does, so layers that keep fp32 keep it.

    Raises InputError for a module with buffers that no checkpoint would hold.
    """
    with torch.device("meta"):
        module = config.build()
    lost = [name for name, _ in module.named_buffers() if name not in module.state_dict()]
    if lost:
        raise InputError(
            f"{type(module).__name__} has buffers that no checkpoint holds ({', '.join(lost)}); "
            "register them with persistent=True, or compute them where they are used"
        )
    return module if dtype is None else module.to(dtype)


def shapes_of(config: Buildable) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state, without building it in memory."""
    return {key: tuple(value.shape) for key, value in empty_module(config).state_dict().items()}


@functools.lru_cache
def _kept_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """As `shapes_of`: every size of a family is built for each file that may be of it."""
    return shapes_of(config)


def _fits(stored: Mapping[str, StoredTensor], config: Buildable, family: Family) -> bool:
    expected = _kept_shapes(cast(Any, config))
    if len(stored) > len(expected):
        return False
    pieces = map_keys(stored, expected.keys(), family.rules_for(config))
    return {key: piece.shape for key, piece in pieces.items()} == expected


def _fetch_component(source: Source, subfolder: str) -> None:
    """Configuration and safetensors of one component; of its top, those of no other component."""
    if subfolder:
        source.fetch([f"{subfolder}/*.json", f"{subfolder}/*.safetensors"])
    elif source.repo is not None:
        # "*" also stands for "/" in these patterns, so "*.safetensors" would be all components.
        source.fetch(["*.json", f"{WEIGHTS_STEM}*.safetensors"])
