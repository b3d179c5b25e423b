"""Tensors between files and modules: every key accounted for, every value finite."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apt.checkpoints.safetensors import StoredTensor, read_stored
from apt.distributed.tensors import local
from apt.errors import LISTED, CheckpointError, listed
from apt.files import write_safetensors

Shapes = Mapping[str, tuple[int, ...]]
Marks = Mapping[str, Sequence[str]]
"""Names of families, each with fragments of keys that all occur in its files."""


@dataclass(frozen=True)
class Piece:
    """A tensor of a module, as a part of a stored one.

    Attributes:
        stored: where it lies.
        part, parts: it is part number `part`, from 0, of `parts` equal ones along dimension 0.
        swap_halves: the two halves along dimension 0 trade places.
        rows: slices of what that gives, one after the other; empty takes all.
    """

    stored: StoredTensor
    part: int = 0
    parts: int = 1
    swap_halves: bool = False
    rows: tuple[slice, ...] = ()

    def __hash__(self) -> int:
        return hash((self.stored.file, self.stored.key, self.part, self.parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part. A tensor that cannot be cut keeps its own, which then fits nothing."""
        shape = self.stored.shape
        if self.parts == 1 or not shape or shape[0] % self.parts:
            return shape
        return (shape[0] // self.parts, *shape[1:])

    def take(self, whole: Tensor) -> Tensor:
        """The part of the stored tensor."""
        part = whole if self.parts == 1 else whole.chunk(self.parts)[self.part]
        if self.swap_halves:
            part = torch.cat(part.chunk(2)[::-1])
        return torch.cat([part[rows] for rows in self.rows]) if self.rows else part


def load_weights(
    path: str | Path, module: nn.Module, *, device: torch.device | str = "cpu"
) -> None:
    """Copy a safetensors file, or the shards of an index, into a module; see `fill`.

    Args:
        path: of the file or the index.
        module: whose state is named as in the file.
        device: for what is on the meta device.

    Raises:
        CheckpointError: if a file is missing, truncated or not safetensors, its keys and shapes
            are not exactly the module's (it is then untouched), or a value is not finite.
    """
    pieces = {key: Piece(stored) for key, stored in read_stored(path).items()}
    fill(module, pieces, source=str(path), device=device)


def fill(
    module: nn.Module,
    pieces: Mapping[str, Piece],
    *,
    source: str,
    device: torch.device | str = "cpu",
    marks: Marks | None = None,
) -> None:
    """Copy stored tensors into a module, one at a time, casting to its dtypes.

    Parameters and buffers on the meta device are made on `device`; others stay where they are. At
    no time is there more in memory than the module and one tensor.

    Raises:
        CheckpointError: if the keys and shapes are not exactly the module's (it is then
            untouched), or a value is not finite.
    """
    check_fit(module, pieces, source=source, marks=marks)
    with torch.no_grad():
        for key, target in module.state_dict(keep_vars=True).items():
            if target.is_meta:
                owner, _, name = key.rpartition(".")
                target = put_empty(module.get_submodule(owner), name, device)
            copy_piece(pieces[key], target)


def check_fit(
    module: nn.Module, pieces: Mapping[str, Piece], *, source: str, marks: Marks | None = None
) -> None:
    """Raise CheckpointError unless `fill` could copy the pieces into the module."""
    targets = module.state_dict(keep_vars=True)
    _check_keys(
        source,
        {key: piece.shape for key, piece in pieces.items()},
        {key: tuple(target.shape) for key, target in targets.items()},
        marks or {},
    )
    for key, target in targets.items():
        stored = pieces[key].stored
        if target.is_floating_point() and not stored.is_floating_point:
            raise CheckpointError(
                f"{str(stored.file)!r}: {stored.key!r} is {stored.dtype} and no scale lies beside "
                "it: it is quantised in a way that is not known here; use the bf16 or fp16 file of "
                "the same model"
            )


def copy_piece(piece: Piece, target: Tensor, rows: slice | None = None) -> None:
    """Copy a stored tensor into one of a module, casting to its dtype.

    Args:
        target: sharded or not, on any device.
        rows: which of the whole a sharded target has on this rank; None if it is not sharded.

    Raises CheckpointError for values that are not finite.
    """
    target, file, key = local(target.detach()), str(piece.stored.file), piece.stored.key
    with piece.stored.mapped() as whole:
        value = piece.take(whole)
        value = value if rows is None else value[rows]
        check_finite(file, key, value)
        target.copy_(value)
        if target.dtype == torch.float16 and value.dtype != torch.float16:
            # The only type here whose range is narrower than that of files.
            check_finite(file, key, target)


def put_empty(owner: nn.Module, name: str, device: torch.device | str) -> Tensor:
    """Put an empty tensor on `device` in the place of one of a module on the meta device."""
    old = getattr(owner, name)
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(owner, name, new)
    return new


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as safetensors; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: for values that are not finite, before or after casting, or a disk that
            refuses. A file that was there before is then untouched.
    """
    save_tensors(path, module.state_dict(), dtype)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors as one safetensors file, one after the other; see `save_weights`.

    `like` has the names, shapes and types of `tensors`, on any device, if those are costly to make:
    each is then asked for once.
    """

    def ready(key: str) -> Tensor:
        tensor = cast_type(tensors[key].detach().cpu(), dtype)
        check_finite(str(path), key, tensor)
        return tensor

    kinds = {
        key: cast_type(torch.empty_like(value, device="meta"), dtype)
        for key, value in (tensors if like is None else like).items()
    }
    try:
        write_safetensors(path, kinds, value=ready)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {error.strerror or error}; free some space or choose "
            "another folder"
        ) from error


