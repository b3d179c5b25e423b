"""One-line descriptions of networks, for reprs and lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def described_weights(module: nn.Module) -> str:
    """Describe a module's parameters, like "5.8 M parameters, float32 on cpu"."""
    parameters = list(module.parameters())
    if not parameters:
        return "no parameters"
    first = parameters[0]
    number = count_words(sum(parameter.numel() for parameter in parameters))
    return f"{number} parameters, {str(first.dtype).removeprefix('torch.')} on {first.device}"


def count_words(parameters: int) -> str:
    """Format a number of parameters, like "5.8 M" or "8.16 B"."""
    small = parameters < 10**8
    return f"{parameters / 1e6:.1f} M" if small else f"{parameters / 1e9:.2f} B"
