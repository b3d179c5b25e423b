"""Assembly of adapters from the parts in a file, with checks against the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from apt.checkpoints.lora.keys import KIND_OF_PART, Kind, Names, bare_names
from apt.checkpoints.lora.layers import (
    Layer,
    LoHaLayer,
    LoKrLayer,
    LoRA,
    LoRALayer,
    RowsOf,
    cut_rows,
    delta_shape,
    magnitude_of,
)
from apt.errors import CheckpointError, listed

Scale = Callable[[str, int | None, Tensor | None], float]


def assemble(
    file: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    names: Names,
    scale: Scale,
    model: nn.Module,
) -> LoRA:
    """Assemble an adapter from its parts.

    Args:
        file: the file, for messages.
        parts: tensors by module name in the file, and by part.
        names: finds the modules in the model.
        scale: returns the factor of a layer's change, given its name in the file, the rank of its
            factors, and their alpha tensor.
        model: the model that the adapter is for.

    Raises:
        CheckpointError: for missing parts, a weight that is changed twice, or shapes that do not
            fit each other or the model.
    """
    lora = _Assembly(file, names, scale).assemble(parts)
    _check_shapes(file, lora, model)
    return lora


class _Assembly:
    """Assembles the parts in a file."""

    def __init__(self, file: Path, names: Names, scale: Scale) -> None:
        self._file, self._names, self._scale = file, names, scale
        self._layers: dict[str, Layer] = {}
        self._differences: dict[str, Tensor] = {}
        self._magnitudes: dict[str, Tensor] = {}

    def assemble(self, parts: Mapping[str, Mapping[str, Tensor]]) -> LoRA:
        """Raise CheckpointError for missing parts, or a weight that is changed twice."""
        for name, found in parts.items():
            for part in ("weight", "bias", "modulation"):
                if part in found:
                    self._add_difference(name, KIND_OF_PART.get(part, "weight"), found[part])
            if found.keys() - {"weight", "bias", "modulation", "alpha"}:
                self._add_layer(name, found)
            elif found.keys() == {"alpha"}:
                raise self._incomplete(name, found)
        return LoRA(self._layers, self._differences, self._magnitudes)

    def _add_difference(self, name: str, kind: Kind, value: Tensor) -> None:
        ours, rule = self._names.find(name, kind)
        swap = rule is not None and rule.swap_halves
        self._check_rows(name, tuple(value.shape), len(ours), swap)
        for key, part in zip(ours, cut_rows(value, len(ours), swap), strict=True):
            if key in self._differences:
                raise self._twice(key)
            self._differences[key] = part

    def _add_layer(self, name: str, found: Mapping[str, Tensor]) -> None:
        layer = self._layer(name, found)
        ours, rule = self._names.find(name, "weight")
        swap = rule is not None and rule.swap_halves
        if not all(key.endswith(".weight") for key in ours):
            raise CheckpointError(
                f"{str(self._file)!r} has a {self._kind(found)} for {name!r}, which is a table and "
                "not a layer; the file is damaged, or for another model"
            )
        self._check_rows(name, self._shape(name, layer), len(ours), swap)
        pieces: list[Layer] = [layer]
        if isinstance(layer, LoRALayer) and layer.mid is None:
            ups = cut_rows(layer.up, len(ours), swap)
            pieces = [LoRALayer(layer.down, up, layer.scale) for up in ups]
        elif len(ours) > 1 or swap:
            pieces = [RowsOf(layer, part, len(ours), swap) for part in range(len(ours))]
        magnitudes = self._cut_magnitude(name, layer, found.get("magnitude"), len(ours), swap)
        for key, piece, magnitude in zip(ours, pieces, magnitudes, strict=True):
            module = key.removesuffix(".weight")
            if module in self._layers:
                raise self._twice(key)
            self._layers[module] = piece
            if magnitude is not None:
                self._magnitudes[module] = magnitude
        if "up_bias" in found:
            self._add_difference(name, "bias", found["up_bias"].float() * layer.scale)

    def _check_rows(
        self, name: str, shape: tuple[int, ...], pieces: int, swap_halves: bool
    ) -> None:
        """Raise CheckpointError if a shape cannot be split like a fused projection."""
        if (pieces > 1 or swap_halves) and (not shape or shape[0] % (2 if swap_halves else pieces)):
            raise CheckpointError(
                f"{str(self._file)!r} does not fit the model: {name!r} has the shape {shape}, "
                f"whose first dimension does not split into {pieces} equal parts; use a file for "
                "this size of the model"
            )

    def _layer(self, name: str, found: Mapping[str, Tensor]) -> Layer:
        """Return the adapter with these parts. Raises CheckpointError if some are missing."""
        kinds = found.keys() - {"weight", "bias", "modulation", "alpha", "magnitude", "up_bias"}
        alpha = found.get("alpha")
        if alpha is not None and (alpha.numel() != 1):
            raise CheckpointError(
                f"{str(self._file)!r}: alpha of {name!r} must be one number, got the shape "
                f"{tuple(alpha.shape)}; download it again"
            )

        for kind in sorted(kinds):
            if found[kind].ndim < 2 or not found[kind].numel():
                raise CheckpointError(
                    f"{str(self._file)!r}: {kind} of {name!r} has the shape "
                    f"{tuple(found[kind].shape)}, expected a matrix; download it again"
                )

        def scale(factor: Tensor | None) -> float:
            """Return the scale for the rank of a factor, which is its first dimension."""
            (*_, bare) = bare_names(name)
            rank = None if factor is None else factor.shape[0]
            return self._scale(bare, rank, alpha)

        def factors(part: str) -> tuple[Tensor, ...] | None:
            """Return a matrix, or the two whose product it is."""
            if f"{part}_a" in found and f"{part}_b" in found:
                return found[f"{part}_a"], found[f"{part}_b"]
            return (found[part],) if part in found else None

        if {"down", "up"} <= kinds <= {"down", "up", "mid"}:
            down = found["down"]
            return LoRALayer(down, found["up"], scale(down), found.get("mid"))
        if all(kind.startswith("hada_") for kind in kinds):
            cores = [found[core] for core in ("hada_t1", "hada_t2") if core in found]
            if found.keys() >= _LOHA and len(cores) in (0, 2):
                a1, b1, a2, b2 = (found[part] for part in sorted(_LOHA))
                both = (cores[0], cores[1]) if cores else None
                return LoHaLayer(a1, b1, a2, b2, scale(b1), both)
        if all(kind.startswith("lokr_") for kind in kinds):
            first, second = factors("lokr_w1"), factors("lokr_w2")
            core = found.get("lokr_t2")
            if first is not None and second is not None and (core is None or len(second) == 2):
                product = next((pair for pair in (second, first) if len(pair) == 2), None)
                inner = None if product is None else product[1]
                return LoKrLayer(first, second, scale(inner), core)
        raise self._incomplete(name, found)

    def _cut_magnitude(
        self, name: str, layer: Layer, value: Tensor | None, pieces: int, swap: bool
    ) -> tuple[Tensor | None, ...]:
        """Return DoRA's norms for each of our weights."""
        if value is None:
            return (None,) * pieces
        shape = self._shape(name, layer)
        magnitude = magnitude_of(value, shape[0], shape[1])
        if magnitude is None or (magnitude.shape[0] == 1 and pieces > 1):
            raise CheckpointError(
                f"{str(self._file)!r}: the DoRA norms of {name!r} are {tuple(value.shape)}, "
                f"expected ({shape[0]}, 1)"
                + (f" or (1, {shape[1]})" if pieces == 1 else " because it is split along its rows")
            )
        return cut_rows(magnitude, pieces, swap) if magnitude.shape[0] > 1 else (magnitude,)

    def _shape(self, name: str, layer: Layer) -> tuple[int, ...]:
        try:
            return delta_shape(layer)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{str(self._file)!r}: the factors of {name!r} do not fit each other "
                f"({str(error).splitlines()[0]}); download it again"
            ) from error

    def _incomplete(self, name: str, found: Mapping[str, Tensor]) -> CheckpointError:
        return CheckpointError(
            f"{str(self._file)!r} is incomplete: {name!r} has only {listed(sorted(found))} of a "
            f"{self._kind(found)}; download the file again"
        )

    def _kind(self, found: Mapping[str, Tensor]) -> str:
        kinds = (kind for start, kind in _KINDS if any(part.startswith(start) for part in found))
        return next(kinds, "LoRA")

    def _twice(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{str(self._file)!r} changes {key!r} twice, under two names; save only one of them"
        )


_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_KINDS = (("lokr_", "LoKr"), ("hada_", "LoHa"), ("magnitude", "DoRA"))


def _check_shapes(file: Path, lora: LoRA, model: nn.Module) -> None:
    wrong = []
    for name, layer in lora.layers.items():
        expected = tuple(model.get_parameter(f"{name}.weight").shape)
        problem = _misfit(layer, expected)
        if problem is not None:
            wrong.append(f"{name} is for {problem}, but the model has {expected}")
    for name, difference in lora.differences.items():
        expected = tuple(model.get_parameter(name).shape)
        if tuple(difference.shape) != expected:
            wrong.append(f"{name} is {tuple(difference.shape)}, but the model has {expected}")
    if wrong:
        raise CheckpointError(
            f"{str(file)!r} does not fit the model: {listed(wrong)}; it is a LoRA for another size "
            "of this family"
        )


def _misfit(layer: Layer, expected: tuple[int, ...]) -> str | None:
    """Return the shape of a layer's change if it does not fit `expected`. Kernels may be flat."""
    shape = delta_shape(layer)
    if shape[0] == expected[0] and math.prod(shape) == math.prod(expected):
        return None
    return f"{shape}"
