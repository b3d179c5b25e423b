"""Objects that a run is given in Python, instead of those that its configuration names."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from apt.checkpoints.info import CODEC_FILE, TEXT_ENCODER_FILE, ComponentInfo
from apt.checkpoints.load import ModelBundle, component_info
from apt.checkpoints.weights import shapes_of
from apt.condition import TextEncoder
from apt.data.builtin_sources import OBJECT
from apt.data.clips import clip_size
from apt.errors import ConfigError, InputError, counted
from apt.methods.base import MethodConfig
from apt.models.architectures import CODECS, MODELS, TEXT_ENCODERS
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec
from apt.registry import Buildable, Registry
from apt.train.config import DataConfig, TrainConfig

__all__ = ["NO_OBJECTS", "Objects", "check_same_objects"]

Kinds = Mapping[str, Mapping[str, Any]]
"""Descriptions of objects, as a checkpoint records them."""


class _Part(NamedTuple):
    """The requirements for an object."""

    kind: type[nn.Module]
    registry: Registry[Any]
    weights: str | None


_PARTS = {
    "model": _Part(DiffusionTransformer, MODELS, None),
    "text_encoder": _Part(TextEncoder, TEXT_ENCODERS, TEXT_ENCODER_FILE),
    "codec": _Part(LatentCodec, CODECS, CODEC_FILE),
}


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects to use instead of names; see `apt.train.run`.

    Attributes:
        model: a backbone, instead of `config.model.name`.
        text_encoder, codec: instead of those in `config.model`.
        bundles: models, by the field of the stage that would name them.
        dataset: instead of `config.data.source`.
    """

    model: DiffusionTransformer | None = None
    text_encoder: TextEncoder | None = None
    codec: LatentCodec | None = None
    bundles: Mapping[str, ModelBundle] = field(default_factory=dict)
    dataset: Any = None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The given parts of a new model, by name."""
        found = {name: getattr(self, name) for name in _PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def check(self, config: TrainConfig) -> None:
        """Raise ConfigError, which names the argument, if an object cannot be used."""
        stage = config.stage
        for name, part in self.parts.items():
            _check_part(name, part, _PARTS[name])
            field = stage.starts_from if stage.starts_from in self.bundles else stage.start_field
            if field is not None:
                raise ConfigError(
                    f"this stage takes its {name} from the model that it starts from: pass that "
                    f"model instead, as bundles={{{field!r}: apt.ModelBundle(...)}}"
                )
            if name != "codec" and not isinstance(stage, MethodConfig):
                raise ConfigError(f"this stage trains a codec and has no {name}; leave it out")
        if self.codec is not None and stage.trained_codec():
            raise ConfigError(
                f"--stage.codec names the codec {stage.trained_codec()!r}, but codec= passes "
                "another; leave one of them out"
            )
        for name, bundle in self.bundles.items():
            if name not in stage.names_models or name == "codec":
                known = [other for other in stage.names_models if other != "codec"]
                raise ConfigError(
                    f"bundles: the stage has no model {name!r}; choose from: "
                    f"{', '.join(known) or 'nothing, it starts from no model: pass model=...'}"
                )
            if not isinstance(bundle, ModelBundle):
                raise ConfigError(
                    f"bundles: {name} has type {type(bundle).__name__}; expected an "
                    "apt.ModelBundle, as from apt.load_bundle"
                )
            _check_weights(f"the backbone of {name}", bundle.backbone)

    def named(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with the names of the objects.

        Sizes of clips that it leaves open are those of the data set. Raises DataError if the data
        set's first clip cannot be used.
        """
        changes: dict[str, Any] = {}
        for name, part in self.parts.items():
            prefix = "" if name == "model" else f"{name}_"
            changes["name" if name == "model" else name] = self.info(name, part).architecture
            changes[f"{prefix}options"] = {}
        data = config.data if self.dataset is None else _of_object(config.data, self.dataset)
        model, stage = dataclasses.replace(config.model, **changes), config.stage
        if stage.may_begin_anew and stage.starts_from in self.bundles:
            start: dict[str, Any] = {str(stage.starts_from): OBJECT}
            stage = dataclasses.replace(stage, **start)
        return dataclasses.replace(config, model=model, data=data, stage=stage)

    def info(self, name: str, part: Any) -> ComponentInfo:
        """Return the description of a part of a new model; its weights are saved with the model."""
        known = _PARTS[name]
        described = component_info(_architecture(known.registry, part), part)
        weights = known.weights if part.state_dict() else None
        return dataclasses.replace(described, weights=weights)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Describe each object: its class, and its parameters' names and shapes, or its length."""
        kinds = {name: _module_kind(part) for name, part in self.parts.items()}
        for name, bundle in self.bundles.items():
            kinds[f"bundles.{name}"] = _module_kind(bundle.backbone)
        if self.dataset is not None:
            length = len(self.dataset) if hasattr(self.dataset, "__len__") else None
            kinds["dataset"] = {"class": type(self.dataset).__qualname__, "length": length}
        return kinds


