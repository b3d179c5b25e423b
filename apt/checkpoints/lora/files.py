"""LoRA files in common formats: finding, loading with their strength, and writing.

`apt.checkpoints.lora.keys` explains the keys. The strength is alpha over rank. Alpha is in the
first of these places: a tensor `NAME.alpha`; PEFT's options, in the header (diffusers'
`lora_adapter_metadata`) or in `adapter_config.json` beside the file; a number in the header
(`lora_alpha`, `alpha`, kohya's `ss_network_alpha`). Without any of them, alpha is the rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from apt.checkpoints.layouts import Family, family_of
from apt.checkpoints.lora.assembly import assemble
from apt.checkpoints.lora.keys import KIND_OF_PART, Names, describe_unknown, split_key
from apt.checkpoints.lora.layers import LoRA, LoRALayer
from apt.checkpoints.reading import read_json, read_stored
from apt.checkpoints.runs import model_folder
from apt.checkpoints.source import split_hub_id
from apt.checkpoints.weights import check_finite, save_tensors
from apt.errors import CheckpointError, listed
from apt.hub.download import download
from apt.untrusted import parse_json

LORA_FILE = "pytorch_lora_weights.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"

_DOCUMENTS = ("lora_adapter_metadata", "adapter_config", "peft_config", "lora_config", "config")
"""Header entries that are JSON objects with PEFT's options."""
_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "lora_network_alpha")
_KOHYA_ALPHA = "ss_network_alpha"

_PEFT_TYPES = ("LORA", "LOKR", "LOHA")
_CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that change the base model's weights, so the LoRA fits no other base."""


def load_lora(path: str | Path, model: nn.Module, family: Family | None = None) -> LoRA:
    """Read a LoRA for a model.

    Args:
        path: a safetensors file, or a folder with one; see `find_lora`.
        model: the backbone that it is for.
        family: the model's family, for files with its authors' names; None finds it by the config.

    Raises:
        CheckpointError: for a missing or damaged file, values that are not finite, keys that match
            nothing in the model, or shapes that do not fit it. The model does not change, and no
            part of the file is ignored.
    """
    file = _file_in(Path(path)) if Path(path).is_dir() else Path(path)
    read_stored(file)
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        header = stored.metadata() or {}
    if family is None:
        family = family_of(model.config)
    names = Names(model, () if family is None else family.rules_for(model.config))
    parts: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        check_finite(str(file), key, value)
        name, part = split_key(key)
        if part != "alpha" and not value.is_floating_point():
            raise CheckpointError(
                f"{str(file)!r}: {key!r} is {str(value.dtype).removeprefix('torch.')}, expected "
                "floating-point numbers; quantised LoRAs are not supported: use a file in bf16"
            )
        if part is None or not names.find(name, KIND_OF_PART.get(part, "weight"))[0]:
            unknown.append(key)
        elif part in parts.setdefault(name, {}):
            raise CheckpointError(
                f"{str(file)!r} has {part!r} of {name!r} twice, so it contains several adapters; "
                "save only one of them"
            )
        else:
            parts[name][part] = value
    if unknown:
        raise CheckpointError(describe_unknown(file, unknown, len(tensors), family))
    if not parts:
        raise CheckpointError(
            f"{str(file)!r} is not a LoRA; expected keys such as NAME.lora_A.weight"
        )
    strength = read_strength(file, header, tensors.keys())
    return assemble(file, parts, names, strength.scale, model)


def save_lora(folder: str | Path, layers: Mapping[str, LoRALayer]) -> Path:
    """Write `pytorch_lora_weights.safetensors`, diffusers' name, and return the file.

    Raises:
        CheckpointError: for values that are not finite, or a failure to write.
    """
    file = Path(folder) / LORA_FILE
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        # The scale is multiplied into the weights, because loaders look for alpha in different
        # places.
        up = layer.up if layer.scale == 1 else layer.up * layer.scale
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(file)!r}: {error.strerror or error}") from error
    save_tensors(file, tensors)
    return file


