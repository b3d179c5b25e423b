"""Read and write configurations as JSON, as in `train --print-config` and a run's config.json."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from apt.errors import ConfigError
from apt.files import read_text
from apt.methods.base import StageConfig
from apt.registry import Registry, check_options
from apt.train.config import ModelConfig, TrainConfig

__all__ = ["METHOD", "OBJECTS", "plain", "read_configs"]

OBJECTS = "objects"
"""The key in config.json for objects that a run was given in Python: `Objects.kinds`"""
METHOD = "method"
"""The key that names the method of a stage: its `exports_as`"""

_TAKEN: Mapping[type[Any], str] = {TrainConfig: "model", ModelConfig: "codec"}
"""Fields that are null if the stage takes them from the model or codec that it names."""

T = TypeVar("T")


def plain(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as JSON; values left open, or taken from elsewhere, are null."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    stage, model, usual = config.stage, config.model, ModelConfig()
    tree["stage"] = {METHOD: stage.exports_as, **tree["stage"]}
    if stage.start_field is not None and model == usual:
        tree["model"] = None
    elif stage.trained_codec() and (model.codec, model.codec_options) == (usual.codec, {}):
        tree["model"]["codec"] = None
    return tree


def read_configs(file: Path) -> list[TrainConfig]:
    """Read the configurations in a file: one, or those of several stages in a row.

    Fields that are left out have their defaults, not those of a recipe.

    Raises:
        ConfigError: the file cannot be read; it has unknown fields, values of a wrong type or out
            of range, or an unknown method; or its run was given objects in Python, which a file
            cannot hold.
    """
    if file.is_dir():
        raise ConfigError(
            f"{str(file)!r} is a folder; expected the output of `train RECIPE --print-config`, or "
            "the config.json of a run (`train --resume RUN` resumes the run in a folder)"
        )
    try:
        document = json.loads(read_text(file))
    except OSError as error:
        raise ConfigError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{str(file)!r} is not JSON ({error}); expected the output of `train RECIPE "
            "--print-config`"
        ) from error
    several = isinstance(document, list) and document
    configs = document if several else [document]
    given = {name for one in configs if isinstance(one, Mapping) for name in one.get(OBJECTS, ())}
    if given:
        raise ConfigError(
            f"the run of {str(file)!r} was given objects in Python, which a file cannot hold "
            f"({', '.join(sorted(given))}); resume it by apt.train.run(config, ..., resume=True)"
        )
    places = [f"{file}, stage {number}" for number in range(1, len(configs) + 1)]
    places = places if several else [str(file)]
    return [_read(TrainConfig, one, place) for one, place in zip(configs, places, strict=True)]


def _read(kind: type[T], document: Any, where: str) -> T:
    """Make a dataclass from a JSON object."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"{where}: expected an object with fields, got {document!r:.80}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    accepted = {name: hints[name] for name in fields}
    values = {
        name: _value(accepted[name], value, f"{where}: {name}") if name in accepted else value
        for name, value in document.items()
        if not (value is None and name == _TAKEN.get(kind))
    }
    check_options(where, accepted, values)
    absent = [name for name, field in fields.items() if name not in values and _required(field)]
    if absent:
        raise ConfigError(f"{where}: {', '.join(absent)} must be set, because it has no default")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Convert a JSON value for a field of that type; a wrong type is left for the later check."""
    if hint is StageConfig:
        return _stage(value, where)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(
            (kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)), hint
        )
    if dataclasses.is_dataclass(hint) and value is not None:
        return _read(hint, value, where)  # type: ignore[arg-type]
    return tuple(value) if isinstance(value, list) else value


def _stage(document: Any, where: str) -> StageConfig:
    """Make the options of the method that the object names, or the only one with such fields."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"{where}: expected an object with fields, got {document!r:.80}")
    options = {name: value for name, value in document.items() if name != METHOD}
    known = list(_kinds(StageConfig))
    if METHOD in document:
        named: Registry[StageConfig] = Registry("method")
        for kind in known:
            if kind.exports_as not in named.names():
                named.register(kind.exports_as)(kind)
        named.get(str(document[METHOD]))
        known = [kind for kind in known if kind.exports_as == document[METHOD]]
    fitting = [
        kind for kind in known if options.keys() == {f.name for f in dataclasses.fields(kind)}
    ]
    if len(known) > 1 and len(fitting) != 1:
        raise ConfigError(
            f"{where}: these options do not tell which method they belong to; add {METHOD!r}, "
            f"one of: {', '.join(sorted({kind.exports_as for kind in known}))}"
        )
    return _read((fitting or known)[0], options, where)


def _kinds(base: type[Any]) -> Iterator[type[StageConfig]]:
    """Yield every known stage, including those of imported modules."""
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind) and hasattr(kind, "exports_as"):
            yield kind
        yield from _kinds(kind)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
