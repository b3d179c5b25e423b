"""LoRA files in the spellings that people have: read, merge into a model, and write.

    W <- W + scale * (alpha / rank) * up @ down                 (Hu et al. 2022)

Spellings: diffusers and peft (`transformer.NAME.lora_A.weight`), ComfyUI and the original Wan
repositories (`diffusion_model.NAME.lora_down.weight`, NAME in the authors' layout), kohya
(`lora_unet_NAME` with underscores for dots). `.diff` and `.diff_b` are whole differences of a
weight or bias.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from apt.errors import CheckpointError, InputError
from apt.hub import check_safetensors, download
from apt.hub.folders import split_hub_id
from apt.hub.mismatch import listed
from apt.hub.weights import save_tensors
from apt.models.families import FAMILIES, Family, KeyRule
from apt.models.layouts import family_of

LORA_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
)
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
}


@dataclass(frozen=True)
class LoRALayer:
    """A change of one weight: `scale * up @ down`.

    Attributes:
        down: (rank, in), or (rank, in, *kernel) of a convolution.
        up: (out, rank), or (out, rank, 1, ...).
        scale: alpha over rank.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def delta(self) -> Tensor:
        """The change in fp32, in the shape of the weight, at scale 1."""
        rank = self.down.shape[0]
        change = self.up.float().reshape(-1, rank) @ self.down.float().reshape(rank, -1)
        return (change * self.scale).reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class LoRA:
    """What a file changes, in the names of our modules.

    Attributes:
        layers: by module name.
        differences: whole changes of parameters, by parameter name.
    """

    layers: dict[str, LoRALayer]
    differences: dict[str, Tensor]


def read_lora(path: str | Path, model: nn.Module, family: Family | None = None) -> LoRA:
    """Read a LoRA of a model.

    Args:
        path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
        model: the backbone that it belongs to.
        family: the model's, for files in its authors' names; None finds it by the config.

    Raises:
        CheckpointError: no such file, a damaged one, keys that belong to nothing in the model, or
            shapes that do not fit it. Nothing is changed, and nothing is left out.
    """
    file = Path(path)
    if file.is_dir():
        file = file / LORA_FILE
    check_safetensors(file)
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        metadata = json.loads((stored.metadata() or {}).get(_METADATA, "{}"))
    if family is None:
        family = family_of(model.config)
    names = _Names(model, () if family is None else family.rules_for(model.config))
    parts: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        name, part = _split(key)
        if part is None or not names.find(name, "bias" if part == "bias" else "weight")[0]:
            unknown.append(key)
        else:
            parts.setdefault(name, {})[part] = value
    if unknown:
        raise CheckpointError(_describe_unknown(file, unknown, len(tensors), family))
    if not parts:
        raise CheckpointError(
            f"{str(file)!r} holds no LoRA; expected keys such as NAME.lora_A.weight"
        )
    lora = _assemble(file, parts, names, metadata)
    _check_shapes(file, lora, model)
    return lora


@torch.no_grad()
def merge_lora(model: nn.Module, lora: LoRA, *, scale: float = 1.0) -> None:
    """Add a LoRA to a model's weights, in place; a negative scale takes it off (to rounding).

    Sums are made in fp32 and rounded once to the weight's type.

    Raises InputError for a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise InputError(f"the scale of a LoRA must be finite, got {scale}")
    for name, change in _changes(lora):
        parameter = model.get_parameter(name)
        moved = change.to(parameter.device, torch.float32)
        parameter.copy_(parameter.float() + scale * moved)


def save_lora(folder: str | Path, layers: Mapping[str, LoRALayer]) -> Path:
    """Write `pytorch_lora_weights.safetensors` as diffusers names it; returns the file.

    Raises:
        CheckpointError: values that are not finite, or a disk that refuses.
    """
    file = Path(folder) / LORA_FILE
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        # The scale goes into the weights: loaders disagree on where alpha is.
        up = layer.up if layer.scale == 1 else layer.up * layer.scale
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(file)!r}: {error.strerror or error}") from error
    save_tensors(file, tensors)
    return file


class _Names:
    """Finds our parameters by the names that LoRA files use."""

    def __init__(self, model: nn.Module, rules: Iterable[KeyRule]) -> None:
        self._ours = {name for name, _ in model.named_parameters()}
        self._flat = {name.replace(".", "_"): name for name in self._ours}
        self._rules = list(rules)

    def find(self, name: str, kind: str) -> tuple[list[str], KeyRule | None]:
        """Our parameters for a module's name in a file, and the rule that cuts them, if one does.

        An empty list: it is nothing of this model.
        """
        key = f"{name}.{kind}"
        if key in self._ours:
            return [key], None
        flat = self._flat.get(key.replace(".", "_"))
        if flat is not None and "." not in name:
            return [flat], None
        for rule in self._rules:
            found = rule.match(key)
            if found is None and "." not in name:
                found = _match_flat(rule, f"{name}_{kind}")
            if found is not None and all(ours in self._ours for ours in found):
                return list(found), rule
        return [], None


def _match_flat(rule: KeyRule, key: str) -> tuple[str, ...] | None:
    """As `rule.match`, for keys with underscores in place of dots."""
    found = re.fullmatch(rule.theirs.replace(r"\.", "_"), key)
    return None if found is None else tuple(found.expand(ours) for ours in rule.ours)


def _split(key: str) -> tuple[str, str | None]:
    """The module's name in a key without its prefix, and which part of the LoRA it is."""
    part = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
    name = key if part is None else key.removesuffix(part)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name, None if part is None else _PARTS[part]


