"""8-bit weights and their scales.

    weight = stored number * scale

These formats are read: ComfyUI's `NAME.scale_weight` with a marker `scaled_fp8`; its newer
`NAME.weight_scale` with `NAME.comfy_quant`, or with a description in the header; musubi-tuner's
`NAME.scale_weight` for rows and parts of rows; LightX2V's `NAME.weight_scale` for rows in fp8 or
int8. Scales of activations (`scale_input`, `input_scale`) are for 8-bit products and do not change
weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from apt.checkpoints.reading import StoredTensor
from apt.errors import CheckpointError

_SCALES = ("scale_weight", "weight_scale")
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_SCALED_MARKER = "scaled_fp8"
_DESCRIPTION = ".comfy_quant"
_HEADER_ENTRY = "_quantization_metadata"

_READABLE = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")

_OTHER_QUANTISATIONS: dict[str, str] = {
    ".wscales": "Nunchaku (SVDQuant)",
    ".smooth_factor": "Nunchaku (SVDQuant)",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes (fp4)",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes (int8)",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ, AWQ or Nunchaku",
    ".weight_scale_2": "NVFP4",
    ".weight_scale_inv": "fp8 in blocks",
    "._data": "optimum-quanto",
    ".weight_codebook": "4 bits with a codebook",
}
"""Other quantisations, by a suffix of their keys; the first that occurs counts."""


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the weights of a model, 8-bit ones with their scales, without any other tensors.

    Args:
        stored: tensors of one model, without the prefix of an all-in-one file.

    Raises:
        CheckpointError: for another quantisation, which it names, or a scale without a weight.
    """
    for ending, name in _OTHER_QUANTISATIONS.items():
        for key, tensor in stored.items():
            if key.endswith(ending):
                raise _unreadable(tensor.file, key, name)
    _check_descriptions(stored)
    weights: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        module, _, part = key.rpartition(".")
        if part in _SCALES:
            scales[f"{module}.weight"] = tensor
        elif key != _SCALED_MARKER and not key.endswith((*_OF_ACTIVATIONS, _DESCRIPTION)):
            weights[key] = tensor
    for key, scale in scales.items():
        if key not in weights:
            raise CheckpointError(
                f"{str(scale.file)!r} has the scale {scale.key!r}, but not its weight {key!r}; "
                "download it again"
            )
        if not scale.dtype.startswith(("F", "BF")) or scale.dtype.startswith(("F8", "F4")):
            raise _unreadable(scale.file, scale.key, f"scales in {scale.dtype} (such as MXFP8)")
        weights[key] = dataclasses.replace(weights[key], scale=scale)
    return weights


def _check_descriptions(stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if ComfyUI's descriptions of layers name another quantisation."""
    # A header also describes the other models of an all-in-one file.
    ours = {*stored, *(tensor.key for tensor in stored.values())}
    for file in {tensor.file for tensor in stored.values()}:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_HEADER_ENTRY)
        whole = {} if text is None else _parse_json(file, _HEADER_ENTRY, text)
        layers = whole.get("layers") if isinstance(whole, dict) else None
        for name, description in (layers if isinstance(layers, dict) else {}).items():
            if f"{name}.weight" in ours:
                _check_description(file, name, description)
    for key, tensor in stored.items():
        if key.endswith(_DESCRIPTION):
            with tensor.mapped() as characters:
                text = bytes(characters.flatten().tolist()).decode("utf-8", "replace")
            _check_description(tensor.file, key, _parse_json(tensor.file, key, text))


def _check_description(file: Path, name: str, description: object) -> None:
    options = {"format": description} if isinstance(description, str) else description
    if not isinstance(options, dict):
        raise CheckpointError(
            f"{str(file)!r}: the description of the quantisation of {name!r} must be a JSON "
            "object; download it again"
        )
    nested = options.get("params")
    rotated = options.get("convrot") or (isinstance(nested, dict) and nested.get("convrot"))
    if options.get("format") not in _READABLE or rotated:
        shown = f"{options.get('format')}{' with rotated channels (ConvRot)' if rotated else ''}"
        raise _unreadable(file, name, shown)


def _parse_json(file: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file)!r}: {name!r} is not valid JSON ({error}); download it again"
        ) from error


def _unreadable(file: Path, key: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{str(file)!r} is quantised: {name} (see {key!r}), which is not supported; use the bf16 "
        "or fp16 file of the same model, or one in fp8 or int8 with one scale per tensor or row"
    )
