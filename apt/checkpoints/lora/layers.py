"""The arithmetic of adapters: the changes of weights that a file describes, and merging them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apt.errors import CheckpointError, InputError


class Layer(Protocol):
    """A change of one weight.

    Attributes:
        scale: alpha over rank, or the file's own value.
    """

    @property
    def scale(self) -> float: ...

    def delta(self) -> Tensor:
        """Return the change at strength 1: (out, ...) fp32, with as many values as the weight."""
        ...


@dataclass(frozen=True)
class LoRALayer:
    """`scale * up @ down` (Hu et al. 2022).

    Attributes:
        down: (rank, in), or (rank, in, *kernel) for a convolution.
        up: (out, rank), or (out, rank, 1, ...).
        scale: alpha over rank.
        mid: (rank, rank, *kernel) for a convolution whose `down` has no kernel; None otherwise.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    def delta(self) -> Tensor:
        """See `Layer`; in the shape of the weight."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.mid is not None:
            return _tucker(self.mid.float(), up.T, down) * self.scale
        change = (up @ down) * self.scale
        return change.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class LoHaLayer:
    """`scale * (a1 @ b1) * (a2 @ b2)`, element by element (Hyeon-Woo et al. 2022).

    Attributes:
        a1, a2: (out, rank), or (rank, out) with cores.
        b1, b2: (rank, in), with a kernel flattened into the second dimension; (rank, in) with
            cores.
        scale: alpha over rank.
        cores: two (rank, rank, *kernel) for a convolution; None otherwise.
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float = 1.0
    cores: tuple[Tensor, Tensor] | None = None

    def delta(self) -> Tensor:
        """See `Layer`."""
        a1, b1, a2, b2 = (part.float() for part in (self.a1, self.b1, self.a2, self.b2))
        if self.cores is None:
            return (a1 @ b1) * (a2 @ b2) * self.scale
        first, second = (core.float() for core in self.cores)
        return _tucker(first, a1, b1) * _tucker(second, a2, b2) * self.scale


@dataclass(frozen=True)
class LoKrLayer:
    """`scale * kron(w1, w2)` (Edalati et al. 2022; LyCORIS).

    Attributes:
        w1: a matrix, or two whose product it is.
        w2: a matrix or the weight of a convolution, or two matrices whose product it is.
        scale: alpha over rank.
        core: (rank, rank, *kernel) for a convolution, whose weight it forms with w2's two matrices,
            (rank, out) and (rank, in); None otherwise.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0
    core: Tensor | None = None

    def delta(self) -> Tensor:
        """See `Layer`."""
        w1 = _product(self.w1)
        w2 = (
            _product(self.w2)
            if self.core is None
            else _tucker(self.core.float(), self.w2[0].float(), self.w2[1].float())
        )
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
        return torch.kron(w1, w2.contiguous()) * self.scale


@dataclass(frozen=True)
class RowsOf:
    """The change of one of several weights that a file has as one, split along the outputs.

    Attributes:
        layer: the change of the whole.
        part, parts: part number `part`, from 0, of `parts` equal ones.
        swap_halves: swap the two halves of the whole first.
    """

    layer: Layer
    part: int
    parts: int
    swap_halves: bool

    @property
    def scale(self) -> float:
        """The scale of the whole."""
        return self.layer.scale

    def delta(self) -> Tensor:
        """See `Layer`."""
        return cut_rows(self.layer.delta(), self.parts, self.swap_halves)[self.part]


def cut_rows(value: Tensor, pieces: int, swap_halves: bool) -> tuple[Tensor, ...]:
    """Split a fused projection along its outputs, with halves in our order."""
    if pieces == 1 and not swap_halves:
        return (value,)
    if swap_halves:
        value = torch.cat(value.chunk(2)[::-1])
    return value.chunk(pieces)


def delta_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape of a layer's change, without computing it.

    Raises RuntimeError if its factors do not fit each other.
    """
    bare: Layer = _on_meta(layer)
    return tuple(bare.delta().shape)


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """Return the change of a weight by DoRA, in fp32: `m * V / |V| - W`, V = W + change.

    Liu et al. 2024.

    Args:
        weight: (out, ...), fp32.
        change: tensor of the same shape.
        magnitude: (out, 1) for norms of rows, (1, in) for norms of columns.
    """
    moved = (weight + change).flatten(1)
    if magnitude.shape[0] == 1 and moved.shape[0] != 1:
        columns = (weight + change).transpose(0, 1).flatten(1)
        moved_columns = columns * (magnitude.float().T / columns.norm(dim=1, keepdim=True))
        out = moved_columns.reshape(weight.shape[1], weight.shape[0], *weight.shape[2:])
        return out.transpose(0, 1) - weight
    moved = moved * (magnitude.float() / moved.norm(dim=1, keepdim=True))
    return moved.reshape(weight.shape) - weight


