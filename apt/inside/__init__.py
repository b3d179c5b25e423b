"""Looks inside a model, as the paper's appendices G and I take them: layer by layer, and between
noises."""

from __future__ import annotations

from apt.inside.probe import LayerProbe, ProbeResult, probe_layers
from apt.inside.traverse import Traversal, great_circle, traverse

__all__ = [
    "LayerProbe",
    "ProbeResult",
    "Traversal",
    "great_circle",
    "probe_layers",
    "traverse",
]
