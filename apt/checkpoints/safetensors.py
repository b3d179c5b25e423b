"""Safetensors on disk: headers read and checked, tensors mapped one at a time, scales applied.

A checkpoint is one file, or shards with an `.index.json` that says which key is where, as diffusers
and transformers write them. Weights of 8 bits have scales beside them:

    weight = stored number * scale

Spellings: ComfyUI's `NAME.scale_weight` with a marker `scaled_fp8`; its newer `NAME.weight_scale`
with `NAME.comfy_quant`, or with a description in the header; musubi-tuner's `NAME.scale_weight` for
rows and for parts of rows; LightX2V's `NAME.weight_scale` for the rows of fp8 or int8. Scales of
activations (`scale_input`, `input_scale`) are for 8-bit products and change no weight.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from apt.checkpoints.documents import read_document
from apt.checkpoints.source import INDEX_SUFFIX
from apt.errors import CheckpointError
from apt.untrusted import check_name, read_entries

_BEGINNINGS: dict[bytes, str] = {
    b"GGUF": "is a GGUF file, whose quantised blocks are not read here; use the safetensors file "
    "of the same model (bf16, fp16 or fp8)",
    b"<!doctype": "is a web page, not a model: the download was answered with a login or error "
    "page; download it again",
    b"<html": "is a web page, not a model: the download was answered with a login or error page; "
    "download it again",
}

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
"""Endings of keys that only this quantisation has; the first that occurs names it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        file, key: where it lies, and its name there.
        shape: of the tensor.
        dtype: as safetensors spells it: F32, BF16, F8_E4M3, I8, ...
        scale: what the stored numbers are to be multiplied with; None if they are the values.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    scale: StoredTensor | None = None

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are real numbers: stored so, or with a scale beside them."""
        return self.scale is not None or self.dtype.startswith(("F", "BF"))

    @contextmanager
    def mapped(self) -> Iterator[Tensor]:
        """The tensor as a view of the mapped file, valid inside the block alone; in fp32, and not a
        view, if it has a scale.

        The file is mapped anew each time: pages that were read would otherwise stay in the memory
        of this process until the last tensor is done, and loading would need twice the model.

        Raises CheckpointError if the file is damaged, or the scale does not fit.
        """
        try:
            with safe_open(self.file, framework="pt") as stored:
                value = stored.get_tensor(self.key)
                if self.scale is None:
                    yield value
                    return
                with self.scale.mapped() as scale:
                    yield self._scaled(value, scale)
        except SafetensorError as error:
            raise CheckpointError(
                f"{str(self.file)!r} is damaged ({error}); copy or download it again"
            ) from error

    def _scaled(self, value: Tensor, scale: Tensor) -> Tensor:
        """The values: a scale is for the whole tensor, for each row, or for equal parts of rows."""
        value, scale = value.float(), scale.float()
        if scale.numel() == 1:
            return value * scale.reshape(())
        rows, parts = scale.shape[0], scale[0].numel()
        if value.ndim < 2 or rows != value.shape[0] or value[0].numel() % parts:
            raise CheckpointError(
                f"{str(self.file)!r}: {self.key!r} is {tuple(value.shape)} and its scale "
                f"{tuple(scale.shape)}, expected one number, one for each row, or one for each of "
                "some equal parts of a row; use the bf16 or fp16 file of the same model"
            )
        return (value.reshape(rows, parts, -1) * scale.reshape(rows, parts, 1)).reshape(value.shape)


def read_stored(path: str | Path) -> dict[str, StoredTensor]:
    """What a checkpoint holds, by key: `path` is a .safetensors file or an index of shards.

    Raises:
        CheckpointError: a file that is missing, truncated or not safetensors; an index that does
            not agree with its shards.
    """
    path = Path(path)
    _check_file_kind(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    return read_header(path)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError; see `read_entries`."""
    entries = read_entries(path)
    return {
        key: StoredTensor(path, key, tuple(e["shape"]), e["dtype"]) for key, e in entries.items()
    }


def _check_file_kind(path: Path) -> None:
    """Raise CheckpointError for a file of a known other kind. What cannot be read passes: reading
    it says why."""
    try:
        with path.open("rb") as stream:
            start = stream.read(16).lstrip()
    except OSError:
        return
    for beginning, kind in _BEGINNINGS.items():
        if start[: len(beginning)].lower() == beginning.lower():
            raise CheckpointError(f"{str(path)!r} {kind}")


def shard_names(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: the file beside it that each key is in.

    Raises CheckpointError if there is none, or it names another place.
    """
    weight_map = read_document(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{str(index)!r} has no weight_map of keys to files beside it")
    for name in weight_map.values():
        try:
            if "/" in check_name(name):
                raise ValueError(f"{name!r} is in another folder")
        except ValueError as error:
            raise CheckpointError(
                f"the weight_map of {str(index)!r} names a file that is not beside it: {error}; "
                "take the checkpoint from its author again"
            ) from error
    return dict(weight_map)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = shard_names(index)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = read_header(index.parent / name)
        listed = {key for key, file in weight_map.items() if file == name}
        if listed != shard.keys():
            odd = sorted(listed ^ shard.keys())
            raise CheckpointError(
                f"{str(index)!r} does not agree with its shard {name!r} on {len(odd)} keys, such "
                f"as {odd[0]!r}; the files are of different checkpoints, download them again"
            )
        stored.update(shard)
    return stored


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a model, each of 8 bits with its scale; what is no weight is left out.

    Args:
        stored: of one model, without the prefix of an all-in-one file.

    Raises:
        CheckpointError: another quantisation, by its name; a scale of no weight.
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
                f"{str(scale.file)!r} has {scale.key!r} and no {key!r} that it could be a scale "
                "of; download it again"
            )
        if not scale.dtype.startswith(("F", "BF")) or scale.dtype.startswith(("F8", "F4")):
            raise _unreadable(scale.file, scale.key, f"scales in {scale.dtype} (such as MXFP8)")
        weights[key] = dataclasses.replace(weights[key], scale=scale)
    return weights


def _check_descriptions(stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if ComfyUI's descriptions of layers name what cannot be read."""
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
        raise CheckpointError(f"{str(file)!r}: the quantisation of {name!r} is no JSON object")
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
        f"{str(file)!r} is quantised: {name} (see {key!r}), which is not read here; fp8 and int8 "
        "with one scale for a tensor or row are: use such a file, or the bf16 or fp16 file of the "
        "same model"
    )