def cast_type(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it goes into a file: floating-point numbers in `dtype`, unless that is None."""
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def check_finite(path: str, key: str, value: Tensor) -> None:
    """Raise CheckpointError that names the tensor if a value is NaN or infinite."""
    if not value.is_floating_point() or not value.numel():
        return
    if value.element_size() == 1:
        # Types of 8 bits have hardly any operations.
        value = value.float()
    # NaN passes through both, and neither needs memory: temporary copies leave holes in the heap
    # that the small tensors after them keep open.
    low, high = torch.aminmax(value)
    if not math.isfinite(low) or not math.isfinite(high):
        bad = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"{path!r}: {bad} of {value.numel()} values of {key!r} are NaN or infinite in "
            f"{str(value.dtype).removeprefix('torch.')}; the training run diverged or the type is "
            "too narrow: use an earlier checkpoint or a wider type"
        )


def _check_keys(source: str, stored: Shapes, expected: Shapes, marks: Marks) -> None:
    """Raise CheckpointError unless `stored` has exactly the keys and shapes of `expected`.

    Args:
        source: where the tensors come from, for the message.
        stored, expected: shapes by key.
        marks: of the families that a foreign checkpoint may belong to.
    """
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
    guess = _guess(missing, unexpected, stored, expected, marks)
    raise CheckpointError(
        f"{source!r} does not fit the model that it is loaded into: {'; '.join(problems)}. {guess}"
    )


def looks_like(keys: Collection[str], marks: Marks) -> str | None:
    """What a checkpoint with these keys probably is: a family of `marks`, or a known other kind."""
    for name, fragments in (*_ADAPTERS, *marks.items(), *_OTHERS):
        if fragments and all(any(fragment in key for key in keys) for fragment in fragments):
            return name
    return None


def _guess(
    missing: list[str], unexpected: list[str], stored: Shapes, expected: Shapes, marks: Marks
) -> str:
    for prefix in _WRAPPER_PREFIXES:
        if {key.removeprefix(prefix): shape for key, shape in stored.items()} == dict(expected):
            return f"It fits once the prefix {prefix!r} is taken off its keys."
    if not missing and not unexpected:
        return "The keys agree, so the config is of another size of the same model."
    family = looks_like(stored.keys(), marks)
    if family is not None and family != looks_like(expected.keys(), marks):
        return f"Its keys look like {family}; load it as that."
    pairs = [
        f"{key} (for {close[0]}?)"
        for key in unexpected[:LISTED]
        if (close := difflib.get_close_matches(key, missing[:2000], n=1, cutoff=0.8))
    ]
    if pairs:
        return f"Similar names: {', '.join(pairs)}."
    return f"It shares {len(expected.keys() & stored.keys())} of {len(expected)} keys with it."


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "transformer.")
"""What wrapping a module adds to its keys."""

_ADAPTERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoKr adapter, not a whole model", (".lokr_w",)),
    ("a LoHa adapter, not a whole model", (".hada_w",)),
    ("a LoRA, not a whole model", (".lora_A.",)),
    ("a LoRA of another naming, not a whole model", (".lora_down.",)),
    ("a LoRA of an old naming, not a whole model", ("lora.down.",)),
    ("differences from a model (a LoRA cut from a fine-tune), not a whole model", (".diff_b",)),
)
"""They change a model, and their keys have the marks of its family."""

_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a ControlNet, which guides a model and is none itself", ("controlnet_blocks.",)),
    ("a ControlNet, which guides a model and is none itself", ("control_model.",)),
    ("an IP-Adapter, which adds to a model and is none itself", ("image_proj.", "to_k_ip")),
    ("an IP-Adapter, which adds to a model and is none itself", ("image_proj.", "ip_adapter.")),
    ("the module that makes a Wan a VACE, without the Wan", ("vace_blocks.",)),
    (
        "FLUX or another model of two kinds of blocks, which this package has no model of",
        ("double_blocks.", "single_blocks."),
    ),
    (
        "FLUX, which this package has no model of",
        ("single_transformer_blocks.", "transformer_blocks."),
    ),
    ("a T5 or UMT5 text encoder", ("shared.weight", "encoder.block.")),
    ("a T5 or UMT5 text encoder", ("encoder.block.", ".SelfAttention.")),
    ("a UMT5 text encoder in the layout of Wan's authors", ("token_embedding.", ".ffn.gate.")),
    ("a CLIP text encoder", ("text_model.encoder.layers.",)),
    ("a CLIP text encoder", ("transformer.resblocks.", "token_embedding.")),
    ("an image encoder (CLIP or SigLIP)", ("vision_model.encoder.",)),
    ("an image encoder (CLIP), as image-to-video models use it", ("visual.transformer.",)),
    ("an image or video autoencoder (VAE)", ("encoder.", "decoder.")),
    ("the decoder of an image or video autoencoder (VAE)", ("decoder.", "up_blocks.")),
    ("a U-Net such as Stable Diffusion 1.5 or XL", ("input_blocks.", "output_blocks.")),
    ("a U-Net such as Stable Diffusion 1.5 or XL", ("down_blocks.", "up_blocks.")),
)
"""Kinds of checkpoints that are no family of ours: each with fragments that all occur."""
