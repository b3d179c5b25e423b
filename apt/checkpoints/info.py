"""`apt.json`, which describes the model in a folder, and its version without private paths."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from apt.checkpoints.reading import inert, read_document
from apt.errors import CheckpointError, InputError, listed
from apt.files import write_text
from apt.registry import check_options
from apt.untrusted import check_name

FORMAT = 1
INFO_FILE = "apt.json"
PIPELINE_FILE = "model_index.json"
"""Its presence makes a folder a diffusers pipeline."""
TRANSFORMER_FILE = "transformer.safetensors"
TEXT_ENCODER_FILE = "text_encoder.safetensors"
CODEC_FILE = "codec.safetensors"
CODEC_STAGE = "codec"

# Fields that name folders and models in records of earlier versions, which do not list them.
_FOLDERS = ("run_dir", "data.path")
_MODELS = ("stage.teacher", "stage.generator", "stage.discriminator")

_PLACE = re.compile(r"[~./\\]|[A-Za-z]:[\\/]|file:")
"""Beginnings of paths."""


@dataclass(frozen=True, kw_only=True)
class ComponentInfo:
    """A part of a model: its registered name, the config it was built from, its weights.

    `weights` is a file in the folder. It is None for a part without weights, and for one that loads
    its own when it is built (a text encoder or VAE of a public checkpoint). Lists in `config`
    become tuples, which configs use but JSON does not have.
    """

    architecture: str
    config: dict[str, Any]
    weights: str | None = None

    def __post_init__(self) -> None:
        tuples = {name: _as_tuple(value) for name, value in self.config.items()}
        object.__setattr__(self, "config", tuples)


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """The size of the videos that the model was trained on last."""

    frames: int
    height: int
    width: int
    fps: float

    def sized(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Return frames, height and width as given; None uses those of training."""
        return (
            self.frames if frames is None else frames,
            self.height if height is None else height,
            self.width if width is None else width,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingInfo:
    """The recommended sampling settings of a model.

    Attributes:
        num_steps: evaluations of the network.
        cfg_scale: guidance scale; 1 means none.
        negative_prompt: the prompt that guidance steers away from.
        timestep_shift: s of Eq. 7 on the timestep grid.
        sampler: "euler" or "consistency"; empty, in files of earlier versions, is the stage's.
    """

    num_steps: int = 1
    cfg_scale: float = 1.0
    negative_prompt: str = ""
    timestep_shift: float = 1.0
    sampler: Literal["", "euler", "consistency"] = ""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The contents of `apt.json`.

    Attributes:
        stage: "diffusion" (many steps), "consistency" or "apt" (one step), or the name of another
            package's stage.
        summary: one line about the model; empty in files of earlier versions.
        model, text_encoder, codec: the parts.
        sample: the default output size.
        sampling: the default sampling settings.
        training: the training record: recipe, seed, updates, figures, in any form.
    """

    stage: str
    model: ComponentInfo
    text_encoder: ComponentInfo
    codec: ComponentInfo
    sample: SampleInfo
    sampling: SamplingInfo = SamplingInfo()
    training: dict[str, Any] = field(default_factory=dict)
    summary: str = ""

    def sample_prompts(self) -> tuple[str, ...]:
        """Return the prompts of its sample sheets in training; empty if they are not recorded."""
        config = self.training.get("config")
        shown = config.get("sample_prompts") if isinstance(config, Mapping) else None
        if not isinstance(shown, (list, tuple)) or not all(isinstance(text, str) for text in shown):
            return ()
        return tuple(shown)


@dataclass(frozen=True, kw_only=True)
class CodecInfo:
    """The contents of `apt.json` in the folder of a latent codec.

    Attributes:
        stage: "codec".
        codec: the codec, with its weights.
        sample: the size of the clips that it was trained on.
        training, summary: as in `ModelInfo`.
    """

    stage: Literal["codec"] = "codec"
    codec: ComponentInfo
    sample: SampleInfo
    training: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


Info = TypeVar("Info", bound=ModelInfo | CodecInfo)


def read_info(folder: str | Path) -> ModelInfo:
    """Read and check the `apt.json` of a model.

    Raises:
        CheckpointError: if it is missing, damaged, of a newer format, has other fields, or
            describes only a codec.
    """
    info = read_description(folder)
    if isinstance(info, CodecInfo):
        raise CheckpointError(
            f"{str(folder)!r} is a latent codec, not a whole model; pre-train a model in its "
            "latents (--stage.codec), which then includes the codec"
        )
    return info


def read_description(folder: str | Path) -> ModelInfo | CodecInfo:
    """Read and check the `apt.json` of a model or a codec; raises as `read_info`."""
    path = Path(folder) / INFO_FILE
    if not path.exists():
        raise CheckpointError(_describe_foreign_folder(Path(folder)))
    document = read_document(path)
    inert(document, str(path))
    if not isinstance(document.get("format"), int):
        raise CheckpointError(
            f"{str(path)!r} has no format number, so this package did not write it; name another "
            "folder"
        )
    number = document.pop("format")
    if number != FORMAT:
        advice = "upgrade diffusion-apt" if number > FORMAT else "the file is damaged"
        raise CheckpointError(
            f"{str(path)!r} has format {number}, but this version reads format {FORMAT}; {advice}"
        )
    if document.get("stage") == CODEC_STAGE:
        codec: CodecInfo = _parse(CodecInfo, document, str(path))
        _check_weights(path, codec.codec)
        return codec
    info: ModelInfo = _parse(ModelInfo, document, str(path))
    _check_weights(path, info.model, info.text_encoder, info.codec)
    return info


def _check_weights(path: Path, *parts: ComponentInfo) -> None:
    for part in parts:
        try:
            if part.weights is not None:
                check_name(part.weights)
        except ValueError as error:
            raise CheckpointError(
                f"{str(path)!r} names weights that are not in its folder: {error}"
            ) from error


def write_info(folder: str | Path, info: ModelInfo | CodecInfo) -> None:
    """Write `apt.json`, replacing an existing file atomically.

    Raises:
        OSError: if it cannot be written.
    """
    write_text(Path(folder) / INFO_FILE, info_text(info))


def info_text(info: ModelInfo | CodecInfo) -> str:
    """Return the text of `apt.json`."""
    document = {"format": FORMAT, **dataclasses.asdict(info)}
    return json.dumps(document, indent=2) + "\n"


def without_folders(info: Info) -> Info:
    """Return the info with empty text wherever the training record names a local folder.

    A record lists the fields of its configuration that hold folders and models, as the method
    declares them. In any field, text that looks like a path counts as one. A name with one slash
    that is not a local folder counts as a Hub id, and stays.
    """
    return dataclasses.replace(info, training=_cleared_stage(info.training))


def _cleared_stage(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of one training stage, and of those before it, without local folders."""
    folders, models = record.get("folders", _FOLDERS), record.get("models", _MODELS)
    cleared = {
        key: _cleared(value, (), ("source",), key)
        for key, value in record.items()
        if key not in ("config", "started_from")
    }
    if "config" in record:
        cleared["config"] = _cleared(record["config"], folders, models, "")
    before = record.get("started_from")
    return cleared if before is None else {**cleared, "started_from": _cleared_stage(before)}


def _cleared(value: Any, folders: Collection[str], models: Collection[str], name: str) -> Any:
    """Return the value of the option `name`, such as "stage.teacher", without local folders."""
    if isinstance(value, Mapping):
        inside = f"{name}." if name else ""
        return {k: _cleared(v, folders, models, f"{inside}{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleared(entry, folders, models, name) for entry in value]
    if isinstance(value, str) and (name in folders or _is_place(value, is_model=name in models)):
        return ""
    return value


def _is_place(value: str, *, is_model: bool) -> bool:
    """Whether a text names a local path."""
    if value.startswith(("https://", "http://")):
        return False
    slashes = value.count("/") + value.count("\\")
    path_like = bool(_PLACE.match(value)) and slashes > 0
    return path_like or slashes > 1 or (is_model and slashes > 0 and Path(value).is_dir())


def _describe_foreign_folder(folder: Path) -> str:
    start = f"{str(folder)!r} has no {INFO_FILE}, so it is not a model of this package"
    try:
        names = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        # A Hub repository, whose files are downloaded on demand.
        return f"{start}; nor is it a diffusers pipeline"
    except OSError as error:
        return f"cannot read {str(folder)!r}: {error.strerror or error}"
    if "config.json" in names:
        return (
            f"{start}; config.json says that it is a diffusers or transformers model: pass the "
            "folder of the whole pipeline, or load only the transformer with apt.load_model"
        )
    if any(name.endswith((".pt", ".pth", ".ckpt", ".bin")) for name in names):
        return f"{start}; it has pickles, which are never loaded: convert them to safetensors"
    if any(name.startswith("step") for name in names):
        return (
            f"{start}; it looks like the checkpoints of a training run: pass the run's own folder"
        )
    return f"{start}; pass the folder of a training run or of an export, or a diffusers pipeline"


def _parse(kind: Any, document: Any, where: str) -> Any:
    """Build a dataclass from JSON; every field must be known, present and of the right type."""
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} must be an object, got {document!r}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for label, names in (
        ("lacks", required - document.keys()),
        ("has unknown fields", document.keys() - fields.keys()),
    ):
        if names:
            raise CheckpointError(f"{where} {label}: {listed(sorted(names))}")
    values = {}
    for name, value in document.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _parse(hint, value, f"{where}, {name},")
            continue
        try:
            check_options(f"{where}:", {name: hint}, {name: value})
        except InputError as error:
            raise CheckpointError(str(error)) from error
        values[name] = value
    return kind(**values)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
