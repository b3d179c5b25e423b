"""LoRA files in the spellings that people have: read, merge into a model, and write.

    W <- W + strength * change

The change is a LoRA's, a LoHa's or a LoKr's (`apt.models.lora_layers`), with DoRA's norms if there
are any, or a whole difference (`.diff`, `.diff_b`, `.diff_m`). Spellings: diffusers and peft
(`transformer.NAME.lora_A.weight`), ComfyUI and the original Wan repositories
(`diffusion_model.NAME.lora_down.weight`, NAME in the authors' layout), kohya (`lora_unet_NAME` with
underscores for dots), LyCORIS; see `apt.models.lora_keys`, and `apt.models.lora_strength` for
where alpha is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from apt.errors import CheckpointError, InputError
from apt.hub import download
from apt.hub.folders import split_hub_id
from apt.hub.mismatch import listed
from apt.hub.stored import read_stored
from apt.hub.weights import check_finite, save_tensors
from apt.models.families import Family
from apt.models.layouts import family_of
from apt.models.lora_assembly import LoRA, assemble
from apt.models.lora_keys import KIND_OF_PART, Names, split_key
from apt.models.lora_layers import LoRALayer, decomposed
from apt.models.lora_strength import CONFIG_FILE, PEFT_FILE, read_strength
from apt.models.lora_unknown import describe_unknown

LORA_FILE = "pytorch_lora_weights.safetensors"

__all__ = [
    "LORA_FILE",
    "LoRA",
    "LoRALayer",
    "find_lora",
    "merge_lora",
    "read_lora",
    "save_lora",
]


def read_lora(path: str | Path, model: nn.Module, family: Family | None = None) -> LoRA:
    """Read a LoRA of a model.

    Args:
        path: a safetensors file, or a folder with one; see `find_lora`.
        model: the backbone that it belongs to.
        family: the model's, for files in its authors' names; None finds it by the config.

    Raises:
        CheckpointError: no such file, a damaged one, values that are not finite, keys that belong
            to nothing in the model, or shapes that do not fit it. Nothing is changed, and nothing
            is left out.
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
                "floating-point numbers; a quantised LoRA is not read"
            )
        if part is None or not names.find(name, KIND_OF_PART.get(part, "weight"))[0]:
            unknown.append(key)
        elif part in parts.setdefault(name, {}):
            raise CheckpointError(
                f"{str(file)!r} has {part!r} of {name!r} twice: it holds several adapters; save "
                "one of them alone"
            )
        else:
            parts[name][part] = value
    if unknown:
        raise CheckpointError(describe_unknown(file, unknown, len(tensors), family))
    if not parts:
        raise CheckpointError(
            f"{str(file)!r} holds no LoRA; expected keys such as NAME.lora_A.weight"
        )
    strength = read_strength(file, header, tensors.keys())
    return assemble(file, parts, names, strength, model)


@torch.no_grad()
def merge_lora(model: nn.Module, lora: LoRA, *, scale: float = 1.0) -> None:
    """Add a LoRA to a model's weights, in place; a negative scale takes it off (to rounding).

    Sums are made in fp32 and rounded once to the weight's type.

    Raises:
        InputError: a scale that is not finite, or a negative one of a DoRA, whose change depends on
            the weights and is not taken off by it.
        CheckpointError: a sum that is not finite in the weight's type. The model is as it was.
    """
    if not math.isfinite(scale):
        raise InputError(f"the scale of a LoRA must be finite, got {scale}")
    if scale < 0 and lora.magnitudes:
        raise InputError(
            f"a DoRA cannot be taken off again, so its scale must not be negative, got {scale}; "
            "load the model anew"
        )
    # All sums are looked at before the first is kept: half a LoRA would be a model of nobody.
    for keep in (False, True):
        for name in _parameters(lora):
            parameter = model.get_parameter(name)
            value = _merged(parameter, name, lora, scale).to(parameter.dtype)
            if keep:
                parameter.copy_(value)
            elif not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"with the LoRA at scale {scale:g}, values of {name!r} are NaN or infinite in "
                    f"{str(parameter.dtype).removeprefix('torch.')}; lower the scale, or load the "
                    "model in a type of a wider range, such as bfloat16"
                )


def _parameters(lora: LoRA) -> list[str]:
    """Names of the parameters that change, each once."""
    return list(dict.fromkeys([*(f"{name}.weight" for name in lora.layers), *lora.differences]))


def _merged(parameter: Tensor, name: str, lora: LoRA, scale: float) -> Tensor:
    """The new value of a parameter, in fp32."""
    weight = parameter.float()
    value = weight
    module = name.removesuffix(".weight")
    layer = lora.layers.get(module) if module != name else None
    if layer is not None:
        change = layer.delta().to(parameter.device).reshape(parameter.shape)
        if module in lora.magnitudes:
            change = decomposed(weight, change, lora.magnitudes[module].to(parameter.device))
        value = value + scale * change
    if name in lora.differences:
        value = value + scale * lora.differences[name].to(parameter.device, torch.float32)
    return value


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


def find_lora(name: str | Path) -> Path:
    """The file of a LoRA: a file, a folder that has one, or a Hub repository of one.

    In a folder it is diffusers' or PEFT's file, or else the only safetensors file.

    Raises CheckpointError if there is none, or several to choose from.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    hub_id = None if path.is_dir() or path.suffix == ".safetensors" else split_hub_id(str(name))
    if hub_id is not None:
        path = download(*hub_id, [LORA_FILE, PEFT_FILE, CONFIG_FILE])
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
            f"{str(folder)!r} holds several files ({listed(file.name for file in found)}); name one"
        )
    raise CheckpointError(
        f"there is no LoRA in {str(folder)!r}: expected {LORA_FILE}, {PEFT_FILE} or one other "
        ".safetensors file"
    )