def find_lora(name: str | Path) -> Path:
    """Find the file of a LoRA, given a file, a folder, or a Hub repository.

    In a folder it is diffusers' or PEFT's file, or else the only safetensors file.

    Raises CheckpointError if there is none, or there are several.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    hub_id = None if path.is_dir() or path.suffix == ".safetensors" else split_hub_id(str(name))
    if hub_id is not None:
        path = download(*hub_id, [LORA_FILE, PEFT_FILE, CONFIG_FILE])
    elif path.is_dir():
        path = model_folder(path)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no LoRA {str(name)!r}: expected a .safetensors file, or a folder or Hub "
            f"repository with {LORA_FILE} or {PEFT_FILE}"
        )
    return _file_in(path)


def _file_in(folder: Path) -> Path:
    for name in (LORA_FILE, PEFT_FILE):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{str(folder)!r} has several files ({listed(file.name for file in found)}); name one"
        )
    raise CheckpointError(
        f"there is no LoRA in {str(folder)!r}: expected {LORA_FILE}, {PEFT_FILE} or one other "
        ".safetensors file"
    )


@dataclass(frozen=True)
class Strength:
    """What a file says about alpha.

    Attributes:
        origin: where it says so, for messages.
        alpha: alpha of all layers; None for their rank.
        rank: the rank that the file states for all layers; None if it states none.
        alphas, ranks: those of single layers, by patterns of their names.
        rslora: divide by the square root of the rank (Kalajdzievski 2023).
    """

    origin: str
    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, name: str, rank: int | None, alpha: Tensor | None) -> float:
        """Return the factor of a layer's change.

        Args:
            name: name of the layer in the file, without prefix.
            rank: rank of its factors; None for whole matrices (of a LoKr).
            alpha: their alpha tensor; None if there is none.

        Raises CheckpointError if the file states another rank.
        """
        if alpha is not None:
            # LyCORIS also stores an alpha for whole matrices, and ignores it.
            return 1.0 if rank is None else float(alpha) / rank
        claimed = _matching(self.ranks, name, self.rank)
        if rank is None:
            rank = None if claimed is None else int(claimed)
        elif claimed is not None and claimed != rank:
            raise CheckpointError(
                f"{self.origin} states rank {claimed:g} for {name!r}, whose factors have rank "
                f"{rank}: it describes another LoRA, so the strength is unknown; put the file "
                "beside its own description"
            )
        value = _matching(self.alphas, name, self.alpha)
        if value is None or rank is None:
            return 1.0
        return value / (math.sqrt(rank) if self.rslora else rank)


def read_strength(file: Path, header: Mapping[str, str], keys: Collection[str]) -> Strength:
    """Read what a LoRA says about its strength, apart from tensors.

    Args:
        file: the LoRA, which may have an `adapter_config.json` beside it.
        header: the strings in its header.
        keys: the keys of its tensors.

    Raises:
        CheckpointError: for a description that is damaged, or describes another kind of adapter, or
            one whose base was changed.
    """
    for entry in _DOCUMENTS:
        if entry in header:
            origin = f"{entry!r} in the header of {str(file)!r}"
            options = _read_object(header[entry], origin)
            if any(key in _PEFT_FIELDS for key in options):
                return _from_peft(options, origin)
    config = file.with_name(CONFIG_FILE)
    # If PEFT's own file is there, the config describes that file and no other.
    if config.is_file() and (file.name == PEFT_FILE or not file.with_name(PEFT_FILE).exists()):
        return _from_peft(read_json(config), repr(str(config)))
    origin = f"the header of {str(file)!r}"
    names = _ALPHAS if _puts_alpha_into_factors(header, keys) else (*_ALPHAS, _KOHYA_ALPHA)
    alpha = next((header[name] for name in names if header.get(name) not in (None, "None")), None)
    return Strength(
        origin,
        alpha=None if alpha is None else _number(alpha, "alpha", origin),
        rslora=_flag(header.get("use_rslora", header.get("rslora", False))),
    )


def _puts_alpha_into_factors(header: Mapping[str, str], keys: Collection[str]) -> bool:
    """Whether musubi-tuner's converter wrote the file, which keeps kohya's header unchanged."""
    return _KOHYA_ALPHA in header and any(
        key.startswith(("diffusion_model.", "transformer.")) and ".lora_A." in key for key in keys
    )


_PEFT_FIELDS = ("r", "lora_alpha", "alpha", "peft_type", "alpha_pattern", "use_rslora")


def _from_peft(options: Mapping[str, Any], origin: str) -> Strength:
    kind = str(options.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in _PEFT_TYPES:
        raise CheckpointError(
            f"{origin} describes an adapter of the type {kind}, which is not supported; expected "
            f"one of {', '.join(_PEFT_TYPES)}"
        )
    begun = str(options.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGED_BASES):
        raise CheckpointError(
            f"{origin} has init_lora_weights = {begun!r}: such a LoRA fits only the base whose "
            "weights were changed with it; convert it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    alpha = options.get("lora_alpha", options.get("alpha"))
    rank = options.get("r")
    return Strength(
        origin,
        alpha=None if alpha is None else _number(alpha, "lora_alpha", origin),
        rank=None if rank is None else _positive(rank, "r", origin),
        alphas=_pattern(options, "alpha_pattern", origin),
        ranks=_pattern(options, "rank_pattern", origin),
        rslora=_flag(options.get("use_rslora", False)),
    )


def _read_object(text: str, origin: str) -> dict[str, Any]:
    """Read a JSON object; if it has several components, return only the transformer's part."""
    try:
        document = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON ({error}); download it again") from error
    if not isinstance(document, dict):
        return {}
    if isinstance(document.get("transformer"), dict):
        document = document["transformer"]
    return {key.removeprefix("transformer."): value for key, value in document.items()}


def _pattern(options: Mapping[str, Any], name: str, origin: str) -> dict[str, float]:
    patterns = options.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{origin}: {name} must be an object, got {patterns!r:.80}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{origin}: {name} has an invalid pattern {pattern!r}") from error
    check = _positive if name == "rank_pattern" else _number
    return {pattern: check(value, name, origin) for pattern, value in patterns.items()}


def _matching(patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
    """Return the value of the first pattern that matches the end of a name, as in PEFT."""
    for pattern, value in patterns.items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
            return value
    return default


def _number(value: object, name: str, origin: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise CheckpointError(f"{origin}: {name} must be a finite number, got {value!r:.80}")
    return number


def _positive(value: object, name: str, origin: str) -> float:
    number = _number(value, name, origin)
    if number < 1 or number != int(number):
        raise CheckpointError(f"{origin}: {name} must be an integer above 0, got {value!r:.80}")
    return number


def _flag(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1")