def _assemble(
    file: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    names: _Names,
    metadata: Mapping[str, Any],
) -> LoRA:
    layers: dict[str, LoRALayer] = {}
    differences: dict[str, Tensor] = {}
    for name, found in parts.items():
        for kind in ("weight", "bias"):
            if kind in found:
                ours, rule = names.find(name, kind)
                differences |= dict(zip(ours, _cut(found[kind], len(ours), rule), strict=True))
        present = found.keys() & {"down", "up"}
        if present == {"down", "up"}:
            ours, rule = names.find(name, "weight")
            scale = _scale(name, found, metadata)
            for key, up in zip(ours, _cut(found["up"], len(ours), rule), strict=True):
                layers[key.removesuffix(".weight")] = LoRALayer(found["down"], up, scale)
        elif present or "alpha" in found:
            raise CheckpointError(
                f"{str(file)!r} is incomplete: {name!r} has only {listed(sorted(found))} of a LoRA"
            )
    return LoRA(layers, differences)


def _scale(name: str, found: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> float:
    """Alpha over rank; alpha is the rank where the file does not tell."""
    rank = found["down"].shape[0]
    if "alpha" in found:
        return float(found["alpha"]) / rank
    options = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    alpha = options.get("alpha_pattern", {}).get(name, options.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _cut(value: Tensor, pieces: int, rule: KeyRule | None) -> tuple[Tensor, ...]:
    """The parts of a fused projection along its outputs, in our order of halves."""
    if rule is not None and rule.swap_halves:
        value = torch.cat(value.chunk(2)[::-1])
    return value.chunk(pieces)


def _changes(lora: LoRA) -> Iterator[tuple[str, Tensor]]:
    for name, layer in lora.layers.items():
        yield f"{name}.weight", layer.delta()
    yield from lora.differences.items()


def _check_shapes(file: Path, lora: LoRA, model: nn.Module) -> None:
    wrong = []
    for name, layer in lora.layers.items():
        shape = (layer.up.shape[0], *layer.down.shape[1:])
        expected = tuple(model.get_parameter(f"{name}.weight").shape)
        rank = layer.up.shape[1] if layer.up.ndim > 1 else 0
        if shape != expected or rank != layer.down.shape[0]:
            wrong.append(f"{name} is for {shape} of rank {rank}, the model has {expected}")
    for name, difference in lora.differences.items():
        expected = tuple(model.get_parameter(name).shape)
        if tuple(difference.shape) != expected:
            wrong.append(f"{name} is {tuple(difference.shape)}, the model has {expected}")
    if wrong:
        raise CheckpointError(
            f"{str(file)!r} does not fit the model: {listed(wrong)}; it is a LoRA of another size "
            "of this family"
        )


def _describe_unknown(file: Path, unknown: list[str], total: int, family: Family | None) -> str:
    start = (
        f"{str(file)!r}: {len(unknown)} of {total} keys belong to nothing in this model: "
        f"{listed(unknown)}"
    )
    if any(key.startswith(("lora_te", "text_encoder")) for key in unknown):
        return f"{start}; it also changes the text encoder, which is not supported"
    if any("dora_scale" in key or "magnitude" in key for key in unknown):
        return f"{start}; it is a DoRA, which is not supported"
    mine = "" if family is None else family.name
    for name in FAMILIES.names():
        other = FAMILIES.get(name)()
        rules = other.rules_for(other.config_class())
        keys = [f"{_split(key)[0]}.weight" for key in unknown]
        if name != mine and any(rule.match(key) for key in keys for rule in rules):
            return f"{start}; its names are those of the family {name!r}"
    return f"{start}; it is a LoRA of another model"


def find_lora(name: str | Path) -> Path:
    """The file of a LoRA: a file, a folder that has one, or a Hub repository of one.

    Raises CheckpointError if there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    hub_id = None if path.is_dir() or path.suffix == ".safetensors" else split_hub_id(str(name))
    if hub_id is not None:
        path = download(*hub_id, [LORA_FILE])
    if not (path / LORA_FILE).is_file():
        raise CheckpointError(
            f"there is no LoRA {str(name)!r}: expected a .safetensors file, or a folder or Hub "
            f"repository with {LORA_FILE}"
        )
    return path / LORA_FILE