NO_OBJECTS = Objects()


def check_same_objects(now: Kinds, before: Kinds, place: str) -> None:
    """Raise ConfigError unless a resumed run has the same kinds of objects as before.

    Args:
        now, before: see `Objects.kinds`.
        place: the run's folder, for the message.
    """
    if missing := sorted(before.keys() - now.keys()):
        began = ", ".join(f"{name} ({before[name]['class']})" for name in sorted(before))
        raise ConfigError(
            f"{place} was started in Python with objects that the command line cannot name: "
            f"{began}; resume it in Python and pass {' and '.join(missing)} again: "
            "apt.train.run(config, ..., resume=True)"
        )
    if added := sorted(now.keys() - before.keys()):
        raise ConfigError(
            f"{place} was started without {' and '.join(added)}; leave that out, or start a new "
            "run in another --run-dir"
        )
    for name in sorted(now):
        if now[name] != before[name]:
            raise ConfigError(
                f"{place} was started with another {name}: {_words(before[name])}, but now it is "
                f"{_words(now[name])}; pass one like the first, or start a new run in another "
                "--run-dir"
            )


def _check_part(name: str, part: Any, expected: _Part) -> None:
    if not isinstance(part, expected.kind):
        raise ConfigError(
            f"{name} is a {type(part).__name__}; expected "
            f"{expected.kind.__module__}.{expected.kind.__name__}"
        )
    config = getattr(part, "config", None)
    if not dataclasses.is_dataclass(config) or not callable(getattr(config, "build", None)):
        raise ConfigError(
            f"{name} {type(part).__qualname__} cannot be built from its config: expected "
            "a config that is a frozen dataclass with build(), which exports record"
        )
    try:
        built = shapes_of(cast(Buildable, config))
    except InputError as error:
        raise ConfigError(f"{name} cannot be built from its config: {error}") from error
    own = {key: tuple(value.shape) for key, value in part.state_dict().items()}
    differing = sorted(key for key in built.keys() | own.keys() if built.get(key) != own.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{name} {type(part).__qualname__} differs from what its config builds: {key} is "
            f"{own.get(key)}, but {built.get(key)} in what build() returns; fix its config"
        )
    _check_weights(name, part)


def _check_weights(name: str, module: nn.Module) -> None:
    for key, value in module.named_parameters():
        if not bool(value.isfinite().all()):
            raise ConfigError(f"{name} has weights that are NaN or infinite, in {key}")
        if value.requires_grad and value.dtype != torch.float32:
            raise ConfigError(
                f"{name} must be fp32 to train, but {key} is "
                f"{str(value.dtype).removeprefix('torch.')}; pass module.float()"
            )


def _of_object(data: DataConfig, dataset: Any) -> DataConfig:
    size = clip_size(dataset)
    named = dataclasses.replace(data, source=OBJECT, path="", options={})
    if size is None:
        return named
    return dataclasses.replace(
        named,
        frames=size.frames if data.frames is None else data.frames,
        height=size.height if data.height is None else data.height,
        width=size.width if data.width is None else data.width,
    )


def _architecture(registry: Registry[Any], part: Any) -> str:
    """Return the name under which a part's config is registered, or else that of its class."""
    configs = {name: registry.get(name)() for name in registry.names()}
    same = [name for name, config in configs.items() if type(config) is type(part.config)]
    equal = [name for name in same if configs[name] == part.config]
    return [*equal, *same, f"{type(part).__module__}.{type(part).__qualname__}"][0]


def _module_kind(module: nn.Module) -> dict[str, Any]:
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return {
        "class": type(module).__qualname__,
        "parameters": sum(p.numel() for p in module.parameters()),
        "shapes": hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest(),
    }


def _words(kind: Mapping[str, Any]) -> str:
    if "length" in kind:
        return f"{kind['class']} of {counted(kind['length'], 'clip')}"
    return f"{kind['class']} with {kind['parameters']:,} parameters"