def magnitude_of(value: Tensor, rows: int, columns: int) -> Tensor | None:
    """Return a DoRA's norms as (out, 1) or (1, in); None if they match neither rows nor columns."""
    of_rows = value.ndim == 1 or value.shape[0] == rows
    # PEFT's norms for a convolution are along dimension 1.
    if value.numel() == rows and (of_rows or (value.ndim > 2 and rows != columns)):
        return value.reshape(rows, 1)
    if value.numel() == columns and value.ndim > 1 and value.shape[:2] == (1, columns):
        return value.reshape(1, columns)
    return None


@dataclass(frozen=True)
class LoRA:
    """The changes in a file, by the names of our modules.

    Attributes:
        layers: changes of weights, by module name.
        differences: full differences of parameters, by parameter name.
        magnitudes: DoRA's norms, (out, 1) or (1, in), by the name of a module in `layers`.
    """

    layers: Mapping[str, Layer]
    differences: dict[str, Tensor]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def merge_lora(model: nn.Module, lora: LoRA, *, scale: float = 1.0) -> None:
    """Add a LoRA to a model's weights, in place; a negative scale removes it (up to rounding).

    Sums are computed in fp32 and rounded once to the weight's dtype.

    Raises:
        InputError: for a scale that is not finite, or a negative one for a DoRA, whose change
            depends on the weights and cannot be removed in this way.
        CheckpointError: for a sum that is not finite in the weight's dtype; the model does not
            change.
    """
    if not math.isfinite(scale):
        raise InputError(f"the scale of a LoRA must be finite, got {scale}")
    if scale < 0 and lora.magnitudes:
        raise InputError(
            f"a DoRA cannot be removed, so its scale must not be negative, got {scale}; load the "
            "model again instead"
        )
    # Check all sums before storing the first, so that a failure leaves no half-merged model.
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
                    "model in a dtype with a wider range, such as bfloat16"
                )


class MergedWeights(Mapping[str, Tensor]):
    """A model's weights with adapters added; each sum is computed when it is accessed.

    Args:
        weights: weights by name; those of the model start with `prefix`.
        layers: adapters by module name, without the prefix.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], prefix: str, layers: Mapping[str, Layer]
    ) -> None:
        self._weights, self._prefix = weights, prefix
        self._lora = LoRA(layers, {})

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[self._prefix + name]
        if name.removesuffix(".weight") not in self._lora.layers:
            return value
        return _merged(value, name, self._lora, 1.0).to(value.dtype)

    def __iter__(self) -> Iterator[str]:
        names = (name for name in self._weights if name.startswith(self._prefix))
        return (name.removeprefix(self._prefix) for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _parameters(lora: LoRA) -> list[str]:
    """Return the names of the parameters that change, each once."""
    return list(dict.fromkeys([*(f"{name}.weight" for name in lora.layers), *lora.differences]))


def _merged(parameter: Tensor, name: str, lora: LoRA, scale: float) -> Tensor:
    """Return the new value of a parameter, in fp32."""
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


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    whole = factors[0].float()
    return whole if len(factors) == 1 else whole @ factors[1].float()


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Combine core (rank, rank, *kernel), up (rank, out), down (rank, in): (out, in, *kernel)."""
    return torch.einsum("ab...,ao,bi->oi...", core, up, down)


def _on_meta(value: Any) -> Any:
    """Return a tensor, a layer or a tuple of them on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, tuple):
        return tuple(map(_on_meta, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)
