"""Configurations in files: what `train --print-config` prints, and a run keeps, read strictly."""

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
"""The key under which config.json says what a run was given in Python: `Objects.kinds`."""
METHOD = "method"
"""The key of a stage that says which one it is: its `exports_as`."""

_TAKEN: Mapping[type[Any], str] = {TrainConfig: "model", ModelConfig: "codec"}
"""What is null where the stage takes it from the model, or the codec, that it names."""

T = TypeVar("T")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON holds it; null is what is left open, or taken from elsewhere."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    stage, model, usual = config.stage, config.model, ModelConfig()
    tree["stage"] = {METHOD: stage.exports_as, **tree["stage"]}
    if stage.start_field is not None and model == usual:
        tree["model"] = None
    elif stage.trained_codec() and (model.codec, model.codec_options) == (usual.codec, {}):
        tree["model"]["codec"] = None
    return tree


def read_configs(file: Path) -> list[TrainConfig]:
    """The configuration of a file, or of several stages in a row.

    A field that is left out has its default, not a recipe's.

    Raises:
        ConfigError: the file cannot be read, or holds fields that there are not, values of a wrong
            type or out of range, a stage of a method that is not known, or a run that was given
            objects in Python, which no file holds.
    """
    if file.is_dir():
        raise ConfigError(
            f"{str(file)!r} is a folder; expected what `train RECIPE --print-config` prints, or "
            "the config.json of a run (`train --resume RUN` goes on with the run in a folder)"
        )
    try:
        document = json.loads(read_text(file))
    except OSError as error:
        raise ConfigError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{str(file)!r} is not JSON ({error}); expected what `train RECIPE --print-config` "
            "prints"
        ) from error
    several = isinstance(document, list) and document
    configs = document if several else [document]
    given = {name for one in configs if isinstance(one, Mapping) for name in one.get(OBJECTS, ())}
    if given:
        raise ConfigError(
            f"{str(file)!r} is of a run that was given objects in Python, which have no name here "
            f"({', '.join(sorted(given))}); go on there: apt.train.run(config, ..., resume=True)"
        )
    places = [f"{file}, stage {number}" for number in range(1, len(configs) + 1)]
    places = places if several else [str(file)]
    return [_read(TrainConfig, one, place) for one, place in zip(configs, places, strict=True)]


def _read(kind: type[T], document: Any, where: str) -> T:
    """A dataclass from an object of JSON."""
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
        raise ConfigError(f"{where}: {', '.join(absent)} is missing, which has no default")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """JSON's value as a field of that type holds it; what does not fit is left for the check."""
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
    """The options of the method that the object names, or that alone has such fields."""
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
            f"{where}: it is not clear of which method these options are; say so with {METHOD!r}, "
            f"one of: {', '.join(sorted({kind.exports_as for kind in known}))}"
        )
    return _read((fitting or known)[0], options, where)


def _kinds(base: type[Any]) -> Iterator[type[StageConfig]]:
    """Every stage that is there, those of imported modules too."""
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind) and hasattr(kind, "exports_as"):
            yield kind
        yield from _kinds(kind)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
