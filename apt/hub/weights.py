"""Tensors in safetensors files, loaded strictly: every key accounted for, every value finite."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.errors import CheckpointError

_LISTED = 5
"""Keys named in a message before the rest is only counted."""

_MAX_HEADER = 100_000_000
"""What the safetensors library takes at most."""


def load_weights(path: str | Path, module: nn.Module) -> None:
    """Copy a safetensors file into a module, casting to its dtypes, on its devices.

    Raises:
        CheckpointError: if the file is missing, truncated or not safetensors, its keys and shapes
            are not exactly the module's (it is then untouched), or a value is not finite.
    """
    file = Path(path)
    check_safetensors(file)
    targets = module.state_dict(keep_vars=True)
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
            _check_keys(file, shapes, {key: tuple(t.shape) for key, t in targets.items()})
            with torch.no_grad():
                for key, target in targets.items():
                    value = stored.get_tensor(key)
                    _check_finite(str(file), key, value)
                    target.copy_(value)
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged ({error}); copy or download it again"
        ) from error


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError unless the file is safetensors and as long as its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header = stream.read(length) if length < min(size, _MAX_HEADER) else b""
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} is missing, though its model names it; copy the folder again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if start == b"version ":
        raise CheckpointError(f"{str(path)!r} is a Git LFS pointer; run `git lfs pull` to fetch it")
    pickled = f"{str(path)!r} is a pickle; only safetensors is read, as pickles can run code"
    if start[:4] == b"PK\x03\x04":
        raise CheckpointError(pickled)
    if size < 8 or (0 < length < _MAX_HEADER and len(header) < length):
        raise CheckpointError(
            f"{str(path)!r} is truncated: {size} bytes are not even its header; copy or download "
            "it again"
        )
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key[:2] != "__"]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        # Only now: 0x80 is also a possible first byte of a good file, whose header length it is.
        if start[:1] == b"\x80":
            raise CheckpointError(pickled) from error
        raise CheckpointError(
            f"{str(path)!r} is not a safetensors file, or its header is damaged"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"{str(path)!r} is {what}: it has {size} bytes, its header promises {expected}; copy "
            "or download it again"
        )


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as safetensors; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: for values that are not finite, before or after casting, or a disk that
            refuses. A file that was there before is then untouched.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        tensor = value.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        _check_finite(str(path), key, tensor)
        # Tensors that share memory are written as copies: a loader must find every key.
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={"format": "pt"})
        # safetensors >= 0.8 makes the file readable for its owner alone.
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_finite(path: str, key: str, value: Tensor) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"{path!r}: {bad} of {value.numel()} values of {key!r} are NaN or infinite in "
            f"{str(value.dtype).removeprefix('torch.')}; the training run diverged or the type is "
            "too narrow: use an earlier checkpoint or a wider type"
        )


def _check_keys(
    path: Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    reshaped = [
        f"{key} is {_shape(stored[key])}, expected {_shape(expected[key])}"
        for key in sorted(expected.keys() & stored.keys())
        if stored[key] != expected[key]
    ]
    if not (missing or unexpected or reshaped):
        return
    problems = [
        f"{len(items)} {label}: {listed(items)}"
        for label, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrongly shaped", reshaped),
        )
        if items
    ]
    guess = _guess(missing, unexpected, stored, expected)
    raise CheckpointError(
        f"{str(path)!r} does not fit the model that it is loaded into: {'; '.join(problems)}. "
        f"{guess}"
    )


def _guess(
    missing: list[str],
    unexpected: list[str],
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> str:
    """What the file probably is."""
    for prefix in _WRAPPER_PREFIXES:
        if {key.removeprefix(prefix): shape for key, shape in stored.items()} == dict(expected):
            return f"It fits once the prefix {prefix!r} is taken off its keys."
    for family, marks in _FAMILIES.items():
        if all(any(mark in key for key in stored) for mark in marks):
            return f"Its keys look like {family}; only this package's own folders load here."
    if not missing and not unexpected:
        return "The keys agree, so the config is of another size of the same model."
    pairs = [
        f"{key} (for {close[0]}?)"
        for key in unexpected[:_LISTED]
        if (close := difflib.get_close_matches(key, missing[:2000], n=1, cutoff=0.8))
    ]
    if pairs:
        return f"Similar names: {', '.join(pairs)}."
    return f"It shares {len(expected.keys() & stored.keys())} of {len(expected)} keys with it."


_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "transformer.")
"""What wrapping a module adds to its keys."""

_FAMILIES = {
    "diffusers' Wan transformer": ("condition_embedder.", ".attn1.to_q.", ".ffn.net."),
    "the original Wan layout": (".self_attn.", ".cross_attn.", "patch_embedding."),
    "diffusers' SD3 transformer": ("transformer_blocks.", "pos_embed.", ".add_q_proj."),
    "diffusers' FLUX transformer": ("single_transformer_blocks.", "transformer_blocks."),
    "the original SD3 layout": ("joint_blocks.", "x_embedder."),
    "a LoRA": (".lora_A.",),
    "a LoRA of another naming": (".lora_down.",),
    "an image or video autoencoder": ("encoder.", "decoder."),
    "a T5 or UMT5 text encoder": ("shared.weight", "encoder.block."),
}
"""Fragments of keys that all occur in a family's files."""


def listed(items: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
