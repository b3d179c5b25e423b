"""Look inside a model, as in Appendices G and I of the paper: layer by layer, and along a path
between two noises."""

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
